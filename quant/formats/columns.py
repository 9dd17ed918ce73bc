"""Weights laid out by columns, the form in which they are multiplied with a few tokens fastest.

A product with one token reads every weight once, so its speed is that of turning codes into float32. Two things make
this cheap here. Codes are cast without their scales, and multiplied as they are; the scales come in afterwards, once a
group instead of once a weight. And what is cast at once is contiguous and as large as the calls' own time asks for.

A matrix (out, in) is cut into slabs of rows. Within a slab the order is column, then row: what one token's activation
k is multiplied with lies together, and a group of columns is one contiguous range. Workers and threads share the slabs,
whose size depends on the shape alone, and so does every digit of a result.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute.activations import Activations
from numoe.quant.compute.kernels import (
    FEW,
    block_elements,
    equal_spans,
    multiply_columns,
    pack_nibbles,
    scale_codes,
    transposed,
)
from numoe.quant.compute.memory import ALIGNMENT, scratch
from numoe.quant.compute.threads import Task, in_use, run
from numoe.quant.dtypes import E2M1, Float32, UInt8, UInt16, decode_e8m0, decode_f16
from numoe.quant.formats.format import Format
from numoe.quant.formats.integer import INT4, INT8, integer_format
from numoe.quant.formats.mxfp4 import MXFP4
from numoe.quant.formats.plain import F32
from numoe.quant.formats.qtensor import QTensor, finite_scales

SLAB_ROWS = 1024
"""Most rows of a slab. Folders that numoe writes are laid out by this and the next number."""

SMALL = 1 << 19
"""A resident matrix of fewer weights is held as float32: more calls than computing went into its product otherwise.
One of more has two slabs at least."""

WHOLE = 1 << 14
"""A matrix of no more weights, such as a small model's expert, is made float32 as a whole when it is multiplied, and
kept as float32 where there is room: the calls for its groups would take several times as long as their computing."""


_SUMS = 1 << 19
"""Most sums of groups alive at a time in a product of few tokens, unless those of a quantum are more: 2 MiB, scaled and
added up before it has left the caches. Digits depend on it, so it is the same on every machine."""

_SUMS_A_WEIGHT = 0.75
"""Where there are more sums of groups than that, it takes less time to scale the weights."""

_WHOLE_SLABS = 1.75
"""Slabs of up to so many blocks are multiplied with one token at once, such as both of 1536 x 576; more were no faster
(Zen 4)."""

_BIAS_BESIDE = 64
"""For more tokens, multiplying their sums with biases takes longer than adding these to the weights."""

_LINE = ALIGNMENT // 4
_FLOAT32 = np.dtype(np.float32)


class Slab(NamedTuple):
    """Rows first..first + rows of a matrix: its codes, and scales and bias (groups, rows).

    Or `alike` slabs of so many rows, one after another: scales and bias (alike groups, rows).
    """

    first: int
    rows: int
    codes: NDArray[Any]
    scales: NDArray[Any]
    bias: NDArray[Any] | None
    alike: int = 1


@dataclass(frozen=True, eq=False)
class Columns(QTensor):
    """A matrix (out, in) of `size` in slabs.

    codes: flat, slab after slab. scales and bias: flat too, (G, rows) a slab: float16, float32 or e8m0 as uint8.
    value = unit * scale * code + bias.
    """

    codes: NDArray[Any]
    scales: NDArray[Any]
    bias: NDArray[Any] | None
    size: tuple[int, int]
    cut: tuple[tuple[int, int], ...] | None = None
    """Rows first and last + 1 of each slab, where they are not those of `slab_spans`."""

    unit = 1.0
    """The value of code 1 at scale 1."""
    dtype: ClassVar[type[np.integer]]
    """Of what holds the codes."""

    @cached_property
    def shape(self) -> tuple[int, int]:
        return self.size

    @cached_property
    def group(self) -> int:
        """Weights of a row that share a scale."""
        return self.shape[0] * self.shape[1] // self.scales.size

    @property
    def quantum(self) -> int:
        """Groups of a row whose codes cannot be had without each other's."""
        return 1

    @property
    def spans(self) -> Sequence[tuple[int, int]]:
        """Rows first and last + 1 of each slab."""
        return self.cut or slab_spans(*self.shape)

    @cached_property
    def slabs(self) -> list[Slab]:
        """The parts that workers and threads share."""
        return [self._slab(first, stop - first) for first, stop in self.spans]

    @cached_property
    def _firsts(self) -> list[int]:
        """The first row of each slab."""
        return [first for first, _ in self.spans]

    def _slabs_of(self, start: int, stop: int) -> Iterator[tuple[Slab, int, int]]:
        """The slabs that have some of the rows start..stop, and which: first and last + 1."""
        for slab in self.slabs[bisect_right(self._firsts, start) - 1 : bisect_left(self._firsts, stop)]:
            a, b = max(start, slab.first), min(stop, slab.first + slab.rows)
            if a < b:
                yield slab, a, b

    def _slab(self, first: int, rows: int, count: int = 1) -> Slab:
        """The slab of so many rows from `first` on, or several."""

        def part(values: NDArray[Any]) -> NDArray[Any]:
            each = values.size // self.shape[0]
            return values[first * each : (first + count * rows) * each]

        bias = None if self.bias is None else part(self.bias).reshape(-1, rows)
        return Slab(first, rows, part(self.codes), part(self.scales).reshape(-1, rows), bias, count)

    def _joined(self, sharing: int, most: int) -> list[Slab]:
        """The slabs, as many at a time as have `most` weights, for so many threads to share them; none where one has
        more."""
        rows = self.slabs[0].rows
        count = min(most // (rows * self.shape[1]), max(1, len(self.slabs) // sharing))
        if not count:
            return []
        alike = self.slabs if self.slabs[-1].rows == rows else self.slabs[:-1]
        firsts = range(0, len(alike), count)
        runs = [self._slab(alike[at].first, rows, min(count, len(alike) - at)) for at in firsts]
        return runs + self.slabs[len(alike) :]

    def finite(self) -> bool:
        return finite_scales(self.scales) and (self.bias is None or finite_scales(self.bias))

    @classmethod
    def slab_arrays(cls, rows: QTensor) -> list[NDArray[Any]]:
        """The rows of one slab: flat codes, scales, and bias if there is one."""
        codes, *factors = rows.arrays().values()
        return [transposed(codes).reshape(-1), *(values.T.reshape(-1) for values in factors)]

    @classmethod
    def of(cls, format: Format, arrays: Sequence[NDArray[Any]], shape: tuple[int, int]) -> Columns:
        """The matrix that the arrays of all its slabs make, those of a kind one after another."""
        codes, scales, *bias = arrays
        return cls(codes.view(cls.dtype), scales, bias[0] if bias else None, shape)

    @abstractmethod
    def plain(self) -> QTensor:
        """The same matrix in the form it had before."""

    def wider(self) -> QTensor:
        """See `widened`."""
        return self

    @abstractmethod
    def _bytes(self, slab: Slab, start: int, stop: int) -> NDArray[np.int8]:
        """Codes of groups start..stop of a slab, flat (groups g rows,). Valid until the next call."""

    @abstractmethod
    def _rows(self, slab: Slab, start: int, stop: int) -> NDArray[Any]:
        """Codes of rows start..stop of a slab, (in, rows)."""

    def _codes_by_rows(self) -> NDArray[Any]:
        """Those of all rows, (out, in)."""
        return np.ascontiguousarray(np.concatenate([self._rows(slab, 0, slab.rows).T for slab in self.slabs]))

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        for slab, a, b in self._slabs_of(start, stop):
            picked = slice(a - slab.first, b - slab.first)
            part = out[a - start : b - start]
            np.copyto(part, self._rows(slab, picked.start, picked.stop).T, casting="unsafe")
            grouped = part.reshape(b - a, -1, self.group)
            scales, bias = self._scaling(slab)
            grouped *= scales[:, picked].T[..., None]
            if bias is not None:
                grouped += bias[:, picked].T[..., None]

    def dequantize(self) -> Float32:
        out = np.empty(self.shape, np.float32)
        for slab in self.slabs:
            for k, block in self._blocks(slab, *self._scaling(slab)):
                out[slab.first : slab.first + slab.rows, k : k + len(block)] = block.T
        return out

    def slice_rows(self, start: int, stop: int, step: int = 1) -> QTensor:
        """Shares these bytes where the range begins and ends with a slab; elsewhere it copies them."""
        if step != 1:
            return laid_out(self.plain().slice_rows(start, stop, step))
        cut = tuple((s.first - start, s.first - start + s.rows) for s in self.slabs if start <= s.first < stop)
        if not cut or cut[0][0] or cut[-1][1] != stop - start:
            return laid_out(self.plain().slice_rows(start, stop))

        def part(values: NDArray[Any]) -> NDArray[Any]:
            each = values.size // self.shape[0]
            return values[start * each : stop * each]

        parts = {name: part(values) for name, values in self.arrays().items()}
        return replace(self, **parts, size=(stop - start, self.shape[1]), cut=cut)

    def _scaling(self, slab: Slab) -> tuple[Float32, Float32 | None]:
        """The value of code 1 and the bias, if there is one, (G, rows)."""
        scales = _factors(slab.scales)
        if self.unit != 1:
            scales = np.multiply(scales, np.float32(self.unit), out=scratch("scales", scales.shape))
        return scales, None if slab.bias is None else _factors(slab.bias, "bias")

    def _unpacked(self) -> NDArray[np.int8]:
        """The codes of all slabs in a byte each."""
        rows, columns = self.shape
        codes = np.empty(rows * columns, np.int8)

        def unpack(slab: Slab) -> None:
            size = self.group * slab.rows
            to = codes[slab.first * columns :][: slab.rows * columns]
            for start, stop in equal_spans(columns // self.group, size):
                np.copyto(to[start * size : stop * size], self._bytes(slab, start, stop))

        run([partial(unpack, slab) for slab in self.slabs])
        return codes

    def _spans(self, first: int, last: int, size: int, most: int | None = None) -> Sequence[tuple[int, int]]:
        """Ranges of the groups first..last that fit in the scratch, or in `most` elements, where each has `size`."""
        return _whole_quanta(first, last, size, most, self.quantum)

    def _blocks(self, slab: Slab, scales: Float32, bias: Float32 | None) -> Iterator[tuple[int, Float32]]:
        """(first column, (columns, rows) float32) of a slab in turn, scaled, and with a bias added if one is given;
        each is overwritten by the next."""
        group = self.group
        for start, stop in self._spans(0, self.shape[1] // group, group * slab.rows):
            block = scratch("block", (stop - start, group, slab.rows))
            scale_codes(self._bytes(slab, start, stop).reshape(block.shape), scales[start:stop, None], block)
            if bias is not None:
                block += bias[start:stop, None]
            yield start * group, block.reshape(-1, slab.rows)

    def products(self, x: Activations, out: Float32) -> list[Task]:
        if is_small(self.shape):
            return super().products(x, out)
        if len(out) == 1 and (runs := self._runs()):
            return [partial(self._multiply_one, run, x, out[0, run.first :][: run.alike * run.rows]) for run in runs]
        few = len(out) <= min(FEW, _SUMS_A_WEIGHT * self.group)
        multiply = self._multiply_few if few else self._multiply_many
        return [partial(multiply, slab, x, out[:, slab.first : slab.first + slab.rows]) for slab in self.slabs]

    def _runs(self) -> list[Slab]:
        """What one token is multiplied with at once: slabs are cut for threads to share them, and the calls for one
        take a quarter of the time of making it float32. Nothing where they are too large for that."""
        key = in_use(), int(_WHOLE_SLABS * block_elements())
        if key not in self._runs_by:
            self._runs_by[key] = self._joined(*key)
        return self._runs_by[key]

    @cached_property
    def _runs_by(self) -> dict[tuple[int, int], list[Slab]]:
        return {}

    def _multiply_one(self, run: Slab, x: Activations, out: Float32) -> None:
        """`_multiply_few` of one token, with few calls; out (alike rows,)."""
        grouped, group = x.grouped(self.group), self.group  # (G, 1, g)
        shape = run.alike, len(grouped), group, run.rows
        block, sums = scratch("block", shape), scratch("sums", (run.alike, len(grouped), 1, run.rows))
        np.copyto(block, self._bytes(run, 0, run.alike * len(grouped)).reshape(shape))
        np.matmul(grouped, block, out=sums)
        scales, bias = self._scaling(run)
        to = out.reshape(run.alike, run.rows)
        np.einsum("sgr,sgr->sr", sums[:, :, 0], scales.reshape(run.alike, -1, run.rows), out=to)
        if bias is not None:
            to += np.matmul(x.sums(group), bias.reshape(run.alike, -1, run.rows))[:, 0]

    def _multiply_few(self, slab: Slab, x: Activations, out: Float32) -> None:
        """out = x @ W.T for at most FEW tokens; out (T, rows)."""
        tokens = len(out)
        # Added up in memory of this thread's own: rows of `out` lie far apart, and between them what others write.
        own = out if tokens == 1 else scratch("own", out.shape)
        scales, bias = self._scaling(slab)
        for first, last in self._spans(0, len(scales), tokens * slab.rows, _SUMS):
            sums = self._sums(slab, x, first, last)
            added = own if not first else scratch("added", out.shape)
            np.einsum("gtr,gr->tr", sums, scales[first:last], out=added)
            if first:
                own += added
        if bias is not None:
            own += np.matmul(x.sums(self.group), bias, out=scratch("added", out.shape))
        if own is not out:
            np.copyto(out, own)

    def _sums(self, slab: Slab, x: Activations, first: int, last: int) -> Float32:
        """Products of x with the codes of groups first..last, each by itself: (groups, T, rows). Valid until the next
        call."""
        grouped = x.grouped(self.group)
        _, tokens, size = grouped.shape
        sums = scratch("sums", (last - first, tokens, slab.rows))
        pitch = slab.rows if tokens == 1 else _apart(slab.rows)
        for start, stop in self._spans(first, last, size * slab.rows, block_elements()):
            block = scratch("block", (stop - start, size, pitch))
            if pitch != slab.rows:
                block = block[..., : slab.rows]
            np.copyto(block, self._bytes(slab, start, stop).reshape(block.shape))
            np.matmul(grouped[start:stop], block, out=sums[start - first : stop - first])
        return sums

    def _multiply_many(self, slab: Slab, x: Activations, out: Float32) -> None:
        """out = x @ W.T for many tokens; out (T, rows)."""
        scales, bias = self._scaling(slab)
        beside = bias is not None and len(out) <= _BIAS_BESIDE
        for k, block in self._blocks(slab, scales, None if beside else bias):
            multiply_columns(x.x[:, k : k + len(block)], block, out, add=k > 0)
        if bias is not None and beside:
            multiply_columns(x.sums(self.group), bias, out, add=True)


def _as_stored(matrix: Columns, slab: Slab, start: int, stop: int) -> NDArray[np.int8]:
    """`_bytes` of codes that are bytes."""
    size = matrix.group * slab.rows
    return slab.codes[start * size : stop * size]


@dataclass(frozen=True, eq=False)
class INT8Columns(Columns):
    """codes int8."""

    codes: NDArray[np.int8]
    dtype = np.int8

    @property
    def format(self) -> Format:
        return integer_format(8, self.group, 8 * self.scales.itemsize, self.bias is not None)

    def plain(self) -> INT8:
        bias = None if self.bias is None else by_rows(self, "bias")
        return INT8(self._codes_by_rows(), by_rows(self, "scales"), bias)

    _bytes = _as_stored

    def _rows(self, slab: Slab, start: int, stop: int) -> NDArray[np.int8]:
        return slab.codes.reshape(-1, slab.rows)[:, start:stop]


@dataclass(frozen=True, eq=False)
class INT4Columns(Columns):
    """value = scale * q + bias, or scale * (q - 8) without a bias.

    codes uint8, (G, g/2, rows) a slab: in bits 0-3 the q of the first half of a group's columns, in bits 4-7 those of
    its second.
    """

    codes: UInt8
    dtype = np.uint8

    @property
    def format(self) -> Format:
        return integer_format(4, self.group, 8 * self.scales.itemsize, self.bias is not None)

    def plain(self) -> INT4:
        codes = self._codes_by_rows()
        if self.bias is None:
            codes += np.int8(8)
        nibbles = codes.view(np.uint8)
        packed = pack_nibbles(nibbles.reshape(len(nibbles), -1, self.group)).reshape(len(nibbles), -1)
        bias = None if self.bias is None else by_rows(self, "bias")
        return INT4(packed, by_rows(self, "scales"), bias)

    def _bytes(self, slab: Slab, start: int, stop: int) -> NDArray[np.int8]:
        half = self.group * slab.rows // 2
        codes = slab.codes[start * half : stop * half].reshape(-1, half)
        out = scratch("bytes", (stop - start, 2, half), np.uint8)
        np.bitwise_and(codes, 15, out=out[:, 0])
        np.right_shift(codes, 4, out=out[:, 1])
        signed = out.reshape(-1).view(np.int8)  # which is cast a little faster than uint8
        if self.bias is None:
            signed -= np.int8(8)
        return signed

    def _rows(self, slab: Slab, start: int, stop: int) -> NDArray[np.int8]:
        packed = slab.codes.reshape(-1, 1, self.group // 2, slab.rows)[..., start:stop]
        codes = packed >> np.array([0, 4], np.uint8)[:, None, None] & np.uint8(15)
        signed = codes.reshape(self.shape[1], -1).view(np.int8)
        if self.bias is None:
            signed -= np.int8(8)
        return signed


@dataclass(frozen=True, eq=False)
class MXFP4Columns(Columns):
    """e2m1 codes with e8m0 scales. codes uint16, rows/4 a column: four successive rows each, the first in bits 0-3.

    A table of all words gives the four values, each twice what it is, as int8.
    """

    codes: UInt16
    format = MXFP4.format
    unit = 0.5
    dtype = np.uint16

    @classmethod
    def slab_arrays(cls, rows: QTensor) -> list[NDArray[Any]]:
        assert isinstance(rows, MXFP4)
        return [e2m1_words(rows.codes), rows.scales.T.reshape(-1)]

    def plain(self) -> MXFP4:
        return MXFP4(e2m1_codes(self._codes_by_rows()), by_rows(self, "scales"))

    def _bytes(self, slab: Slab, start: int, stop: int) -> NDArray[np.int8]:
        size = self.group * slab.rows // 4
        codes = slab.codes[start * size : stop * size]
        index = scratch("index", codes.shape, np.intp)
        np.copyto(index, codes)
        out = scratch("words", codes.shape, np.uint32)
        return np.take(_values_of_words(), index, out=out, mode="wrap").view(np.int8)

    def _rows(self, slab: Slab, start: int, stop: int) -> NDArray[np.int8]:
        word, place = np.divmod(np.arange(start, stop), 4)
        words = slab.codes.reshape(self.shape[1], -1)[:, word]
        return _TWICE_E2M1[words >> (4 * place).astype(np.uint16) & np.uint16(15)]


@dataclass(frozen=True, eq=False)
class INT4Wide(INT4Columns):
    """The same with a byte a weight: codes int8, (in, rows) a slab, q, or q - 8 without a bias. Scales and bias are
    float32."""

    codes: NDArray[Any]

    _bytes = _as_stored

    @property
    def format(self) -> Format:
        return super().format.wide

    def _rows(self, slab: Slab, start: int, stop: int) -> NDArray[np.int8]:
        return slab.codes.reshape(-1, slab.rows)[:, start:stop]


@dataclass(frozen=True, eq=False)
class MXFP4Wide(MXFP4Columns):
    """The same with a byte a weight: codes int8, (in, rows) a slab, twice the values."""

    codes: NDArray[Any]
    format = MXFP4.format.wide

    _bytes = _as_stored

    def _rows(self, slab: Slab, start: int, stop: int) -> NDArray[np.int8]:
        return slab.codes.reshape(-1, slab.rows)[:, start:stop]


def widened(matrix: QTensor) -> QTensor:
    """The form of the matrix that takes more memory and less time, to the same digits; the matrix itself where there
    is none. int4 and mxfp4 take a byte a weight, and the scales and biases of integers are float32; what is small is
    all float32."""
    plain = not (matrix.format.scaled or isinstance(matrix, F32))
    if is_small(matrix.shape) and (isinstance(matrix, Columns) or plain):
        return F32(QTensor.dequantize(matrix))
    if isinstance(matrix, INT4Wide | MXFP4Wide) or not isinstance(matrix, INT8Columns | INT4Columns | MXFP4Columns):
        return matrix.wider() if isinstance(matrix, Columns) else matrix
    integers = not isinstance(matrix, MXFP4Columns)
    scales = matrix.scales.astype(np.float32, copy=False) if integers else matrix.scales
    bias = None if matrix.bias is None else matrix.bias.astype(np.float32, copy=False)
    if isinstance(matrix, INT8Columns):
        return INT8Columns(matrix.codes, scales, bias, matrix.shape, matrix.cut)
    codes = matrix._unpacked()
    return (INT4Wide if integers else MXFP4Wide)(codes, scales, bias, matrix.shape, matrix.cut)


def _apart(rows: int) -> int:
    """How far apart columns of so many numbers begin for BLAS to read several at once: an odd number of cache lines.

    Where it is a multiple of many, they share few places in the cache, and products with 2, 3 or 7 tokens take a tenth
    to a third longer.
    """
    return (-(-rows // _LINE) | 1) * _LINE


@cache
def _whole_quanta(first: int, last: int, size: int, most: int | None, quantum: int) -> Sequence[tuple[int, int]]:
    """See `Columns._spans`."""
    spans = equal_spans((last - first) // quantum, size * quantum, most)
    return [(first + start * quantum, first + stop * quantum) for start, stop in spans]


def is_small(shape: tuple[int, int]) -> bool:
    """Whether a matrix is multiplied as a float32 one, see `WHOLE`."""
    return shape[0] * shape[1] <= WHOLE


def slab_spans(rows: int, columns: int) -> list[tuple[int, int]]:
    """The rows of each slab; all but the last have the same number, a multiple of 4."""
    slabs = max(-(-rows // SLAB_ROWS), 1 if rows * columns < SMALL else 2)
    step = -(-rows // (4 * slabs)) * 4
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


FORMS: dict[str, type[Columns]] = {"int8": INT8Columns, "int4": INT4Columns, "mxfp4": MXFP4Columns}
"""By `Format.kind`; a file of kinds that has its own adds them."""


def slab_arrays(rows: QTensor) -> list[NDArray[Any]]:
    """The rows of one slab, of a format with a form by columns: flat codes, scales, and bias if there is one."""
    return FORMS[rows.format.kind].slab_arrays(rows)


def laid_out(matrix: QTensor) -> QTensor:
    """The matrix by columns where there is such a form of it, else the matrix itself."""
    if isinstance(matrix, Columns) or not matrix.format.by_columns(matrix.shape[0]):
        return matrix
    slabs = [slab_arrays(matrix.slice_rows(*span)) for span in slab_spans(*matrix.shape)]
    return from_arrays(matrix.format, [np.concatenate(parts) for parts in zip(*slabs, strict=True)], matrix.shape)


def from_arrays(format: Format, arrays: Sequence[NDArray[Any]], shape: tuple[int, int]) -> Columns:
    """The matrix of a format that the arrays of all its slabs make, those of a kind one after another."""
    return FORMS[format.kind].of(format, arrays, shape)


def e2m1_codes(values: NDArray[Any]) -> UInt8:
    """Twice the values of e2m1 (out, in) as codes, two a byte, low nibble first: (out, in/2)."""
    nibble = np.zeros(256, np.uint8)
    nibble[_TWICE_E2M1.view(np.uint8)] = np.arange(16)
    nibbles = nibble[values.view(np.uint8)]
    return nibbles[:, 0::2] | nibbles[:, 1::2] << np.uint8(4)


def e2m1_words(stored_codes: UInt8) -> UInt16:
    """e2m1 codes (out, in/2), low nibble first, as those of `MXFP4Columns`, flat."""
    rows, columns = len(stored_codes), 2 * stored_codes.shape[1]
    packed = transposed(stored_codes)  # (in/2, rows), the column of even number in the low bits
    codes = np.empty((columns, rows // 4), np.uint16)
    stored = codes.view(np.uint8).reshape(columns // 2, 2, -1)
    even, odd = packed[:, 0::2], packed[:, 1::2]
    stored[:, 0] = even & np.uint8(15) | odd << np.uint8(4)
    stored[:, 1] = even >> np.uint8(4) | odd & np.uint8(0xF0)
    return codes.reshape(-1)


def by_rows(matrix: Columns, which: str) -> NDArray[Any]:
    """Its scales or bias, (out, G)."""
    return np.concatenate([getattr(slab, which).T for slab in matrix.slabs])


def _factors(stored: NDArray[Any], use: str = "scales") -> Float32:
    """Scales or bias as float32."""
    if stored.dtype == _FLOAT32:
        return stored
    out = scratch(use, stored.shape)
    return decode_e8m0(stored, out) if stored.dtype == np.uint8 else decode_f16(stored, out)


_TWICE_E2M1 = (2 * E2M1).astype(np.int8)


@cache
def _values_of_words() -> NDArray[np.uint32]:
    """(65536,) items of four int8: twice the e2m1 values of the nibbles of the index, the lowest first."""
    pairs = np.stack([np.tile(_TWICE_E2M1, 16), np.repeat(_TWICE_E2M1, 16)], axis=1)  # of each byte
    both = np.empty((256, 256, 4), np.int8)
    both[..., :2], both[..., 2:] = pairs[None], pairs[:, None]
    return both.reshape(-1, 4).view(np.uint32)[:, 0]
