"""One interface over weight matrices however they are held; each kind of them is a file beside this one.

A QTensor is a matrix W of shape (out, in). Users multiply with it and never ask for its format. Each kind adds its
`Format`, how a range of its rows becomes float32, and how a range of its rows is cut out.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute import kernels, threads, workers
from numoe.quant.compute.activations import Activations
from numoe.quant.compute.kernels import FEW
from numoe.quant.compute.threads import Task
from numoe.quant.dtypes import E8M0_NAN, Float32
from numoe.quant.errors import InputError
from numoe.quant.formats.format import Format

_FLOAT32 = np.dtype(np.float32)

_WORTH_WORKERS = 3 << 18  # multiplications; for fewer, having workers help takes longer than it gains


class QTensor(ABC):
    """A weight matrix of shape (out, in), held in some format, that computes in float32.

    A kind of them is a frozen dataclass of arrays.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    @abstractmethod
    def format(self) -> Format:
        """How the weights are held here."""

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and biases."""
        return sum(values.nbytes for values in self.arrays().values())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What the matrix is made of, by the names of its fields: values, or codes, scales and perhaps a bias."""
        every = ((field.name, getattr(self, field.name)) for field in fields(self))  # type: ignore[arg-type]
        return {name: values for name, values in every if isinstance(values, np.ndarray)}

    @abstractmethod
    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        """Writes rows start..stop to `out`, (stop - start, in) float32, C-contiguous."""

    @abstractmethod
    def slice_rows(self, start: int, stop: int, step: int = 1) -> "QTensor":
        """Rows start, start + step, ... before stop as a QTensor that shares these bytes, or has its own where they do
        not follow each other."""

    @abstractmethod
    def finite(self) -> bool:
        """Whether no code, scale or bias is NaN or infinite."""

    def matmul(self, x: Float32 | Activations, out: Float32 | None = None) -> Float32:
        """x @ W.T: x (T, in) float32, C-contiguous -> (T, out) float32, written to `out` if given.

        Raises ValueError for another shape or dtype.
        """
        return matmul_all([(self, x, out)])[0]

    def rows(self, indices: NDArray[np.integer] | Sequence[int]) -> Float32:
        """The rows of these indices, (n, in) float32: an embedding look-up. Raises IndexError outside 0..out-1."""
        picked = np.asarray(indices, np.int64)
        if picked.size and not 0 <= int(picked.min()) <= int(picked.max()) < self.shape[0]:
            raise IndexError(f"row indices must lie in 0..{self.shape[0] - 1}")
        out = np.empty((picked.size, self.shape[1]), np.float32)
        for position, row in enumerate(picked.tolist()):
            self.dequantize_rows(row, row + 1, out[position : position + 1])
        return out

    def dequantize(self) -> Float32:
        """The whole matrix, (out, in) float32."""
        out = np.empty(self.shape, np.float32)
        step = kernels.block_rows(self.shape[1])
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            self.dequantize_rows(start, stop, out[start:stop])
        return out

    def products(self, x: Activations, out: Float32) -> list[Task]:
        """The tasks that together write x @ W.T to `out`, in any order and on any thread."""
        return kernels.products_by_rows(x.x, self.shape, self.dequantize_rows, out)

    def split(self, parts: int) -> "list[QTensor]":
        """`parts` equal ranges of rows that share these bytes. Raises ValueError when they would not be equal."""
        step, rest = divmod(self.shape[0], parts)
        if rest:
            raise ValueError(f"{self.shape[0]} rows do not split into {parts} equal parts")
        return [self.slice_rows(part * step, (part + 1) * step) for part in range(parts)]


def matmul_all(products: Sequence[tuple[QTensor, Float32 | Activations, Float32 | None]]) -> list[Float32]:
    """`QTensor.matmul` of several matrices at once, each (W, x, out or None): workers or threads share all of it.

    Give the same `Activations` to all matrices that are multiplied with the same x. Raises what `matmul` raises.
    """
    given: list[workers.Product] = []
    work = 0
    few = True
    for matrix, x, out in products:
        activations = x if isinstance(x, Activations) else Activations(x)
        values = activations.x
        rows, columns = matrix.shape
        if values.dtype != _FLOAT32 or values.ndim != 2 or values.shape[1] != columns:
            raise ValueError(f"matmul takes float32 (T, {columns}), not {values.dtype} {values.shape}")
        given.append((matrix, activations, np.empty((len(values), rows), np.float32) if out is None else out))
        work += len(values) * rows * columns
        few = few and len(values) <= FEW
    if not (few and work >= _WORTH_WORKERS and workers.multiply(given)):
        tasks = [task for matrix, x, out in given for task in matrix.products(x, out)]
        threads.run_worth(tasks, work)
    return [out for _, _, out in given]


def taken(values: NDArray, start: int, stop: int, step: int) -> NDArray:
    """Rows one after another, as kernels take them: without a copy where they are so already."""
    return values[start:stop] if step == 1 else np.ascontiguousarray(values[start:stop:step])


def pair(values: NDArray) -> tuple[int, int]:
    """The shape of an array of two axes."""
    rows, columns = values.shape
    return rows, columns


def check_groups(kind: str, shape: tuple[int, int], group: int, scales: NDArray) -> None:
    """Raises InputError unless scales of this shape are one for each group of a row."""
    if group < 2 or group % 2 or scales.shape != (shape[0], shape[1] // group) or shape[1] % group:
        raise InputError(
            f"{kind} weights of shape {shape} do not fit scales of shape {scales.shape} in groups of {group}; "
            "the row length must be a multiple of an even group size"
        )


def finite_scales(scales: NDArray) -> bool:
    """Whether no scale, float or e8m0 code, is NaN or infinite."""
    if scales.dtype == np.uint8:
        return not kernels.has_bits(scales, E8M0_NAN)
    return kernels.all_finite(scales)
