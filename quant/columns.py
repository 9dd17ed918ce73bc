"""Weights laid out by columns, the form in which they are multiplied with a few tokens fastest.

A product with one token reads every weight once, so its speed is that of turning codes into float32. Two things make
this cheap here. Integer codes are cast without their scales, a block of columns at a time, and multiplied as they are;
the scales come in afterwards, once a group instead of once a weight. And 4-bit codes go two to a float32: a word
a + 2^12 b of two rows is cast once and multiplied once, and since the activations are split into small integers
("digits") both sums come out exactly, one below and one above the 12th bit.

A matrix (out, in) is cut into slabs of rows. Within a slab the order is column, then row: what one token's activation
k is multiplied with lies together, and a group of columns is one contiguous range. Threads share the slabs; their size
depends on the shape alone, and so does every digit of a result.
"""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numoe.quant.activations import FIELD_BITS, Activations, Rounding
from numoe.quant.dtypes import E2M1, Float32, UInt8, UInt16, decode_e2m1, decode_e8m0, decode_f16, encode_e8m0
from numoe.quant.kernels import pack_nibbles
from numoe.quant.qtensor import FEW, INT4, INT8, MXFP4, QTensor, finite_scales
from numoe.quant.threads import Task, run

SLAB_ROWS = 1024
"""Most rows of a slab. Folders that numoe writes are laid out by this and the next number."""

SMALL = 1 << 19
"""A resident matrix of fewer weights is held as float32: more calls than computing went into its product otherwise.
One of more has two slabs at least."""

_BLOCK = 1 << 19  # float32 weights alive at a time: 2 MiB; with fewer, the calls take longer than the caches save


class Slab(NamedTuple):
    """Rows first..first + rows of a matrix: its codes, and scales and bias (groups, rows)."""

    first: int
    rows: int
    codes: NDArray[Any]
    scales: NDArray[Any]
    bias: NDArray[Any] | None


@dataclass(frozen=True, eq=False)
class Columns(QTensor):
    """A matrix (out, in) of `size` in slabs.

    codes: flat, slab after slab. scales and bias: flat too, (G, rows) a slab: float16, float32 or e8m0 as uint8.
    value = scale * code + bias.
    """

    codes: NDArray[Any]
    scales: NDArray[Any]
    bias: NDArray[Any] | None
    size: tuple[int, int]
    cut: tuple[tuple[int, int], ...] | None = None
    """Rows first and last + 1 of each slab, where they are not those of `slab_spans`."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @cached_property
    def group(self) -> int:
        """Weights of a row that share a scale."""
        return self.shape[0] * self.shape[1] // self.scales.size

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + (0 if self.bias is None else self.bias.nbytes)

    @cached_property
    def slabs(self) -> list[Slab]:
        """The parts that threads share."""
        rows, columns = self.shape
        groups = columns // self.group
        parts = []
        for first, stop in self.cut or slab_spans(rows, columns):
            count = stop - first
            codes = self.codes[first * columns * self.codes.size // (rows * columns) :]
            codes = codes[: count * columns * self.codes.size // (rows * columns)]
            at = slice(first * groups, (first + count) * groups)
            bias = None if self.bias is None else self.bias[at].reshape(groups, count)
            parts.append(Slab(first, count, codes, self.scales[at].reshape(groups, count), bias))
        return parts

    def finite(self) -> bool:
        return finite_scales(self.scales) and (self.bias is None or finite_scales(self.bias))

    @abstractmethod
    def plain(self) -> QTensor:
        """The same matrix in the form it had before."""

    @abstractmethod
    def _rows(self, slab: Slab, start: int, stop: int) -> NDArray[Any]:
        """Codes of rows start..stop of a slab, (in, rows)."""

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        for slab in self.slabs:
            a, b = max(start, slab.first), min(stop, slab.first + slab.rows)
            if a < b:
                picked = slice(a - slab.first, b - slab.first)
                part = out[a - start : b - start]
                np.copyto(part, self._rows(slab, picked.start, picked.stop).T, casting="unsafe")
                grouped = part.reshape(b - a, -1, self.group)
                grouped *= _factors(slab.scales[:, picked]).T[..., None]
                if slab.bias is not None:
                    grouped += self._bias(slab)[:, picked].T[..., None]

    def dequantize(self) -> Float32:
        out = np.empty(self.shape, np.float32)
        for slab in self.slabs:
            for k, block in self._blocks(slab, self.shape[1]):
                out[slab.first : slab.first + slab.rows, k : k + len(block)] = block.T
        return out

    def slice_rows(self, start: int, stop: int) -> QTensor:
        """Shares these bytes where the range begins and ends with a slab; elsewhere it copies them."""
        cut = tuple((s.first - start, s.first - start + s.rows) for s in self.slabs if start <= s.first < stop)
        if not cut or cut[0][0] or cut[-1][1] != stop - start:
            return laid_out(self.plain().slice_rows(start, stop))

        def part(values: NDArray[Any]) -> NDArray[Any]:
            each = values.size // self.shape[0]
            return values[start * each : stop * each]

        bias = None if self.bias is None else part(self.bias)
        return type(self)(part(self.codes), part(self.scales), bias, (stop - start, self.shape[1]), cut)

    unit = 1.0
    """The value of code 1 at scale 1."""
    offset = 0
    """What codes were before they were centred, less what they are: of unsigned 4-bit ones 8."""

    def _bias(self, slab: Slab) -> Float32:
        """What is added to scale * code, (G, rows)."""
        assert slab.bias is not None
        return _factors(slab.bias, "bias") + np.float32(self.offset) * _factors(slab.scales)

    def _blocks(self, slab: Slab, columns: int) -> Iterator[tuple[int, Float32]]:
        """(first column, (columns, rows) float32) of a slab in turn; each is overwritten by the next."""
        group = self.group
        step = max(1, _BLOCK // (slab.rows * group))
        scales = _factors(slab.scales)
        bias = None if slab.bias is None else self._bias(slab)
        for g in range(0, columns // group, step):
            end = min(g + step, columns // group)
            block = _scratch("block", (end - g, group, slab.rows))
            self._decode(slab, g, end, block)
            block *= scales[g:end, None]
            if bias is not None:
                block += bias[g:end, None]
            yield g * group, block.reshape(-1, slab.rows)

    @abstractmethod
    def _decode(self, slab: Slab, start: int, stop: int, out: Float32) -> None:
        """Groups start..stop of a slab without scales: out (groups, g, rows)."""

    def products(self, x: Activations, out: Float32) -> list[Task]:
        def multiply(slab: Slab) -> None:
            to = out[:, slab.first : slab.first + slab.rows]
            if len(out) <= FEW:
                self._multiply_few(slab, x, to)
            else:
                self._multiply_many(slab, x.x, to)

        return [partial(multiply, slab) for slab in self.slabs]

    @abstractmethod
    def _multiply_few(self, slab: Slab, x: Activations, out: Float32) -> None:
        """out = x @ W.T for at most FEW tokens; out (T, rows)."""

    def _finish(self, slab: Slab, x: Activations, sums: Float32, out: Float32) -> None:
        """Of the sums of each group's codes times x, (G, T, rows), the product (T, rows)."""
        scales = _factors(slab.scales)
        np.einsum("gtr,gr->tr", sums, scales, out=out)
        if self.unit != 1:
            out *= np.float32(self.unit)
        if slab.bias is not None:  # scale * (code + offset) + bias
            if self.offset:
                out += np.matmul(x.shifts(self.group, self.offset), scales)
            out += np.matmul(x.sums(self.group), _factors(slab.bias, "bias"))

    def _multiply_many(self, slab: Slab, x: Float32, out: Float32) -> None:
        """out = x @ W.T for many tokens; out (T, rows)."""
        part = _scratch("part", out.shape)
        for k, block in self._blocks(slab, self.shape[1]):
            columns = x[:, k : k + len(block)]
            if k == 0:
                np.matmul(columns, block, out=out)
            else:
                out += np.matmul(columns, block, out=part)


@dataclass(frozen=True, eq=False)
class _Bytes(Columns):
    """codes int8, one a weight."""

    codes: NDArray[np.int8]

    @abstractmethod
    def _grouped(self, x: Activations) -> Float32:
        """What the codes are multiplied with, (G, T, g)."""

    def _rows(self, slab: Slab, start: int, stop: int) -> NDArray[np.int8]:
        return slab.codes.reshape(-1, slab.rows)[:, start:stop]

    def _codes_by_rows(self) -> NDArray[np.int8]:
        """(out, in)."""
        rows, columns = self.shape
        codes = np.empty((rows, columns), np.int8)
        for slab in self.slabs:
            codes[slab.first : slab.first + slab.rows] = self._rows(slab, 0, slab.rows).T
        return codes

    def _decode(self, slab: Slab, start: int, stop: int, out: Float32) -> None:
        size = self.group * slab.rows
        np.copyto(out.reshape(-1), slab.codes[start * size : stop * size])

    def _multiply_few(self, slab: Slab, x: Activations, out: Float32) -> None:
        grouped = self._grouped(x)
        groups, tokens, size = grouped.shape
        sums = _scratch("sums", (groups, tokens, slab.rows))
        for start, stop in _spans(groups, size * slab.rows):
            block = _scratch("block", (stop - start, size, slab.rows))
            self._decode(slab, start, stop, block)
            np.matmul(grouped[start:stop], block, out=sums[start:stop])
        self._finish(slab, x, sums, out)


@dataclass(frozen=True, eq=False)
class INT8Columns(_Bytes):
    """value = scale * code + bias, activations as they are."""

    @property
    def format(self) -> str:
        return f"int8 g{self.group}"

    def plain(self) -> INT8:
        bias = None if self.bias is None else _by_rows(self, "bias")
        return INT8(self._codes_by_rows(), _by_rows(self, "scales"), bias)

    def _grouped(self, x: Activations) -> Float32:
        return x.grouped(self.group)


@dataclass(frozen=True, eq=False)
class _Pairs(Columns):
    """Matrices whose codes go two to a float32 word.

    `_fill` makes the words a + 2^12 b of some groups of a slab, (passes, width) of them a column. Rows come in the
    order (pass, field, position): a pass's first fields are `width` successive rows, and so are its second ones.
    """

    rounding: ClassVar[Rounding]
    passes = 1

    @abstractmethod
    def _fill(self, slab: Slab, index: int, start: int, stop: int, words: Float32) -> None:
        """The words of pass `index` of groups start..stop, flat (groups g width,)."""

    def _width(self, slab: Slab) -> int:
        return slab.rows // (2 * self.passes)

    def _decode(self, slab: Slab, start: int, stop: int, out: Float32) -> None:
        self._integers(slab, start, stop, out)
        if self.unit != 1:
            out *= np.float32(self.unit)

    def _integers(self, slab: Slab, start: int, stop: int, out: Float32) -> None:
        """Codes of groups start..stop of a slab, (groups, g, rows)."""
        width = self._width(slab)
        words = _scratch("words", (stop - start, self.group, width))
        fields = out.reshape(stop - start, self.group, self.passes, 2, width)
        for index in range(self.passes):
            self._fill(slab, index, start, stop, words.reshape(-1))
            low, high = fields[:, :, index, 0], fields[:, :, index, 1]
            words -= np.float32(self.offset)
            np.multiply(words, np.float32(2**-FIELD_BITS), out=high)
            np.rint(high, out=high)
            np.multiply(high, np.float32(2**FIELD_BITS), out=low)
            np.subtract(words, low, out=low)

    def _multiply_few(self, slab: Slab, x: Activations, out: Float32) -> None:
        digits = x.digits(self.group, self.rounding)
        groups, lines, size = digits.values.shape
        tokens, count = digits.units.shape[3], digits.units.shape[-1]
        passes, width = self.passes, self._width(slab)
        sums = _scratch("sums", (2, passes, groups, lines, width))
        low, high = sums
        for start, stop in _spans(groups, 2 * size * width):
            words = _scratch("words", (stop - start, size, width))
            for index in range(passes):
                self._fill(slab, index, start, stop, words.reshape(-1))
                np.matmul(digits.values[start:stop], words, out=low[index, start:stop])
        if self.offset:
            low -= digits.offsets
        np.rint(low, out=high)  # the second fields' sums; what is left of the first ones' is below one half
        low -= high
        by_row = _scratch("by row", (groups, tokens, passes, 2, 1, width))
        by_digit = sums.reshape(2, passes, groups, tokens, count, width)
        np.matmul(digits.units, by_digit, out=by_row.transpose(3, 2, 0, 1, 4, 5))
        self._finish(slab, x, by_row.reshape(groups, tokens, slab.rows), out)

    def codes_in_bytes(self) -> NDArray[np.int8]:
        """The codes as integers, flat, in the order (slab, column, row)."""
        rows, columns = self.shape
        codes = np.empty(rows * columns, np.int8)

        def unpack(slab: Slab) -> None:
            size = self.group * slab.rows
            to = codes[slab.first * columns :][: slab.rows * columns].reshape(-1, size)
            for start, stop in _spans(len(to), size):
                block = _scratch("block", (stop - start, self.group, slab.rows))
                self._integers(slab, start, stop, block)
                np.copyto(to[start:stop], block.reshape(stop - start, size), casting="unsafe")

        run([partial(unpack, slab) for slab in self.slabs])
        return codes


@dataclass(frozen=True, eq=False)
class INT4Columns(_Pairs):
    """value = scale * q + bias, or scale * (q - 8) without a bias: the codes are q - 8, and so is the bias's share.

    codes uint16, rows/4 a column. Bits of word i: 0-3 the code of row i, 12-15 of row w + i, 8-11 of row 2w + i, 4-7
    of row 3w + i - 1 (of the column before where i is 0, of the last one in the first word), with w = rows/4. Codes
    in bits 0-3 and 8-11 are stored plus 8, the others in two's complement. So the same mask that picks bits 0-3 and
    12-15 picks the other two codes when the bytes are read from the second one on.
    """

    codes: UInt16
    rounding = Rounding(peak=8, precision=5e-4)  # three or four digits in groups of 32 or 64
    passes = 2
    offset = 8

    @property
    def format(self) -> str:
        return f"int4 g{self.group}"

    def plain(self) -> INT4:
        return _int4_by_rows(self)

    def _rows(self, slab: Slab, start: int, stop: int) -> NDArray[np.int8]:
        columns, width = self.shape[1], slab.rows // 4
        quarter, word = np.divmod(np.arange(start, stop), width)
        word = word + np.arange(columns)[:, None] * width + (quarter == 3)
        nibbles = slab.codes[word % slab.codes.size] >> np.array([0, 12, 8, 4], np.uint16)[quarter]
        nibbles ^= np.array([0, 8, 0, 8], np.uint16)[quarter]
        return (nibbles & np.uint16(15)).astype(np.int8) - np.int8(8)

    def _fill(self, slab: Slab, index: int, start: int, stop: int, words: Float32) -> None:
        at, size = start * self.group * slab.rows // 4, words.size
        masked = _scratch("masked", (size,), np.uint16)
        if index == 0:
            np.bitwise_and(slab.codes[at : at + size], np.uint16(0xF00F), out=masked)
        else:
            stored, picked = slab.codes.view(np.uint8), masked.view(np.uint8)
            length = min(2 * size, len(stored) - 2 * at - 1)
            np.bitwise_and(stored[2 * at + 1 :][:length], _alternating(length), out=picked[:length])
            if length < 2 * size:  # the last word ends where the slab begins
                picked[length] = stored[0] & np.uint8(0xF0)
        np.copyto(words, masked.view(np.int16))


@dataclass(frozen=True, eq=False)
class MXFP4Columns(_Pairs):
    """e2m1 codes with e8m0 scales. codes uint16, rows/4 a column.

    Bits 0-3 and 8-11 of word i are the codes of rows 2i and 2i + 1, bits 4-7 and 12-15 those of rows 2w + 2i and
    2w + 2i + 1, w = rows/4: a table of all words gives the two float32 words that hold these four values.
    """

    codes: UInt16
    format = "mxfp4"
    unit = 0.5
    rounding = Rounding(peak=12, precision=5e-5)  # finer, since models in this format are used as they were trained

    def plain(self) -> MXFP4:
        rows, columns = self.shape
        codes = np.empty((rows, columns // 2), np.uint8)
        for slab in self.slabs:
            nibbles = self._nibbles(slab, 0, slab.rows)
            codes[slab.first : slab.first + slab.rows] = (nibbles[0::2] | nibbles[1::2] << np.uint8(4)).T
        return MXFP4(codes, _by_rows(self, "scales"))

    def _nibbles(self, slab: Slab, start: int, stop: int) -> UInt8:
        """e2m1 codes of rows start..stop, (in, rows)."""
        half, word = np.divmod(np.arange(start, stop), slab.rows // 2)
        shift = (4 * half + 8 * (word % 2)).astype(np.uint16)
        words = slab.codes.reshape(self.shape[1], -1)[:, word // 2]
        return (words >> shift & np.uint16(15)).astype(np.uint8)

    def _rows(self, slab: Slab, start: int, stop: int) -> Float32:
        return decode_e2m1(self._nibbles(slab, start, stop))

    def _fill(self, slab: Slab, index: int, start: int, stop: int, words: Float32) -> None:
        size = words.size // 2
        at = start * self.group * slab.rows // 4
        picked = _scratch("picked", (size,), np.intp)
        np.copyto(picked, slab.codes[at : at + size])
        np.take(_words_of_e2m1(), picked, out=words.view(np.float64), mode="clip")


@dataclass(frozen=True, eq=False)
class INT4Wide(_Bytes):
    """int4 in a byte a weight: codes q - 8, and scales and bias float32."""

    offset = 8

    @property
    def format(self) -> str:
        return f"int4 g{self.group}"

    def plain(self) -> INT4:
        return _int4_by_rows(self)

    def _grouped(self, x: Activations) -> Float32:
        return x.rounded(self.group, INT4Columns.rounding)


@dataclass(frozen=True, eq=False)
class MXFP4Wide(_Bytes):
    """mxfp4 in a byte a weight: codes twice the e2m1 values, and float32 scales for them."""

    format = "mxfp4"

    def plain(self) -> MXFP4:
        code = np.zeros(256, np.uint8)
        code[(2 * E2M1).astype(np.int8).view(np.uint8)] = np.arange(16)
        nibbles = code[self._codes_by_rows().view(np.uint8)]
        return MXFP4(nibbles[:, 0::2] | nibbles[:, 1::2] << np.uint8(4), encode_e8m0(2 * _by_rows(self, "scales")))

    def _grouped(self, x: Activations) -> Float32:
        return x.rounded(self.group, MXFP4Columns.rounding)


def widened(matrix: QTensor) -> QTensor:
    """The form of the matrix that takes more memory and less time, to the same digits; the matrix itself where there
    is none: a byte a weight, and float32 scales and bias."""
    if not isinstance(matrix, INT8Columns | INT4Columns | MXFP4Columns):
        return matrix
    bias = None if matrix.bias is None else matrix.bias.astype(np.float32, copy=False)
    if isinstance(matrix, INT8Columns):
        return INT8Columns(matrix.codes, matrix.scales.astype(np.float32, copy=False), bias, matrix.shape, matrix.cut)
    scales = _to_float32(matrix.scales, np.empty(matrix.scales.shape, np.float32))
    scales *= np.float32(matrix.unit)
    kind = INT4Wide if isinstance(matrix, INT4Columns) else MXFP4Wide
    return kind(matrix.codes_in_bytes(), scales, bias, matrix.shape, matrix.cut)


def wide_nbytes(format: str, rows: int, columns: int, nbytes: int) -> int:
    """Memory of a matrix of a `QTensor.format` and so many bytes when `widened`.

    As if the scales and bias of integers were float16 before. Where they are float32, as those of GGUF's K-quants, it
    takes less.
    """
    kind = format.partition(" ")[0]
    if kind not in ("int8", "int4", "mxfp4") or not can_lay_out(format, rows):
        return nbytes
    codes = rows * columns // (1 if kind == "int8" else 2)
    return rows * columns + (4 if kind == "mxfp4" else 2) * (nbytes - codes)


def can_lay_out(format: str, rows: int) -> bool:
    """Whether matrices of a `QTensor.format` with so many rows have a form by columns."""
    return format.startswith("int8") or (format.startswith(("int4", "mxfp4")) and rows % 4 == 0)


def slab_spans(rows: int, columns: int) -> list[tuple[int, int]]:
    """The rows of each slab; all but the last have the same number, a multiple of 4."""
    slabs = max(-(-rows // SLAB_ROWS), 1 if rows * columns < SMALL else 2)
    step = -(-rows // (4 * slabs)) * 4
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def slab_arrays(rows: QTensor) -> list[NDArray[Any]]:
    """The rows of one slab, in a format that `can_lay_out`, laid out: flat codes, scales, and bias if there is one."""
    assert isinstance(rows, INT4 | INT8 | MXFP4)
    factors = [rows.scales] if isinstance(rows, MXFP4) or rows.bias is None else [rows.scales, rows.bias]
    codes: NDArray[Any]
    if isinstance(rows, INT8):
        codes = _transposed(rows.codes)
    else:
        codes = _int4_words(rows) if isinstance(rows, INT4) else _mxfp4_words(rows)
    return [codes.reshape(-1), *(values.T.reshape(-1) for values in factors)]


def laid_out(matrix: QTensor) -> QTensor:
    """The matrix by columns where there is such a form of it, else the matrix itself."""
    if not isinstance(matrix, INT4 | INT8 | MXFP4) or not can_lay_out(matrix.format, matrix.shape[0]):
        return matrix
    slabs = [slab_arrays(matrix.slice_rows(*span)) for span in slab_spans(*matrix.shape)]
    return from_arrays(matrix.format, [np.concatenate(parts) for parts in zip(*slabs, strict=True)], matrix.shape)


def for_use(matrix: QTensor, exact: bool) -> QTensor:
    """The form to multiply with: the fastest, or if `exact` one that leaves activations as they are."""
    if exact:
        return matrix.plain() if isinstance(matrix, Columns) else matrix
    return laid_out(matrix)


def from_arrays(format: str, arrays: Sequence[NDArray[Any]], shape: tuple[int, int]) -> Columns:
    """The matrix of a `QTensor.format` that the arrays of all its slabs make, those of a kind one after another."""
    codes, scales, *bias = arrays
    kinds = {"int8": (INT8Columns, np.int8), "int4": (INT4Columns, np.uint16), "mxfp4": (MXFP4Columns, np.uint16)}
    kind, dtype = kinds[format.split()[0]]
    return kind(codes.view(dtype), scales, bias[0] if bias else None, shape)


def _int4_words(matrix: INT4) -> UInt16:
    rows, columns = matrix.shape
    half, width, eight = matrix.group // 2, rows // 4, np.uint8(8)
    packed = _transposed(matrix.codes).reshape(-1, half, rows)
    codes = np.empty((columns, width), np.uint16)
    stored = codes.reshape(-1).view(np.uint8)
    words = stored.reshape(len(packed), 2, half, width, 2)
    last = np.empty(words.shape[:-1], np.uint8)
    step = max(1, (1 << 18) // (half * rows))  # so many bytes stay in the cache
    for start, index in ((g, i) for g in range(0, len(packed), step) for i in (0, 1)):
        groups = slice(start, start + step)
        nibbles = packed[groups] >> np.uint8(4 * index)
        if index == 0:
            nibbles &= np.uint8(15)
        last[groups, index] = nibbles[..., 3 * width :]
        words[groups, index, ..., 0] = nibbles[..., :width]
        words[groups, index, ..., 1] = nibbles[..., 2 * width : 3 * width]
        nibbles ^= eight
        nibbles <<= np.uint8(4)
        words[groups, index, ..., 1] |= nibbles[..., width : 2 * width]
    last ^= eight
    last <<= np.uint8(4)
    flat = last.reshape(-1)
    stored[2::2] |= flat[:-1]
    stored[0] |= flat[-1]
    return codes


def _mxfp4_words(matrix: MXFP4) -> UInt16:
    rows, columns = matrix.shape
    packed = _transposed(matrix.codes)  # (in/2, rows)
    codes = np.empty((columns, rows // 4), np.uint16)
    stored = codes.view(np.uint8).reshape(columns // 2, 2, -1)
    for index, nibbles in enumerate((packed & np.uint8(15), packed >> np.uint8(4))):
        first, second = np.split(nibbles, 2, axis=-1)
        stored[:, index] = first | second << np.uint8(4)
    return codes


def _transposed(codes: NDArray[Any]) -> NDArray[Any]:
    """codes (n, m) of one byte -> (m, n), several times faster than copying `.T`: first eight at a time."""
    rows, columns = codes.shape
    if columns % 8:
        return np.ascontiguousarray(codes.T)
    eights = np.empty((columns // 8, rows), np.uint64)
    for row in range(0, rows, 16):  # what is read stays in the cache until all of it is
        eights[:, row : row + 16] = codes[row : row + 16].view(np.uint64).T
    out = np.empty((columns, rows), codes.dtype)
    np.copyto(out.reshape(-1, 8, rows), eights.view(codes.dtype).reshape(-1, rows, 8).transpose(0, 2, 1))
    return out


def _int4_by_rows(matrix: INT4Columns | INT4Wide) -> INT4:
    rows, columns = matrix.shape
    codes = np.empty((rows, columns // 2), np.uint8)
    for slab in matrix.slabs:
        nibbles = (matrix._rows(slab, 0, slab.rows) + np.int8(8)).astype(np.uint8).T
        packed = pack_nibbles(nibbles.reshape(slab.rows, -1, matrix.group))
        codes[slab.first : slab.first + slab.rows] = packed.reshape(slab.rows, -1)
    return INT4(codes, _by_rows(matrix, "scales"), None if matrix.bias is None else _by_rows(matrix, "bias"))


def _by_rows(matrix: Columns, which: str) -> NDArray[Any]:
    return np.concatenate([getattr(slab, which).T for slab in matrix.slabs])


@cache
def _spans(groups: int, size: int) -> list[tuple[int, int]]:
    """Equal ranges of groups of `size` weights each that stay within a block."""
    parts = -(-groups * size // _BLOCK)
    step = -(-groups // max(1, parts))
    return [(start, min(start + step, groups)) for start in range(0, groups, step)]


def _factors(stored: NDArray[Any], use: str = "scales") -> Float32:
    """Scales or bias as float32."""
    return stored if stored.dtype == np.float32 else _to_float32(stored, _scratch(use, stored.shape))


def _to_float32(stored: NDArray[Any], out: Float32) -> Float32:
    if stored.dtype == np.float32:
        np.copyto(out, stored)
        return out
    return decode_e8m0(stored, out) if stored.dtype == np.uint8 else decode_f16(stored, out)


class _Memory(threading.local):
    """Buffers of one thread by use, and the views of them that were asked for."""

    def __init__(self) -> None:
        self.buffers: dict[str, NDArray[Any]] = {}
        self.views: dict[tuple[str, tuple[int, ...]], NDArray[Any]] = {}
        self.mask = np.empty(0, np.uint8)


_memory = _Memory()


def _scratch(use: str, shape: tuple[int, ...], dtype: type = np.float32) -> NDArray[Any]:
    """Memory for one use at a time on this thread, kept for the next."""
    view = _memory.views.get((use, shape))
    if view is None:
        size = math.prod(shape)
        held = _memory.buffers.get(use)
        if held is None or held.size < size:
            held = _memory.buffers[use] = np.empty(size, dtype)
            _memory.views = {key: old for key, old in _memory.views.items() if key[0] != use}
        view = _memory.views[use, shape] = held[:size].reshape(shape)
    return view


def _alternating(length: int) -> UInt8:
    """0x0F, 0xF0, 0x0F, ..."""
    if len(_memory.mask) < length:
        _memory.mask = np.tile(np.array([0x0F, 0xF0], np.uint8), -(-length // 2))
    return _memory.mask[:length]


@cache
def _words_of_e2m1() -> NDArray[np.float64]:
    """(65536,) items of two float32 words: n0 + 2^12 n1 and n2 + 2^12 n3, of the nibbles n0 ... n3 of the index."""
    twice = 2 * E2M1
    pairs = (twice[None, :] + np.float32(2**FIELD_BITS) * twice[:, None]).reshape(-1)  # by byte: low nibble first
    both = np.empty((256, 256, 2), np.float32)
    both[..., 0], both[..., 1] = pairs[None, :], pairs[:, None]
    return both.reshape(-1, 2).view(np.float64)[:, 0]
