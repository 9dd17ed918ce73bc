"""Writes a checkpoint anew as a numoe folder, its matrices in the formats of a recipe.

The folder is laid out as on the Hugging Face hub: the small files of the source as they are, `model.safetensors` or
shards with their index, and `numoe.json`. Tensors keep their stored names, and what the recipe leaves alone keeps its
values and format; only experts stacked in one tensor get names of their own. Matrices in mxfp4, int8 and int4 are laid
out by columns (`checkpoint.LAYOUT`), so that they are multiplied with as they are read.

A shard of the result is made from one of the source, in the same order. What a later shard needs of it besides (scales
stored apart from their codes, the rest of an expert) waits in a file of its own, so that no two shards of the source
must be there together. Matrices of one unit (a routed expert's gate, up and down with their scales) follow each other
without a gap, so that one read fetches them. Everything outside the units comes first, in the order of the source.

Files appear in DESTINATION.part whole and synced, then its numoe.json records them; the folder gets its name when all
are there. So a conversion that ended in any way goes on at its first unrecorded file.

What is to be rounded is read twice: where float16 has no scales for a matrix, it stays in the format it has, and the
index, which names the tensors of all shards, is written last.

Memory is bounded by a block of rows a thread, one slab of rows, and the scales of one matrix; of matrices that are
stored (in, out), by a whole one a thread.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute import threads
from numoe.quant.convert.recipe import Target, target
from numoe.quant.documents import read_document
from numoe.quant.errors import InputError
from numoe.quant.files import TensorInfo, held, is_plain_name
from numoe.quant.formats.columns import can_lay_out, slab_arrays, slab_spans
from numoe.quant.formats.pack import Moments, float16_loss
from numoe.quant.formats.qtensor import BF16, F16, F32, INT4, INT8
from numoe.quant.stored.checkpoint import LAYOUT, Checkpoint, Rows, companion
from numoe.quant.stored.manifest import MANIFEST_NAME, FileRecord, Manifest, read_manifest
from numoe.quant.stored.safetensors import DTYPE_BITS, INDEX_NAME, file_start, read_header

PART_SUFFIX = ".part"
"""Ends the name of a folder that is not finished."""

_WORK = "work"  # in the unfinished folder: downloads, files half written, what waits for a later shard
# Room that is left on the disk: so many bytes, or on small disks this part of all.
_RESERVE_BYTES = 1_000_000_000
_RESERVE_SHARE = 50
_BLOCK_ELEMENTS = 1 << 20  # weights in float32 at a time and thread: 4 MiB
_COPY_BYTES = 1 << 24
# Configuration, vocabularies, templates; weights, code, pictures and logs stay behind.
_READ = re.compile(r".+\.(json|jinja|model|tiktoken)|(vocab|merges)\.txt")
_TEXTS = re.compile(r".+\.md|(LICEN[CS]E|NOTICE|COPYING)[\w-]*(\.(txt|rst|\d+))?", re.IGNORECASE)

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes to write); what it raises ends the conversion."""


class Origin(Protocol):
    """Where a conversion takes its files from."""

    @property
    def name(self) -> str:
        """The manifest's `source`."""

    @property
    def revision(self) -> str | None:
        """The manifest's `revision`."""

    @property
    def passing(self) -> bool:
        """Whether shards are there for a while only."""

    def room(self, names: Sequence[str], folder: Path) -> int:
        """The most bytes that these shards will take together on the disk of `folder`, what is there left out."""

    def names(self) -> Sequence[str]:
        """All files at the top of the source."""

    def read(self, name: str) -> bytes:
        """A small file."""

    def shards(self, names: Sequence[str], folder: Path) -> Generator[Path]:
        """The paths of these shards one by one, each whole by then; asking for the next gives the last one up.

        `folder` is a place for downloads, which an interrupted conversion finds there when it goes on.
        """


@dataclass(frozen=True)
class Folder:
    """A local folder as the origin of a conversion, which calls it `name`."""

    path: Path
    name: str
    passing = False

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise InputError(f"{self.path} is one file, and quantize takes a folder of safetensors with a config.json")
        # What is not UTF-8 in a folder's name has no place in the manifest.
        object.__setattr__(self, "name", self.name.encode("utf-8", "replace").decode())

    @property
    def revision(self) -> str:
        """A hash over the names, sizes and times of change of the files that a model is made of."""
        names = [name for name in small_files(self.names()) if _READ.fullmatch(name)]
        names += [n for n in self.names() if n == INDEX_NAME or (n.endswith(".safetensors") and not n.startswith("."))]
        stats = ((name, (self.path / name).stat()) for name in names)
        listing = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return hashlib.sha256(repr(listing).encode()).hexdigest()[:16]

    def names(self) -> Sequence[str]:
        return sorted(path.name for path in self.path.iterdir() if path.is_file())

    def read(self, name: str) -> bytes:
        return read_document(self.path / name)

    def room(self, names: Sequence[str], folder: Path) -> int:
        return 0

    def shards(self, names: Sequence[str], folder: Path) -> Generator[Path]:
        for name in names:
            yield self.path / name


@dataclass(frozen=True)
class Matrix:
    """One matrix of the result. `index` and `rows` are those of `Checkpoint.matrix`, for `source`."""

    name: str
    """Its stored name in the result."""
    role: str
    source: str
    """The stored name of the weight it comes from."""
    index: int | None = None
    rows: Rows | None = None
    unit: str = ""
    """Successive matrices of the same unit are kept together; "" for none."""
    inputs: Moments | None = field(default=None, compare=False)
    """What `Target.pack` takes."""

    def span(self, start: int, stop: int) -> Rows:
        """Its own rows start..stop as rows of the source."""
        if self.rows is None:
            return start, stop
        first, last, *every = self.rows
        step = every[0] if every else 1
        span = first + start * step, min(first + stop * step, last)
        return (*span, step) if every else span


@dataclass(frozen=True)
class Conversion:
    """Bytes of all tensors, before and after."""

    source_bytes: int
    result_bytes: int
    kept: tuple[str, ...] = ()
    """Matrices that stay as they were stored though the recipe has a format for them: float16 has no scales for it."""

    @property
    def remark(self) -> str:
        """What is to be said about `kept`; "" for nothing."""
        if not self.kept:
            return ""
        names = ", ".join(self.kept[:3]) + (", ..." if len(self.kept) > 3 else "")
        return f"{len(self.kept)} too small or too large for the recipe's scales stay as they were stored: {names}"


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
    """A tensor that is a byte range of the stored tensor `source`, from its byte `start`.

    Where `step` is above one, it has only the first of every `step` rows of `row` bytes.
    """

    output: _Output
    source: str
    start: int = 0
    row: int = 1
    step: int = 1

    @property
    def outputs(self) -> tuple[_Output, ...]:
        return (self.output,)

    def needs(self, source: Checkpoint) -> tuple[str, ...]:
        """The stored tensors that are read."""
        return (self.source,)

    def pieces(self, source: Checkpoint) -> Iterator[NDArray]:
        info = source.tensors[self.source]
        stride = self.row * self.step
        end = self.start + self.output.nbytes * self.step
        piece = max(1, _COPY_BYTES // stride) * stride
        for at in range(self.start, end, piece):
            nbytes = min(piece, end - at)
            if self.step == 1:
                yield source.files.read_range(info.path, info.offset + at, nbytes)
            else:  # the rows behind the last one may be none of this tensor's
                rows = source.files.read_range(info.path, info.offset + at, nbytes - stride + self.row)
                whole = np.concatenate([rows, np.zeros(stride - self.row, np.uint8)])
                yield np.ascontiguousarray(whole.reshape(-1, self.step, self.row)[:, 0])


@dataclass(frozen=True)
class _Quantization:
    """A matrix to be read, packed and written."""

    matrix: Matrix
    target: Target
    shape: tuple[int, int]

    @property
    def outputs(self) -> tuple[_Output, ...]:
        names = _parts(self.matrix.name)
        layout = self.target.layout(*self.shape)
        return tuple(_Output(name, *tensor) for name, tensor in zip(names, layout, strict=False))

    def needs(self, source: Checkpoint) -> tuple[str, ...]:
        """The stored tensors that are read."""
        return source.companions(self.matrix.source)

    def pieces(self, source: Checkpoint) -> Iterator[NDArray]:
        rows, columns = self.shape
        by_columns = can_lay_out(self.target.format, rows)
        step = max(1, _BLOCK_ELEMENTS // columns) * threads.in_use()
        blocks = ((start, min(start + step, rows)) for start in range(0, rows, step))
        spans = slab_spans(rows, columns) if by_columns else blocks
        parts = (self._packed(source, start, stop) for start, stop in spans)
        yield from _codes_first(slab_arrays(part) if by_columns else _stored(part) for part in parts)

    def fits(self, source: Checkpoint) -> bool:
        """Whether this format can hold the matrix: float16 has no scales for weights near 1e-6 and above 65504."""
        if self.target.kind == "bf16":
            return True
        rows, columns = self.shape
        step = max(1, _BLOCK_ELEMENTS // columns)
        starts = range(0, rows, step)
        found = np.empty((len(starts), 2))
        levels = 255 if self.target.kind == "int8" else 15

        def measure(part: int) -> None:
            span = self.matrix.span(starts[part], min(starts[part] + step, rows))
            block = source.matrix(self.matrix.source, self.matrix.index, span).dequantize()
            found[part] = float16_loss(block, self.target.group, levels)

        threads.share(len(starts), measure)
        lost, whole = found.sum(axis=0)
        return bool(lost <= whole / (2 * levels) ** 2)  # about what the levels themselves leave

    def _packed(self, source: Checkpoint, start: int, stop: int) -> BF16 | INT8 | INT4:
        """Rows start..stop of the matrix, no more float32 blocks at a time than threads."""
        step = max(1, _BLOCK_ELEMENTS // self.shape[1])
        starts = range(start, stop, step)
        packed: list[BF16 | INT8 | INT4 | None] = [None] * len(starts)

        def pack(part: int) -> None:
            span = self.matrix.span(starts[part], min(starts[part] + step, stop))
            block = source.matrix(self.matrix.source, self.matrix.index, span).dequantize()
            packed[part] = self.target.pack(block, self.matrix.inputs)

        threads.share(len(starts), pack)
        return _joined([one for one in packed if one is not None])


def _stored(matrix: BF16 | INT8 | INT4) -> list[NDArray]:
    """Codes, scales and bias, as far as there are any."""
    factors = [] if isinstance(matrix, BF16) else [matrix.scales, matrix.bias]
    return [matrix.codes, *(values for values in factors if values is not None)]


def _codes_first(parts: Iterable[Sequence[NDArray]]) -> Iterator[NDArray]:
    """The codes of all parts, then their scales, then their biases."""
    factors = []
    for codes, *others in parts:
        yield codes
        factors.append(others)
    yield from chain.from_iterable(zip(*factors, strict=True))


def _joined(parts: Sequence[BF16 | INT8 | INT4]) -> BF16 | INT8 | INT4:
    """Successive rows of one matrix."""
    return type(parts[0])(*map(np.concatenate, zip(*map(_stored, parts), strict=True)))


@dataclass(frozen=True)
class _Arrangement:
    """A matrix that keeps its codes and scales, and is laid out by columns."""

    matrix: Matrix
    shape: tuple[int, int]
    outputs: tuple[_Output, ...]

    def needs(self, source: Checkpoint) -> tuple[str, ...]:
        """The stored tensors that are read."""
        return source.companions(self.matrix.source)

    def pieces(self, source: Checkpoint) -> Iterator[NDArray]:
        spans = (self.matrix.span(start, stop) for start, stop in slab_spans(*self.shape))
        parts = (source.matrix(self.matrix.source, self.matrix.index, span) for span in spans)
        yield from _codes_first(map(slab_arrays, parts))


@dataclass(frozen=True)
class _Turn:
    """A matrix of floats that is stored (in, out) and keeps its dtype."""

    matrix: Matrix
    output: _Output

    @property
    def outputs(self) -> tuple[_Output, ...]:
        return (self.output,)

    def needs(self, source: Checkpoint) -> tuple[str, ...]:
        """The stored tensors that are read."""
        return source.companions(self.matrix.source)

    def pieces(self, source: Checkpoint) -> Iterator[NDArray]:
        made = source.matrix(self.matrix.source, self.matrix.index, self.matrix.rows)
        assert isinstance(made, F32 | F16 | BF16)
        yield made.codes if isinstance(made, BF16) else made.values


_Job = _Copy | _Quantization | _Arrangement | _Turn


def convert(
    source: Checkpoint,
    matrices: Sequence[Matrix],
    destination: Path,
    quant: str,
    origin: Origin,
    progress: Progress = lambda done, total: None,
    calibration: str | None = None,
) -> Conversion:
    """Writes `source` into the new folder `destination`, which appears there when it is complete and not before.

    Until then the files lie in DESTINATION.part. When something ends the conversion, the ones that are finished stay
    there, and the same call goes on with the others.

    Args:
        source: a listing of the tensors, whose paths end in the names of the origin's shards.
        matrices: the weights a recipe may change, with their roles; every other tensor is copied.
        quant: a key of `recipe.RECIPES`.
        origin: where the files of `source` come from.
        calibration: the manifest's; what gave the matrices their `inputs`.

    Raises:
        InputError: the destination exists, its disk has too little room or cannot be written, another process writes
            there, DESTINATION.part is of another conversion, or a weight is damaged.
    """
    plan = _plan(source, matrices, quant, origin.passing)
    small = small_files(origin.names())
    with _part(destination, Manifest(origin.name, quant, {}, origin.revision, calibration)) as part:
        part.forget_all_but([*small, *([INDEX_NAME] if len(plan.names) > 1 else []), *plan.names.values()])
        for name in small:
            if name not in part.files:
                part.write(name, [origin.read(name)])
        _write_shards(plan, part, source, origin, progress)
        made = {number: read_header(part.path / name)[0] for number, name in plan.names.items()}
        if len(made) > 1 and INDEX_NAME not in part.files:
            part.write(INDEX_NAME, [_index(plan.names, made)])
        part.finish()
    wanted = ((number, job) for number in made for job in plan.jobs[number] if isinstance(job, _Quantization))
    kept = [job.matrix.name for n, job in wanted if made[n][job.matrix.name].dtype != job.outputs[0].dtype]
    nbytes = sum(info.nbytes for tensors in made.values() for info in tensors.values())
    return Conversion(sum(info.nbytes for info in source.tensors.values()), nbytes, tuple(kept))


def _index(names: Mapping[int, str], made: Mapping[int, Mapping[str, TensorInfo]]) -> bytes:
    """The text of the index file of shards by these names that hold these tensors."""
    weight_map = {tensor: names[number] for number, tensors in made.items() for tensor in tensors}
    total = sum(info.nbytes for tensors in made.values() for info in tensors.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1).encode()


def small_files(names: Iterable[str]) -> list[str]:
    """Those of a model's files that a conversion takes along as they are.

    Names that not every disk can have are left behind, and of two that differ in capitals alone the one with more.
    """
    taken = (
        name
        for name in sorted(names, key=lambda name: (sum(map(str.isupper, name)), name))
        if (_READ.fullmatch(name) or _TEXTS.fullmatch(name))
        and not name.startswith(".")
        and name not in (INDEX_NAME, MANIFEST_NAME)
        and is_plain_name(name)
    )
    spelled: dict[str, str] = {}
    for name in taken:
        spelled.setdefault(name.casefold(), name)
    return sorted(spelled.values())


@dataclass(frozen=True)
class _Plan:
    """A conversion laid out. Shards of source and result have the same number."""

    shards: tuple[str, ...]
    """The files of the source."""
    jobs: tuple[tuple[_Job, ...], ...]
    """For each shard what is written when it is there."""
    names: Mapping[int, str]
    """The files of the result; a shard without jobs has none."""
    stored: tuple[tuple[TensorInfo, ...], ...]
    """The tensors of each shard."""
    waiting: Mapping[int, tuple[TensorInfo, ...]]
    """Those of them that later shards of the result need."""
    needed_by: Mapping[int, frozenset[int]]
    """The shards of the result that need these."""
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of the result's tensors."""
        return sum(self.shard_nbytes(number) for number in self.names)

    def shard_nbytes(self, number: int) -> int:
        """Bytes of the tensors in one shard of the result."""
        return sum(output.nbytes for job in self.jobs[number] for output in job.outputs)

    def waiting_nbytes(self) -> int:
        """The most that waits at a time."""
        sizes = {number: sum(info.nbytes for info in infos) for number, infos in self.waiting.items()}
        together = (
            sum(size for i, size in sizes.items() if i <= number < max(self.needed_by[i]))
            for number in range(len(self.shards))
        )
        return max(together, default=0)


def _plan(source: Checkpoint, matrices: Sequence[Matrix], quant: str, passing: bool) -> _Plan:
    """`passing`: the shards of the source are there one by one."""
    shards = tuple(sorted({info.path.name for info in source.tensors.values()}))
    number = {name: i for i, name in enumerate(shards)}
    home = {name: number[info.path.name] for name, info in source.tensors.items()}
    jobs: list[list[_Job]] = [[] for _ in shards]
    for unit in _jobs(source, matrices, quant):
        homes = [home[name] for job in unit for name in job.needs(source)]
        if max(homes) - min(homes) > 1:  # to keep it together could make a large part of the source wait
            for job in unit:
                jobs[max(home[name] for name in job.needs(source))].append(job)
        else:
            jobs[max(homes)] += unit
    waiting: dict[int, dict[str, TensorInfo]] = {}
    needed_by: dict[int, set[int]] = {}
    for i, made in enumerate(jobs if passing else ()):
        for name in {name for job in made for name in job.needs(source) if home[name] < i}:
            waiting.setdefault(home[name], {})[name] = source.tensors[name]
            needed_by.setdefault(home[name], set()).add(i)
    stored: list[list[TensorInfo]] = [[] for _ in shards]
    for name, info in source.tensors.items():
        stored[home[name]].append(info)
    full = [i for i, made in enumerate(jobs) if made]
    single = len(full) == 1
    names = {
        i: "model.safetensors" if single else f"model-{k:05d}-of-{len(full):05d}.safetensors"
        for k, i in enumerate(full, 1)
    }
    return _Plan(
        shards,
        tuple(map(tuple, jobs)),
        names,
        tuple(map(tuple, stored)),
        {i: tuple(sorted(infos.values(), key=lambda info: info.offset)) for i, infos in waiting.items()},
        {i: frozenset(users) for i, users in needed_by.items()},
        {**source.metadata, **LAYOUT},
    )


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
    copies = [_Copy(_Output(info.name, info.dtype, info.shape), info.name) for info in stored]
    return _arranged(source, Matrix(name, "", name), copies)


def _arranged(source: Checkpoint, matrix: Matrix, copies: list[_Copy]) -> list[_Job]:
    """Instead of copies of a matrix's codes and scales what lays them out, where they have a form by columns."""
    *stacked, height, width = (1, *source.shape(matrix.source))
    rows = len(range(*(matrix.rows or (0, height))))
    single = matrix.index is not None or math.prod(stacked) == 1
    if source.by_columns or not single or not can_lay_out(source.format(matrix.source), rows):
        return list(copies)
    return [_Arrangement(matrix, (rows, width), tuple(copy.output for copy in copies))]


def _matrix_jobs(source: Checkpoint, matrix: Matrix, quant: str) -> list[_Job]:
    *_, height, width = source.shape(matrix.source)
    rows = len(range(*(matrix.rows or (0, height))))
    stored_bits = 8 * source.stored_nbytes(matrix.source) / math.prod(source.shape(matrix.source))
    wanted = target(quant, matrix.role, width, stored_bits)
    if wanted is not None:
        return [_Quantization(matrix, wanted, (rows, width))]
    return _kept(source, matrix)


def _kept(source: Checkpoint, matrix: Matrix) -> list[_Job]:
    """A matrix in the format it has."""
    info = source.tensors.get(matrix.source)
    if info is not None and info.transposed:
        rows = len(range(*(matrix.rows or (0, info.shape[-2]))))
        dtype = source.format(matrix.source).upper()
        return [_Turn(matrix, _Output(matrix.name, dtype, (rows, info.shape[-1])))]
    if matrix.index is None and matrix.rows is None:
        return _copies(source, matrix.source)
    stored = (source.tensors[part] for part in source.companions(matrix.source))
    cuts = [_cut(source, matrix, info, name) for info, name in zip(stored, _parts(matrix.name), strict=False)]
    return _arranged(source, matrix, cuts)


def _parts(name: str) -> tuple[str, str, str]:
    """The names of a matrix's codes, scales and minimums."""
    return name, companion(name, "scale"), companion(name, "minimum")


def _cut(source: Checkpoint, matrix: Matrix, info: TensorInfo, name: str) -> _Copy:
    """The part of a stored tensor, codes or scales, that belongs to a matrix within a stacked or fused weight."""
    shape = source.shape(matrix.source)
    height = shape[-2]
    start, stop, *every = matrix.rows or (0, height)
    _, height_k, *inner = (1, *info.shape) if matrix.index is None else info.shape
    if height_k != height:  # a row of FP8 scales serves a block of rows
        block = source.fp8_block[0]
        if start % block or every:
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
    output = _Output(name, dtype, (len(range(start, stop, *every)), math.prod(inner)))
    return _Copy(output, info.name, ((matrix.index or 0) * height_k + start) * row, row, *every)


def _write_shards(plan: _Plan, part: _Part, source: Checkpoint, origin: Origin, progress: Progress) -> None:
    """Writes the shards that are not there yet, with what they need of earlier ones."""
    undone = {number for number, name in plan.names.items() if name not in part.files}
    sizes = {number: plan.shard_nbytes(number) for number in undone}
    for number in plan.names.keys() - undone:
        sizes[number] = sum(info.nbytes for info in read_header(part.path / plan.names[number])[0].values())
    done = sum(size for number, size in sizes.items() if number not in undone)
    located = dict(source.tensors)  # where each tensor is now
    reader = Checkpoint(source.path, located, source.metadata, source.fp8_block)

    def waiting(number: int) -> Path:
        return part.work / f"waiting-{number + 1:05d}"

    def leave(number: int) -> None:
        offset = 0
        for info in plan.waiting.get(number, ()):
            located[info.name] = replace(info, path=waiting(number), offset=offset)
            offset += info.nbytes

    def settled(number: int) -> list[_Job]:
        """What to write, now that the weights can be looked at."""
        jobs = (
            _kept(source, job.matrix) if isinstance(job, _Quantization) and not job.fits(reader) else [job]
            for job in plan.jobs[number]
        )
        return list(chain.from_iterable(jobs))

    def pieces(jobs: Iterable[_Job]) -> Iterator[NDArray]:
        nonlocal done
        for job in jobs:
            for piece in job.pieces(reader):
                yield piece
                done += piece.nbytes
                progress(done, sum(sizes.values()))

    needed = {number for number, users in plan.needed_by.items() if users & undone}
    there = {number for number in needed if waiting(number).exists()}
    todo = sorted(undone | needed - there)
    shards = [plan.shards[number] for number in todo]
    part.clear_work({*shards, *(f"{name}.incomplete" for name in shards), *(waiting(number).name for number in there)})
    part.require_space(sum(map(plan.shard_nbytes, undone)) + plan.waiting_nbytes() + origin.room(shards, part.work))
    for number in there:
        leave(number)
    with closing(reader), closing(origin.shards(shards, part.work)) as paths:
        for number, path in zip(todo, paths, strict=True):
            located |= {info.name: replace(info, path=path) for info in plan.stored[number]}
            if number in needed - there:
                copies = [_Copy(_Output(i.name, i.dtype, i.shape), i.name) for i in plan.waiting[number]]
                part.put(waiting(number), (piece for copy in copies for piece in copy.pieces(reader)))
            if number in undone:
                jobs = settled(number)
                outputs = [output for job in jobs for output in job.outputs]
                sizes[number] = sum(output.nbytes for output in outputs)
                part.require_space(sizes[number])
                start = file_start(((output.name, output.dtype, output.shape) for output in outputs), plan.metadata)
                part.write(plan.names[number], chain([start], pieces(jobs)))
                undone.discard(number)
            reader.close()  # an open file keeps its room on the disk when it is removed
            leave(number)
            for earlier, users in plan.needed_by.items():
                if earlier <= number and not users & undone:
                    waiting(earlier).unlink(missing_ok=True)


class _Part:
    """The unfinished folder of a conversion, made or found, while nobody else writes there."""

    def __init__(self, destination: Path, manifest: Manifest) -> None:
        self.destination = destination
        self.path = destination.with_name(destination.name + PART_SUFFIX)
        self.work = self.path / _WORK
        found = read_manifest(self.path)
        if found is not None and replace(found, files={}) != manifest:
            raise InputError(
                f"{self.path} holds an unfinished conversion to {found.format} of {found.source} at revision "
                f"{found.revision}, and this is one to {manifest.format} of {manifest.source} at revision "
                f"{manifest.revision}; repeat the command that began it, or remove the folder to begin anew"
            )
        if found is None:
            self._refuse_strangers()
        if self.work.is_symlink():
            raise InputError(f"{self.work} leads out of the unfinished folder; remove it")
        self.work.mkdir(parents=True, exist_ok=True)
        self._manifest = found or manifest

    def _refuse_strangers(self) -> None:
        """Raises InputError when there is a folder by this name that no conversion has made.

        One without a manifest ended before it wrote any other file.
        """
        inside = (path for path in self.path.iterdir() if path.name != _WORK) if self.path.exists() else iter(())
        strange = any(not path.name.startswith(f".{MANIFEST_NAME}.") for path in inside)
        if strange or (self.work.is_dir() and any(self.work.iterdir())):
            raise InputError(f"{self.path} is there and holds no unfinished conversion; remove or rename it")

    @property
    def files(self) -> Mapping[str, FileRecord]:
        """Those that are finished."""
        return self._manifest.files

    def forget_all_but(self, names: Sequence[str]) -> None:
        """Keeps the record of files by these names that are there."""
        files = self._manifest.files
        for name in list(files):
            path = self.path / name
            if name not in names or not path.is_file() or path.stat().st_size != files[name].size:
                del files[name]
                path.unlink(missing_ok=True)
        self._manifest.write(self.path)

    def clear_work(self, keep: Set[str]) -> None:
        """Removes what earlier runs left and nobody needs."""
        for path in self.work.iterdir():
            if path.name not in keep:
                path.unlink()

    def require_space(self, nbytes: int) -> None:
        """Raises InputError unless so many more bytes leave the disk its reserve."""
        usage = shutil.disk_usage(self.path)
        nbytes += min(_RESERVE_BYTES, usage.total // _RESERVE_SHARE)
        if nbytes > usage.free:
            raise InputError(
                f"{self.destination} needs {nbytes / 1e9:.2f} GB more and its disk has {usage.free / 1e9:.2f} GB "
                "free; make room and repeat the command, or choose a folder on another disk"
            )

    def put(self, path: Path, pieces: Iterable[bytes | NDArray]) -> FileRecord:
        """Makes a file, which appears when it is whole and safe on disk."""
        new = self.work / f"{path.name}.new"
        digest = hashlib.sha256()
        new.unlink(missing_ok=True)  # what is there may be a link
        try:
            with new.open("xb") as file:
                for piece in pieces:
                    data = piece if isinstance(piece, bytes) else np.ascontiguousarray(piece).view(np.uint8).data
                    file.write(data)
                    digest.update(data)
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
        _sync(path.parent)
        return FileRecord(size, digest.hexdigest())

    def write(self, name: str, pieces: Iterable[bytes | NDArray]) -> None:
        """Makes a file of the result and records it."""
        self._manifest.files[name] = self.put(self.path / name, pieces)
        self._manifest.write(self.path)
        _sync(self.path)

    def finish(self) -> None:
        """Gives the folder its name."""
        shutil.rmtree(self.work)
        self.path.rename(self.destination)
        _sync(self.destination.parent)

    def give_up(self) -> None:
        """Removes the folder when nothing in it would save work, and nothing is in it that was not made here."""
        if not self.work.exists():
            return  # finished
        if any(name.endswith(".safetensors") for name in self.files) or any(self.work.iterdir()):
            return
        self.work.rmdir()
        for name in (*self.files, MANIFEST_NAME):
            (self.path / name).unlink(missing_ok=True)
        with suppress(OSError):  # somebody has put files there
            self.path.rmdir()


@contextmanager
def _part(destination: Path, manifest: Manifest) -> Iterator[_Part]:
    """DESTINATION.part, which nobody else writes meanwhile. Errors of the disk become sentences."""
    refuse_existing(destination)
    if not destination.parent.is_dir():
        raise InputError(f"there is no folder {destination.parent} to put {destination.name} into; make it first")
    path = destination.with_name(destination.name + PART_SUFFIX)
    with ExitStack() as stack:
        try:
            if not stack.enter_context(held(path)):
                raise InputError(f"{path} is being written by another process; wait until that has ended")
            refuse_existing(destination)  # by a process that has finished just now
            part = _Part(destination, manifest)
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}); choose another folder") from error
        try:
            try:
                yield part
            finally:
                part.give_up()
        except OSError as error:
            raise InputError(
                f"{destination} cannot be written ({error.strerror or error}); what is finished is kept: put the "
                "disk right and repeat the command"
            ) from error


def refuse_existing(destination: Path) -> None:
    """Raises InputError when there is something by the name of the folder to make."""
    if os.path.lexists(destination):
        raise InputError(f"{destination} is there already and is not overwritten; choose another name or remove it")


def _sync(folder: Path) -> None:
    """Makes the entries of a folder outlast a power cut."""
    if os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
