"""Reads a SentencePiece `tokenizer.model`: a protobuf message, of which only the fields a runner needs are read.

Field numbers are those of sentencepiece_model.proto (github.com/google/sentencepiece); the wire format is
protobuf.dev/programming-guides/encoding.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from numoe.quant.errors import InputError


class PieceType(IntEnum):
    """What a piece is for. GGUF's `tokenizer.ggml.token_type` uses the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class SentencePieceModel:
    """Pieces with their scores and types, index = token id, and the rules around them.

    unigram: the Unigram algorithm; else BPE, whose merges go by the score of the piece they make.
    charsmap: the precompiled normalization table, empty for none.
    dummy_prefix: a space goes before the text. collapse_spaces: runs of spaces become one, ends are stripped.
    bos_id, eos_id: None where the vocabulary has none.
    """

    pieces: list[str]
    scores: list[float]
    types: list[int]
    unigram: bool
    byte_fallback: bool
    unk_id: int
    bos_id: int | None
    eos_id: int | None
    charsmap: bytes = b""
    dummy_prefix: bool = True
    collapse_spaces: bool = True


def parse_sentencepiece(data: bytes, name: str) -> SentencePieceModel:
    """The model in the bytes of a `tokenizer.model`; `name` stands for the file in an InputError."""
    try:
        return _model(data)
    except (ValueError, struct.error) as error:
        raise InputError(
            f"{name} cannot be read as a SentencePiece model ({error}); "
            "put the model's tokenizer.json beside it instead."
        ) from error


def _model(data: bytes) -> SentencePieceModel:
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            piece = dict(_fields(value))
            pieces.append(_bytes(piece.get(1, b"")).decode("utf-8"))
            scores.append(struct.unpack("<f", _bytes(piece.get(2, bytes(4))))[0])
            types.append(_int(piece.get(3, PieceType.NORMAL)))
        elif number == 2 and isinstance(value, bytes):
            trainer = dict(_fields(value))
        elif number == 3 and isinstance(value, bytes):
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("it has no pieces")
    if any(map(math.isnan, scores)):
        raise ValueError("a piece's score is not a number")
    unk_id = _int(trainer.get(40, 0))
    if unk_id >= len(pieces):
        raise ValueError(f"its unknown piece is {unk_id} of {len(pieces)}")
    kind = _int(trainer.get(3, 1))
    if kind not in (1, 2):
        raise ValueError(f"model_type {kind} is neither 1 (unigram) nor 2 (BPE)")
    if trainer.get(24):
        raise ValueError("treat_whitespace_as_suffix is not supported")
    return SentencePieceModel(
        pieces=pieces,
        scores=scores,
        types=types,
        unigram=kind == 1,
        byte_fallback=bool(trainer.get(35, 0)),
        unk_id=unk_id,
        bos_id=_token_id(trainer.get(41, 1), len(pieces)),
        eos_id=_token_id(trainer.get(42, 2), len(pieces)),
        charsmap=_bytes(normalizer.get(2, b"")),
        dummy_prefix=bool(normalizer.get(3, 1)),
        collapse_spaces=bool(normalizer.get(4, 1)),
    )


def _token_id(value: int | bytes, count: int) -> int | None:
    """A missing token is -1, which a varint spells as 2^64 - 1."""
    token_id = _int(value)
    return token_id if token_id < count else None


def _int(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("a number is spelled as bytes")
    return value


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("bytes are spelled as a number")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one message: varints as int, everything else as its bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == 2:
            size, position = _varint(data, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"unknown wire type {wire}")
        if position + size > len(data):
            raise ValueError("it ends inside a field")
        yield number, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("it ends inside a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number is longer than 64 bits")
