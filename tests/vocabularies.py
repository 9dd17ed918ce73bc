"""Small tokenizers of every kind of vocabulary."""

from pathlib import Path

import tokenizers
from tiny import GOLDEN
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from numoe.engine.text.tokenizer import Tokenizer, load_tokenizer

SPECIALS = ["<s>", "</s>", "<|im_start|>"]
MARKERS = ["<think>", "｜DSML｜"]  # added to the vocabulary but not marked special, as DeepSeek's are
CORPUS = ["the quick brown fox jumps over the lazy dog", "It's 12 o'clock, 345 times", "你好 мир 🎉 the the the dog"]


def byte_level_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKERS])
    return backend


BACKEND = byte_level_backend()


def plain(backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(backend, bos_id=None, eos_ids=[], add_bos=False, special_tokens={}, chat_template=None)


def sentencepiece_folder(folder: Path, kind: str) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes((GOLDEN / f"sentencepiece_{kind}.model").read_bytes())
    return load_tokenizer(folder)
