"""Files of a repository that are read where they are, range by range."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from numoe.engine.hub.repository import Repository
from numoe.quant.files import Extent, Files, joined

_GAP_SHARE = 128
"""Which part of all ranges may lie between two of them, to be fetched too instead of asking once more."""


class Distant(Files):
    """The files of a repository, by paths that begin with its id. Every read asks the hub."""

    def __init__(self, repository: Repository) -> None:
        super().__init__()
        self._repository = repository

    def read_range(
        self, path: Path, offset: int, nbytes: int, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        name = path.relative_to(self._repository.repo_id).as_posix()
        data = np.frombuffer(self._repository.read_range(name, offset, offset + nbytes), np.uint8)
        if out is None:
            return data
        out[:nbytes] = data
        return out[:nbytes]


class Fetched(Distant):
    """The same, of which some ranges are in memory: those that follow each other were asked for at once."""

    def __init__(self, repository: Repository, extents: Iterable[Extent]) -> None:
        """Fetches the ranges. Raises InputError when they cannot be had."""
        super().__init__(repository)
        wanted = list(extents)
        gap = sum(extent.nbytes for extent in wanted) // _GAP_SHARE
        self._runs = [(run, super(Fetched, self).read_range(*run)) for run in joined(wanted, gap)]

    def read_range(
        self, path: Path, offset: int, nbytes: int, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        for run, data in self._runs:
            at = offset - run.offset
            if run.path == path and 0 <= at <= run.nbytes - nbytes:
                part = data[at : at + nbytes]
                if out is None:
                    return part
                out[:nbytes] = part
                return out[:nbytes]
        return super().read_range(path, offset, nbytes, out)
