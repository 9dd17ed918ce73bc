"""The boundary around the libraries in Rust that read what strangers wrote: tokenizers and llguidance."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from numoe.quant.errors import InputError


@contextmanager
def library(what: str, remedy: str) -> Iterator[None]:
    """A boundary around calls of a library that raises whatever there is, and panics in Rust.

    Raises:
        InputError: whatever it raised, as "what (reason); remedy".
    """
    try:
        with _silent():
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


@contextmanager
def _silent() -> Iterator[None]:
    """Rust prints a panic to file descriptor 2 before Python hears of it."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
