"""Make golden/sentencepiece_{unigram,bpe}.model and their .json: small trained vocabularies and what they encode.

Run: pip install -e '.[reference]' && python tests/reference/make_sentencepiece.py

The unigram model has a small normalization table of its own, collapses spaces and knows an unknown piece; the BPE
model is laid out like Llama's: identity normalization, every space kept, byte fallback. Each .json holds
{"texts": [str], "ids": [[int]], "decoded": [str]} as the sentencepiece library gives them.
"""

import contextlib
import json
import shutil
import tempfile
from pathlib import Path

import sentencepiece

GOLDEN = Path(__file__).resolve().parent.parent / "golden"

CORPUS = """\
The quick brown fox jumps over the lazy dog while the other dogs are sleeping in the warm sun.
A mixture of experts sends every token to a few experts, and the router learns which ones to choose.
Experts that are not chosen cost nothing but the memory in which they wait to be chosen again.
In the beginning there was one tokenizer, and it split the text into tokens, and the tokens into numbers.
She sells sea shells on the sea shore; the shells she sells are sea shells, I am sure.
Der schnelle braune Fuchs springt über den faulen Hund, und die anderen Hunde schlafen in der Sonne.
Le renard brun saute par-dessus le chien paresseux pendant que les autres chiens dorment au soleil.
Numbers such as 1, 12, 123, 2024 and 3.14159 appear in text, as do e-mail addresses and (parentheses).
def forward(x, weights): return x @ weights.T  # the whole of a linear layer in one line of code
for expert in experts: if expert.chosen: output += expert.gate * expert.forward(hidden)
Привет мир, как дела? Привет снова, мир. 你好世界，你好吗？世界很大。
"""

TEXTS = [
    "",
    " ",
    "Hello world",
    "The quick brown fox",
    "  leading and   many    spaces  ",
    "line one\nline two\n\n\ttabbed",
    "the experts and the router, chosen again and again",
    "aaaaaaaa bbbbb abababab",
    "über Привет 你好世界",
    "ﬁne ① café cafe\u0301 🎉 \u00a0x",
    "def f(x): return x ** 2 + 3.14",
    "unseen: ∑ ℝ 𝔘 ऋ ö \x07",
    "▁ already escaped ▁▁ twice",
]

RULES = "FB01\t66 69\n2460\t31\n65 301\tE9\n"  # hexadecimal code points: ligature fi, circled 1, e + accent


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # a model tells the paths it was given
        corpus, rules = Path("corpus.txt"), Path("rules.tsv")
        corpus.write_text(CORPUS, "utf-8")
        rules.write_text(RULES, "utf-8")
        shared = {"input": str(corpus), "character_coverage": 1.0, "hard_vocab_limit": False, "minloglevel": 2}
        sentencepiece.SentencePieceTrainer.train(
            **shared,
            model_prefix="sentencepiece_unigram",
            model_type="unigram",
            vocab_size=300,
            normalization_rule_tsv=str(rules),
            user_defined_symbols=["<sep>"],
        )
        sentencepiece.SentencePieceTrainer.train(
            **shared,
            model_prefix="sentencepiece_bpe",
            model_type="bpe",
            vocab_size=600,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            byte_fallback=True,
            user_defined_symbols=["<sep>"],
        )
        for made in Path(folder).glob("*.model"):
            shutil.copy(made, GOLDEN)
    for kind in ("unigram", "bpe"):
        path = GOLDEN / f"sentencepiece_{kind}.model"
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        ids = [processor.encode(text) for text in TEXTS]
        decoded = [processor.decode(one) for one in ids]
        document = {"texts": TEXTS, "ids": ids, "decoded": decoded}
        path.with_suffix(".json").write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
