"""The activations that matrices are multiplied with, and what kernels need of them beside their values."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from numoe.quant.dtypes import Float32

Rows = NDArray[np.integer] | slice


class Activations:
    """x (T, in) float32, and what kernels make of it, once for all matrices that are multiplied with it."""

    rows: Rows | None = None
    """Those that were taken of `whole`; None if all are."""

    def __init__(self, x: Float32):
        self.x = x
        self._grouped: dict[int, Float32] = {}
        self._sums: dict[int, Float32] = {}

    @property
    def whole(self) -> Activations:
        """What these were taken of."""
        return self

    def __len__(self) -> int:
        return len(self.x)

    def grouped(self, group: int) -> Float32:
        """(G, T, g)."""
        if group not in self._grouped:
            self._grouped[group] = self.x.reshape(len(self.x), -1, group).transpose(1, 0, 2)
        return self._grouped[group]

    def sums(self, group: int) -> Float32:
        """Of each group, (T, G)."""
        if group not in self._sums:
            # By BLAS, which takes a fifth of the time of NumPy's sums over so short an axis.
            sums = np.matmul(self.x.reshape(-1, group), _ones(group))  # (T G,)
            self._sums[group] = sums.reshape(len(self.x), -1)  # (T, G)
        return self._sums[group]

    def take(self, rows: Rows) -> Activations:
        """Some of the rows."""
        return self if len(self.x) == 1 else _Taken(self, rows)


class _Taken(Activations):
    def __init__(self, whole: Activations, rows: Rows):
        super().__init__(whole.x[rows])
        self._whole = whole
        self.rows = rows

    @property
    def whole(self) -> Activations:
        return self._whole


@cache
def _ones(count: int) -> Float32:
    return np.ones(count, np.float32)
