"""Experts that a node without a copy of the model pulls from the hub: those that it has, in the form of the asking
machine's, which a pull of the whole model would give them too.

    NUMOE_HOME/experts/OWNER--NAME-QUANT-COMMIT/LAYER-EXPERT.safetensors        one that is the asking machine's
                                                new-N/LAYER-EXPERT.safetensors  what a process has not compared yet

The hub's hashes are of whole shards, of which a node gets parts: who asks compares an expert's with that of its own.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from numoe.engine.description import Description, describe_repository
from numoe.engine.experts.store import READERS, ExpertStore
from numoe.engine.experts.unit import Key
from numoe.engine.home import home, make
from numoe.engine.hub.distant import Fetched
from numoe.engine.hub.hub_id import is_hub_id
from numoe.engine.hub.network import HubError
from numoe.engine.hub.repository import repository
from numoe.quant.convert.jobs import Matrix, Reader
from numoe.quant.convert.unit import Unit, units_on_disk
from numoe.quant.errors import InputError
from numoe.quant.files import Files, TensorInfo, held, write_whole
from numoe.quant.stored.manifest import read_manifest

_PATIENCE = 4.0
"""Seconds that are waited for the hub at a time: somebody waits for an answer, and has the expert too."""
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Origin:
    """What a model on disk was made of: a repository at a commit, by a recipe."""

    repo_id: str
    revision: str
    recipe: str

    @property
    def folder(self) -> Path:
        """Where this machine keeps experts of it."""
        return home() / "experts" / f"{self.repo_id.replace('/', '--')}-{self.recipe}-{self.revision}"


def origin(description: Description) -> Origin | None:
    """Where a model can be had again; None of one that nobody pulled, a GGUF file, and one rounded by a text."""
    path = description.path.resolve()
    if description.metadata is not None:
        return None
    manifest = read_manifest(path)
    if manifest is None:
        kind, *names = path.parent.parent.name.split("--")  # of the Hugging Face cache
        found = Origin("/".join(names) if kind == "models" else "", path.name, "native")
    else:
        found = Origin(manifest.source, manifest.revision or "", manifest.recipe)
    plain = manifest is None or manifest.calibration is None
    return found if plain and is_hub_id(found.repo_id) and _COMMIT.fullmatch(found.revision) else None


class Written:
    """What a pull writes of each routed expert, made of a model as it lies on disk or on the hub."""

    def __init__(self, description: Description, recipe: str):
        self._description, self._recipe = description, recipe

    @cached_property
    def units(self) -> dict[Key, Unit]:
        """All of them."""
        keys = {
            name.rpartition(".")[0]: (layer, tensor.expert)
            for layer, name, tensor in self._description.spec.listing()
            if layer is not None and tensor.expert is not None
        }
        found = defaultdict(list)
        for weight in self._description.weights():
            if isinstance(weight, Matrix) and weight.unit in keys:
                found[keys[weight.unit]].append(weight)
        return {key: Unit(matrices, self._recipe) for key, matrices in found.items()}

    def reader(self, files: Files) -> Reader:
        """The model, read by `files`."""
        return Reader(self._tensors, files)

    def hash(self, key: Key) -> str:
        """That of an expert, from where the model lies. Raises InputError when it cannot be read."""
        return self.units[key].hash(self.reader(self._description.checkpoint.files))

    @cached_property
    def _tensors(self) -> dict[str, TensorInfo]:
        return dict(self._description.checkpoint.tensors)


class PulledExperts(Files):
    """The experts' files of a model that is on the hub, each of which is pulled when it is first read."""

    def __init__(self, of: Origin):
        """Reads the configuration and the headers of the model, and none of its weights.

        Raises:
            InputError: the hub cannot be reached or does not have this commit any more, or there is no place for files.
        """
        super().__init__()
        self._repository = repository(of.repo_id, of.revision, _wait)
        self.description = describe_repository(self._repository)
        self.folder, self._held = of.folder, ExitStack()
        try:
            make(self.folder)
            self._work = _claimed(self.folder, self._held)
        except OSError as error:
            raise self._unwritable(error) from error
        self._written = Written(self.description, of.recipe)
        self._keys = {self.folder / "{}-{}.safetensors".format(*key): key for key in self._written.units}
        self._fresh: dict[Key, str] = {}
        units = {path: self._written.units[key] for path, key in self._keys.items()}
        experts = {
            self._keys[path]: {name.rpartition(".")[2]: stored for name, stored in matrices.items()}
            for path, matrices in units_on_disk(units, self).items()
        }
        self.store = ExpertStore(self, experts)
        self.working_bytes = READERS * max(sum(extent.nbytes for extent in unit.extents) for unit in units.values())
        """The most memory that pulling takes: of each that is pulled at a time what the hub has of it."""

    # ------------------------------------------------------------------------------------------------ what is here

    def keep_only(self, keys: Collection[Key]) -> None:
        """Remove the files of all others, unless another process of this machine has experts in the same folder.

        Raises InputError where that is not possible.
        """
        wanted = set(keys)
        try:
            if not self._alone():
                return
            for path, key in self._keys.items():
                if key not in wanted:
                    path.unlink(missing_ok=True)
                    self._new(path).unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def _alone(self) -> bool:
        for path in self.folder.glob("new-*"):
            if path != self._work:
                with held(path) as free:
                    if not free:
                        return False
        return True

    def fresh(self, keys: Collection[Key]) -> dict[Key, str]:
        """The hashes of those of them that were not compared yet."""
        return {key: self._fresh[key] for key in keys if key in self._fresh}

    def confirm(self, keys: Collection[Key]) -> None:
        """They are what they should be, and stay here."""
        for path, key in self._keys.items():
            if key in keys and self._fresh.pop(key, ""):
                with suppress(FileNotFoundError):  # it was given to another node meanwhile
                    self._new(path).replace(path)

    # ------------------------------------------------------------------------------------------------- as `Files`

    def read_range(
        self, path: Path, offset: int, nbytes: int, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        with self._reading(path) as here:
            return super().read_range(here, offset, nbytes, out)

    def read_once(self, path: Path, offset: int, nbytes: int, pages: NDArray[np.uint8]) -> None:
        with self._reading(path) as here:
            super().read_once(here, offset, nbytes, pages)

    def drop_cached(self, path: Path, offset: int, nbytes: int) -> None:
        with self._reading(path) as here:
            super().drop_cached(here, offset, nbytes)

    @contextmanager
    def _reading(self, path: Path) -> Iterator[Path]:
        """A file that is open meanwhile, and no longer: there are tens of thousands. It is pulled if need be."""
        while True:
            here = next((one for one in (path, self._new(path)) if one.exists()), None) or self._pull(path)
            try:
                self.open(here)
                break
            except InputError:
                if here.exists():  # else another process of this node has removed it meanwhile
                    raise
        try:
            yield here
        finally:
            self.forget(here)

    def _pull(self, path: Path) -> Path:
        key = self._keys[path]
        unit, digest = self._written.units[key], hashlib.sha256()
        reader = self._written.reader(Fetched(self._repository, unit.extents))

        def pieces() -> Iterator[bytes | memoryview]:
            yield unit.start
            for piece in unit.pieces(reader):
                digest.update(piece.data)
                yield piece.data

        new = self._new(path)
        try:
            write_whole(new, pieces())
        except OSError as error:
            raise self._unwritable(error) from error
        self._fresh[key] = digest.hexdigest()
        return new

    def _new(self, path: Path) -> Path:
        """Where an expert is until it has been compared."""
        return self._work / path.name

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(
            f"{self.folder}, where pulled experts are kept, cannot be written ({error.strerror}); put that right, or "
            "set NUMOE_HOME to another disk"
        )


def _claimed(folder: Path, stack: ExitStack) -> Path:
    """A folder in it that no other process has, as long as the stack is there; what one left that has ended is gone."""
    for number in count():
        path = folder / f"new-{number}"
        if stack.enter_context(held(path)):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            return path
    raise AssertionError("numbers do not end")


def _wait(seconds: float, trouble: str) -> None:
    """Raises HubError where the hub is out of reach for long."""
    if seconds > _PATIENCE:
        raise HubError(trouble.rpartition("; ")[0])
    time.sleep(seconds)
