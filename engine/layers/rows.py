"""The forms that rows of earlier tokens are held in, and how attention reads them: block after block, as float32.

A form is one class: `ROW_FORMS` has them all. float32 is the exact one. int8 has a scale for each row of each head.
Keys that are rotated have 16 bits there: few of their channels are many times the others, and an error in a score is
multiplied by e to its power, while one in a value is averaged away. Sums are scaled, which are fewer than values: a
score is that of the codes times the scale, and a weight is multiplied with it before the codes are summed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numoe.engine.layers.ops import Floats, Ids
from numoe.quant.compute.memory import scratch
from numoe.quant.errors import InputError

BLOCK_BYTES = 1 << 19
"""Of the float32 form of rows that are made float32 at once: they stay in the processor's cache."""

Planes = tuple[NDArray[Any], ...]
"""The arrays that rows are held in, each (G, rows, ...): the values or their codes (G, rows, C), and maybe scales."""

PlaneShape = tuple[type, tuple[int, ...]]
"""Dtype and shape of one."""


@dataclass(frozen=True)
class RowShape:
    """What a row is made of: `groups` heads of `width` channels."""

    groups: int
    width: int
    apart: int = field(default=0, kw_only=True)
    """So many of the last channels are measured on their own, for they may be of another size than the others."""
    fine: bool = field(default=False, kw_only=True)
    """And they are never held in fewer than 16 bits."""


class RowForm(ABC):
    """How rows (G, rows, C) are held."""

    name: str
    is_float32 = False
    """Whether `decode` costs nothing, so that no blocks are needed."""

    @abstractmethod
    def planes(self, shape: RowShape, rows: int) -> dict[str, PlaneShape]:
        """Dtype and shape of each plane, by what its name in a session's file ends with."""

    @abstractmethod
    def encode(self, rows: Floats, shape: RowShape) -> Planes:
        """Rows in this form; those of float32 without a copy."""

    @abstractmethod
    def decode(self, planes: Planes, shape: RowShape) -> tuple[Floats, Floats | None]:
        """Rows as float32, up to a factor a row (G, rows) where there are factors: a view, or this thread's scratch,
        which the next call overwrites."""

    def nbytes(self, shape: RowShape, rows: int) -> int:
        return sum(np.dtype(dtype).itemsize * prod(size) for dtype, size in self.planes(shape, rows).values())


class _Float32(RowForm):
    name = "float32"
    is_float32 = True

    def planes(self, shape: RowShape, rows: int) -> dict[str, PlaneShape]:
        return {"": (np.float32, (shape.groups, rows, shape.width))}

    def encode(self, rows: Floats, shape: RowShape) -> Planes:
        return (rows,)

    def decode(self, planes: Planes, shape: RowShape) -> tuple[Floats, Floats | None]:
        return planes[0], None


class _BFloat16(RowForm):
    """The upper half of each float32's bits, rounded to nearest, ties to even."""

    name = "bf16"

    def planes(self, shape: RowShape, rows: int) -> dict[str, PlaneShape]:
        return {"": (np.uint16, (shape.groups, rows, shape.width))}

    def encode(self, rows: Floats, shape: RowShape) -> Planes:
        bits = np.ascontiguousarray(rows).view(np.uint32)
        odd = bits >> 16 & 1
        return (((bits + (odd + np.uint32(0x7FFF))) >> 16).astype(np.uint16),)

    def decode(self, planes: Planes, shape: RowShape) -> tuple[Floats, Floats | None]:
        out = _space(planes[0].shape)
        np.left_shift(planes[0], np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
        return out, None


class _Int8(RowForm):
    """Codes of 8 bits, of 16 where channels are fine, and a float32 scale for those of each row and head; the scale of
    channels apart is told in those of the others."""

    name = "int8"

    def planes(self, shape: RowShape, rows: int) -> dict[str, PlaneShape]:
        parts = _parts(shape)
        made: dict[str, PlaneShape] = {}
        if coarse := sum(width for width, fine in parts if not fine):
            made[""] = np.int8, (shape.groups, rows, coarse)
        if fine := sum(width for width, fine in parts if fine):
            made[".fine"] = np.int16, (shape.groups, rows, fine)
        return made | {".scale": (np.float32, (shape.groups, rows, len(parts)))}

    def encode(self, rows: Floats, shape: RowShape) -> Planes:
        codes: dict[type, list[NDArray[Any]]] = {np.int8: [], np.int16: []}
        scales, at = np.empty((*rows.shape[:-1], len(_parts(shape))), np.float32), 0
        for i, (width, fine) in enumerate(_parts(shape)):
            part, scale = rows[..., at : at + width], scales[..., i : i + 1]
            np.maximum.reduce(np.abs(part), axis=-1, keepdims=True, out=scale)
            scale *= np.float32(1 / 32767 if fine else 1 / 127)
            scale[scale == 0] = 1
            kind = np.int16 if fine else np.int8
            codes[kind].append(np.rint(part / scale).astype(kind))
            at += width
        scales[..., 1:] /= scales[..., :1]
        return *(np.concatenate(some, axis=-1) if len(some) > 1 else some[0] for some in codes.values() if some), scales

    def decode(self, planes: Planes, shape: RowShape) -> tuple[Floats, Floats | None]:
        *codes, scales = planes
        out, at = _space((*scales.shape[:-1], shape.width)), 0
        for some in codes:
            np.copyto(out[..., at : at + some.shape[-1]], some)
            at += some.shape[-1]
        if scales.shape[-1] > 1:
            out[..., -shape.apart :] *= scales[..., 1:]
        return out, scales[..., 0]


def _parts(shape: RowShape) -> list[tuple[int, bool]]:
    """How many channels each have a scale, and whether they are fine."""
    parts = [(shape.width - shape.apart, False), (shape.apart, shape.fine)]
    return [(width, fine) for width, fine in parts if width]


FLOAT32, BF16, INT8 = _Float32(), _BFloat16(), _Int8()
ROW_FORMS: dict[str, RowForm] = {form.name: form for form in (FLOAT32, BF16, INT8)}
"""By name, from the most exact to the smallest."""


def row_form(name: str) -> RowForm:
    """The form of this name.

    Raises:
        InputError: there is none.
    """
    if name not in ROW_FORMS:
        raise InputError(f'`kv` is {", ".join(ROW_FORMS)}, not "{name}"')
    return ROW_FORMS[name]


class Stretch:
    """Rows that are attended to, (G, S, C), or each query's own, (T, S, C): one after the other, in their form."""

    def __init__(self, form: RowForm, planes: Planes, made_of: RowShape, channels: int | None = None):
        """channels: how many of the first ones count; None: all."""
        self.form = form
        self._planes, self._made_of = planes, made_of
        self._channels = channels or made_of.width
        heads, rows = planes[0].shape[:2]
        self.shape = heads, rows, self._channels

    def first(self, channels: int) -> Stretch:
        """The same rows, of which only the first channels count."""
        return Stretch(self.form, self._planes, self._made_of, channels)

    def heads(self, some: slice) -> Stretch:
        """The rows of some heads."""
        return Stretch(self.form, tuple(plane[some] for plane in self._planes), self._made_of, self._channels)

    def some(self, rows: Ids) -> Stretch:
        """Those of these numbers alone, of all heads."""
        return Stretch(self.form, tuple(plane[:, rows] for plane in self._planes), self._made_of, self._channels)

    def blocks(self, start: int, stop: int) -> Iterable[tuple[int, int, Floats, Floats | None]]:
        """Rows start..stop in blocks: from, to, their values (G, n, C) and what each row is to be multiplied with
        (G, n), if anything. A block is to be used before the next is asked for."""
        if self.form.is_float32:
            return [(start, stop, self._planes[0][:, start:stop, : self._channels], None)]
        return self._decoded(start, stop)

    def _decoded(self, start: int, stop: int) -> Iterator[tuple[int, int, Floats, Floats | None]]:
        step = max(1, BLOCK_BYTES // (4 * self.shape[0] * self._made_of.width))
        for a in range(start, stop, step):
            b = min(a + step, stop)
            values, factors = self.form.decode(tuple(plane[:, a:b] for plane in self._planes), self._made_of)
            yield a, b, values[..., : self._channels], factors

    def pick(self, chosen: Ids) -> Floats:
        """Rows of one head by their numbers (T, K): (T, K, C)."""
        values, factors = self.form.decode(tuple(plane[0][chosen] for plane in self._planes), self._made_of)
        if factors is not None:
            values *= factors[..., None]
        return values if self.form.is_float32 else values.copy()

    def floats(self) -> Floats:
        """All of them as float32 (G, S, C), without a copy where they are."""
        if self.form.is_float32:
            return self._planes[0][..., : self._channels]
        out = np.empty(self.shape, np.float32)
        for a, b, values, factors in self.blocks(0, self.shape[1]):
            np.multiply(values, 1 if factors is None else factors[..., None], out=out[:, a:b])
        return out


def stretch(rows: Floats) -> Stretch:
    """Rows (G, S, C) that are float32."""
    return Stretch(FLOAT32, (rows,), RowShape(len(rows), rows.shape[-1]))


def _space(shape: tuple[int, ...]) -> Floats:
    size = prod(shape)
    space: Floats = scratch("rows", (max(size, BLOCK_BYTES // 4),))[:size].reshape(shape)
    return space
