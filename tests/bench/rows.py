"""What int8 rows cost: KL divergence from float32 rows, and the time of a token behind a long context.

    python tests/bench/rows.py [--smollm2 FILE] [--kv int8] [--only smollm2 | tiny | needles | speed]

SmolLM2 reads 20 texts of 1,024 tokens that it has sampled itself, `tiny` 20,480 tokens held out from training. A
needle is a story behind 8,000 tokens of others; after some more `tiny` is asked for a name in it, and float32 and int8
rows are to give the same answer (often a wrong one, for it was made for 4,096 tokens). Speed is that of SmolLM2 behind
32,768 tokens, which are noise, of either in turn.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from contexts import fill

from numoe.engine import Model, describe, load
from numoe.engine.layers.rows import row_form
from numoe.engine.measure.perplexity import perplexity

TESTS = Path(__file__).parents[1]
SMOLLM2 = Path("SmolLM2-135M-Instruct.Q4_1.gguf")
HELD_OUT = TESTS / "golden" / "tiny_held_out.txt"
TEXTS, LENGTH = 20, 1024
CONTEXT, AWAY = 8192, (0, 30, 60, 120)
BEHIND, PAIRS = 32768, 15


def sampled(model: Model) -> list[list[int]]:
    """Texts that a model samples side by side, at temperature 1 and without an end."""
    random, decoder = np.random.default_rng(0), model.decoder
    caches = [decoder.cache(LENGTH) for _ in range(TEXTS)]
    ids = np.full((TEXTS, LENGTH), model.tokenizer.bos_id or 0)
    for position in range(LENGTH - 1):
        logits = decoder.forward_all(list(zip(ids[:, position : position + 1], caches, strict=True)))
        ids[:, position + 1] = (logits + random.gumbel(size=logits.shape)).argmax(axis=1)
        print(f"\rsampling {position + 1}/{LENGTH}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    texts: list[list[int]] = ids.tolist()
    return texts


def divergence(name: str, made: Model, exact: Model, texts: Sequence[Sequence[int]]) -> None:
    results = [perplexity(made, text, window=len(text), against=exact) for text in texts]
    tokens = [result.tokens for result in results]
    kl = np.average([result.kl_mean or 0 for result in results], weights=tokens)
    top1 = np.average([result.top1_agreement or 0 for result in results], weights=tokens)
    print(f"{name}: KL {kl:.2e} over {sum(tokens):,} tokens, the same best token {top1:.2%}", flush=True)


def needles(kv: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny"
        shutil.copytree(describe("tiny").path, path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2 * CONTEXT}))
        exact, made = load(path, ctx=CONTEXT + 600), load(path, ctx=CONTEXT + 600, kv=kv)
        tokenizer, text = exact.tokenizer, HELD_OUT.read_text(encoding="utf-8")
        ids = tokenizer.encode(text)
        hay, between = ids[: CONTEXT - 200], ids[CONTEXT:]
        divergence(f"tiny, {CONTEXT:,} tokens", made, exact, [ids[:CONTEXT]])
        sessions = [model.session(CONTEXT + 600) for model in (exact, made)]
        for session in sessions:
            session.feed(hay, last=True)
        points = [session.snapshot() for session in sessions]
        same, right = Counter[int](), Counter[int]()
        for tale, question, answer in tales(text):
            for away in AWAY:
                asked = [*tokenizer.encode(tale), *between[:away], *tokenizer.encode(question)]
                given = []
                for session, point in zip(sessions, points, strict=True):
                    session.restore(point)
                    given.append("".join(session.generate(asked, max_tokens=24)).strip())
                same[away] += given[0] == given[1]
                right[away] += given[0] == answer
        for away in AWAY:
            print(
                f"tiny, {CONTEXT:,} tokens, asked {away} after the story: {same[away]} of {len(tales(text))} answers "
                f"the same, of which {right[away]} are right",
                flush=True,
            )


def tales(text: str) -> list[tuple[str, str, str]]:
    """Stories of a text, the first question about each, and its answer."""
    found = []
    for chat in text.split("<｜begin▁of▁sentence｜>"):
        tale, *asked = chat.split("<｜User｜>What was the name of")
        if asked:
            question, _, answer = asked[0].partition("</think>")
            answer = answer.partition("<｜end▁of▁sentence｜>")[0]
            found.append((tale, f"<｜User｜>What was the name of{question}</think>", answer))
    return found


def speed(source: Path, kv: str) -> None:
    """A token behind so many, whose rows are held either way, in turn."""
    model = load(describe(source))
    caches: list[Any] = [model.decoder.cache(BEHIND + 2 * PAIRS, row_form(form)) for form in ("float32", kv)]
    for cache in caches:
        fill(cache, BEHIND)
    times: list[list[float]] = [[], []]
    for turn in range(PAIRS + 2):
        for which, cache in enumerate(caches):
            begun = time.perf_counter()
            model.decoder.forward(np.array([1]), cache, last=True)
            if turn > 1:
                times[which].append(time.perf_counter() - begun)
    exact, made = map(median, times)
    print(
        f"a token behind {BEHIND:,}: {1e3 * exact:.1f} ms with float32 rows, {1e3 * made:.1f} with {kv}: "
        f"{median(b / a for a, b in zip(*times, strict=True)):.2f} times",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, default=SMOLLM2)
    parser.add_argument("--kv", default="int8")
    parser.add_argument("--only", choices=("smollm2", "tiny", "needles", "speed"))
    options = parser.parse_args()

    def smollm2() -> None:
        exact = load(describe(options.smollm2))
        divergence("SmolLM2", load(describe(options.smollm2), kv=options.kv), exact, sampled(exact))

    def tiny() -> None:
        exact = load("tiny")
        ids = exact.tokenizer.encode(HELD_OUT.read_text(encoding="utf-8"))[: TEXTS * LENGTH]
        texts = [ids[a : a + LENGTH] for a in range(0, len(ids), LENGTH)]
        divergence("tiny", load("tiny", kv=options.kv), exact, texts)

    measures = {
        "smollm2": smollm2,
        "tiny": tiny,
        "needles": lambda: needles(options.kv),
        "speed": lambda: speed(options.smollm2, options.kv),
    }
    for name, measure in measures.items():
        if options.only in (None, name):
            measure()


if __name__ == "__main__":
    main()
