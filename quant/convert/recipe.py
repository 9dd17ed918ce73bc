"""Which format a weight is written in, by its role in the model.

The many weights of experts, feed-forward blocks and attention are rounded; the few that decide where tokens go or
what a word is (embedding, head, norms, router, indexer, residual mixing) stay as they are stored. int4 keeps eight
bits for what every token passes through, which is a small share of a mixture of experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from numoe.quant.dtypes import Float32
from numoe.quant.errors import InputError
from numoe.quant.formats import pack
from numoe.quant.formats.format import Format
from numoe.quant.formats.integer import INT4, INT8, integer_format
from numoe.quant.formats.plain import BF16

Kind = Literal["bf16", "int8", "int4"]
_BITS = {"int8": 8, "int4": 4}

# Weights that share a scale and a minimum, float16 both.
_GROUPS = {"int8": 32, "int4": 64}
# Other groups serve rows that these do not divide: smaller ones would spend more bits than they save.
_OTHER_GROUPS = range(128, 15, -2)

# float32 tables of words hold no more than bf16 does in any released model.
_WORDS: dict[str, Kind] = {"embedding": "bf16", "head": "bf16"}
_RECIPES: dict[str, dict[str, Kind]] = {
    "native": {},
    "int8": _WORDS
    | {
        "attention": "int8",
        "compressor": "int8",
        "dense ffn": "int8",
        "shared experts": "int8",
        "experts": "int8",
    },
    "int4": _WORDS
    | {
        "attention": "int8",
        "compressor": "int8",
        "dense ffn": "int4",
        "shared experts": "int8",
        "experts": "int4",
    },
}
RECIPES: Mapping[str, Mapping[str, Kind]] = _RECIPES
"""Recipe -> role -> format; a role that is not listed stays as stored."""


@dataclass(frozen=True)
class Target:
    """A format to write a matrix in. `group` weights share a scale and a minimum; bf16 has none."""

    kind: Kind
    group: int = 1

    @property
    def format(self) -> Format:
        """That of what `pack` gives."""
        return BF16.format if self.kind == "bf16" else integer_format(_BITS[self.kind], self.group, 16, True)

    def pack(self, weights: Float32, inputs: pack.Moments | None = None) -> BF16 | INT8 | INT4:
        """weights (out, in) float32 -> that matrix in this format. Raises InputError for NaN or infinity.

        inputs: what the matrix will be multiplied with, for int4; None: anything.
        """
        if self.kind == "bf16":
            return pack.pack_bf16(weights)
        if self.kind == "int8":
            return pack.pack_int8(weights, self.group)
        return pack.pack_int4(weights, self.group, inputs=inputs)

    def layout(self, rows: int, columns: int) -> tuple[tuple[str, tuple[int, int]], ...]:
        """(dtype as safetensors spells it, shape) of the codes, and of scales and minimums if there are any."""
        if self.kind == "bf16":
            return (("BF16", (rows, columns)),)
        codes = ("I8", (rows, columns)) if self.kind == "int8" else ("U8", (rows, columns // 2))
        factors = ("F16", (rows, columns // self.group))
        return codes, factors, factors


@cache
def target(quant: str, role: str, columns: int, stored_bits: float) -> Target | None:
    """The format for a matrix with rows of `columns` weights; None: as it is stored.

    `stored_bits` is what a weight takes now, scales included: what is stored in no more bits than the recipe would
    spend (a checkpoint's own FP8 and FP4) is never rounded again. Rows that the recipe's group (32 for int8, 64 for
    int4) does not divide get the largest even group from 16 to 128 that does, or stay as stored when there is none.
    Raises InputError for an unknown recipe.
    """
    if quant not in RECIPES:
        raise InputError(f'"{quant}" is not a way to quantize; choose one of {", ".join(RECIPES)}')
    kind = RECIPES[quant].get(role)
    if kind is None:
        return None
    sizes = (1,) if kind == "bf16" else (_GROUPS[quant], *_OTHER_GROUPS)
    group = next((size for size in sizes if columns % size == 0), None)
    if group is None:
        return None
    chosen = Target(kind, group)
    return chosen if chosen.format.bits_each < stored_bits else None
