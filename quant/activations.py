"""The activations that matrices are multiplied with, and the small integers that some kernels need them in."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from numoe.quant.dtypes import Float32

FIELD_BITS = 12
"""Half of the integers that a float32 holds exactly: two sums of so many bits share one."""


class Rounding(NamedTuple):
    """To what activations are rounded for products with integer codes.

    Each group is rounded to multiples of a power of two so large that its product with any codes is an exact float32:
    whatever the order of the sum, and whether activations go into it whole or digit by digit.
    """

    peak: int
    """The largest magnitude of a code."""
    precision: float
    """A group is off by about this part of its length at most."""


class Digits(NamedTuple):
    """Rounded activations in groups as sums of integers times units: x = 2^12 sum_n units_n values_n.

    values (G, T N, g) hold the integers times 2^-12. units (2, 1, G, T, 1, N) are those of a word's first and second
    field. offsets (G, T N, 1) is 8 times the sum of values: what a code adds that is stored plus 8.
    """

    values: Float32
    units: Float32
    offsets: Float32


Rows = NDArray[np.integer] | slice


class Activations:
    """x (T, in) float32, and what kernels make of it, once for all matrices that are multiplied with it."""

    rows: Rows | None = None
    """Those that were taken of `whole`; None if all are."""

    def __init__(self, x: Float32):
        self.x = x
        self._rounded: dict[tuple[int, Rounding], Float32] = {}
        self._digits: dict[tuple[int, Rounding], Digits] = {}
        self._sums: dict[int, Float32] = {}
        self._shifts: dict[tuple[int, int], Float32] = {}

    @property
    def whole(self) -> Activations:
        """What these were taken of."""
        return self

    def __len__(self) -> int:
        return len(self.x)

    def grouped(self, group: int) -> Float32:
        """(G, T, g)."""
        return self.x.reshape(len(self.x), -1, group).transpose(1, 0, 2)

    def sums(self, group: int) -> Float32:
        """Of each group, (T, G)."""
        if group not in self._sums:
            self._sums[group] = self.x.reshape(len(self.x), -1, group).sum(axis=2)
        return self._sums[group]

    def shifts(self, group: int, offset: int) -> Float32:
        """What `offset` added to every code adds to each group, (T, G)."""
        key = group, offset
        if key not in self._shifts:
            self._shifts[key] = np.float32(offset) * self.sums(group)
        return self._shifts[key]

    def rounded(self, group: int, rounding: Rounding) -> Float32:
        """The activations rounded, (G, T, g)."""
        key = group, rounding
        if key not in self._rounded:
            x = self.grouped(group)
            unit = _unit(x, rounding)[..., None]
            values = np.divide(x, unit)
            np.rint(values, out=values)
            self._rounded[key] = np.multiply(values, unit, out=values)
        return self._rounded[key]

    def digits(self, group: int, rounding: Rounding) -> Digits:
        """The same in digits."""
        key = group, rounding
        if key not in self._digits:
            self._digits[key] = _split(self.grouped(group), rounding)
        return self._digits[key]

    def take(self, rows: Rows) -> Activations:
        """Some of the rows, which get their digits from these."""
        return self if len(self.x) == 1 else _Taken(self, rows)


class _Taken(Activations):
    def __init__(self, whole: Activations, rows: Rows):
        super().__init__(whole.x[rows])
        self._whole = whole
        self.rows = rows

    @property
    def whole(self) -> Activations:
        return self._whole

    def rounded(self, group: int, rounding: Rounding) -> Float32:
        return self._whole.rounded(group, rounding)[:, self.rows]

    def digits(self, group: int, rounding: Rounding) -> Digits:
        key = group, rounding
        if key not in self._digits:
            values, units, offsets = self._whole.digits(group, rounding)
            count = units.shape[-1]
            by_token = values.reshape(len(values), -1, count, values.shape[2])[:, self.rows]
            picked = offsets.reshape(len(values), -1, count)[:, self.rows]
            self._digits[key] = Digits(
                by_token.reshape(len(values), -1, values.shape[2]),
                units[:, :, :, self.rows],
                picked.reshape(len(values), -1, 1),
            )
        return self._digits[key]


@cache
def _steps(size: int, rounding: Rounding) -> tuple[np.float32, Float32, np.float32]:
    """How many times finer each digit is than the one before, the digits' units in those of the last, (N,), and the
    most of the last unit that a group's length may be.

    By Cauchy-Schwarz no sum of digits times codes reaches half of a field then.
    """
    # Rounding to integers may lengthen a vector by half a unit a component, and leaves that much of it at most.
    half = math.sqrt(size) / 2
    reach = (2 ** (FIELD_BITS - 1) - 1) / (rounding.peak * math.sqrt(size)) - half
    finer = math.floor(reach / half)
    left = 2 * math.sqrt(size / 12) / reach  # of a vector by its first digit, whose unit may be twice as large as due
    count = 1 + math.ceil(math.log(left / rounding.precision, finer))
    units = float(finer) ** np.arange(count - 1, -1, -1)
    most = reach * units[0]
    assert (most + half) * rounding.peak * math.sqrt(size) < 2**24, "sums are not exact"
    return np.float32(finer), units.astype(np.float32), np.float32(most)


def _unit(x: Float32, rounding: Rounding) -> Float32:
    """What the groups of x (G, T, g) are rounded to multiples of, (G, T)."""
    _, _, most = _steps(x.shape[2], rounding)
    unit = np.einsum("gtk,gtk->gt", x, x)
    np.sqrt(unit, out=unit)
    unit *= np.float32(2) / most
    np.maximum(unit, np.float32(1e-30), out=unit)
    bits = unit.view(np.int32)
    bits &= 0x7F800000  # without the mantissa: a power of two, and above half of what it was
    return unit


def _split(x: Float32, rounding: Rounding) -> Digits:
    """x (G, T, g)."""
    groups, tokens, size = x.shape
    finer, parts, _ = _steps(size, rounding)
    count = len(parts)
    units = np.empty((2, 1, groups, tokens, 1, count), np.float32)
    own = np.multiply(_unit(x, rounding)[..., None, None], parts, out=units[1, 0])
    np.multiply(own, np.float32(2**FIELD_BITS), out=units[0, 0])
    # x in units of each digit, rounded; less what the digits before say already.
    values = np.empty((groups, tokens, count, size), np.float32)
    np.divide(x[:, :, None], own[:, :, 0, :, None], out=values)
    np.rint(values, out=values)
    values[:, :, 1:] -= values[:, :, :-1] * finer
    values *= np.float32(2**-FIELD_BITS)
    integers = values.reshape(groups, tokens * count, size)
    return Digits(integers, units, np.add.reduce(integers, axis=2, keepdims=True) * np.float32(8))
