"""Whether the files of a folder are the ones that its manifest tells of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from numoe.engine.home import models_folder
from numoe.quant.convert.folder import PART_SUFFIX
from numoe.quant.errors import InputError
from numoe.quant.files import Files, held
from numoe.quant.stored.checked import is_intact, misfits, require_manifest


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
