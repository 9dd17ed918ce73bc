"""Whether the files of a model are the ones that its manifest, or the hub's cache, tells of."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from numoe.engine.home import models_folder
from numoe.quant.convert.folder import PART_SUFFIX
from numoe.quant.errors import InputError
from numoe.quant.files import held, is_left
from numoe.quant.stored.checkpoint import open_checkpoint
from numoe.quant.stored.manifest import MANIFEST_NAME, read_manifest

_BLOCK = 1 << 22


@dataclass(frozen=True)
class Findings:
    """The files of a folder by what is the matter with them.

    Hidden ones are nobody's business, but for what writers left that were killed.
    """

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


def _shifted(progress: Callable[[int, int], None], before: int, total: int, size: int) -> None:
    progress(before + size, total)


def verify(folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Findings:
    """Read every byte of a model.

    Args:
        progress: called with (bytes read, bytes to read).

    Raises:
        InputError: the folder has no manifest, or a damaged one.
    """
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None:
        raise InputError(
            f"{folder} has no {MANIFEST_NAME} with the hashes to compare with; "
            "only what `numoe pull` and `numoe quantize` made can be verified"
        )
    total = sum(record.size for record in manifest.files.values())
    done = 0
    found: dict[str, list[str]] = {"good": [], "damaged": [], "missing": []}
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            found["missing"].append(name)
            continue
        digest = ""
        if path.stat().st_size == record.size:
            digest, _ = _hashed(path, partial(_shifted, progress, done, total))
        found["good" if digest == record.sha256 else "damaged"].append(name)
        done += record.size
    there = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    visible = {
        path.as_posix() for path in there if is_left(path.name) or not any(part.startswith(".") for part in path.parts)
    }
    extra = visible - manifest.files.keys() - {MANIFEST_NAME}
    return Findings(**{kind: tuple(names) for kind, names in found.items()}, extra=tuple(sorted(extra)), nbytes=total)


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
