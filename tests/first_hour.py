"""The first hour of three users, as they see it: one chats, one writes scripts, one asks what fits into memory.

    python tests/first_hour.py          writes tests/golden/first_hour anew

What differs from run to run and from machine to machine, as speeds do, is fixed.
"""

import io
import json
import os
import shlex
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyte
import pytest
from helpers import released_v4_listing, reshard
from hub_server import Hub, virtual_release
from machines import a_machine, keep
from terminal import Terminal, end, styled

from numoe.cli.main import main
from numoe.quant.compute import threads

ROOT = Path(__file__).parent
GOLDEN = ROOT / "golden" / "first_hour"
_FIXED = """
from numoe.cli import output, reply
from numoe.cli.chat import kept, loop

reply.statistics = lambda generation, experts: f"{len(generation.tokens)} tokens, 100 tok/s, first after 0.1 s"
output.duration = lambda seconds: "2 s"
loop._memory = lambda: "16GB"
kept.Kept.age = "now"
"""
_ANSWERS = [
    "A sheep says **baa**.",
    "They want a table.</think>\n| animal | legs |\n|---|---|\n| sheep | 4 |\n| `duck` | 2 |\n\n```python\n"
    "for n in range(2):\n    print(n)\n```\n\nSo \\(a_1 + b_1\\) it is.",
    "```python\ndef f():\n    return 1\n",
    "    # that is all\n```\n\nDone.",
    "Paths begin with it.",
]
_ASKED = [
    ("What sound does a sheep make?", ""),
    ("/think on", r"asked for\.\n>$"),
    ("Legs?", ""),
    ("/think off", r"asked for\.\n>$"),
    ("/set max_tokens 20", r"20\.\n>$"),
    ("Write code.", ""),
    ("/more", ""),
    ("/set max-tokens none", r"none\.\n>$"),
    ("/set temp=0.5", r"0\.5\.\n>$"),
    ("/set top_p 3", r"error[\s\S]*\n>$"),
    ("/set ctx 99999", r"error[\s\S]*\n>$"),
    ("/dance", r"error[\s\S]*\n>$"),
    ("//usr?", ""),
    ("/rename sheep", r"is kept as[\s\S]*\n>$"),
    ("/list", r"now\n>$"),
    ("/load nobody", r"error[\s\S]*\n>$"),
]
_RUN = """
numoe
numoe run tiny "What sound does a sheep make?"
numoe run tiny "What sound does a sheep make?" --choices moo,baa -q
echo "Tim has 12 apples and gives 5 to Rosa." | numoe run tiny "How many apples does Tim have now?" -q
numoe run "What colour is a frog?"
numoe config set model tiny
numoe run "What colour is a frog?"
numoe alias small=tiny
numoe template sound="What sound does a {input} make?"
numoe run -q small -t sound cow
numoe run -q "My name is Mia."
numoe run -q -c "What is my name?"
numoe run -q tiny "Tell me a story about a fox and a lamp." -n 8
numoe run tiny --temp hot x
numoe run tiny --tmp 1 x
numoe run tiny --ram 16 x
numoe run tiny What is it
numoe run acme/large x
numoe rnu
numoe chat --list
numoe list
numoe verify tiny
numoe show tiny
"""
_FITTED = """
numoe search acme --ram 1GB
numoe fit deepseek-ai/DeepSeek-V4-Flash --ram 24GB
numoe fit deepseek-ai/DeepSeek-V4-Flash --ram 24GB --ctx 1M
numoe fit deepseek-ai/DeepSeek-V4-Flash --ram 8GB
numoe fit deepseek-ai/DeepSeek-V4-Flash --ram 24
numoe fit deepseek-ai/DeepSeek-V4-Flsh
numoe fit acme/small --ram 1GB --chart
numoe run acme/small "What colour is a frog?"
numoe pull acme/small --quant int3
numoe pull acme/small --quant int4
numoe pull acme/small --quant int4
numoe list
numoe show acme/small
numoe verify acme/small
numoe run small "What colour is a frog?" --ram 100MB
numoe run small "What colour is a frog?" --ram 1MB
numoe fit small --ram 1GB
numoe rm small -y
"""
_FOUND = [
    {"id": "acme/small", "config": {"model_type": "deepseek_v4"}, "safetensors": {"parameters": {"BF16": 3 * 10**6}}},
    {"id": "acme/middle", "config": {"model_type": "qwen3"}, "safetensors": {"parameters": {"BF16": 4 * 10**9}}},
    {"id": "acme/large-GGUF", "gguf": {"total": 10**12, "architecture": "qwen3moe"}},
    {"id": "acme/odd", "config": {"model_type": "gpt9"}},
]
"""What the hub lists of a search."""
_GB = 10**9


def chatting(home: Path, columns: int, **env: str) -> str:
    """What stands on the screen of the one who chats, after every line that is typed."""
    terminal = Terminal(home, "tiny", answers=list(_ANSWERS), columns=columns, before=_FIXED, **env)
    try:
        screens = [terminal.styled]
        for line, until in _ASKED:
            terminal.ask(line, *([until] if until else []))
            screens.append(terminal.styled)
        left = terminal.send("/bye\r").left()
    finally:
        end(terminal.process)
    text = "\n".join(f"{screen}\n{'-' * columns}" for screen in screens) + f"\nleft with {left}\n"
    return text.replace(str(home), "~")


def scripting(home: Path, columns: int) -> str:
    """What the one who writes scripts gets of each command: both streams, and the exit code."""
    with _machine(home, columns) as patch:
        told = "".join(f"$ {line}\n{_told(line, patch, _Pipe())}" for line in _RUN.strip().splitlines())
        return told.replace(os.environ["NUMOE_HOME"], "~")


def fitting(home: Path, columns: int, **env: str) -> str:
    """What the one who asks what fits sees of each command, and the exit code."""
    with _machine(home, columns, env) as patch, Hub() as hub:
        flash = "deepseek-ai/DeepSeek-V4-Flash"
        config = json.loads((ROOT / "configs" / f"{flash.replace('/', '__')}.json").read_text())
        hub.add(flash, virtual_release(config, released_v4_listing(config), 46))
        master = ROOT / "reference" / "tiny" / "master"
        folder = reshard(master, home / "small", 3)
        for file in master.glob("tokenizer*"):
            (folder / file.name).write_bytes(file.read_bytes())
        hub.add("acme/small", folder)
        hub.answer("/api/models", json.dumps(_FOUND).encode(), times=9)
        patch.setenv("HF_ENDPOINT", hub.url)
        shown = []
        for line in _FITTED.strip().splitlines():
            screen = pyte.Screen(columns, 120)
            screen.set_mode(pyte.modes.LNM)  # as a terminal does it for programs
            code = _told(line, patch, _Tty(screen))
            shown.append(f"$ {line}\n{styled(screen)}\n{code}")
        return "".join(shown).replace(os.environ["NUMOE_HOME"], "~").replace(hub.url, "http://hub")


CASES = {
    "chatting_80": lambda home: chatting(home, 80, COLORFGBG="15;0"),
    "chatting_80_light": lambda home: chatting(home, 80, COLORFGBG="0;15"),
    "chatting_80_no_color": lambda home: chatting(home, 80, NO_COLOR="1"),
    "chatting_40": lambda home: chatting(home, 40, NUMOE_THEME="dark"),
    "chatting_40_light": lambda home: chatting(home, 40, NUMOE_THEME="light"),
    "chatting_40_no_color": lambda home: chatting(home, 40, NO_COLOR="1"),
    "scripting_80": lambda home: scripting(home, 80),
    "scripting_40": lambda home: scripting(home, 40),
    "fitting_80": lambda home: fitting(home, 80),
    "fitting_80_no_color": lambda home: fitting(home, 80, NO_COLOR="1"),
    "fitting_40": lambda home: fitting(home, 40),
    "fitting_40_no_color": lambda home: fitting(home, 40, NO_COLOR="1"),
}
"""Pipes have no colours; what `fit` draws has those of the terminal, which fit its background."""


class _Pipe(io.StringIO):
    """Both streams of a command."""

    encoding = "utf-8"


class _Tty(_Pipe):
    """A terminal that shows what it is told on a screen."""

    def __init__(self, screen: pyte.Screen) -> None:
        super().__init__()
        self._stream = pyte.Stream(screen)

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._stream.feed(text)
        return len(text)


def _statistics(generation: Any, experts: object) -> str:
    return f"{len(generation.tokens)} tokens, 100 tok/s, first after 0.1 s"


@contextmanager
def _machine(home: Path, columns: int, env: Mapping[str, str] = {}) -> Iterator[pytest.MonkeyPatch]:
    """A machine of two cores, 25 GB of memory and 2 TB of free disk, on which nothing was done yet."""
    before, handler = threads.in_use(), signal.getsignal(signal.SIGTERM)
    # A name of fixed length, for lines are folded.
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="", dir="/tmp") as kept:
        for name, value in {"NUMOE_HOME": kept, "COLUMNS": str(columns), **env}.items():
            patch.setenv(name, value)
        patch.setattr(threads, "usable_cores", lambda: 2)
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=4000 * _GB, used=0, free=2000 * _GB))
        patch.setattr("numoe.engine.budget.machine_memory", lambda: (25 * _GB, None))
        patch.setattr("numoe.cli.asking.statistics", _statistics)
        patch.setattr("numoe.engine.measure.busy.taken_by_others", lambda *samples: 0.0)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "cache"))
        keep(replace(a_machine(), read_bytes_per_s={str(1 << power): 1e9 for power in range(12, 25)}))
        yield patch
    threads.use(before)
    signal.signal(signal.SIGTERM, handler)


def _told(line: str, patch: pytest.MonkeyPatch, stream: _Pipe) -> str:
    """Have a command write to a stream, and return what stands there, with the exit code if there is one."""
    said, _, line = line.rpartition(" | ")
    patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(" ".join(shlex.split(said)[1:]).encode())))
    patch.setattr("sys.stdout", stream)
    patch.setattr("sys.stderr", stream)
    with pytest.raises(SystemExit) as left:
        main(shlex.split(line)[1:])
    return stream.getvalue() + (f"[{left.value.code}]\n" if left.value.code else "")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, told in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            (GOLDEN / f"{name}.txt").write_text(told(Path(folder)), encoding="utf-8")
