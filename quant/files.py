"""Tensors as byte ranges of files, the one function that reads such a range, and the one that writes a whole file."""

import errno
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numoe.quant.errors import InputError

# What a file system without locks answers: NFS without lockd, Lustre without -o flock, some FUSE and macOS's NFS.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

# macOS refuses to read 2 GiB or more at once.
_LARGEST_READ = 1 << 30


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


class Files:
    """Files opened for reading when first needed. Safe to use from several threads."""

    def __init__(self) -> None:
        self._open: dict[Path, FileIO] = {}
        self._lock = threading.Lock()

    def read_range(
        self, path: Path, offset: int, nbytes: int, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """`nbytes` from `offset` of a file: uint8 (nbytes,), in `out` if given.

        Raises InputError when the file cannot be opened or read, or ends too soon.
        """
        if out is None:
            out = np.empty(nbytes, np.uint8)
        file = self._file(path)
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
        return out[:nbytes]

    def drop_cached(self, path: Path, offset: int, nbytes: int) -> None:
        """Tells the system, where it listens, that its own copy of a range that was read is not needed again."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file(path).fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Closes every file. A later read opens it again."""
        with self._lock:
            for file in self._open.values():
                file.close()
            self._open.clear()

    def _file(self, path: Path) -> FileIO:
        with self._lock:
            if path not in self._open:
                try:
                    self._open[path] = path.open("rb", buffering=0)
                except OSError as error:
                    raise InputError(f"{path} cannot be read ({error.strerror}); check that it is there") from error
            return self._open[path]

    def _read_into(self, file: FileIO, offset: int, view: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), [view], offset)
        # Windows has no positioned read: seek and read are one step under the lock.
        with self._lock:
            file.seek(offset)
            return file.readinto(view)


def write_whole(path: Path, data: bytes, private: bool = False) -> None:
    """Writes a file in one step and safe on disk: at every moment it is the old one or the new one.

    private: nobody but the user may read it. Raises OSError, and leaves nothing then.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb", opener=_private if private else None) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


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
def locked(path: Path, what: str) -> Iterator[None]:
    """Keeps other processes from writing `path` meanwhile, by a lock on the file .NAME.lock beside it, which stays.

    (A file that is replaced cannot be locked itself: who waits would hold the old one.)

    Raises:
        InputError: another process is writing it; `what` says in the error what that is.
        OSError: the folder cannot be written.
    """
    with path.with_name(f".{path.name}.lock").open("ab") as file:
        if not lock(file):
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
