"""Files of named arrays beside some texts, which is what a session is kept in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numoe.quant.files import Files, TensorInfo, write_whole
from numoe.quant.stored.safetensors import file_start, read_header

_DTYPES = {"float32": "F32", "uint16": "BF16", "int8": "I8", "int16": "I16"}


def dtype_of(values: NDArray[Any]) -> str:
    """What safetensors calls an array's dtype; bfloat16 are the integers of their bits."""
    return _DTYPES[values.dtype.name]


def pieces(arrays: Mapping[str, NDArray[Any]]) -> Iterator[memoryview]:
    """The bytes of all arrays in order, without a copy where those of an index of the first axis lie side by side."""
    return (part.reshape(-1).view(np.uint8).data for values in arrays.values() for part in values)


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], texts: Mapping[str, str]) -> None:
    """Makes a file that only the user may read, whole or not at all. Raises OSError where it cannot be written."""
    start = file_start(((name, dtype_of(values), values.shape) for name, values in arrays.items()), texts)
    write_whole(path, chain([start], pieces(arrays)), private=True)


def listing(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Which arrays a file has, and its texts. Raises InputError where it is none of these files, or damaged."""
    return read_header(path)


def fill(arrays: Mapping[str, NDArray[Any]], stored: Mapping[str, TensorInfo]) -> None:
    """Reads into arrays, of the shapes that `listing` told, what is stored by their names. Raises InputError."""
    with closing(Files()) as files:
        for name, values in arrays.items():
            at = stored[name].offset
            for part in values:
                files.read_range(stored[name].path, at, part.nbytes, part.reshape(-1).view(np.uint8))
                at += part.nbytes
