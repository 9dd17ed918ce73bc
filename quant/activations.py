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


class Digits(NamedTuple):
    """Activations in groups as sums of integers times units: x = 2^12 sum_n units_n values_n.

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
        self._digits: dict[tuple[int, int, float], Digits] = {}
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

    def digits(self, group: int, peak: int, precision: float) -> Digits:
        """Digits for codes of at most the magnitude `peak`; a group is off by at most `precision` of its length."""
        key = group, peak, precision
        if key not in self._digits:
            self._digits[key] = _split(self.grouped(group), peak, precision)
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

    def digits(self, group: int, peak: int, precision: float) -> Digits:
        key = group, peak, precision
        if key not in self._digits:
            values, units, offsets = self._whole.digits(group, peak, precision)
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
def _steps(size: int, peak: int, precision: float) -> tuple[np.float32, Float32, Float32]:
    """How many times finer each digit is than the one before, what x is multiplied with to count in units of each,
    and these units, (N,), for groups of length 1.

    By Cauchy-Schwarz no sum of digits times codes reaches half of a field.
    """
    # Rounding to integers may lengthen a vector by half a unit a component, and leaves that much of it at most.
    half = math.sqrt(size) / 2
    reach = (2 ** (FIELD_BITS - 1) - 1) / (peak * math.sqrt(size)) - half
    finer = math.floor(reach / half)
    left = math.sqrt(size / 12) / reach  # of a vector by its first digit
    count = 1 + math.ceil(math.log(left / precision, finer))
    steps = reach * float(finer) ** np.arange(count)
    return np.float32(finer), steps.astype(np.float32), (1 / steps).astype(np.float32)


def _split(x: Float32, peak: int, precision: float) -> Digits:
    """x (G, T, g)."""
    groups, tokens, size = x.shape
    finer, steps, parts = _steps(size, peak, precision)
    count = len(steps)
    length = np.einsum("gtk,gtk->gt", x, x)
    np.sqrt(length, out=length)
    np.maximum(length, np.float32(1e-30), out=length)
    # x in units of each digit, rounded; less what the digits before say already.
    values = np.empty((groups, tokens, count, size), np.float32)
    np.multiply(x[:, :, None], (steps / length[..., None])[..., None], out=values)
    np.rint(values, out=values)
    values[:, :, 1:] -= values[:, :, :-1] * finer
    values *= np.float32(2**-FIELD_BITS)
    integers = values.reshape(groups, tokens * count, size)
    units = np.empty((2, 1, groups, tokens, 1, count), np.float32)
    np.multiply(length[..., None, None], parts, out=units[1, 0])
    np.multiply(units[1], np.float32(2**FIELD_BITS), out=units[0])
    return Digits(integers, units, np.add.reduce(integers, axis=2, keepdims=True) * np.float32(8))
