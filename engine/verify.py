"""Whether the files of a model are the ones that its manifest, or the hub's cache, tells of."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from numoe.engine.home import models_folder
from numoe.quant.convert.folder import PART_SUFFIX
from numoe.quant.errors import InputError
from numoe.quant.files import Files, held
from numoe.quant.stored.checked import is_intact, misfits, require_manifest
from numoe.quant.stored.checkpoint import open_checkpoint

_BLOCK = 1 << 22


@dataclass(frozen=True)
class Findings:
    """The files of a folder by what is the matter with them, see `checked.misfits`."""

    good: tuple[str, ...]
    damaged: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    nbytes: int
    """What the files take together by the manifest."""

    @property
    def whole(self) -> bool:
        """Whether the model is as it was made: nothing is damaged, missing or added."""
        return not (self.damaged or self.missing or self.extra)


@dataclass(frozen=True)
class Read:
    """A file without a manifest that was read to its end. expected: its hash by the hub's cache, None elsewhere."""

    nbytes: int
    tensors: int
    sha256: str
    expected: str | None

    @property
    def whole(self) -> bool:
        """Whether it is as the hub has it; where that is not known, whether it could be read."""
        return self.expected in (None, self.sha256)


def verify_file(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Read:
    """Read every byte of a GGUF file, whose header must be that of as many; see `verify`.

    Raises:
        InputError: it is damaged, or cut.
    """
    with open_checkpoint(path) as checkpoint:
        tensors = len(checkpoint.tensors)
    blob = path.resolve().name  # the hub's cache calls a file by its hash
    expected = blob if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob) else None
    size = path.stat().st_size
    digest, done = _hashed(path, lambda done: progress(done, size))
    return Read(done, tensors, digest, expected)


def _hashed(path: Path, tell: Callable[[int], None]) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
            tell(size)
    return digest.hexdigest(), size


def verify(folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Findings:
    """Read every byte of a model.

    Args:
        progress: called with (bytes read, bytes to read).

    Raises:
        InputError: the folder has no manifest, or a damaged one.
    """
    records = require_manifest(folder).files
    missing, extra = misfits(folder, records)
    total = sum(record.size for record in records.values())
    done = 0
    good: list[str] = []
    damaged: list[str] = []

    def read(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    for name, record in records.items():
        path = folder / name
        if name in missing:
            continue
        with closing(Files()) as files:
            blocks = range(-(-record.size // record.block))
            intact = path.stat().st_size == record.size and all(
                is_intact(files.read_range, path, record, block, read) for block in blocks
            )
        (good if intact else damaged).append(name)
    return Findings(tuple(good), tuple(damaged), tuple(sorted(missing)), tuple(sorted(extra)), total)


def reopen(folder: Path, findings: Findings) -> None:
    """Remove the damaged files of a pulled model and take it as unfinished, so that a pull makes just these anew.

    Raises:
        InputError: the folder was not pulled, or there is an unfinished pull beside it.
    """
    if folder.parent != models_folder():
        raise InputError(f"{folder} was not pulled; make it anew with `numoe quantize`")
    part = folder.with_name(folder.name + PART_SUFFIX)
    with held(part) as free:
        if not free or part.exists():
            raise InputError(f"{part} is there too, from another pull; remove it first, or let that pull end")
        for name in findings.damaged:
            (folder / name).unlink()
        folder.rename(part)
