"""Which format a weight is written in, by its role in the model."""

from dataclasses import dataclass
from functools import cache

from numoe.quant.convert.recipes import Kind, group, roles
from numoe.quant.dtypes import Float32
from numoe.quant.formats import pack
from numoe.quant.formats.format import Format
from numoe.quant.formats.integer import INT4, INT8, integer_format
from numoe.quant.formats.plain import BF16

_BITS = {"int8": 8, "int4": 4}

# Groups for rows that a recipe's own does not divide: smaller ones would spend more bits than they save.
_OTHER_GROUPS = range(128, 15, -2)


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
    kind = roles(quant).get(role)
    if kind is None:
        return None
    sizes = (group(quant, kind), *(_OTHER_GROUPS if kind != "bf16" else ()))
    size = next((size for size in sizes if columns % size == 0), None)
    if size is None:
        return None
    chosen = Target(kind, size)
    return chosen if chosen.format.bits_each < stored_bits else None
