"""The matrices of one unit in a file of their own, as a conversion of the whole model writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from numoe.quant.convert.jobs import Job, Matrix, Output, Reader
from numoe.quant.dtypes import UInt8
from numoe.quant.errors import InputError
from numoe.quant.files import Extent, Files, TensorInfo
from numoe.quant.stored.checkpoint import Checkpoint
from numoe.quant.stored.conventions.native import LAYOUT, WRITTEN
from numoe.quant.stored.handle import Stored
from numoe.quant.stored.safetensors import file_start


@dataclass(frozen=True)
class Unit:
    """Matrices of a model, wherever that is, and the recipe by which they are written."""

    matrices: Sequence[Matrix]
    recipe: str

    @property
    def extents(self) -> list[Extent]:
        """What is read of the model."""
        return [extent for matrix in self.matrices for extent in matrix.stored.extents()]

    @property
    def start(self) -> bytes:
        """The file up to its tensors."""
        return file_start(((one.name, one.dtype, one.shape) for one in self._outputs(self._jobs())), WRITTEN)

    def pieces(self, reader: Reader) -> Iterator[UInt8]:
        """The rest of it.

        Raises:
            InputError: weights cannot be read or are damaged, or a matrix would stay as it is stored where the recipe's
                format cannot hold it.
        """
        planned = self._jobs()
        jobs = [settled for job in planned for settled in job.settled(reader)]
        if self._outputs(jobs) != self._outputs(planned):
            raise InputError(
                f"{self.matrices[0].stored.name} has values that {self.recipe} has no scales for, and stays as it is "
                "stored, which only a whole model can; copy the model here"
            )
        for job in jobs:
            for piece in job.pieces(reader):
                yield np.ascontiguousarray(piece).view(np.uint8).ravel()

    def hash(self, reader: Reader) -> str:
        """The SHA-256 of all pieces. Raises what `pieces` raises."""
        digest = hashlib.sha256()
        for piece in self.pieces(reader):
            digest.update(piece.data)
        return digest.hexdigest()

    def _jobs(self) -> list[Job]:
        return [job for matrix in self.matrices for job in matrix.jobs(self.recipe)]

    def _outputs(self, jobs: Sequence[Job]) -> list[Output]:
        return [output for job in jobs for output in job.outputs]

    def tensors(self, path: Path) -> dict[str, TensorInfo]:
        """Where its tensors lie in the file."""
        found, offset = {}, len(self.start)
        for one in self._outputs(self._jobs()):
            found[one.name] = TensorInfo(one.name, one.dtype, one.shape, path, offset, one.nbytes)
            offset += one.nbytes
        return found


def units_on_disk(units: Mapping[Path, Unit], files: Files) -> dict[Path, dict[str, Stored]]:
    """The matrices of units by their names, in the files that `files` reads, which need not be there yet."""
    tensors = {name: info for path, unit in units.items() for name, info in unit.tensors(path).items()}
    checkpoint = Checkpoint(next(iter(units)).parent, tensors, LAYOUT, files=files)
    return {path: {one.name: checkpoint[one.name] for one in unit.matrices} for path, unit in units.items()}
