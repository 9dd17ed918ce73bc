"""A folder against its manifest: which files are there, and whether their bytes are those that were written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from numoe.quant.errors import InputError, WrongUsage
from numoe.quant.files import Files, is_left, shortened
from numoe.quant.stored.manifest import MANIFEST_NAME, FileRecord, Manifest, read_manifest

_PIECE = 1 << 22
ReadRange = Callable[[Path, int, int, NDArray[np.uint8]], NDArray[np.uint8]]
"""`Files.read_range`."""


def require_manifest(folder: Path) -> Manifest:
    """The manifest of a folder. Raises InputError when it has none, or a damaged one."""
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None:
        raise WrongUsage(
            f"{folder} has no {MANIFEST_NAME} with the hashes to compare with; "
            "only what `numoe pull` and `numoe quantize` made can be verified"
        )
    return manifest


def misfits(folder: Path, records: Mapping[str, FileRecord]) -> tuple[set[str], set[str]]:
    """The names of files that a folder lacks, and of those that it has beside them.

    Hidden ones are nobody's business, but for what writers left that were killed.
    """
    there = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    visible = {
        path.as_posix() for path in there if is_left(path.name) or not any(part.startswith(".") for part in path.parts)
    }
    missing = {name for name in records if not (folder / name).is_file()}
    return missing, visible - records.keys() - {MANIFEST_NAME}


def is_intact(
    read_range: ReadRange, path: Path, record: FileRecord, block: int, progress: Callable[[int], None] | None = None
) -> bool:
    """Whether a block of a file is the one that was written; `progress` is told of every piece how long it is."""
    digest, begin = hashlib.sha256(), block * record.block
    end = min(record.size, begin + record.block)
    buffer = np.empty(min(_PIECE, end - begin), np.uint8)
    for at in range(begin, end, _PIECE):
        piece = read_range(path, at, min(_PIECE, end - at), buffer)
        digest.update(piece.data)
        if progress:
            progress(len(piece))
    return digest.hexdigest().startswith(record.hash_of(block))


class CheckedFiles(Files):
    """Files of a converted folder, whose bytes are compared with its manifest when they are first read."""

    def __init__(self, folder: Path) -> None:
        """Compares all but the weights, which is little, with the manifest.

        Raises:
            InputError: the folder has no manifest, a file is missing or added, or is not as it was written.
        """
        super().__init__()
        records = require_manifest(folder).files
        self._records = {folder / name: record for name, record in records.items()}
        self._good: set[tuple[Path, int]] = set()
        missing, extra = misfits(folder, records)
        for names, what in ((missing, "is missing"), (extra, "is no part of what was made")):
            if names:
                raise InputError(f"{folder}: {shortened(min(names))} {what}; `numoe verify` names every such file")
        for path, record in self._records.items():
            if path.stat().st_size != record.size:
                raise _damaged(path)
            if path.suffix != ".safetensors":
                self._check(path, 0, record.size)

    def begun(self, path: Path, nbytes: int) -> None:
        super().begun(path, nbytes)
        self._check(path, 0, nbytes)

    def read_range(
        self, path: Path, offset: int, nbytes: int, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        self._check(path, offset, nbytes)
        return super().read_range(path, offset, nbytes, out)

    def read_once(self, path: Path, offset: int, nbytes: int, pages: NDArray[np.uint8]) -> None:
        self._check(path, offset, nbytes)
        super().read_once(path, offset, nbytes, pages)

    def _check(self, path: Path, offset: int, nbytes: int) -> None:
        """Raises InputError where one of the blocks around these bytes is not as it was written."""
        record = self._records.get(path)
        if record is None:
            raise InputError(f"{path} is not among the files of the manifest beside it; read the model as a whole")
        for block in range(offset // record.block, -(-(offset + nbytes) // record.block)):
            if (path, block) not in self._good:
                if not is_intact(super().read_range, path, record, block):
                    end = min(record.size, (block + 1) * record.block)
                    raise _damaged(path, f", between bytes {block * record.block} and {end}")
                self._good.add((path, block))


def _damaged(path: Path, where: str = "") -> InputError:
    return InputError(f"{path} is not as it was written{where}; `numoe verify` tells what to get anew")
