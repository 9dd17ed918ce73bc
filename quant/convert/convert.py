"""Writes a checkpoint anew as a numoe folder, its matrices in the formats of a recipe.

The folder is laid out as on the Hugging Face hub: the small files of the source as they are, `model.safetensors` or
shards with their index, and `numoe.json`. The weights of the model have its own names for them, so that no family's
table of names is needed any more; what else is stored is copied as it is. What the recipe leaves alone keeps its values
and format. Matrices in mxfp4, int8 and int4 are laid out by columns (`conventions.LAYOUT`), so that they are multiplied
with as they are read.

What is to be rounded is read twice: where float16 has no scales for a matrix, it stays in the format it has, and the
index, which names the tensors of all shards, is written last.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Protocol

from numpy.typing import NDArray

from numoe.quant.convert.folder import Part, unfinished
from numoe.quant.convert.jobs import Array, Copy, Job, Matrix, Output, Reader
from numoe.quant.convert.layout import Layout, lay_out
from numoe.quant.documents import read_document
from numoe.quant.files import Files, TensorInfo, is_plain_name
from numoe.quant.stored.checkpoint import Checkpoint, gguf_header, open_checkpoint
from numoe.quant.stored.conventions.native import WRITTEN
from numoe.quant.stored.gguf_sets import HEADER
from numoe.quant.stored.manifest import MANIFEST_NAME, Manifest
from numoe.quant.stored.safetensors import file_start, read_header
from numoe.quant.stored.shards import INDEX_NAME

# Configuration, vocabularies, templates; weights, code, pictures and logs stay behind.
_READ = re.compile(rf".+\.(json|jinja|model|tiktoken)|(vocab|merges)\.txt|{re.escape(HEADER)}")
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
        # What is not UTF-8 in a folder's name has no place in the manifest.
        object.__setattr__(self, "name", self.name.encode("utf-8", "replace").decode())

    @property
    def revision(self) -> str:
        """A hash over the names, sizes and times of change of the files that a model is made of."""
        stats = ((path.name, path.stat()) for path in self._files())
        listing = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return hashlib.sha256(repr(listing).encode()).hexdigest()[:16]

    def _files(self) -> list[Path]:
        names = [name for name in small_files(self.names()) if _READ.fullmatch(name)]
        names += [n for n in self.names() if n == INDEX_NAME or (n.endswith(".safetensors") and not n.startswith("."))]
        return [self.path / name for name in names]

    def names(self) -> Sequence[str]:
        return sorted(path.name for path in self.path.iterdir() if path.is_file())

    def read(self, name: str) -> bytes:
        return read_document(self.path / name)

    def room(self, names: Sequence[str], folder: Path) -> int:
        return 0

    def shards(self, names: Sequence[str], folder: Path) -> Generator[Path]:
        for name in names:
            yield self.path / name


class GgufFile(Folder):
    """A local GGUF file, or the first part of a split one: what else lies in its folder is not the model's."""

    def _files(self) -> list[Path]:
        with open_checkpoint(self.path) as source:
            return sorted({self.path, *(info.path for info in source.tensors.values())})

    def names(self) -> Sequence[str]:
        return [HEADER]

    def read(self, name: str) -> bytes:
        with open_checkpoint(self.path) as source:
            return gguf_header(source)

    def shards(self, names: Sequence[str], folder: Path) -> Generator[Path]:
        for name in names:
            yield self.path.with_name(name)


@dataclass(frozen=True)
class Conversion:
    """Bytes of all tensors, before and after."""

    source_bytes: int
    result_bytes: int
    as_it_was: bool = False
    """Whether the files themselves were taken."""
    kept: tuple[str, ...] = ()
    """Matrices that stay as they were stored though the recipe has a format for them: float16 has no scales for it."""

    @property
    def remark(self) -> str:
        """What is to be said about `kept`; "" for nothing."""
        if not self.kept:
            return ""
        names = ", ".join(self.kept[:3]) + (", ..." if len(self.kept) > 3 else "")
        return f"{len(self.kept)} too small or too large for the recipe's scales stay as they were stored: {names}"


def convert(
    source: Checkpoint,
    weights: Sequence[Matrix | Array],
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
        weights: what the result has under names of its own; every other tensor is copied.
        quant: see `recipes.roles`.
        origin: where the files of `source` come from.
        calibration: the manifest's; what gave the matrices their `inputs`.

    Raises:
        InputError: the destination exists, its disk has too little room or cannot be written, another process writes
            there, DESTINATION.part is of another conversion, or a weight is damaged.
    """
    layout = lay_out(source, weights, quant, origin.passing)
    small = small_files(origin.names())
    with unfinished(destination, Manifest(origin.name, quant, {}, origin.revision, calibration)) as part:
        part.forget_all_but([*small, *([INDEX_NAME] if len(layout.names) > 1 else []), *layout.names.values()])
        for name in small:
            if name not in part.files:
                part.write(name, [origin.read(name)])
        _Shards(layout, part, source, progress).write(origin)
        made = {number: read_header(part.path / name)[0] for number, name in layout.names.items()}
        if len(made) > 1 and INDEX_NAME not in part.files:
            part.write(INDEX_NAME, [_index(layout.names, made)])
        part.finish()
    first = ((made[number], job.outputs[0]) for number in made for job in layout.jobs[number])
    kept = [
        output.name
        for tensors, output in first
        if output.name not in tensors or tensors[output.name].dtype != output.dtype
    ]
    nbytes = sum(info.nbytes for tensors in made.values() for info in tensors.values())
    return Conversion(sum(info.nbytes for info in source.tensors.values()), nbytes, kept=tuple(kept))


class _Shards:
    """The writing of the shards that are not there yet, with what they need of earlier ones."""

    def __init__(self, layout: Layout, part: Part, source: Checkpoint, progress: Progress) -> None:
        self._layout = layout
        self._part = part
        self._progress = progress
        self._reader = Reader(dict(source.tensors), Files())
        names = layout.names
        self._undone = {number for number, name in names.items() if name not in part.files}
        self._sizes = {number: layout.shard_nbytes(number) for number in self._undone}
        for number in names.keys() - self._undone:
            self._sizes[number] = sum(info.nbytes for info in read_header(part.path / names[number])[0].values())
        self._done = sum(size for number, size in self._sizes.items() if number not in self._undone)

    def write(self, origin: Origin) -> None:
        layout, part, undone = self._layout, self._part, self._undone
        needed = {number for number, users in layout.needed_by.items() if users & undone}
        there = {number for number in needed if self._waiting(number).exists()}
        todo = sorted(undone | needed - there)
        shards = [layout.shards[number] for number in todo]
        waiting = {self._waiting(number).name for number in there}
        part.clear_work({*shards, *(f"{name}.incomplete" for name in shards), *waiting})
        room = origin.room(shards, part.work)
        part.require_space(sum(map(layout.shard_nbytes, undone)) + layout.waiting_nbytes() + room)
        for number in there:
            self._leave(number)
        with closing(self._reader.files), closing(origin.shards(shards, part.work)) as paths:
            for number, path in zip(todo, paths, strict=True):
                self._reader.tensors.update({info.name: replace(info, path=path) for info in layout.stored[number]})
                if number in needed - there:
                    part.put(self._waiting(number), self._copied(layout.waiting[number]))
                if number in undone:
                    self._write_one(number)
                self._reader.files.close()  # an open file keeps its room on the disk when it is removed
                self._leave(number)
                self._remove_unneeded(number)

    def _write_one(self, number: int) -> None:
        jobs = [settled for job in self._layout.jobs[number] for settled in job.settled(self._reader)]
        outputs = [output for job in jobs for output in job.outputs]
        self._sizes[number] = sum(output.nbytes for output in outputs)
        self._part.require_space(self._sizes[number])
        start = file_start(((one.name, one.dtype, one.shape) for one in outputs), WRITTEN)
        self._part.write(self._layout.names[number], chain([start], self._pieces(jobs)))
        self._undone.discard(number)

    def _pieces(self, jobs: Iterable[Job]) -> Iterator[NDArray]:
        for job in jobs:
            for piece in job.pieces(self._reader):
                yield piece
                self._done += piece.nbytes
                self._progress(self._done, sum(self._sizes.values()))

    def _copied(self, tensors: Iterable[TensorInfo]) -> Iterator[NDArray]:
        whole = (Copy(Output(info.name, "U8", (info.nbytes,)), info.name) for info in tensors)
        return (piece for copy in whole for piece in copy.pieces(self._reader))

    def _waiting(self, number: int) -> Path:
        """Where what later shards need of one waits."""
        return self._part.work / f"waiting-{number + 1:05d}"

    def _leave(self, number: int) -> None:
        """What waits of a shard is read there from now on."""
        offset = 0
        for info in self._layout.waiting.get(number, ()):
            self._reader.tensors[info.name] = replace(info, path=self._waiting(number), offset=offset)
            offset += info.nbytes

    def _remove_unneeded(self, number: int) -> None:
        """Removes what waits and was for shards up to this one."""
        for earlier, users in self._layout.needed_by.items():
            if earlier <= number and not users & self._undone:
                self._waiting(earlier).unlink(missing_ok=True)


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
