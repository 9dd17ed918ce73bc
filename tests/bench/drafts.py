"""What guessing ahead gains: the same answers with and without it, in turn, on work that copies and on free text.

    python tests/bench/drafts.py MODEL [--tokens 200] [--rounds 3] [--draft MODEL2] [--same 200]

Prints for each prompt: tokens a second without and with, their ratio, the share of guesses that came, and whether the
greedy texts are the same. `tiny` is asked for stories, other models to copy and to write freely. With --same, only of
how many prompts the greedy texts are the same.
"""

import argparse
from collections.abc import Sequence
from itertools import product
from statistics import median

from numoe.engine import Model, load
from numoe.engine.chat.prompt import encode
from numoe.engine.drafting import drafting
from numoe.engine.speculation import Drafter

CODE = """class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance
        self.history = []

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount
        self.history.append(("deposit", amount))

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("not enough money")
        self.balance -= amount
        self.history.append(("withdraw", amount))
"""
STORY = (
    "The river Aller rises near the village of Seehausen and flows for two hundred kilometres through flat country "
    "before it meets the Weser at Verden. Barges carried grain and salt on it until the railway came in 1847. Today "
    "it is known for storks, for its wide meadows that are flooded each winter, and for a footpath along the bank."
)
COPYING = (
    f"Repeat this code exactly, with the method withdraw renamed to take:\n\n{CODE}",
    f"Here is a Python class:\n\n{CODE}\n\nAdd a docstring to every method and print the whole class.",
    f"Rewrite this code with type annotations:\n\n{CODE}",
    f"Quote every sentence of this text, then summarize it with its own words:\n\n{STORY}",
    f"Summarize this text in three sentences:\n\n{STORY}",
    f"Extract all facts with years and numbers from the text, quoting the sentences:\n\n{STORY}",
    f"Fix the spelling errors in this text and give the whole text back:\n\n{STORY}",
)
FREE = (
    "Write a short story about a lighthouse keeper.",
    "Explain why the sky is blue.",
    "What should one think of before buying a bicycle?",
)
STORIES = tuple(
    f"Tell me a story about a {animal} and a {thing}."
    for animal, thing in zip(
        ("fox", "dog", "cow", "hen", "wolf", "bear", "mouse", "owl"),
        ("lamp", "kite", "boat", "key", "bell", "hat", "drum", "book"),
        strict=True,
    )
)
ASKED = tuple(
    how.format(what)
    for how, what in product(
        ("Tell me a story about a {}.", "What is a {}?", "What do you do with a {}?", "Write about a {}, then again.",
         "Who has a {}?", "A {} or a horse: which one is bigger?", "What colour is a {}?", "Say {} ten times.",
         "Tom has a {}. Mia has a red ball. What does Tom have?", "How do you say more than one {}?"),
        ("fox", "lamp", "kite", "boat", "key", "bell", "hat", "drum", "book", "cup", "cow", "hen", "wolf", "bear",
         "mouse", "owl", "frog", "bridge", "garden", "table"),
    )
)  # fmt: skip
"""200 prompts."""


def answer(model: Model, prompt: str, tokens: int, drafter: Drafter | None) -> tuple[list[int], float, float]:
    """Token ids, tokens a second, and the share of guesses that came."""
    ids, _ = encode(
        model.description.chat_format, model.tokenizer, [{"role": "user", "content": prompt}], thinking=False
    )
    with model.session(len(ids) + tokens) as session:
        generation = session.generate(ids, max_tokens=tokens, drafter=drafter)
        for _ in generation:
            pass
    made = [token.id for token in generation.tokens]
    return made, (len(made) - 1) / generation.decode_seconds, generation.accepted / max(1, generation.proposed)


def compare(model: Model, drafter: Drafter, prompts: Sequence[str], tokens: int, rounds: int) -> float:
    """Print what each prompt gains; the median."""
    ratios = []
    for prompt in prompts:
        runs = [[answer(model, prompt, tokens, one) for one in (None, drafter)] for _ in range(rounds)]
        plain, drafted = (median(run[side][1] for run in runs) for side in (0, 1))
        ratios.append(median(run[1][1] / run[0][1] for run in runs))
        same = all(run[0][0] == run[1][0] for run in runs)
        print(
            f"  {plain:.1f} tok/s without, {drafted:.1f} with, {ratios[-1]:.2f} times, "
            f"{runs[-1][1][2]:.0%} of guesses came, {'the same text' if same else 'ANOTHER TEXT'}: {prompt[:40]!r}",
            flush=True,
        )
    return median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draft")
    parser.add_argument("--kv", default="float32")
    parser.add_argument("--same", type=int)
    options = parser.parse_args()
    model = load(options.model, kv=options.kv)
    drafter = drafting(model, load(options.draft) if options.draft else None)
    if drafter is None:
        raise SystemExit("nothing guesses for this model: its experts come from disk")
    if options.same is not None:
        same = 0
        for number, prompt in enumerate(ASKED[: options.same], 1):
            same += answer(model, prompt, options.tokens, None)[0] == answer(model, prompt, options.tokens, drafter)[0]
            print(f"\r{same} of {number} texts are the same", end="", flush=True)
        print()
        return
    kinds = {"stories": STORIES} if options.model == "tiny" else {"copying": COPYING, "free": FREE}
    for kind, prompts in kinds.items():
        print(f"{kind}: {compare(model, drafter, prompts, options.tokens, options.rounds):.2f} times", flush=True)


if __name__ == "__main__":
    main()
