"""What does it cost to constrain an answer? Time a token with a JSON schema against time a token without.

    python tests/bench/constrain.py MODEL [--tokens 64] [--rounds 7] [--threads N]

The two are made in turn, token by token, so that whatever else the machine does slows both; the ratio is that of the
medians. Making the grammar and the tables of the vocabulary is told apart: it happens once.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from numoe.engine import load
from numoe.engine.text.grammar import Matcher, json_grammar

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "likes": {"type": "array"}},
    "required": ["name", "age", "likes"],
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 1000}
PROMPT = "Here is a long list of people with their names, ages and what they like.\n\n"


def timed(pieces: Iterator[str]) -> float:
    """Seconds until the next piece, which is a token for nearly all of them."""
    begun = time.perf_counter()
    next(pieces, "")
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    model = load(arguments.model, threads=arguments.threads)
    grammar = json_grammar(SCHEMA)
    starts = []
    for _ in range(2):
        begun = time.perf_counter()
        Matcher(grammar, model.tokenizer, model.spec.vocab)
        starts.append(time.perf_counter() - begun)
    free, constrained = [], []
    for seed in range(arguments.rounds):
        answers = [
            model.session(1024).generate(PROMPT, grammar=form, temperature=0.7, seed=seed) for form in (None, grammar)
        ]
        for answer in answers:
            next(answer)
        while len(answers[0].tokens) < arguments.tokens and not any(answer.finish_reason for answer in answers):
            free.append(timed(answers[0]))
            constrained.append(timed(answers[1]))
    print(f"start        {starts[0] * 1e3:.0f} ms the first time, {starts[1] * 1e3:.1f} ms after that")
    print(f"free         {median(free) * 1e3:.2f} ms a token")
    print(f"constrained  {median(constrained) * 1e3:.2f} ms a token")
    print(f"ratio        {median(constrained) / median(free):.3f}")


if __name__ == "__main__":
    main()
