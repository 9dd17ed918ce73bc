"""The boundary around the libraries in Rust that read what strangers wrote: tokenizers and llguidance."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from numoe.quant.errors import InputError


@contextmanager
def library(what: str, remedy: str) -> Iterator[None]:
    """A boundary around calls of a library that raises whatever there is, and panics in Rust.

    Raises:
        InputError: whatever it raised, as "what (reason); remedy".
    """
    try:
        with _silence:
            yield
    except InputError:
        raise
    except BaseException as error:
        # Panics derive from BaseException, so that few catch them, and their class can't be imported.
        if isinstance(error, MemoryError) or not (
            isinstance(error, Exception) or type(error).__name__ == "PanicException"
        ):
            raise
        said = " ".join(str(error)[:300].split()).replace("`", "'")  # which are around parameters of ours
        raise InputError(f"{what} ({said}); {remedy}") from None


class _Silence:
    """Standard error goes nowhere while any thread is within: what is printed there meanwhile by others is lost too."""

    def __init__(self) -> None:
        self._changing = Lock()
        self._within = 0
        self._kept: int | None = None

    def __enter__(self) -> None:
        """Rust prints a panic to file descriptor 2 before Python hears of it."""
        with self._changing:
            self._within += 1
            if self._within > 1:
                return
            try:
                self._kept = os.dup(2)
            except OSError:  # it is closed
                return
            if sys.stderr is not None:
                sys.stderr.flush()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)
            os.close(nowhere)

    def __exit__(self, *_: object) -> None:
        with self._changing:
            self._within -= 1
            if not self._within and self._kept is not None:
                os.dup2(self._kept, 2)
                os.close(self._kept)
                self._kept = None


_silence = _Silence()
