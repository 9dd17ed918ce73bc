"""How the weights of a matrix are held, as a value: what they take, and which forms in memory there are of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

_FLOAT16_BITS, _FLOAT32_BITS = 16, 32


@dataclass(frozen=True)
class Format:
    """A code for each weight, and a scale and perhaps a bias for each block of them; `str` gives it for people to read.

    Declared once, beside the matrices that have it.
    """

    kind: str
    """What the codes are; how fast a product goes depends on this alone."""
    bits: int
    """Of a code; 0 where those of a block lie together with all that scales them."""
    block: tuple[int, int] = (1, 1)
    """Rows and columns of the weights that share a scale; at the edges of a matrix there are fewer."""
    scale_bits: int = 0
    """Of the scale of a block, and of its bias; 0 without scales. Of a whole block whose codes have no bits."""
    bias: bool = False
    note: str = ""
    """What tells the block to people, where the kind does not."""
    row_bits: int = 0
    """Of what there is once a row, beside all that."""
    column_bits: int = 0
    """Of what there is once a column."""
    slab_step: int = 0
    """Matrices whose rows this divides have a form by columns (`columns.laid_out`); 0: none has."""
    spread: Format | None = None
    """`wide`, where that is not said by the rest."""

    def __str__(self) -> str:
        """Such as "int4 g32"."""
        return f"{self.kind} {self.note}" if self.note else self.kind

    @property
    def bits_each(self) -> float:
        """What a weight takes, its share of scales and biases included."""
        return self.bits + self.scale_bits * (1 + self.bias) / prod(self.block)

    def nbytes(self, *shape: int) -> int:
        """Bytes of a matrix (out, in), of a stack (E, out, in) of them, or of an array of any shape."""
        *stacked, rows, columns = (1, 1, *shape)
        height, width = self.block
        blocks = -(-rows // height) * -(-columns // width)
        factors = blocks * self.scale_bits * (1 + self.bias)
        beside = rows * self.row_bits + columns * self.column_bits
        return prod(stacked) * (rows * columns * self.bits + factors + beside) // 8

    @property
    def scaled(self) -> bool:
        """Whether a code is not all that tells a weight."""
        return not self.bits or bool(self.scale_bits or self.row_bits or self.column_bits)

    def by_columns(self, rows: int) -> bool:
        """Whether matrices of so many rows have a form by columns, which takes the same bytes."""
        return self.slab_step > 0 and rows % self.slab_step == 0

    @property
    def wide(self) -> Format:
        """That of the form by columns which takes more memory and is multiplied faster, to the same digits: codes of a
        byte, and float scales and biases that are float32. The format itself where it has no form by columns."""
        if self.spread or not self.slab_step:
            return self.spread or self
        scale_bits = _FLOAT32_BITS if self.scale_bits == _FLOAT16_BITS else self.scale_bits
        return replace(self, bits=8, scale_bits=scale_bits)


FLOAT32, INT64 = Format("f32", 32), Format("i64", 64)
"""What arrays are held in."""
