"""The folder that a conversion writes.

Files appear in DESTINATION.part whole and synced, then its numoe.json records them; the folder gets its name when all
are there. So a conversion that ended in any way goes on at its first unrecorded file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from numoe.quant.errors import InputError, WrongUsage
from numoe.quant.files import held, require_folder
from numoe.quant.stored.manifest import MANIFEST_NAME, FileRecord, Hashing, Manifest, read_manifest

PART_SUFFIX = ".part"
"""Ends the name of a folder that is not finished."""

_WORK = "work"  # in the unfinished folder: downloads, files half written, what waits for a later shard
# Room that is left on the disk: so many bytes, or on small disks this part of all.
_RESERVE_BYTES = 1_000_000_000
_RESERVE_SHARE = 50
_COPY_BYTES = 1 << 24


class Part:
    """The unfinished folder of a conversion, made or found, while nobody else writes there."""

    def __init__(self, destination: Path, manifest: Manifest) -> None:
        self.destination = destination
        self.path = destination.with_name(destination.name + PART_SUFFIX)
        self.work = self.path / _WORK
        found = read_manifest(self.path)
        if found is not None and found.version != manifest.version:
            raise InputError(
                f"{self.path} holds an unfinished conversion that an earlier numoe began, which wrote other "
                "files; remove the folder and repeat the command to begin anew"
            )
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
        hashing = Hashing()
        new.unlink(missing_ok=True)  # what is there may be a link
        try:
            with new.open("xb") as file:
                for piece in pieces:
                    data = piece if isinstance(piece, bytes) else np.ascontiguousarray(piece).view(np.uint8).data
                    file.write(data)
                    hashing.update(data)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
        _sync(path.parent)
        return hashing.record()

    def write(self, name: str, pieces: Iterable[bytes | NDArray]) -> None:
        """Makes a file of the result and records it."""
        self._manifest.files[name] = self.put(self.path / name, pieces)
        self._manifest.write(self.path)
        _sync(self.path)

    def take(self, name: str, path: Path, sha256: str | None) -> None:
        """Makes a whole file part of the result, and records it; it is moved here from `work`, else copied.

        sha256: its hash where that is known, by which it has been checked.
        """
        if path.parent == self.work and sha256:
            record = FileRecord(path.stat().st_size, sha256)
            path.replace(self.path / name)
        else:
            with path.open("rb") as file:
                record = self.put(self.path / name, iter(partial(file.read, _COPY_BYTES), b""))
        self._manifest.files[name] = record
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
        if any(name.endswith((".safetensors", ".gguf")) for name in self.files) or any(self.work.iterdir()):
            return
        self.work.rmdir()
        for name in (*self.files, MANIFEST_NAME):
            (self.path / name).unlink(missing_ok=True)
        with suppress(OSError):  # somebody has put files there
            self.path.rmdir()


@contextmanager
def unfinished(destination: Path, manifest: Manifest) -> Iterator[Part]:
    """DESTINATION.part, which nobody else writes meanwhile. Errors of the disk become sentences."""
    refuse_existing(destination)
    require_folder(destination)
    path = destination.with_name(destination.name + PART_SUFFIX)
    with ExitStack() as stack:
        try:
            if not stack.enter_context(held(path)):
                raise InputError(f"{path} is being written by another process; wait until that has ended")
            refuse_existing(destination)  # by a process that has finished just now
            part = Part(destination, manifest)
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
        raise WrongUsage(f"{destination} is there already and is not overwritten; choose another name or remove it")


def _sync(folder: Path) -> None:
    """Makes the entries of a folder outlast a power cut."""
    if os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
