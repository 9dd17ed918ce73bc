"""A model's weights on disk, whatever the file format: names, shapes, byte ranges, and matrices when asked for.

A weight may be stored in several tensors, its codes and its scales. The conventions understood are

    X.weight (F8_E4M3) + X.scale or X.weight_scale_inv       blocks of 128x128; e8m0 or float scales
    X.weight (I8)      + X.scale (F8_E8M0)                   mxfp4: two e2m1 values a byte, groups of 32
    X_blocks (U8)      + X_scales                            mxfp4 as gpt-oss stores it; its name here is X
    X.weight (I8)      + X.scale (F16) [+ X.minimum (F16)]   numoe's int8: (out, in), scales (out, in / group)
    X.weight (U8)      + X.scale (F16) [+ X.minimum (F16)]   numoe's int4: (out, in / 2) in the order of `INT4`

The last two say Y_scale and Y_minimum beside a Y that does not end in .weight.

Where safetensors' `__metadata__` says so (`LAYOUT`), matrices in mxfp4, int8 and int4 are stored by columns: dtypes and
shapes are those above, and the bytes are in the order of `columns.slab_arrays`, slab after slab.

Nothing is read before it is needed, and pickled files are never opened.
"""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute.kernels import all_finite
from numoe.quant.documents import refuse_lfs_pointer
from numoe.quant.dtypes import UInt8, decode_bf16, decode_e8m0
from numoe.quant.errors import InputError
from numoe.quant.files import Extent, Files, TensorInfo
from numoe.quant.formats import columns
from numoe.quant.formats.qtensor import BF16, F16, F32, FP8, INT4, INT8, MX_GROUP, MXFP4, QTensor
from numoe.quant.stored import safetensors
from numoe.quant.stored.manifest import read_manifest

LAYOUT = {"numoe": "columns"}
"""The entry of the metadata of a folder whose matrices are by columns."""

GGUF = b"GGUF"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_INTEGERS = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "I64": "<i8",
}
_FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
_SCALES = ("F8_E8M0", "U8", "F32", "BF16")
_SUPPORTED = "use a checkpoint in F32, F16, BF16, FP8 with block scales, MXFP4, or a GGUF file"


Rows = tuple[int, int] | tuple[int, int, int]
"""A range of output rows: from, to, and perhaps every so many."""


@dataclass(frozen=True)
class _Weight:
    """One weight as it is stored; `shape` is that of its values, (out, in) after any leading dimensions."""

    info: TensorInfo
    scales: TensorInfo | None
    shape: tuple[int, ...]
    format: str
    minimum: TensorInfo | None = None

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return tuple(info for info in (self.info, self.scales, self.minimum) if info is not None)

    @cached_property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.parts)


@dataclass(frozen=True)
class _Picked:
    """Rows start, start + step, ... up to stop of matrix `index` (0 where there is one) of a stored weight."""

    name: str
    weight: _Weight
    index: int
    start: int
    stop: int
    step: int


class Checkpoint:
    """The tensors of a folder or file. Made by `open_checkpoint`, or from a mere listing to plan without data.

    `tensors` maps stored names, scales included. `metadata` holds safetensors' `__metadata__` or GGUF's key-value
    pairs; by_columns tells whether `LAYOUT` is among them. A context manager: leaving it closes the files. Reading is
    safe from several threads.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, Any],
        fp8_block: tuple[int, int] = (128, 128),
        files: Files | None = None,
    ) -> None:
        self.path = path
        self.tensors = tensors
        self.metadata = metadata
        self.fp8_block = fp8_block
        self.files = files or Files()
        self.by_columns = LAYOUT.items() <= metadata.items()
        self._weights: dict[str, _Weight] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        self.files.close()

    def seen_as(self, tensors: Mapping[str, TensorInfo]) -> Self:
        """The same checkpoint, some of whose tensors are of another shape, or transposed."""
        return type(self)(self.path, {**self.tensors, **tensors}, self.metadata, self.fp8_block, self.files)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors or f"{name}_blocks" in self.tensors

    def names(self) -> Iterator[str]:
        """The names of the weights, in stored order; scales belong to their weight and are not listed."""
        for name in self.tensors:
            if name not in self._folded:
                yield self._folded_into.get(name, name)

    def companions(self, name: str) -> tuple[str, ...]:
        """The stored names that make up a weight: itself, or codes, scales and perhaps minimums."""
        return tuple(info.name for info in self._weight(name).parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight's values: (out, in) for a matrix, (E, out, in) for stacked ones."""
        return self._weight(name).shape

    def format(self, name: str) -> str:
        """The `QTensor.format` that `matrix` gives, or the dtype of a tensor that only `array` reads."""
        return self._weight(name).format

    def stored_nbytes(self, name: str) -> int:
        """Bytes of a weight in its file, scales included."""
        return self._weight(name).nbytes

    def loaded_nbytes(self, name: str) -> int:
        """Bytes of a weight as `matrix` holds it: as stored, but for GGUF's block types that are converted."""
        weight = self._weight(name)
        if _is_block_type(weight.info.dtype):
            from numoe.quant.stored import gguf

            return gguf.decoded_nbytes(weight.info.dtype, math.prod(weight.shape))
        if weight.info.dtype == "F64":
            return weight.info.nbytes // 2
        return self.stored_nbytes(name)

    def kept_as_stored(self, name: str) -> bool:
        """Whether `assemble` gives a view of the raw bytes, so that a matrix takes no memory beside them."""
        info = self._weight(name).info
        return not _is_block_type(info.dtype) and info.dtype != "F64" and not info.transposed

    def matrix(self, name: str, index: int | None = None, rows: Rows | None = None) -> QTensor:
        """The weight `name` as a QTensor (out, in), in the format and order it is stored in.

        `index` picks one matrix of a stacked (E, out, in) weight; `rows` is a range of output rows. Only the bytes of
        what is picked are read. Raises InputError for a missing or non-matrix tensor, an index or range outside it, a
        dtype that cannot be multiplied with, and weights that are NaN or infinite.
        """
        picked = self._pick(name, index, rows)
        try:
            raw = [self.files.read_range(*extent) for extent in self._extents(picked)]
        except InputError as error:
            raise self._refusal(picked, error) from error
        return self._assemble(picked, raw, check=True)

    def extents(self, name: str, index: int | None = None, rows: Rows | None = None) -> tuple[Extent, ...]:
        """Where the bytes lie that `matrix` reads for the same arguments, and raises what it raises before reading."""
        return self._extents(self._pick(name, index, rows))

    def assemble(
        self,
        name: str,
        index: int | None,
        rows: Rows | None,
        raw: Sequence[UInt8],
        *,
        check: bool = True,
    ) -> QTensor:
        """What `matrix` gives for the same arguments, of the bytes of its `extents` that were read elsewhere.

        With `check` False NaN and infinite weights are not looked for. Raises what `matrix` raises after reading.
        """
        return self._assemble(self._pick(name, index, rows), raw, check)

    def array(self, name: str) -> NDArray:
        """A whole tensor of any rank: float32 if it stores floats or codes with scales, int64 if integers.

        Raises InputError for a missing tensor, a dtype that is not supported, and NaN or infinite values.
        """
        weight = self._weight(name)
        info = weight.info
        if weight.scales is not None or _is_block_type(info.dtype):
            if len(weight.shape) == 3:
                return np.stack([self.matrix(name, index).dequantize() for index in range(weight.shape[0])])
            return self.matrix(name).dequantize()
        raw = self.files.read_range(info.path, info.offset, info.nbytes)
        if info.dtype in _INTEGERS:
            return raw.view(_INTEGERS[info.dtype]).astype(np.int64).reshape(info.shape)
        values = _float_values(raw, info).reshape(info.shape)
        if not all_finite(values):
            raise InputError(
                f"{info.path}: the tensor {name!r} contains NaN or infinity; the file is damaged: download it again"
            )
        return values

    @cached_property
    def _folded_into(self) -> dict[str, str]:
        # gpt-oss: the codes X_blocks and the weight X that they are.
        codes = {name: name.removesuffix("_blocks") for name in self.tensors if name.endswith("_blocks")}
        return {name: weight for name, weight in codes.items() if f"{weight}_scales" in self.tensors}

    @cached_property
    def _folded(self) -> frozenset[str]:
        folded = {f"{weight}_scales" for weight in self._folded_into.values()}
        for info in self.tensors.values():
            scales = self._scales_of(info)
            if scales is not None:
                folded.add(scales.name)
                if (minimum := self._minimum_of(info, scales)) is not None:
                    folded.add(minimum.name)
        return frozenset(folded)

    def _scales_of(self, info: TensorInfo) -> TensorInfo | None:
        if info.dtype not in ("F8_E4M3", "I8", "U8"):
            return None
        candidates = (f"{info.name}_scale_inv", companion(info.name, "scale"))
        found = next((self.tensors[name] for name in candidates if name in self.tensors), None)
        # A U8 tensor is int4 codes only beside numoe's own scales.
        return None if found is not None and info.dtype == "U8" and found.dtype != "F16" else found

    def _minimum_of(self, info: TensorInfo, scales: TensorInfo) -> TensorInfo | None:
        return self.tensors.get(companion(info.name, "minimum")) if scales.dtype == "F16" else None

    def _weight(self, name: str) -> _Weight:
        # A listing of a large model is gone through many times.
        if name not in self._weights:
            self._weights[name] = self._find(name)
        return self._weights[name]

    def _find(self, name: str) -> _Weight:
        info = self.tensors.get(name)
        if info is not None:
            scales = self._scales_of(info)
            if info.dtype == "F8_E4M3" and scales is not None:
                return self._fp8(info, scales)
            if scales is not None and scales.dtype == "F16":
                return self._grouped(info, scales)
            if info.dtype == "I8" and scales is not None:
                return self._mxfp4(info, scales, (*info.shape[:-1], 2 * info.shape[-1] if info.shape else 0))
            return _Weight(info, None, info.shape, _format(info))
        blocks, scales = self.tensors.get(f"{name}_blocks"), self.tensors.get(f"{name}_scales")
        if blocks is not None and scales is not None:
            if blocks.shape[-1:] != (MX_GROUP // 2,) or len(blocks.shape) < 3:
                raise InputError(
                    f"{blocks.path}: {blocks.name!r} has the shape {blocks.shape}, not (.., out, in/32, 16)"
                )
            return self._mxfp4(blocks, scales, (*blocks.shape[:-2], MX_GROUP * blocks.shape[-2]))
        raise InputError(f"{self.path} has no tensor {name!r}; check that the download is whole and fits the config")

    def _fp8(self, info: TensorInfo, scales: TensorInfo) -> _Weight:
        height, width = self.fp8_block
        blocks = tuple(-(-size // step) for size, step in zip(info.shape[-2:], self.fp8_block, strict=False))
        self._check_scales(info, scales, (*info.shape[:-2], *blocks), _SCALES)
        return _Weight(info, scales, info.shape, f"fp8 {height}x{width}")

    def _mxfp4(self, info: TensorInfo, scales: TensorInfo, shape: tuple[int, ...]) -> _Weight:
        if shape[-1] % MX_GROUP:
            raise InputError(f"{info.path}: the rows of {info.name!r} hold {shape[-1]} values, not a multiple of 32")
        self._check_scales(info, scales, (*shape[:-1], shape[-1] // MX_GROUP), _SCALES[:2])
        return _Weight(info, scales, shape, MXFP4.format)

    def _grouped(self, info: TensorInfo, scales: TensorInfo) -> _Weight:
        width = info.shape[-1] * (2 if info.dtype == "U8" else 1) if len(info.shape) > 1 else 0
        groups = scales.shape[-1] if scales.shape else 0
        if groups < 1 or width % (2 * groups):
            raise InputError(
                f"{info.path}: {info.name!r} of shape {info.shape} does not divide into even groups by the scales "
                f"{scales.name!r} of shape {scales.shape}; convert or download the model again"
            )
        minimum = self._minimum_of(info, scales)
        for stored in (scales, minimum):
            if stored is not None:
                self._check_scales(info, stored, (*info.shape[:-1], groups), ("F16",))
        kind = "int4" if info.dtype == "U8" else "int8"
        return _Weight(info, scales, (*info.shape[:-1], width), f"{kind} g{width // groups}", minimum)

    def _check_scales(
        self, info: TensorInfo, scales: TensorInfo, shape: tuple[int, ...], dtypes: tuple[str, ...]
    ) -> None:
        if scales.shape != shape or scales.dtype not in dtypes:
            raise InputError(
                f"{scales.path}: {scales.name!r} is {scales.dtype} {scales.shape} where {info.name!r} "
                f"{info.shape} needs {' or '.join(dtypes)} {shape}; check the block size in the config"
            )

    def _pick(self, name: str, index: int | None, rows: Rows | None) -> _Picked:
        weight = self._weight(name)
        source = f"{weight.info.path}: the tensor {name!r}"
        if len(weight.shape) != (2 if index is None else 3) or 0 in weight.shape:
            wanted = "(out, in)" if index is None else "(E, out, in)"
            raise InputError(f"{source} has the shape {weight.shape} where {wanted} is needed; check the config")
        if index is not None and not 0 <= index < weight.shape[0]:
            raise InputError(f"{source} has no matrix {index}: it holds {weight.shape[0]}")
        start, stop, *every = rows or (0, weight.shape[-2])
        if not 0 <= start < stop <= weight.shape[-2]:
            raise InputError(f"{source} has no rows {start} to {stop}: it has {weight.shape[-2]}")
        picked = _Picked(name, weight, index or 0, start, stop, *(every or [1]))
        info = weight.info
        if weight.scales is None and not _is_block_type(info.dtype) and info.dtype not in (*_FLOATS, "BF16"):
            raise self._refusal(picked, f"it is {info.dtype} without scales; {_SUPPORTED}")
        if info.transposed and (weight.scales is not None or _is_block_type(info.dtype)):
            raise self._refusal(picked, f"it is {info.dtype} stored (in, out), and only floats can be turned")
        return picked

    def _refusal(self, picked: _Picked, reason: object) -> InputError:
        return InputError(f"{picked.weight.info.path}: the tensor {picked.name!r} cannot be used: {reason}")

    def _scale_rows(self, picked: _Picked) -> tuple[int, int]:
        """The range of rows of the scales that belong to the picked rows."""
        height = self.fp8_block[0] if picked.weight.info.dtype == "F8_E4M3" else 1
        return picked.start // height, -(-picked.stop // height)

    def _laid_out(self, weight: _Weight) -> bool:
        return self.by_columns and len(weight.shape) == 2 and columns.can_lay_out(weight.format, weight.shape[0])

    def _extents(self, picked: _Picked) -> tuple[Extent, ...]:
        """Of the codes, then the scales and the minimums where there are any."""
        weight, scale_rows = picked.weight, self._scale_rows(picked)
        if self._laid_out(weight):
            parts = (weight.info, weight.scales, weight.minimum)
            return tuple(Extent(info.path, info.offset, info.nbytes) for info in parts if info is not None)
        start, stop = (0, weight.shape[-2]) if weight.info.transposed else (picked.start, picked.stop)
        extents = [_row_extent(weight.info, weight.shape, picked.index, start, stop)]
        if weight.scales is not None:
            shape = weight.scales.shape if weight.info.dtype == "F8_E4M3" else weight.shape
            extents += [
                _row_extent(info, shape, picked.index, *scale_rows)
                for info in (weight.scales, weight.minimum)
                if info is not None
            ]
        return tuple(extents)

    def _assemble(self, picked: _Picked, raw: Sequence[UInt8], check: bool) -> QTensor:
        try:
            tensor = self._tensor(picked, raw)
            if picked.step > 1:
                tensor = tensor.slice_rows(0, tensor.shape[0], picked.step)
        except InputError as error:
            raise self._refusal(picked, error) from error
        if check and not tensor.finite():
            source = f"{picked.weight.info.path}: the tensor {picked.name!r}"
            raise InputError(f"{source} contains NaN or infinity; the file is damaged: download it again")
        return tensor

    def _tensor(self, picked: _Picked, raw: Sequence[UInt8]) -> QTensor:
        weight, start, stop = picked.weight, picked.start, picked.stop
        info, scales = weight.info, weight.scales
        if self._laid_out(weight):
            arrays = [raw[0], *(part if weight.format == MXFP4.format else part.view("<f2") for part in raw[1:])]
            rows, width = weight.shape
            matrix = columns.from_arrays(weight.format, arrays, (rows, width))
            return matrix if stop - start == rows else matrix.slice_rows(start, stop)
        if info.transposed:
            whole = raw[0].view(f"V{safetensors.DTYPE_BITS[info.dtype] // 8}").reshape(weight.shape[:-3:-1])
            raw = [np.ascontiguousarray(whole[:, start:stop].T).view(np.uint8)]
        codes = raw[0].reshape(stop - start, -1)
        if scales is None:
            return _unscaled(codes, info, weight.shape[-1])
        first, last = self._scale_rows(picked)
        factors, *minimum = (part.reshape(last - first, -1) for part in raw[1:])
        if weight.format == MXFP4.format:
            return MXFP4(codes, factors)
        if scales.dtype == "F16":
            offsets = minimum[0].view("<f2") if minimum else None
            if info.dtype == "U8":
                return INT4(codes, factors.view("<f2"), offsets)
            return INT8(codes.view(np.int8), factors.view("<f2"), offsets)
        height, width = self.fp8_block
        values = factors if scales.dtype in _SCALES[:2] else _float_values(factors, scales)
        if start % height == 0:
            return FP8(codes, values, self.fp8_block)
        # The range starts inside a block: it gets one row of scales a row of codes.
        return FP8(codes, values[np.arange(start, stop) // height - first], (1, width))


def _row_extent(info: TensorInfo, shape: tuple[int, ...], index: int, start: int, stop: int) -> Extent:
    """Rows start..stop of matrix `index` of a tensor of `shape` (.., out, ..)."""
    width = info.nbytes // math.prod(shape[:-1])
    return Extent(info.path, info.offset + (index * shape[-2] + start) * width, (stop - start) * width)


def companion(name: str, part: str) -> str:
    """The name under which the "scale" or "minimum" of the weight `name` is stored beside it."""
    if name.endswith(".weight"):
        return f"{name.removesuffix('weight')}{part}"
    return f"{name}_{part}"


def open_checkpoint(path: str | Path, fp8_block: tuple[int, int] = (128, 128)) -> Checkpoint:
    """Opens a folder of safetensors files (with or without an index), a .safetensors file or a .gguf file.

    `fp8_block` is the (height, width) of the blocks that share an FP8 scale. Reads headers only.
    Raises InputError when there is nothing readable there or a header is damaged.
    """
    path = Path(path)
    files = Files()
    if path.is_dir():
        read_manifest(path)  # refuses a later format
        tensors, metadata = safetensors.read_folder(path)
        if not tensors:
            raise _nothing_in(path)
        return Checkpoint(path, tensors, metadata, fp8_block, files)
    beginning = _beginning(path)
    refuse_lfs_pointer(beginning, path)
    if path.suffix == ".gguf" or beginning.startswith(GGUF):
        from numoe.quant.stored import gguf  # imports gguf, which safetensors users need not wait for

        return Checkpoint(path, *gguf.read_gguf(path, files), fp8_block, files)
    if path.suffix == ".safetensors":
        return Checkpoint(path, *safetensors.read_header(path), fp8_block, files)
    if path.suffix in PICKLES:
        raise InputError(f"{path} is a pickle, which can run code when opened: get the model's .safetensors files")
    raise InputError(f"{path} is not a folder, a .safetensors file or a GGUF file; check the path")


def is_gguf(path: Path) -> bool:
    """Whether a file is one in GGUF, by its first bytes: Ollama and others keep such files under other names."""
    return _beginning(path).startswith(GGUF)


def only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds no safetensors, the first one of a split model; None where there is none.

    Raises InputError when there are several models, or the folder cannot be read.
    """
    try:
        names = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".") and p.is_file())
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}); check its permissions") from error
    if any(name.endswith(".safetensors") for name in names):
        return None
    # What sees or drafts for a model is no model, and of a split one the first part counts.
    ggufs = [name for name in names if name.endswith(".gguf") and not name.startswith("mmproj")]
    found = [name for name in ggufs if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", name)]
    if len(found) > 1:
        raise InputError(f"{folder} holds {len(found)} GGUF files: give the path of one, such as {folder / found[0]}")
    return folder / found[0] if found else None


def _beginning(path: Path) -> bytes:
    """The first bytes of a file; none of what cannot be read, of which its reader has more to say."""
    try:
        with path.open("rb") if path.is_file() else io.BytesIO() as file:
            return file.read(64)
    except OSError:
        return b""


def _nothing_in(folder: Path) -> InputError:
    found = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in found if name.endswith(PICKLES)]
    ggufs = [name for name in found if name.endswith(".gguf")]
    if ggufs:
        return InputError(f"{folder} holds GGUF files: give the path of one of them, such as {folder / ggufs[0]}")
    if pickles:
        return InputError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when opened: "
            "get the model's .safetensors files"
        )
    return InputError(f"{folder} holds no .safetensors files; check that the download is whole")


def _is_block_type(dtype: str) -> bool:
    # GGUF's plain types have the names of safetensors' dtypes; all others of GGUF pack weights in blocks.
    return dtype not in safetensors.DTYPE_BITS


def _format(info: TensorInfo) -> str:
    if _is_block_type(info.dtype):
        from numoe.quant.stored import gguf

        return gguf.decoded_format(info.dtype)
    return {"F64": "f32"}.get(info.dtype, info.dtype.lower())


def _unscaled(codes: UInt8, info: TensorInfo, columns: int) -> QTensor:
    if _is_block_type(info.dtype):
        from numoe.quant.stored import gguf

        return gguf.decode(codes, info.dtype, columns)
    if info.dtype == "BF16":
        return BF16(codes.view("<u2"))
    if info.dtype == "F16":
        return F16(codes.view("<f2"))
    return F32(_float_values(codes, info))


def _float_values(raw: UInt8, info: TensorInfo) -> NDArray[np.float32]:
    """The values along the last axis of raw bytes, float32. Raises InputError unless the dtype is a float."""
    if info.dtype == "BF16":
        return decode_bf16(raw.view("<u2"))
    if info.dtype == "F8_E8M0":
        return decode_e8m0(raw)
    if info.dtype not in _FLOATS:
        raise InputError(f"{info.path}: the tensor {info.name!r} is {info.dtype} without scales; {_SUPPORTED}")
    return raw.view(_FLOATS[info.dtype]).astype(np.float32, copy=False)
