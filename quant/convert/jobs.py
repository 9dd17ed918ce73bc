"""What a conversion writes: the weights of a model, and the tensors that each becomes.

Memory is bounded by a block of rows a thread, one slab of rows, and the scales of one matrix; of matrices that are
stored (in, out), by a whole one a thread.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute import threads
from numoe.quant.convert.recipe import Target, target
from numoe.quant.files import Files, TensorInfo
from numoe.quant.formats.columns import slab_arrays, slab_spans
from numoe.quant.formats.pack import Moments, float16_loss
from numoe.quant.formats.qtensor import QTensor
from numoe.quant.stored.conventions.native import block_name, companion, own_layout
from numoe.quant.stored.handle import Stored
from numoe.quant.stored.safetensors import DTYPE_BITS

_BLOCK_ELEMENTS = 1 << 20  # weights in float32 at a time and thread: 4 MiB
_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class Matrix:
    """A matrix of the result, which a recipe may write anew."""

    name: str
    """Its name in the result."""
    role: str
    stored: Stored = field(compare=False)
    unit: str = ""
    """Successive matrices of the same unit are kept together; "" for none."""
    inputs: Moments | None = field(default=None, compare=False)
    """What `Target.pack` takes."""

    def jobs(self, quant: str) -> list[Job]:
        """What writes it in the format of a recipe, see `recipes.roles`."""
        rows, columns = self.stored.shape
        wanted = target(quant, self.role, columns, 8 * self.stored.nbytes / (rows * columns))
        return self.kept() if wanted is None else [Quantization(self, wanted)]

    def kept(self) -> list[Job]:
        """What writes it in the format it has."""
        cuts = self.stored.cuts()
        layout = own_layout(self.name, self.stored.format, self.stored.shape)
        if not cuts:
            return [Arrangement(self.stored, tuple(Output(*one) for one in layout))]
        copies = []
        for (name, _, _), cut in zip(layout, cuts, strict=True):
            output = Output(name, cut.dtype, (cut.rows, 8 * cut.row // DTYPE_BITS[cut.dtype]))
            copies.append(Copy(output, cut.tensor, cut.start, cut.row, cut.step))
        return _arranged(self.stored, copies)


@dataclass(frozen=True)
class Array:
    """An array of the result, whose values stay."""

    name: str
    """Its name in the result."""
    stored: Stored = field(compare=False)
    shape: tuple[int, ...] = ()
    columns: slice | None = None
    """Which part of the last axis of what is stored it is; None: all."""
    made: Callable[[Stored], NDArray] | None = field(default=None, compare=False)
    """What gives float32 values of what is stored; None: they stay as they are stored."""

    unit = ""

    def jobs(self, quant: str) -> list[Job]:
        """What writes it, whatever the recipe."""
        if self.made is not None:
            return [Making(Output(self.name, "F32", self.shape), self.stored, self.made)]
        if self.stored.parts[0].dtype not in DTYPE_BITS:  # of GGUF, whose blocks no other file has
            return [Making(Output(self.name, "F32", self.shape), self.stored, self._values)]
        if self.columns is not None:
            output = Output(self.name, self.stored.parts[0].dtype, self.shape)
            return [Making(output, self.stored, partial(_columns, self.columns))]
        parts = zip(_parts(self.name), self.stored.parts, strict=False)
        return [Copy(Output(name, info.dtype, info.shape), info.name) for name, info in parts]

    def _values(self, stored: Stored) -> NDArray:
        return stored.array()[..., self.columns or slice(None)].reshape(self.shape)


@dataclass(frozen=True)
class Reader:
    """Where the tensors of the source are now."""

    tensors: dict[str, TensorInfo]
    files: Files

    def __call__(self, stored: Stored) -> Stored:
        """A weight of the source, to be read."""
        return stored.moved(self.tensors, self.files)


@dataclass(frozen=True)
class Output:
    """A tensor to write."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


class Job(ABC):
    """What makes some tensors of the result that follow each other."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[Output, ...]:
        """The tensors, as far as they are known before the weights are looked at."""

    @property
    @abstractmethod
    def needs(self) -> tuple[str, ...]:
        """The stored tensors that are read."""

    @abstractmethod
    def pieces(self, reader: Reader) -> Iterator[NDArray]:
        """The bytes of the tensors, in order."""

    def settled(self, reader: Reader) -> Sequence[Job]:
        """What is to be done instead, now that the weights can be looked at."""
        return [self]


@dataclass(frozen=True)
class Copy(Job):
    """A tensor that is a byte range of the stored tensor `source`, from its byte `start`.

    Where `step` is above one, it has only the first of every `step` rows of `row` bytes.
    """

    output: Output
    source: str
    start: int = 0
    row: int = 1
    step: int = 1

    @property
    def outputs(self) -> tuple[Output, ...]:
        return (self.output,)

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.source,)

    def pieces(self, reader: Reader) -> Iterator[NDArray]:
        info = reader.tensors[self.source]
        stride = self.row * self.step
        end = self.start + self.output.nbytes * self.step
        piece = max(1, _COPY_BYTES // stride) * stride
        for at in range(self.start, end, piece):
            nbytes = min(piece, end - at)
            if self.step == 1:
                yield reader.files.read_range(info.path, info.offset + at, nbytes)
            else:  # the rows behind the last one may be none of this tensor's
                rows = reader.files.read_range(info.path, info.offset + at, nbytes - stride + self.row)
                whole = np.concatenate([rows, np.zeros(stride - self.row, np.uint8)])
                yield np.ascontiguousarray(whole.reshape(-1, self.step, self.row)[:, 0])


@dataclass(frozen=True)
class Making(Job):
    """A tensor that is made of a whole weight."""

    output: Output
    stored: Stored
    made: Callable[[Stored], NDArray]

    @property
    def outputs(self) -> tuple[Output, ...]:
        return (self.output,)

    @property
    def needs(self) -> tuple[str, ...]:
        return _tensors(self.stored)

    def pieces(self, reader: Reader) -> Iterator[NDArray]:
        yield np.ascontiguousarray(self.made(reader(self.stored)))


@dataclass(frozen=True)
class Quantization(Job):
    """A matrix to be read, packed and written."""

    matrix: Matrix
    target: Target

    @property
    def outputs(self) -> tuple[Output, ...]:
        rows, columns = self.matrix.stored.shape
        layout = self.target.layout(rows, columns)
        return tuple(Output(name, *tensor) for name, tensor in zip(_parts(self.matrix.name), layout, strict=False))

    @property
    def needs(self) -> tuple[str, ...]:
        return _tensors(self.matrix.stored)

    def pieces(self, reader: Reader) -> Iterator[NDArray]:
        stored = reader(self.matrix.stored)
        rows, columns = stored.shape
        by_columns = self.target.format.by_columns(rows)
        step = max(1, _BLOCK_ELEMENTS // columns) * threads.in_use()
        blocks = ((start, min(start + step, rows)) for start in range(0, rows, step))
        spans = slab_spans(rows, columns) if by_columns else blocks
        parts = (self._packed(stored, start, stop) for start, stop in spans)
        yield from _codes_first(slab_arrays(part) if by_columns else list(part.arrays().values()) for part in parts)

    def settled(self, reader: Reader) -> Sequence[Job]:
        return [self] if self._fits(reader) else self.matrix.kept()

    def _fits(self, reader: Reader) -> bool:
        """Whether this format can hold the matrix: float16 has no scales for weights near 1e-6 and above 65504."""
        format = self.target.format
        if not format.scale_bits:
            return True
        stored = reader(self.matrix.stored)
        rows, columns = stored.shape
        step = max(1, _BLOCK_ELEMENTS // columns)
        starts = range(0, rows, step)
        found = np.empty((len(starts), 2))
        levels = (1 << format.bits) - 1

        def measure(part: int) -> None:
            block = stored.rows(starts[part], min(starts[part] + step, rows)).matrix().dequantize()
            found[part] = float16_loss(block, self.target.group, levels)

        threads.share(len(starts), measure)
        lost, whole = found.sum(axis=0)
        return bool(lost <= whole / (2 * levels) ** 2)  # about what the levels themselves leave

    def _packed(self, stored: Stored, start: int, stop: int) -> QTensor:
        """Rows start..stop of the matrix, no more float32 blocks at a time than threads."""
        step = max(1, _BLOCK_ELEMENTS // stored.shape[1])
        starts = range(start, stop, step)
        packed: list[QTensor | None] = [None] * len(starts)

        def pack(part: int) -> None:
            block = stored.rows(starts[part], min(starts[part] + step, stop)).matrix().dequantize()
            packed[part] = self.target.pack(block, self.matrix.inputs)

        threads.share(len(starts), pack)
        parts = [one for one in packed if one is not None]
        return type(parts[0])(*map(np.concatenate, zip(*(one.arrays().values() for one in parts), strict=True)))


@dataclass(frozen=True)
class Arrangement(Job):
    """A matrix that keeps its codes and scales, and is laid out by columns where there is such a form of it."""

    stored: Stored
    written: tuple[Output, ...]

    @property
    def outputs(self) -> tuple[Output, ...]:
        return self.written

    @property
    def needs(self) -> tuple[str, ...]:
        return _tensors(self.stored)

    def pieces(self, reader: Reader) -> Iterator[NDArray]:
        stored = reader(self.stored)
        if not stored.format.by_columns(stored.shape[0]):
            yield from stored.matrix().arrays().values()
            return
        yield from _codes_first(slab_arrays(stored.rows(*span).matrix()) for span in slab_spans(*stored.shape))


def copies(stored: Stored) -> list[Job]:
    """A whole weight under the name and in the format that it has."""
    codes, *others = stored.parts
    if codes.dtype not in DTYPE_BITS and len(stored.shape) == 2:  # of GGUF
        return Matrix(stored.name, "", stored).kept()
    if codes.dtype not in DTYPE_BITS:
        shape = (*codes.shape[:-1], codes.nbytes // math.prod(codes.shape[:-1]))
        blocks = Output(block_name(stored.name, codes.dtype), "U8", shape)
        return [Copy(blocks, codes.name), *map(_whole, others)]
    return _arranged(stored, [_whole(info) for info in stored.parts])


def _whole(info: TensorInfo) -> Copy:
    """A tensor as it is stored."""
    return Copy(Output(info.name, info.dtype, info.shape), info.name)


def _arranged(stored: Stored, copies: Sequence[Copy]) -> list[Job]:
    """Instead of copies of a matrix's codes and scales what lays them out, where they have a form by columns."""
    if stored.laid_out or len(stored.shape) != 2 or not stored.format.by_columns(stored.shape[0]):
        return list(copies)
    return [Arrangement(stored, tuple(copy.output for copy in copies))]


def _parts(name: str) -> tuple[str, str, str]:
    """The names of a weight's codes, scales and minimums."""
    return name, companion(name, "scale"), companion(name, "minimum")


def _columns(columns: slice, stored: Stored) -> NDArray:
    """A part of the last axis of an array, in the dtype in which it is stored."""
    (info,) = stored.parts
    raw = stored.files.read_range(info.path, info.offset, info.nbytes)
    return raw.view(f"V{DTYPE_BITS[info.dtype] // 8}").reshape(info.shape)[..., columns]


def _tensors(stored: Stored) -> tuple[str, ...]:
    return tuple(info.name for info in stored.parts)


def _codes_first(parts: Iterable[Sequence[NDArray]]) -> Iterator[NDArray]:
    """The codes of all parts, then their scales, then their biases."""
    factors = []
    for codes, *others in parts:
        yield codes
        factors.append(others)
    yield from chain.from_iterable(zip(*factors, strict=True))
