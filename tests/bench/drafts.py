"""What guessing ahead gains: the same answers with and without it, in turn, on work that copies and on free text.

    python tests/bench/drafts.py MODEL [--tokens 200] [--rounds 3] [--draft MODEL2]

Prints for each prompt: tokens a second without and with, their ratio, the share of guesses that came, and whether the
greedy texts are the same.
"""

import argparse
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
    f"Repeat the following text word for word:\n\n{STORY}",
    f"Quote every sentence of this text, then summarize it with its own words:\n\n{STORY}",
)
FREE = (
    "Write a short story about a lighthouse keeper.",
    "Explain why the sky is blue.",
    "What should one think of before buying a bicycle?",
)


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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draft")
    parser.add_argument("--kv", default="int8")
    options = parser.parse_args()
    model = load(options.model, kv=options.kv)
    drafter = drafting(model, load(options.draft) if options.draft else None)
    for kind, prompts in (("copying", COPYING), ("free", FREE)):
        ratios = []
        for prompt in prompts:
            runs = [
                (answer(model, prompt, options.tokens, None), answer(model, prompt, options.tokens, drafter))
                for _ in range(options.rounds)
            ]
            plain, drafted = (median(run[side][1] for run in runs) for side in (0, 1))
            ratios.append(median(run[1][1] / run[0][1] for run in runs))
            same = all(run[0][0] == run[1][0] for run in runs)
            print(
                f"{kind}: {plain:.1f} tok/s without, {drafted:.1f} with, {ratios[-1]:.2f} times, "
                f"{runs[-1][1][2]:.0%} of guesses came, {'the same text' if same else 'ANOTHER TEXT'}: {prompt[:40]!r}",
                flush=True,
            )
        print(f"{kind}: {median(ratios):.2f} times")


if __name__ == "__main__":
    main()
