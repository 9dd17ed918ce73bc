"""The transcripts of the READMEs: blocks of `console`, whose commands are run on a terminal.

    python tests/reference/transcripts.py [README ...]     run all, or those, and write what they say into them

A line that begins with "$ " is a command, one that begins with "> " is typed into it. They run where nothing was pulled
yet, on the figures below, which two idle cores of an AMD EPYC (Zen 4) were measured at, and against a hub on loopback
that has DeepSeek-V4-Flash and SmolLM2 at full size. `tests/test_transcripts.py` compares what is said, figures aside.
"""

import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import pexpect
import pyte

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import Listing, released_v4_listing
from hub_server import Content, Hub, virtual_release
from machines import idle_epyc

ROOT = Path(__file__).parents[2]
READMES = {ROOT / "README.md": 80, ROOT / "tests" / "README.md": 800}
"""And how wide the terminal is."""
_LINES = 250
# As on a disk with room, whatever this one has, and with no neighbours.
_NUMOE = """#!{python}
import collections, shutil
usage = collections.namedtuple("usage", "total used free")(4 * 10**12, 2 * 10**12, 2 * 10**12)
shutil.disk_usage = lambda path: usage
from numoe.cli.main import main
from numoe.engine.measure import busy
busy.taken_by_others = lambda *samples: 0.0
main()
"""


@contextmanager
def surroundings() -> Iterator[dict[str, str]]:
    """The environment in which the commands run; its home is as long as /home/you, for lines are folded."""
    home = Path("/tmp") / secrets.token_hex(2)
    home.mkdir(mode=0o700)
    try:
        (home / "bin").mkdir()
        (home / "bin" / "numoe").write_text(_NUMOE.format(python=f"{sys.executable} -P"))
        (home / "bin" / "numoe").chmod(0o755)
        kept = home / ".local" / "share" / "numoe"
        kept.mkdir(parents=True)
        (kept / "machine.json").write_text(json.dumps(asdict(idle_epyc())))
        with Hub() as hub:
            name = "deepseek-ai/DeepSeek-V4-Flash"
            config = json.loads((ROOT / "tests" / "configs" / f"{name.replace('/', '__')}.json").read_text())
            hub.add(name, virtual_release(config, released_v4_listing(config), 46))
            hub.add("HuggingFaceTB/SmolLM2-135M-Instruct", _smollm2())
            environment = {
                key: text for key, text in os.environ.items() if not key.startswith(("NUMOE_", "HF_", "XDG"))
            }
            environment.pop("COLUMNS", None)
            yield environment | {
                "HOME": str(home), "HF_ENDPOINT": hub.url, "PATH": f"{home / 'bin'}:{environment['PATH']}",
                "TERM": "xterm", "NO_COLOR": "1", "PROMPT_TOOLKIT_NO_CPR": "1", "LC_ALL": "C.UTF-8",
            }  # fmt: skip
    finally:
        shutil.rmtree(home)


def _smollm2() -> dict[str, bytes | Content]:
    """HuggingFaceTB/SmolLM2-135M-Instruct as far as `pull` can tell, its weights zeros, whose hash is the file's."""
    hidden, width, kv, vocab, layers = 576, 1536, 192, 49152, 30
    config = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": width,
        "num_hidden_layers": layers, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
        "rope_theta": 100000, "max_position_embeddings": 8192, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "eos_token_id": 2,
    }  # fmt: skip
    shapes = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    shapes |= {
        f"self_attn.{one}_proj": (rows, hidden) for one, rows in zip("qkvo", (hidden, kv, kv, hidden), strict=True)
    }
    shapes |= {"mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width)}
    listing: Listing = {
        "model.embed_tokens.weight": ("BF16", (vocab, hidden)),
        "model.norm.weight": ("BF16", (hidden,)),
    }
    for layer in range(layers):
        listing |= {f"model.layers.{layer}.{name}.weight": ("BF16", shape) for name, shape in shapes.items()}
    files = virtual_release(config, listing, 1)
    name, weights = next((name, one) for name, one in files.items() if isinstance(one, Content))
    digest = sha256(weights.head)
    for _ in range(weights.size - len(weights.head) >> 20):
        digest.update(bytes(1 << 20))
    digest.update(bytes((weights.size - len(weights.head)) % (1 << 20)))
    tokenizer = {one.name: one.read_bytes() for one in (ROOT / "engine" / "tiny").glob("tokenizer*")}
    return files | tokenizer | {name: replace(weights, sha256=digest.hexdigest())}


def blocks(text: str) -> list[re.Match[str]]:
    """The blocks of transcripts in a README; group 1 is what is between the fences."""
    return list(re.finditer(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def made(block: str, environment: dict[str, str], columns: int) -> str:
    """A transcript anew, of the commands and the typed lines of an old one."""
    commands: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            commands.append((line[2:], []))
        elif line.startswith("> "):
            commands[-1][1].append(line[2:])
    return "".join(f"$ {command}\n{_run(command, typed, environment, columns)}" for command, typed in commands)


def _run(command: str, typed: list[str], environment: dict[str, str], columns: int) -> str:
    """What the screen shows of a command when it has ended."""
    process = pexpect.spawn(
        "bash", ["-c", command], env=environment, cwd=environment["HOME"], dimensions=(_LINES, columns),
        encoding="utf-8", timeout=120,
    )  # fmt: skip
    screen = pyte.Screen(columns, _LINES)
    stream, typed = pyte.Stream(screen), list(typed)
    while True:
        try:
            stream.feed(process.read_nonblocking(65536))
        except pexpect.EOF:
            break
        shown = _shown(screen)
        if typed and shown and shown[-1] == ">":
            process.send(f"{typed.pop(0)}\r")
    process.wait()
    lines = [line.replace(environment["HOME"], "/home/you") for line in _shown(screen)]
    return "".join(f"{line}\n" for line in lines)


def _shown(screen: pyte.Screen) -> list[str]:
    return "\n".join(line.rstrip() for line in screen.display).rstrip().split("\n")


def alike(transcript: str) -> str:
    """What does not differ from machine to machine and day to day: no figures, and how lines are folded by them."""
    text = re.sub(r"[\d][\d.,]*( ?[kMGT]?B\b)?", "#", transcript)
    return " ".join(re.sub(r"[█▓▒░▚·]+", "█", text).split())


def main() -> None:
    with surroundings() as environment:
        chosen = [Path(name).resolve() for name in sys.argv[1:]]
        for readme, columns in READMES.items():
            if chosen and readme not in chosen:
                continue
            text = readme.read_text(encoding="utf-8")
            told = [(found, made(found[1], environment, columns)) for found in blocks(text)]
            for found, transcript in reversed(told):
                text = f"{text[: found.start(1)]}{transcript}{text[found.end(1) :]}"
            readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
