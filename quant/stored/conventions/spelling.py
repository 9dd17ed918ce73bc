"""What a convention is made of: how it spells the parts of a weight, and what makes a matrix of their bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from numoe.quant.dtypes import Float32, UInt8, decode_bf16
from numoe.quant.errors import InputError
from numoe.quant.files import Extent, Files, TensorInfo
from numoe.quant.formats.format import FLOAT32
from numoe.quant.formats.qtensor import QTensor
from numoe.quant.stored.handle import Cut, Stored

Tensors = Mapping[str, TensorInfo]
Parts = Mapping[str, TensorInfo]
"""The parts of one weight, by the templates of their names."""

_DTYPES = {
    "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E8M0": "u1", "BF16": "<u2", "F16": "<f2", "F32": "<f4", "I32": "<i4",
    "U32": "<u4", "I64": "<i8",
}  # fmt: skip
FLOATS = "F32", "BF16", "F16"
"""The dtypes that scales have which are no codes themselves."""


@dataclass(frozen=True)
class Spelling:
    """How the parts of a weight are called, and what they make.

    Templates of names have {weight}, {module}, the weight's name without ".weight", or {beside}: X. of X.weight, and Y_
    of a Y that does not end so.
    """

    codes: str
    dtypes: tuple[str, ...]
    """What the codes are stored in; tensors of that name in others are no codes."""
    needs: tuple[str, ...]
    """What is always beside the codes."""
    stored: Callable[[Files, str, Parts], Stored]
    """The weight by a name that is made of these parts; raises InputError where they do not fit each other."""
    may: tuple[str, ...] = ()
    """What may be beside them and counts."""

    def weight(self, name: str) -> str | None:
        """The name of the weight whose codes are called so."""
        if self.codes.startswith("{module}"):
            module = name.removesuffix(self.codes.removeprefix("{module}"))
            return None if module == name else f"{module}.weight"
        ending = self.codes.removeprefix("{weight}")
        return name.removesuffix(ending) if name.endswith(ending) else None

    def parts(self, weight: str, tensors: Tensors) -> dict[str, TensorInfo]:
        """Those that are there; {} where there are no codes."""
        codes = tensors.get(named(self.codes, weight))
        if codes is None or codes.dtype not in self.dtypes:
            return {}
        names = {one: named(one, weight) for one in (*self.needs, *self.may)}
        return {self.codes: codes} | {template: tensors[name] for template, name in names.items() if name in tensors}

    def missing(self, parts: Parts) -> list[str]:
        """The templates of what is needed and not there."""
        return [template for template in self.needs if template not in parts]


def named(template: str, weight: str) -> str:
    """The name of a part of a weight."""
    module = weight.removesuffix(".weight")
    return template.format(weight=weight, module=module, beside=f"{module}{'_' if module == weight else '.'}")


@dataclass(frozen=True)
class Convention:
    """What a config says of the quantized weights of a checkpoint."""

    name: str = "no quantization"
    spellings: tuple[Spelling, ...] = ()
    """In order: the first counts whose parts are all there."""
    dropped: tuple[str, ...] = ()
    """How the names of tensors end that serve quantized activations or caches, which numoe has not."""

    def claims(self, tensors: Tensors) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each weight that is there in all its parts, and their names, the codes first."""
        for name, info in tensors.items():
            for spelling in self.spellings:
                weight = spelling.weight(name) if info.dtype in spelling.dtypes else None
                parts = spelling.parts(weight, tensors) if weight else {}
                if weight and parts and not spelling.missing(parts):
                    yield weight, tuple(part.name for part in parts.values())
                    break

    def find(self, weight: str, tensors: Tensors, files: Files) -> Stored | None:
        """The weight by a name; None where its tensors are none of these. Raises what `Spelling.stored` raises."""
        for spelling in self.spellings:
            parts = spelling.parts(weight, tensors)
            if parts and not spelling.missing(parts):
                return spelling.stored(files, weight, parts)
        return None

    def begun(self, weight: str, tensors: Tensors) -> bool:
        """Whether there are codes of a weight."""
        return any(spelling.parts(weight, tensors) for spelling in self.spellings)

    def incomplete(self, weight: str, tensors: Tensors) -> InputError | None:
        """What is to be said of a weight whose codes are there alone, or with some of their companions."""
        started = [(spelling, spelling.parts(weight, tensors)) for spelling in self.spellings]
        started = [(spelling, parts) for spelling, parts in started if parts]
        if not started:
            return None
        spelling, parts = max(started, key=lambda one: (len(one[1]), -len(one[0].needs)))
        codes = parts[spelling.codes]
        if spelling.codes == "{weight}" and len(codes.shape) < 2:
            return None
        names = [named(template, weight) for template in spelling.missing(parts)]
        return InputError(
            f"{codes.path}: the tensor {codes.name!r} is {codes.dtype} without {' and '.join(map(repr, names))}, which "
            f"{self.name} has beside it; check that all files of the model are there"
        )


Unpack = Callable[[Sequence[NDArray[Any]]], QTensor]
Narrow = Callable[[Sequence[NDArray[Any]], int, int], tuple[Sequence[NDArray[Any]], int]]
"""Parts, and rows from and to -> what of the parts these rows take, and the first row that is in it."""


@dataclass(frozen=True, eq=False)
class Packed(Stored):
    """A weight whose codes another library packs, which are made anew when they are read."""

    unpack: Unpack = field(kw_only=True)
    """Makes the matrix of its parts, their bytes as arrays of their dtypes: bf16 and fp8 as codes."""
    by_rows: tuple[bool, ...] = field(kw_only=True)
    """Which of the parts have a row for each row of the matrix. All of others is read; where the first is no such part,
    `narrow` takes what is needed."""
    narrow: Narrow = field(default=lambda arrays, start, stop: (arrays, 0), kw_only=True)

    @property
    def _is_view(self) -> bool:
        return False

    def cuts(self) -> tuple[Cut, ...]:
        return ()

    def flat(self) -> Self:
        if len(self.whole) > 2:
            raise self._refusal("its codes are packed, and a stack of them makes no one matrix")
        return super().flat()

    @property
    def _matrices(self) -> int:
        return self.whole[0] if len(self.whole) > 2 else 1

    def _extents(self, start: int, stop: int) -> tuple[Extent, ...]:
        rows = self.whole[-2]
        extents = []
        for info, by_rows in zip(self.parts, self._sliced, strict=True):
            each = info.nbytes // self._matrices
            offset = info.offset + (self.index or 0) * each
            if by_rows:
                extents.append(Extent(info.path, offset + start * (each // rows), (stop - start) * (each // rows)))
            else:
                extents.append(Extent(info.path, offset, each))
        return tuple(extents)

    @property
    def _sliced(self) -> tuple[bool, ...]:
        return self.by_rows if self.by_rows[0] else (False,) * len(self.by_rows)

    def _arrays(self, raw: Sequence[UInt8], start: int, stop: int) -> list[NDArray[Any]]:
        """The parts that the bytes of rows start..stop are."""
        arrays = []
        for part, info, by_rows in zip(raw, self.parts, self._sliced, strict=True):
            shape = info.shape[1:] if len(self.whole) > 2 else info.shape
            arrays.append(part.view(_DTYPES[info.dtype]).reshape((stop - start, *shape[1:]) if by_rows else shape))
        return arrays

    def _made(self, raw: Sequence[UInt8], start: int, stop: int) -> QTensor:
        arrays = self._arrays(raw, start, stop)
        if self.by_rows[0]:
            return self.unpack(arrays)
        needed, first = self.narrow(arrays, start, stop)
        return self.unpack(needed).slice_rows(start - first, stop - first)


Choices = Sequence[tuple[int, Callable[[], Stored]]]
"""How wide a weight may be, and what makes it then."""


@dataclass(frozen=True, eq=False)
class Undecided(Stored):
    """Codes that may be packed in several of the ways that a config names: how wide they are only the model tells."""

    choices: Choices = field(kw_only=True)

    def fitted(self, shape: Sequence[int]) -> Stored:
        found = [made for width, made in self.choices if width == shape[-1]]
        if len(found) != 1:
            raise self._undecided()
        return found[0]()

    def _made(self, raw: Sequence[UInt8], start: int, stop: int) -> QTensor:
        raise self._undecided()

    def _undecided(self) -> InputError:
        return misfit(self.parts[0], f"{len(self.choices)} of the packings that the config names fit it")


def decided(choices: Choices, files: Files, weight: str, codes: TensorInfo) -> Stored:
    """What a weight is that may be each of these, of one at least. Raises what they do where there is one."""
    if len(choices) == 1:
        return choices[0][1]()
    return Undecided(files, weight, (codes,), codes.shape, FLOAT32, choices=choices)


def check(
    parts: Parts, template: str, codes: TensorInfo, dtypes: tuple[str, ...], shapes: Sequence[tuple[int, ...]]
) -> TensorInfo:
    """A part, if it is of one of these dtypes and shapes; of no shape in particular without any.

    Raises InputError where it is not.
    """
    info = parts[template]
    if info.dtype not in dtypes or (shapes and info.shape not in shapes):
        wanted = " or ".join(dict.fromkeys(str(list(shape)) for shape in shapes)) if shapes else "another shape"
        raise InputError(
            f"{info.path}: {info.name!r} is {info.dtype} {list(info.shape)} where {codes.name!r} {list(codes.shape)} "
            f"needs {' or '.join(dtypes)} {wanted}; check the quantization in the config, or download the model again"
        )
    return info


def misfit(codes: TensorInfo, reason: str) -> InputError:
    """Codes that are not what their convention says."""
    return InputError(f"{codes.path}: {codes.name!r} of shape {list(codes.shape)} cannot be used: {reason}")


def floats(values: NDArray[Any]) -> Float32:
    """Scales as they are stored, bf16 as codes, in float32."""
    if values.dtype == np.uint16:
        return decode_bf16(values)
    return values.astype(np.float32, copy=False)


def fields(words: NDArray[Any], bits: int, count: int) -> UInt8:
    """Rows of `count` fields of up to 8 bits, least significant first: (n, words) of any integers -> (n, count)."""
    rows = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)
    if bits == 8:
        return rows[:, :count]
    if bits == 4:  # as nearly all are
        pairs = rows.astype("<u2")
        pairs |= pairs * np.uint16(16)
        pairs &= np.uint16(0x0F0F)
        return pairs.view(np.uint8)[:, :count]
    eights = -(-count // 8)  # of fields, which fill whole bytes
    if (short := eights * bits - rows.shape[1]) > 0:
        rows = np.pad(rows, ((0, 0), (0, short)))
    if bits in (1, 2):
        lanes = rows.view(f"<u{bits}").astype("<u8")
    else:
        padded = np.zeros((len(rows), eights, 8), np.uint8)
        padded[..., :bits] = rows[:, : eights * bits].reshape(len(rows), eights, bits)
        lanes = padded.view("<u8")[..., 0]
    for half in (4, 2, 1):  # of twice as many fields the second half moves to where its bytes are
        first = sum(((1 << half * bits) - 1) << at for at in range(0, 64, 16 * half))
        low = lanes & np.uint64(first)
        lanes ^= low
        lanes *= np.uint64(1 << half * (8 - bits))
        lanes |= low
    return lanes.view(np.uint8).reshape(len(rows), -1)[:, :count]
