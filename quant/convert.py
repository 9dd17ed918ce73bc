"""Writes a checkpoint anew as a numoe folder, its matrices in the formats of a recipe.

The folder is laid out as on the Hugging Face hub: the small files of the source as they are, `model.safetensors` or
shards of at most `SHARD_BYTES` with their index, and `numoe.json`. Tensors keep their stored names, and what the
recipe leaves alone keeps its bytes; only experts stacked in one tensor get names of their own.

Matrices of one unit (a routed expert's gate, up and down with their scales) follow each other in one file without a
gap, so that one read fetches them. Everything outside the units comes first, in the order of the source.

Memory is bounded by a block of rows a thread, plus the scales of one matrix.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from numoe.quant import threads
from numoe.quant.checkpoint import Checkpoint, companion
from numoe.quant.errors import InputError
from numoe.quant.files import TensorInfo
from numoe.quant.manifest import MANIFEST_NAME, FileRecord, Manifest
from numoe.quant.qtensor import BF16, INT4, INT8
from numoe.quant.recipe import RECIPES, Target, target
from numoe.quant.safetensors_file import DTYPE_BITS, INDEX_NAME

SHARD_BYTES = 4_000_000_000
"""Most bytes of tensors in a file, unless a single unit is larger."""

_BLOCK_ELEMENTS = 1 << 20  # weights in float32 at a time and thread: 4 MiB
_COPY_BYTES = 1 << 24
# Configuration, vocabularies, templates; weights, code and pictures stay behind.
_SMALL_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".md")
_LICENSES = ("LICENSE", "NOTICE")

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes to write); what it raises ends the conversion."""


@dataclass(frozen=True)
class Matrix:
    """One matrix of the result. `index` and `rows` are those of `Checkpoint.matrix`, for `source`."""

    name: str
    """Its stored name in the result."""
    role: str
    source: str
    """The stored name of the weight it comes from."""
    index: int | None = None
    rows: tuple[int, int] | None = None
    unit: str = ""
    """Successive matrices of the same unit are kept together; "" for none."""


@dataclass(frozen=True)
class Conversion:
    """Bytes of all tensors, before and after."""

    source_bytes: int
    result_bytes: int


@dataclass(frozen=True)
class _Output:
    """A tensor to write."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class _Copy:
    """A tensor that is a byte range of the source."""

    output: _Output
    path: Path
    offset: int

    @property
    def outputs(self) -> tuple[_Output, ...]:
        return (self.output,)

    def pieces(self, source: Checkpoint) -> Iterator[NDArray]:
        end = self.offset + self.output.nbytes
        for start in range(self.offset, end, _COPY_BYTES):
            yield source.files.read_range(self.path, start, min(_COPY_BYTES, end - start))


@dataclass(frozen=True)
class _Quantization:
    """A matrix to be read, packed and written."""

    matrix: Matrix
    target: Target
    shape: tuple[int, int]

    @property
    def outputs(self) -> tuple[_Output, ...]:
        names = self.matrix.name, companion(self.matrix.name, "scale")
        layout = self.target.layout(*self.shape)
        return tuple(_Output(name, *tensor) for name, tensor in zip(names, layout, strict=False))

    def pieces(self, source: Checkpoint) -> Iterator[NDArray]:
        first = (self.matrix.rows or (0, 0))[0]
        rows, columns = self.shape
        step = max(1, _BLOCK_ELEMENTS // columns)

        scales = []
        starts = range(0, rows, step)
        for at in range(0, len(starts), threads.in_use()):  # no more blocks at a time than threads
            batch = starts[at : at + threads.in_use()]
            packed: list[BF16 | INT8 | INT4 | None] = [None] * len(batch)

            def pack(part: int, batch: range = batch, packed: list[BF16 | INT8 | INT4 | None] = packed) -> None:
                span = first + batch[part], first + min(batch[part] + step, rows)
                block = source.matrix(self.matrix.source, self.matrix.index, span).dequantize()
                packed[part] = self.target.pack(block)

            threads.share(len(batch), pack)
            for one in packed:
                assert one is not None
                yield one.codes
                if not isinstance(one, BF16):
                    scales.append(one.scales)
        yield from scales


_Job = _Copy | _Quantization


def convert(
    source: Checkpoint,
    matrices: Sequence[Matrix],
    destination: Path,
    quant: str,
    origin: str,
    progress: Progress = lambda done, total: None,
) -> Conversion:
    """Writes `source` into the new folder `destination`, which appears there when it is complete and not before.

    Until then the files lie in DESTINATION.part, which is removed when anything fails.

    Args:
        matrices: the weights a recipe may change, with their roles; every other tensor is copied.
        quant: a key of `recipe.RECIPES`.
        origin: what the manifest calls the source.

    Raises:
        InputError: the source is no safetensors folder, the destination exists, its disk has too little room or
            cannot be written, or a weight is damaged.
    """
    if quant not in RECIPES:
        raise InputError(f'"{quant}" is not a way to quantize; choose one of {", ".join(RECIPES)}')
    if not source.path.is_dir():
        raise InputError(f"{source.path} is one file, and quantize takes a folder of safetensors with a config.json")
    if destination.exists():
        raise InputError(f"{destination} is there already and is not overwritten; choose another name or remove it")
    if not destination.parent.is_dir():
        raise InputError(f"there is no folder {destination.parent} to put {destination.name} into; make it first")
    units = _jobs(source, matrices, quant)
    small = _small_files(source.path)
    total = sum(output.nbytes for unit in units for job in unit for output in job.outputs)
    _require_space(destination, total + sum(path.stat().st_size for path in small))
    part = destination.with_name(destination.name + ".part")
    try:
        part.mkdir()
    except FileExistsError:
        raise InputError(
            f"{part} is left from a conversion that was killed, or of one that still runs; remove it and try again"
        ) from None
    except OSError as error:
        raise InputError(f"{part} cannot be made ({error.strerror}); choose another folder") from error
    try:
        files = _write_shards(source, units, part, total, progress)
        for path in small:
            shutil.copyfile(path, part / path.name)
            files[path.name] = _record(part / path.name)
        _sync(Manifest(origin, quant, dict(sorted(files.items()))).write(part))
        _sync(part)
        part.rename(destination)
        _sync(destination.parent)
    except OSError as error:
        raise InputError(f"{destination} cannot be written ({error.strerror or error}); nothing was kept") from error
    finally:
        if part.exists():
            shutil.rmtree(part)
    return Conversion(sum(info.nbytes for info in source.tensors.values()), total)


def _jobs(source: Checkpoint, matrices: Sequence[Matrix], quant: str) -> list[list[_Job]]:
    """What to write, in order; the jobs of an inner list stay together in one file."""
    of_source: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        of_source.setdefault(matrix.source, []).append(matrix)
    loose: list[list[_Job]] = []
    for name in source.names():
        made = of_source.get(name, [])
        if not made:
            loose.append(_copies(source, name))
        loose.extend(_matrix_jobs(source, matrix, quant) for matrix in made if not matrix.unit)
    together = groupby((matrix for matrix in matrices if matrix.unit), key=lambda matrix: matrix.unit)
    return loose + [[job for one in unit for job in _matrix_jobs(source, one, quant)] for _, unit in together]


def _copies(source: Checkpoint, name: str) -> list[_Job]:
    stored = (source.tensors[part] for part in source.companions(name))
    return [_Copy(_Output(info.name, info.dtype, info.shape), info.path, info.offset) for info in stored]


def _matrix_jobs(source: Checkpoint, matrix: Matrix, quant: str) -> list[_Job]:
    *_, height, width = source.shape(matrix.source)
    start, stop = matrix.rows or (0, height)
    stored_bits = 8 * source.stored_nbytes(matrix.source) / math.prod(source.shape(matrix.source))
    wanted = target(quant, matrix.role, width, stored_bits)
    if wanted is not None:
        return [_Quantization(matrix, wanted, (stop - start, width))]
    if matrix.index is None and matrix.rows is None:
        return _copies(source, matrix.source)
    names = matrix.name, companion(matrix.name, "scale"), companion(matrix.name, "minimum")
    stored = (source.tensors[part] for part in source.companions(matrix.source))
    return [_cut(source, matrix, info, name) for info, name in zip(stored, names, strict=False)]


def _cut(source: Checkpoint, matrix: Matrix, info: TensorInfo, name: str) -> _Job:
    """The part of a stored tensor, codes or scales, that belongs to a matrix within a stacked or fused weight."""
    shape = source.shape(matrix.source)
    height = shape[-2]
    start, stop = matrix.rows or (0, height)
    _, height_k, *inner = (1, *info.shape) if matrix.index is None else info.shape
    if height_k != height:  # a row of FP8 scales serves a block of rows
        block = source.fp8_block[0]
        if start % block:
            raise InputError(
                f"{info.path}: {matrix.source!r} cannot be cut at row {start} without new scales, as its blocks have "
                f"{block} rows; quantize it to int4"
            )
        start, stop = start // block, -(-stop // block)
    row = info.nbytes // (height_k * (shape[0] if matrix.index is not None else 1))
    # Two of gpt-oss's dtypes say less than the ones that stand for the same bytes beside a `.weight`.
    dtype = info.dtype
    if source.format(matrix.source) == "mxfp4":
        dtype = "F8_E8M0" if name != matrix.name else "I8"
    output = _Output(name, dtype, (stop - start, math.prod(inner)))
    return _Copy(output, info.path, info.offset + ((matrix.index or 0) * height_k + start) * row)


def _shards(units: Iterable[list[_Job]]) -> list[list[_Job]]:
    shards: list[list[_Job]] = [[]]
    filled = 0
    for unit in units:
        size = sum(output.nbytes for job in unit for output in job.outputs)
        if filled and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1] += unit
        filled += size
    return shards


def _write_shards(
    source: Checkpoint, units: list[list[_Job]], folder: Path, total: int, progress: Progress
) -> dict[str, FileRecord]:
    """Writes all tensors and, if there are several files, their index; gives the files' records by name."""
    shards = _shards(units)
    files: dict[str, FileRecord] = {}
    weight_map: dict[str, str] = {}
    done = 0
    for number, jobs in enumerate(shards, 1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        outputs = [output for job in jobs for output in job.outputs]
        weight_map |= dict.fromkeys((output.name for output in outputs), name)
        digest = hashlib.sha256()
        with (folder / name).open("xb") as file:
            header = _header(outputs, source.metadata)
            file.write(header)
            digest.update(header)
            for job in jobs:
                for piece in job.pieces(source):
                    data = np.ascontiguousarray(piece).view(np.uint8).data
                    file.write(data)
                    digest.update(data)
                    done += piece.nbytes
                    progress(done, total)
            file.flush()
            os.fsync(file.fileno())
            files[name] = FileRecord(file.tell(), digest.hexdigest())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")
        files[INDEX_NAME] = _record(folder / INDEX_NAME)
    return files


def _header(outputs: Sequence[_Output], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for output in outputs:
        offsets = [end, end + output.nbytes]
        header[output.name] = {"dtype": output.dtype, "shape": output.shape, "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _small_files(folder: Path) -> list[Path]:
    skipped = (INDEX_NAME, MANIFEST_NAME)
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in skipped
        and (path.suffix in _SMALL_SUFFIXES or path.name.startswith(_LICENSES))
    ]


def _require_space(destination: Path, needed: int) -> None:
    free = shutil.disk_usage(destination.parent).free
    if needed > free:
        raise InputError(
            f"{destination} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
            "make room or choose a folder on another disk"
        )


def _record(path: Path) -> FileRecord:
    """Size and hash of a small file that was just written, which is then safe on disk."""
    data = path.read_bytes()
    _sync(path)
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def _sync(path: Path) -> None:
    """Makes a file, or the entries of a folder, outlast a power cut."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
