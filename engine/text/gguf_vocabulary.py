"""The vocabulary in a GGUF file's metadata: the `tokenizer.*` keys of the GGUF specification.

What they leave open is as in llama.cpp (src/llama-vocab.cpp): the ids of special tokens by the kind of vocabulary, and
whether a text begins with BOS.
"""

import math
from collections.abc import Mapping
from typing import Any

import tokenizers

from numoe.engine.text.ends import turn_ends
from numoe.engine.text.sentencepiece import PieceType, SentencePieceModel
from numoe.engine.text.vocabulary import (
    NAMED_TOKENS,
    PRE_TOKENIZERS,
    Vocabulary,
    add_typed_tokens,
    byte_level_backend,
    joins,
    sentencepiece_backend,
)
from numoe.quant.errors import InputError

_PREFIX = "tokenizer.ggml."
_BEGINS = "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken"
_BOS_UNLESS_TOLD = {*_BEGINS.split(), "chameleon"}  # in files older than add_bos_token
_WHOLE = f"{_BEGINS} minicpm5 glm4 glm5 gpt-4o llama4 youtu kimi-k2 granite-embed-multi-97m"
_WHOLE_WORDS = frozenset(_WHOLE.split())  # a word that is in the vocabulary is not cut
_COMPOSES = {"qwen2", "deepseek-r1-qwen"}  # as the models' own tokenizer.json does
_DEFAULT_IDS = {  # by tokenizer.ggml.model
    "llama": {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
    "gpt2": {"bos_token_id": 11, "eos_token_id": 11},
    "gemma4": {},
}
_NO_ID = (-1, (1 << 32) - 1, (1 << 64) - 1)  # -1 is also written as an unsigned number


def read_metadata(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary in a GGUF file's metadata.

    Raises:
        InputError: a key is missing or malformed, or `tokenizer.ggml.model` (gpt2, llama and gemma4 are known) or
            `tokenizer.ggml.pre` is unknown; the sentence names it.
    """
    keys = _Keys(metadata)
    kind = keys.text("model")
    if kind not in _DEFAULT_IDS:
        raise InputError(
            f"the GGUF file's {_PREFIX}model is {kind!r}, and numoe reads gpt2, llama and gemma4; take another model"
        )
    pieces = keys.listed("tokens", str)
    types = keys.listed("token_type", int, len(pieces)) or [int(PieceType.NORMAL)] * len(pieces)
    template = keys.value("tokenizer.chat_template", str)
    # Turn ends are control tokens, whatever their type says.
    closing = turn_ends(template, pieces)
    types = [int(PieceType.CONTROL) if pieces[i] in closing else kind for i, kind in enumerate(types)]
    control = {piece for piece, kind in zip(pieces, types, strict=True) if kind == PieceType.CONTROL}
    ids = _Ids(keys, kind, pieces, control if _PREFIX + "token_type" in metadata or kind == "gpt2" else set(pieces))
    pre = keys.text("pre") or None if kind == "gpt2" else None
    notes = []
    bos_ids, eos_ids = ids.of("bos_token_id", needed=True), ids.of("eos_token_id", needed=True)
    bos_id = bos_ids[0] if bos_ids else None
    if kind == "gpt2":
        if pre is None:
            notes.append(
                f"The GGUF file does not name its pre-tokenizer ({_PREFIX}pre): text may be cut into other tokens than "
                "the model was trained on. A newer conversion of the model names it."
            )
        backend = _byte_level(keys, pieces, types, pre or "default")
    else:
        listed = kind == "gemma4"  # SentencePiece's spaces and bytes, merges as they are listed
        model = SentencePieceModel(
            pieces,
            keys.listed("scores", float, len(pieces), required=not listed),
            types,
            unigram=False,
            byte_fallback=PieceType.BYTE in types,
            unk_id=(ids.of("unknown_token_id") or [0])[0],
            bos_id=bos_id,
            eos_id=eos_ids[0] if eos_ids else None,
            dummy_prefix=not listed and keys.switch("add_space_prefix", True),
            collapse_spaces=not listed and keys.switch("remove_extra_whitespaces", False),
        )
        backend = sentencepiece_backend(model, merges=_merges(keys) if listed else None)
    named = zip(NAMED_TOKENS, ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id"), strict=True)
    ends = turn_ends(template, pieces, control)
    declared = [i for key in ("eos_token_ids", "eot_token_id", "eom_token_id") for i in ids.of(key)]
    return Vocabulary(
        backend,
        bos_id=bos_id,
        eos_ids=frozenset([*eos_ids, *declared, *(i for i, piece in enumerate(pieces) if piece in ends)]),
        add_bos=kind == "gemma4" or keys.switch("add_bos_token", kind == "llama" or pre in _BOS_UNLESS_TOLD),
        special_tokens={name: pieces[found[0]] for name, key in named if (found := ids.of(key))},
        chat_template=template,
        pieces=pieces,
        notes=tuple(notes),
    )


class _Keys:
    """Values by their key, each checked for its type."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata

    def value(self, key: str, kind: type) -> Any:
        value = self._metadata.get(key)
        if value is not None and type(value) is not kind:
            raise _wrong(key, value, _SPOKEN[kind])
        return value

    def text(self, key: str) -> str | None:
        text: str | None = self.value(_PREFIX + key, str)
        return text

    def switch(self, key: str, default: bool) -> bool:
        switch: bool | None = self.value(_PREFIX + key, bool)
        return default if switch is None else switch

    def integers(self, key: str) -> list[int]:
        """A number, or several where they end answers; [] where there is none."""
        value = self._metadata.get(_PREFIX + key)
        values = value if isinstance(value, list) and key.startswith("eo") else [] if value is None else [value]
        if not all(type(i) is int for i in values):
            raise _wrong(_PREFIX + key, value, _SPOKEN[int])
        return values

    def listed(self, key: str, kind: type, count: int | None = None, required: bool = False) -> list[Any]:
        """A list, [] where there is none; `count`: how long it must be."""
        values = self._metadata.get(_PREFIX + key)
        if values is None and count is not None and not required:
            return []
        if values is None:
            raise InputError(f"the GGUF file has no {_PREFIX}{key}; take a file that a current converter made")
        if not isinstance(values, list) or not all(_is(one, kind) for one in set(map(type, values))):
            raise _wrong(_PREFIX + key, values, f"a list, each entry of which is {_SPOKEN[kind]}")
        if kind is float and any(math.isnan(value) for value in values):
            raise _wrong(_PREFIX + key, math.nan, "a list of numbers")
        if count is not None and len(values) != count:
            raise InputError(
                f"the GGUF file's {_PREFIX}{key} has {len(values)} entries for {count} tokens; take another"
            )
        return values


def _is(one: type, kind: type) -> bool:
    return issubclass(one, (int, float) if kind is float else kind) and one is not bool


_SPOKEN = {str: "a text", int: "a whole number", bool: "true or false", float: "a number"}


def _wrong(key: str, value: Any, wanted: str) -> InputError:
    return InputError(f"the GGUF file's {key} is {str(value)[:60]!r}, not {wanted}; take a file of another converter")


class _Ids:
    """The ids of special tokens."""

    def __init__(self, keys: _Keys, kind: str, pieces: list[str], trusted: set[str]) -> None:
        """trusted: the tokens of which an id is believed where it stands in no key."""
        self._keys, self._pieces, self._trusted = keys, pieces, trusted
        self._defaults = _DEFAULT_IDS[kind]

    def of(self, key: str, needed: bool = False) -> list[int]:
        """What a key says, or llama.cpp's default; a number that is no token is left out unless it is needed."""
        count = len(self._pieces)
        found = []
        for token_id in self._keys.integers(key):
            if 0 <= token_id < count:
                found.append(token_id)
            elif needed and token_id not in _NO_ID:
                raise InputError(
                    f"the GGUF file's {_PREFIX}{key} is {token_id}, but it has {count} tokens; take another file"
                )
        default = self._defaults.get(key, count)
        if not found and default < count and self._pieces[default] in self._trusted:
            found = [default]
        return found


def _merges(keys: _Keys) -> list[tuple[str, str]]:
    merges = []
    for merge in keys.listed("merges", str):
        left, space, right = merge.partition(" ")
        if not space or " " in right:
            raise InputError(f"the GGUF file's {_PREFIX}merges has {merge!r}, which is not two tokens; take another")
        merges.append((left, right))
    return merges


def _byte_level(keys: _Keys, pieces: list[str], types: list[int], pre: str) -> tokenizers.Tokenizer:
    if pre not in PRE_TOKENIZERS:
        raise InputError(
            f"the GGUF file's {_PREFIX}pre is {pre!r}, a way to cut text that numoe does not know; run the model from "
            "its safetensors (numoe pull OWNER/NAME), or take a newer numoe"
        )
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    if pre == "kimi-k2":  # its files carry no merges: ids are ranks
        plain = [i for i, kind in enumerate(types) if kind == PieceType.NORMAL]
        merges = joins({pieces[i]: float(-i) for i in plain})
    else:
        merges = _merges(keys)
    backend = byte_level_backend(
        vocabulary, merges, PRE_TOKENIZERS[pre], whole_words=pre in _WHOLE_WORDS, composes=pre in _COMPOSES
    )
    add_typed_tokens(backend, pieces, types)
    return backend
