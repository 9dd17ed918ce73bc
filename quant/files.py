"""Tensors as byte ranges of files and the one function that reads such a range; names, locks and writing of files."""

from __future__ import annotations

import errno
import os
import re
import secrets
import sys
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from numoe.quant.errors import InputError, WrongUsage

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

# What a file system without locks answers: NFS without lockd, Lustre without -o flock, some FUSE and macOS's NFS.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}

# macOS refuses to read 2 GiB or more at once.
_LARGEST_READ = 1 << 30

PAGE = 4096
"""Reads that go past the system's cache begin and end with a multiple of it, in the file and in memory: that of every
disk's sectors."""

MOST_TENSORS = 250_000
"""In a file: reading a header of so many takes a second, and the largest models have as many in all files."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a stored tensor lies: `nbytes` from `offset` of `path` hold `shape` in row-major order.

    `dtype` is the file format's own name: "BF16", "F8_E4M3", "Q4_K", ...
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


class Extent(NamedTuple):
    """A range of bytes in a file."""

    path: Path
    offset: int
    nbytes: int


def joined(extents: Iterable[Extent], gap: int) -> list[Extent]:
    """The ranges in their order, those in one that lie no more than `gap` bytes apart."""
    runs: list[Extent] = []
    for extent in sorted(extents, key=lambda one: (str(one.path), one.offset)):
        end = runs[-1].offset + runs[-1].nbytes if runs else 0
        if runs and extent.path == runs[-1].path and extent.offset <= end + gap:
            end = max(end, extent.offset + extent.nbytes)
            runs[-1] = runs[-1]._replace(nbytes=end - runs[-1].offset)
        else:
            runs.append(extent)
    return runs


class Files:
    """Files opened when first needed, which stay as they were when first read. Safe to use from several threads."""

    def __init__(self) -> None:
        self._open: dict[Path, FileIO] = {}
        self._past_cache: dict[Path, FileIO | None] = {}  # None: not possible there
        self._left: dict[Path, FileIO] = {}  # tried past the cache, and maybe still read by another thread
        finalize(self, _close, self._open, self._past_cache, self._left)
        self._states: dict[Path, tuple[int, ...]] = {}
        self._lock = threading.Lock()

    def begun(self, path: Path, nbytes: int) -> None:
        """To be called when the first `nbytes` of a file have been read elsewhere: they are this file's.

        Raises InputError when it cannot be looked at.
        """
        try:
            self._states.setdefault(path, _state(path.stat()))
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); check that it is there") from error

    def open(self, path: Path) -> None:
        """Opens a file that may have no name when it is read.

        Raises InputError when it cannot be opened.
        """
        self._file(path)
        self._direct(path)

    def read_range(
        self, path: Path, offset: int, nbytes: int, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """`nbytes` from `offset` of a file: uint8 (nbytes,), in `out` if given.

        Raises InputError when the file cannot be opened or read, ends too soon, or is not as it was when it was first
        read.
        """
        if out is None:
            out = np.empty(nbytes, np.uint8)
        file = self._file(path)
        if path not in self._states:
            self._states.setdefault(path, _state(os.fstat(file.fileno())))
        view = out.data[:nbytes]
        done = 0
        while done < nbytes:
            try:
                count = self._read_into(file, offset + done, view[done : done + _LARGEST_READ])
            except OSError as error:
                raise InputError(f"{path} cannot be read ({error.strerror}); check its disk") from error
            if count == 0:
                raise InputError(f"{path} ends at byte {offset + done}, inside its tensor data: download it again")
            done += count
        self._refuse_changed(path, os.fstat(file.fileno()))
        return out[:nbytes]

    def read_once(self, path: Path, offset: int, nbytes: int, pages: NDArray[np.uint8]) -> None:
        """`nbytes` from `offset` of a file, without a copy of them in the system's memory where that is possible: it
        would take the place of others, and making it takes five times as long as the rest of the processor's work.

        pages: (n,) uint8, as many PAGEs as the range touches, beginning with one. What they hold of the file is at its
        place, and the rest of the first and the last is overwritten.

        Raises InputError as `read_range`.
        """
        lead = offset % PAGE
        done = 0
        while done < lead + nbytes and (file := self._direct(path)) is not None:
            self._states.setdefault(path, _state(os.fstat(file.fileno())))
            try:
                count = os.preadv(file.fileno(), [pages.data[done : done + _LARGEST_READ]], offset - lead + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise InputError(f"{path} cannot be read ({error.strerror}); check its disk") from error
                self._left[path], self._past_cache[path] = (
                    file,
                    None,
                )  # its disk has larger sectors, or its file system cannot
            else:
                if count == 0:
                    break  # which `read_range` tells
                done += count
                self._refuse_changed(path, os.fstat(file.fileno()))
        if done < lead + nbytes:
            self.read_range(path, offset, nbytes, pages[lead : lead + nbytes])
            self.drop_cached(path, offset, nbytes)

    def drop_cached(self, path: Path, offset: int, nbytes: int) -> None:
        """Tells the system, where it listens, that its own copy of a range that was read is not needed again."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file(path).fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)

    def forget(self, path: Path) -> None:
        """Closes a file that nobody reads now; what has its name when it is read again may be another one."""
        with self._lock:
            for opened in (self._open, self._past_cache, self._left):
                if file := opened.pop(path, None):
                    file.close()
            self._states.pop(path, None)

    def close(self) -> None:
        """Closes every file. A later read opens it again."""
        with self._lock:
            _close(self._open, self._past_cache, self._left)

    def _file(self, path: Path) -> FileIO:
        with self._lock:
            if path not in self._open:
                try:
                    self._open[path] = path.open("rb", buffering=0)
                except OSError as error:
                    raise InputError(f"{path} cannot be read ({error.strerror}); check that it is there") from error
            return self._open[path]

    def _direct(self, path: Path) -> FileIO | None:
        """The file for reads past the system's cache; None where there are none."""
        with self._lock:
            if path not in self._past_cache:
                self._past_cache[path] = None
                if hasattr(os, "O_DIRECT") and hasattr(os, "preadv"):
                    with suppress(OSError):  # a file system that cannot; what else is wrong, `read_range` tells
                        self._past_cache[path] = FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT))
            return self._past_cache[path]

    def _refuse_changed(self, path: Path, now: os.stat_result) -> None:
        if self._states[path] != _state(now):
            raise InputError(f"{path} has changed since it was first read; leave it alone, and load the model again")

    def _read_into(self, file: FileIO, offset: int, view: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), [view], offset)
        # Windows has no positioned read: seek and read are one step under the lock.
        with self._lock:
            file.seek(offset)
            return file.readinto(view)


def _close(*opened: dict[Path, Any]) -> None:
    for files in opened:
        for file in filter(None, files.values()):
            file.close()
        files.clear()


def _state(found: os.stat_result) -> tuple[int, ...]:
    """What tells whether a file is another one, or was written to."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


_LEFT = re.compile(r"\.(.+)\.[0-9a-f]+\.part", re.DOTALL)
# Names that Windows keeps for devices, whatever follows their first point.
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in "123456789¹²³")}


def is_plain_name(name: object) -> bool:
    """Whether this names one file in a folder, and the same one on every system: no path, device or control character.

    Not plain as well is what disks change or cannot have: points and spaces at the end, bytes that are not UTF-8.
    """
    return (
        isinstance(name, str)
        and name.isprintable()  # which control characters, surrogates and line separators are not
        and name == name.rstrip(". ") != ""
        and len(name.encode()) <= 255
        and not set('/\\:*?"<>|') & set(name)
        and name.partition(".")[0].rstrip().upper() not in _DEVICES
    )


def plain_names(names: Iterable[object], where: str | Path) -> list[str]:
    """The names of files that `where` tells of, before they are joined to a folder.

    Raises:
        InputError: one is not plain, or two are the same on disks that do not tell capitals apart.
    """
    spelled: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not is_plain_name(name):
            raise InputError(f"{where} names the file {shortened(name)}, which is none beside it: do not use it")
        folded = unicodedata.normalize("NFC", name).casefold()
        if spelled.setdefault(folded, name) != name:
            raise InputError(f"{where} names both {spelled[folded]!r} and {name!r}, which many disks take for one file")
    return list(spelled.values())


def shortened(value: object) -> str:
    """What to print of a foreign value: its beginning, on one line."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:76]}..."


def require_folder(path: Path) -> None:
    """Raises WrongUsage unless there is a folder for a file or folder to be made: before hours of work go into it."""
    if not path.parent.is_dir():
        raise WrongUsage(f"there is no folder {path.parent} to put {path.name} into; make it first")


def write_whole(path: Path, data: bytes | Iterable[Buffer], private: bool = False) -> None:
    """Writes a file in one step and safe on disk: at every moment it is the old one or the new one.

    Args:
        data: the bytes, or pieces of them.
        private: nobody but the user may read it.

    Raises OSError, and leaves nothing then. What writers left that were killed meanwhile is removed.
    """
    if path.exists() and not path.is_file():  # a device would be replaced by a file
        raise OSError(errno.EINVAL, "it is not an ordinary file")
    with suppress(OSError):  # not by `glob`, which keeps what it made of every name that it was ever given
        for left in path.parent.iterdir():
            if is_left(left.name, path.name):
                with suppress(OSError), left.open("ab") as file:
                    if lock(file):  # else somebody is writing it now
                        left.unlink()
    while True:
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            with open(part, "xb", opener=_private if private else None) as file:
                if not lock(file) or not part.exists():
                    continue  # somebody took it for one that was left, before it was locked
                if path.exists() and not private:
                    part.chmod(path.stat().st_mode & 0o777)
                for piece in (data,) if isinstance(data, bytes) else data:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
                if os.name != "nt":  # which renames no open file
                    part.replace(path)
            if os.name == "nt":
                part.replace(path)
            return
        finally:
            part.unlink(missing_ok=True)


def is_left(name: str, of: str | None = None) -> bool:
    """Whether a file is called as those that `write_whole` writes, of the file `of` or any."""
    return (left := _LEFT.fullmatch(name)) is not None and of in (None, left[1])


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def lock(file: BinaryIO) -> bool:
    """Takes an open file for this process until it is closed or the process ends; False: another one has it.

    Where the file system has no locks nobody can be kept out, and the file counts as taken.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Keeps other processes from writing `path` meanwhile; False: another one does.

    By a lock on the file .NAME.lock beside it, which is there no longer than that. (What is replaced or renamed cannot
    be locked itself: who waits would hold the old one.) Raises OSError where the folder cannot be written.
    """
    guard = path.with_name(f".{path.name}.lock")
    while True:
        with guard.open("ab") as file:
            if not lock(file):
                yield False
                return
            try:
                if not os.path.samestat(os.fstat(file.fileno()), guard.stat()):
                    continue
            except FileNotFoundError:  # whoever held it removed it, and has ended
                continue
            try:
                yield True
            finally:
                if os.name != "nt":  # which removes no open file
                    guard.unlink(missing_ok=True)
        if os.name == "nt":
            with suppress(OSError):  # the next one has it open already
                guard.unlink()
        return


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """As `held`.

    Raises:
        InputError: another process is writing it; `what` says in the error what that is.
    """
    with held(path) as free:
        if not free:
            raise InputError(f"{what} is in use by another process; wait until that has ended, or take another")
        yield


@contextmanager
def locked_soon(path: Path, what: str, patience: float) -> Iterator[None]:
    """As `locked`, but waits so many seconds for the other process to end."""
    until = time.monotonic() + patience
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(path, what))
                break
            except InputError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)
        yield
