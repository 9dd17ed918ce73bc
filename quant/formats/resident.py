"""How a matrix that was read is held in memory: float32, by columns, wider and faster, or as it is stored.

This is decided here alone, for loading and for telling beforehand what a model takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np

from numoe.quant.compute import memory
from numoe.quant.formats.columns import SMALL, laid_out, wide_nbytes, widened
from numoe.quant.formats.qtensor import F32, QTensor


def hold(matrix: QTensor, *, multiplied: bool, wide: bool) -> QTensor:
    """A matrix that stays, in the form in which it is multiplied fastest.

    Args:
        multiplied: False for one that only gives some of its rows: it stays as it is stored.
        wide: whether there is room for the form that takes more memory.
    """
    if multiplied:
        if matrix.shape[0] * matrix.shape[1] < SMALL:
            matrix = F32(matrix.dequantize())
        else:
            matrix = widened(laid_out(matrix)) if wide else laid_out(matrix)
    return settled(matrix)


def held_nbytes(kind: str, shape: tuple[int, int], nbytes: int, *, routed: bool = False) -> tuple[int, int]:
    """Bytes that `hold` makes of a matrix that is multiplied with, without and with room for the wide form.

    Args:
        kind, nbytes: its format and bytes as it is stored.
        routed: whether it is a routed expert's, which is not made float32 however small it is.
    """
    rows, columns = shape
    if not routed and rows * columns < SMALL:
        return 4 * rows * columns, 4 * rows * columns
    return nbytes, wide_nbytes(kind, rows, columns, nbytes)


def settled(matrix: QTensor) -> QTensor:
    """The same matrix, which is to stay, in memory where it is read fastest."""
    copies = {}
    for one in fields(matrix):  # type: ignore[arg-type]
        values = getattr(matrix, one.name)
        if isinstance(values, np.ndarray) and values.nbytes < memory.HUGE:
            copies[one.name] = memory.lasting(values.nbytes).view(values.dtype).reshape(values.shape)
            np.copyto(copies[one.name], values)
    return replace(matrix, **copies)  # type: ignore[type-var]


def apart(matrices: Mapping[str, QTensor]) -> dict[str, QTensor]:
    """The same matrices in memory that workers do not see: they would keep what is evicted."""
    arrays = {
        (part, one.name): values
        for part, matrix in matrices.items()
        for one in fields(matrix)  # type: ignore[arg-type]
        if isinstance(values := getattr(matrix, one.name), np.ndarray)
    }
    line = memory.ALIGNMENT
    sizes = [-(-values.nbytes // line) * line for values in arrays.values()]
    taken = memory.unshared(sum(sizes))
    moved: dict[str, dict[str, Any]] = {part: {} for part in matrices}
    for ((part, name), values), start in zip(arrays.items(), itertools.accumulate(sizes, initial=0), strict=False):
        copy = taken[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
        np.copyto(copy, values)
        moved[part][name] = copy
    return {part: replace(matrix, **moved[part]) for part, matrix in matrices.items()}  # type: ignore[type-var]
