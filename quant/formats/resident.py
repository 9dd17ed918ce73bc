"""How a matrix that was read is held in memory: float32, by columns, wider and faster, or as it is stored.

This is decided here alone, for loading and for telling beforehand what a model takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from numoe.quant.compute import memory
from numoe.quant.formats.columns import SMALL, is_small, laid_out, widened
from numoe.quant.formats.format import Format
from numoe.quant.formats.plain import F32
from numoe.quant.formats.qtensor import QTensor


def hold(matrix: QTensor, *, multiplied: bool, wide: bool) -> QTensor:
    """A matrix that stays, in the form in which it is multiplied fastest.

    Args:
        multiplied: False for one that only gives some of its rows: it stays as it is stored.
        wide: whether there is room for the form that takes more memory.
    """
    if multiplied:
        small = matrix.shape[0] * matrix.shape[1] < SMALL
        matrix = F32(matrix.dequantize()).tiled() if small else fastest(matrix, wide=wide)
    return settled(matrix)


def fastest(matrix: QTensor, *, wide: bool = False) -> QTensor:
    """The form in which a matrix is multiplied fastest; `wide`: though it takes more memory, to the same digits."""
    return widened(laid_out(matrix)) if wide else laid_out(matrix)


def held_nbytes(format: Format, shape: tuple[int, int], *, routed: bool = False) -> tuple[int, int]:
    """Bytes that `hold` makes of a matrix that is multiplied with, without and with room for the wide form.

    Args:
        format: that in which it is read.
        routed: whether it is a routed expert's, which is not made float32 however small it is.
    """
    rows, columns = shape
    if not routed and rows * columns < SMALL:
        return 4 * rows * columns, 4 * rows * columns
    if is_small(shape) and (format.by_columns(rows) or not format.scaled):
        return format.nbytes(*shape), 4 * rows * columns
    return format.nbytes(*shape), (format.wide if format.by_columns(rows) else format).nbytes(*shape)


def settled(matrix: QTensor) -> QTensor:
    """The same matrix, which is to stay, in memory where it is read fastest."""
    copies = {}
    for name, values in matrix.arrays().items():
        if values.nbytes < memory.HUGE:
            copies[name] = memory.lasting(values.nbytes).view(values.dtype).reshape(values.shape)
            np.copyto(copies[name], values)
    return replace(matrix, **copies)  # type: ignore[type-var]


def apart(matrices: Mapping[str, QTensor]) -> dict[str, QTensor]:
    """The same matrices in memory that workers do not see: they would keep what is evicted."""
    arrays = {(part, name): values for part, matrix in matrices.items() for name, values in matrix.arrays().items()}
    line = memory.ALIGNMENT
    sizes = [-(-values.nbytes // line) * line for values in arrays.values()]
    taken = memory.unshared(sum(sizes))
    moved: dict[str, dict[str, Any]] = {part: {} for part in matrices}
    for ((part, name), values), start in zip(arrays.items(), itertools.accumulate(sizes, initial=0), strict=False):
        copy = taken[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
        np.copyto(copy, values)
        moved[part][name] = copy
    return {part: replace(matrix, **moved[part]) for part, matrix in matrices.items()}  # type: ignore[type-var]
