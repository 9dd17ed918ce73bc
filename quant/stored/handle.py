"""A weight as it lies on disk: where its bytes are, and the matrix or array that they make."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from numoe.quant.dtypes import Float32, UInt8
from numoe.quant.errors import InputError
from numoe.quant.files import Extent, Files, TensorInfo
from numoe.quant.formats.format import FLOAT32, Format
from numoe.quant.formats.qtensor import QTensor


class Cut(NamedTuple):
    """The rows of a tensor that belong to a matrix: `rows` of them, every `step`th of those from byte `start` on.

    A row has `row` bytes, in a dtype as safetensors spells it.
    """

    tensor: str
    dtype: str
    start: int
    row: int
    rows: int
    step: int


@dataclass(frozen=True, eq=False)
class Stored(ABC):
    """A weight, one matrix of a stacked one, or rows of such a matrix. Nothing is read before it is asked for.

    Each way to store weights adds where the rows of its tensors lie, and what their bytes make. Reading is safe from
    several threads.
    """

    files: Files
    name: str
    parts: tuple[TensorInfo, ...]
    """The tensors that it is stored in: values, or codes, scales and perhaps minimums."""
    whole: tuple[int, ...]
    """The shape of all values by that name: (out, in) after any leading dimensions."""
    format: Format
    """That in which it is read; of a tensor that only `array` reads, its dtype."""
    index: int | None = None
    """Which matrix of a stacked weight."""
    picked: tuple[int, int, int] | None = None
    """Which rows of the matrix: from, to, every so many."""

    laid_out = False
    """Whether it is stored by columns."""
    _dtypes: ClassVar[tuple[str, ...]] = ()
    """Of the parts, where theirs may say less."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) of a matrix, (E, out, in) of stacked ones."""
        if self.picked is not None:
            return len(range(*self.picked)), self.whole[-1]
        return self.whole if self.index is None else self.whole[1:]

    @property
    def nbytes(self) -> int:
        """Bytes in its file, its share of scales included."""
        stored = sum(info.nbytes for info in self.parts)
        if self.index is None and self.picked is None:
            return stored
        return stored * math.prod(self.shape) // math.prod(self.whole)

    @property
    def read_nbytes(self) -> int:
        """Bytes of what `matrix` gives: as stored, but where that is converted."""
        return self.format.nbytes(*self.shape)

    @property
    def array_format(self) -> Format:
        """That of what `array` gives."""
        return FLOAT32

    @property
    def stays_as_read(self) -> bool:
        """Whether the matrix is held in the very bytes of its `extents`, and takes no memory beside them."""
        moved = not self.laid_out and self.format.by_columns(self.shape[0])
        return self._is_view and not moved and self._range[2] == 1

    def expert(self, index: int) -> Self:
        """One matrix of a stacked weight. Raises InputError where there is none."""
        self._require(3, "(E, out, in)")
        if not 0 <= index < self.whole[0]:
            raise InputError(f"{self._source} has no matrix {index}: it holds {self.whole[0]}")
        return replace(self, index=index)

    def rows(self, start: int, stop: int, step: int = 1) -> Self:
        """Rows start, start + step, ... before stop of a matrix. Raises InputError where it has no such rows."""
        self._require(2, "(out, in)")
        if not 0 <= start < stop <= self.shape[0]:
            raise InputError(f"{self._source} has no rows {start} to {stop}: it has {self.shape[0]}")
        first, last, every = self._range
        return replace(self, picked=(first + start * every, min(first + stop * every, last), every * step))

    def flat(self) -> Self:
        """The rows of stacked matrices, or the one row of a vector, as those of one matrix."""
        *stacked, width = self.whole or (1,)
        return replace(self, whole=(math.prod(stacked), width))

    def turned(self) -> Stored:
        """The matrix or matrices (out, in) of what is stored (in, out); a vector as it is.

        Raises InputError where codes would have to be turned with their scales.
        """
        if len(self.whole) < 2:
            return self
        raise self._refusal(f"it is {self.parts[0].dtype} stored (in, out), and only floats can be turned")

    def moved(self, tensors: Mapping[str, TensorInfo], files: Files) -> Self:
        """The same weight where its tensors lie elsewhere."""
        there = ((tensors[info.name], info) for info in self.parts)
        parts = tuple(replace(now, dtype=info.dtype, shape=info.shape) for now, info in there)
        return replace(self, parts=parts, files=files)

    def fitted(self, shape: Sequence[int]) -> Stored:
        """The same weight in the shape that a model has for it, where what is stored does not say one.

        Raises InputError where that does not tell either.
        """
        return self

    def matrix(self) -> QTensor:
        """It as a QTensor (out, in), in the format and order it is stored in; reads no other bytes.

        Raises InputError for what is no matrix, a dtype that cannot be multiplied with, and weights that are NaN or
        infinite.
        """
        extents = self.extents()
        try:
            raw = [self.files.read_range(*extent) for extent in extents]
        except InputError as error:
            raise self._refusal(error) from error
        return self.assemble(raw)

    def on_disk(self) -> QTensor:
        """The same matrix whose rows are read when they are asked for, and not kept: a table of which few are.

        NaN among them is refused then. Raises InputError for what is no matrix.
        """
        self._require(2, "(out, in)")
        return _OnDisk(self)

    def extents(self) -> tuple[Extent, ...]:
        """Where the bytes lie that `matrix` reads, those of each of its `parts`; raises what it raises before."""
        self._require(2, "(out, in)")
        start, stop, _ = self._range
        return self._extents(start, stop)

    def assemble(self, raw: Sequence[UInt8], *, check: bool = True) -> QTensor:
        """What `matrix` gives, of the bytes of its `extents` that were read elsewhere.

        With `check` False NaN and infinite weights are not looked for. Raises what `matrix` raises after reading.
        """
        start, stop, step = self._range
        try:
            matrix = self._made(raw, start, stop)
            if step > 1:
                matrix = matrix.slice_rows(0, stop - start, step)
        except InputError as error:
            raise self._refusal(error) from error
        if check and not matrix.finite():
            raise self._not_finite()
        return matrix

    def cuts(self) -> tuple[Cut, ...]:
        """What of its `parts` makes the matrix by itself; () where no bytes of it follow each other.

        Raises InputError where that would take new scales.
        """
        start, stop, step = self._range
        dtypes = self._dtypes or [info.dtype for info in self.parts]
        return tuple(
            Cut(info.name, dtype, extent.offset - info.offset, extent.nbytes // (stop - start), self.shape[0], step)
            for info, dtype, extent in zip(self.parts, dtypes, self.extents(), strict=False)
        )

    def array(self) -> NDArray:
        """The weight, of any rank, as float32 if it stores floats or codes with scales, as int64 if integers.

        Raises InputError for a dtype that is not supported, and NaN or infinite values.
        """
        if len(self.shape) == 3:
            return np.stack([self.expert(index).matrix().dequantize() for index in range(self.whole[0])])
        return self.matrix().dequantize()

    @property
    def _is_view(self) -> bool:
        """Whether `_made` gives views of the raw bytes."""
        return True

    @abstractmethod
    def _made(self, raw: Sequence[UInt8], start: int, stop: int) -> QTensor:
        """Rows start..stop of the raw bytes that `_extents` tells of."""

    def _extents(self, start: int, stop: int) -> tuple[Extent, ...]:
        """Of rows start..stop of the matrix, as many as each part has."""
        return tuple(self._extent(info, self.whole, start, stop) for info in self.parts)

    def _extent(self, info: TensorInfo, shape: tuple[int, ...], start: int, stop: int) -> Extent:
        """Rows start..stop of this matrix in a tensor of `shape` (.., out, ..)."""
        width = info.nbytes // math.prod(shape[:-1])
        return Extent(info.path, info.offset + ((self.index or 0) * shape[-2] + start) * width, (stop - start) * width)

    @property
    def _range(self) -> tuple[int, int, int]:
        return self.picked or (0, self.whole[-2], 1)

    @property
    def _source(self) -> str:
        return f"{self.parts[0].path}: the tensor {self.name!r}"

    def _require(self, rank: int, wanted: str) -> None:
        if len(self.shape) != rank or 0 in self.shape:
            raise InputError(f"{self._source} has the shape {self.whole} where {wanted} is needed; check the config")

    def _refusal(self, reason: object) -> InputError:
        return InputError(f"{self._source} cannot be used: {reason}")

    def _not_finite(self) -> InputError:
        return InputError(f"{self._source} contains NaN or infinity; the file is damaged: download it again")


@dataclass(frozen=True, eq=False)
class _OnDisk(QTensor):
    stored: Stored

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.stored.shape
        return rows, columns

    @property
    def format(self) -> Format:
        return self.stored.format

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        self.stored.rows(start, stop).matrix().dequantize_rows(0, stop - start, out)

    def slice_rows(self, start: int, stop: int, step: int = 1) -> QTensor:
        return _OnDisk(self.stored.rows(start, stop, step))

    def finite(self) -> bool:
        return True  # as far as it is known
