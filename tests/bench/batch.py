"""What does a batch save? `numoe run --batch` on short prompts, many at once and one by one.

    python tests/bench/batch.py MODEL [--prompts 64] [--tokens 24] [--rounds 3] [--parallel N]

The two are whole commands, run in turn; what loading takes is taken off both. The ratio is that of the medians. Both
are asked greedily, so that their texts can be compared.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

SUBJECTS = ("the ocean", "a mountain", "an old river", "the moon", "a small bird", "bread", "winter", "a lighthouse")
WISHES = ("Tell me something about {}.", "Who would like {}, and why?", "Write a line on {}.", "Describe {}.")


def prompts(count: int) -> list[str]:
    """So many short prompts, which differ."""
    made = [wish.format(subject) for wish in WISHES for subject in SUBJECTS]
    return [f"{made[i % len(made)]} Number {i // len(made) + 1}." for i in range(count)]


def answered(model: str, folder: Path, options: list[str]) -> tuple[float, list[str]]:
    """Seconds that a command takes, and the texts that it gives."""
    command = [sys.executable, "-m", "numoe.cli", "run", model, "--batch", "batch.jsonl", "--temp", "0", "-q", *options]
    begun = time.perf_counter()
    out = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    return time.perf_counter() - begun, [json.loads(line)["text"] for line in out.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a folder, a file or a name")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parallel", type=int, help="default: what the command chooses")
    arguments = parser.parse_args()
    model = str(Path(arguments.model).resolve()) if Path(arguments.model).exists() else arguments.model
    asked = prompts(arguments.prompts)
    many = [] if arguments.parallel is None else ["--parallel", str(arguments.parallel)]
    size = ["-n", str(arguments.tokens), "--ctx", "256"]
    loading: list[float] = []
    spent: dict[str, list[float]] = {"together": [], "one by one": []}
    equal = 0
    with TemporaryDirectory() as name:
        folder = Path(name)
        for round_ in range(-1, arguments.rounds):  # the first one warms the file's pages
            (folder / "batch.jsonl").write_text(json.dumps({"prompt": asked[0]}))
            loading.append(answered(model, folder, ["-n", "1", "--ctx", "256"])[0])
            (folder / "batch.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
            together, texts = answered(model, folder, size + many)
            if round_ >= 0:
                alone, same = answered(model, folder, [*size, "--parallel", "1"])
                spent["together"].append(together)
                spent["one by one"].append(alone)
                equal = sum(a == b for a, b in zip(texts, same, strict=True))
    load = min(loading)
    took = {name: median(seconds) - load for name, seconds in spent.items()}
    for name, seconds in took.items():
        print(f"{name:12}  {seconds:6.1f} s")
    print(f"ratio         {took['one by one'] / took['together']:6.2f}; {equal} of {len(asked)} texts equal")


if __name__ == "__main__":
    main()
