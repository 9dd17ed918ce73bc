"""Chat templates, which are programs of strangers, in a process of their own: a file that imports nothing of ours.

Each line of standard input is a JSON object: "template", and "variables" or nothing where it is only to be compiled.
The answer is a line too: "text" or "error". What takes more than a second of computing ends the process by SIGPROF.
"""

import json
import sys
import warnings
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_SECONDS, _SECONDS_A_BYTE = 1.0, 1e-6
_MEMORY, _MEMORY_A_BYTE = 256 << 20, 64  # beside what the process has
_TEXT, _TEXT_A_BYTE = 1 << 20, 8


def main() -> None:
    """Answer the lines of standard input until it ends."""
    warnings.simplefilter("ignore")  # of the compiler, about the template's code
    limit = _limiter()
    for line in sys.stdin.buffer:
        limit(len(line))
        try:
            answer = _answer(json.loads(line), _TEXT + _TEXT_A_BYTE * len(line))
        except MemoryError:
            answer = {"error": "it takes too much memory"}
        except Exception as error:  # a template can fail in any way Python can
            answer = {"error": _reason(error)}
        limit(None)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _answer(asked: dict[str, Any], longest: int) -> dict[str, str]:
    template = _compiled(asked["template"])
    if asked["variables"] is None:
        return {"text": ""}
    text = template.render(asked["variables"])
    return {"text": text} if len(text) <= longest else {"error": "it writes far more text than it is given"}


def _limiter() -> Any:
    """A function that limits what a request of so many bytes may take; None: no longer."""
    try:
        import resource
        import signal
    except ImportError:  # Windows: whoever asked waits no longer than it likes
        return lambda nbytes: None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asked, and then standard input ends
    most = resource.getrlimit(resource.RLIMIT_AS)[1]

    def limit(nbytes: int | None) -> None:
        if nbytes is None:
            signal.setitimer(signal.ITIMER_PROF, 0)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            return
        if sys.platform == "linux":  # macOS does not keep to it
            taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
            room = taken + _MEMORY + _MEMORY_A_BYTE * nbytes
            room = room if most == resource.RLIM_INFINITY else min(room, most)
            resource.setrlimit(resource.RLIMIT_AS, (room, most))
        signal.setitimer(signal.ITIMER_PROF, _SECONDS + _SECONDS_A_BYTE * nbytes)

    return limit


@lru_cache(maxsize=4)
def _compiled(text: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    for toy in ("lipsum", "cycler"):
        del environment.globals[toy]
    return environment.from_string(text)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models saw it in training; Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _reason(error: Exception) -> str:
    """What an error says, in a line that can be printed; some say nothing, and some go on without end."""
    said = "".join(c if c.isprintable() else "?" for c in " ".join(str(error)[:200].split())).rstrip(".")
    said = said.replace("`", "'")  # which are around parameters of ours
    return said or type(error).__name__


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks what a model writes; a prompt needs only the text in it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


if __name__ == "__main__":
    main()
