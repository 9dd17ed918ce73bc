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
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from numoe.engine.description import Description, describe_repository
from numoe.engine.experts.store import READERS, ExpertStore, Key
from numoe.engine.home import home, make
from numoe.engine.hub.distant import Fetched
from numoe.engine.hub.hub_id import is_hub_id
from numoe.engine.hub.network import HubError
from numoe.engine.hub.repository import repository
from numoe.quant.convert.jobs import Job, Matrix, Output, Reader
from numoe.quant.errors import InputError
from numoe.quant.files import Extent, Files, TensorInfo, held, write_whole
from numoe.quant.stored.checkpoint import Checkpoint
from numoe.quant.stored.conventions.native import LAYOUT
from numoe.quant.stored.manifest import read_manifest
from numoe.quant.stored.safetensors import file_start

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
    if description.in_gguf:
        return None
    manifest = read_manifest(path)
    if manifest is None:
        owner, _, name = path.parent.parent.name.removeprefix("models--").partition("--")  # the Hugging Face cache
        found = Origin(f"{owner}/{name}", path.name, "native")
    else:
        found = Origin(manifest.source, manifest.revision or "", manifest.recipe)
    plain = manifest is None or manifest.calibration is None
    return found if plain and is_hub_id(found.repo_id) and _COMMIT.fullmatch(found.revision) else None


class Written:
    """What a pull writes of each routed expert, made of a model as it lies on disk or on the hub."""

    def __init__(self, description: Description, recipe: str):
        self.description, self._recipe = description, recipe

    @cached_property
    def _weights(self) -> Mapping[Key, list[Matrix]]:
        keys = {
            name.rpartition(".")[0]: (layer, tensor.expert)
            for layer, name, tensor in self.description.spec.listing()
            if layer is not None and tensor.expert is not None
        }
        found = defaultdict(list)
        for weight in self.description.weights():
            if isinstance(weight, Matrix) and weight.unit in keys:
                found[keys[weight.unit]].append(weight)
        return found

    def keys(self) -> list[Key]:
        return list(self._weights)

    def weights(self, key: Key) -> list[Matrix]:
        return self._weights[key]

    def jobs(self, key: Key) -> list[Job]:
        """What writes an expert, before its weights are looked at."""
        return [job for weight in self._weights[key] for job in weight.jobs(self._recipe)]

    def outputs(self, key: Key) -> list[Output]:
        """Its tensors then."""
        return [output for job in self.jobs(key) for output in job.outputs]

    def pieces(self, key: Key, files: Files) -> Iterator[NDArray[np.uint8]]:
        """The bytes of its tensors, in order; `files` reads the model.

        Raises:
            InputError: they cannot be read, or it stays as it is stored where the recipe's format cannot hold it.
        """
        reader = Reader(self._tensors, files)
        jobs = [settled for job in self.jobs(key) for settled in job.settled(reader)]
        if [output for job in jobs for output in job.outputs] != self.outputs(key):
            layer, expert = key
            raise InputError(
                f"expert {expert} of layer {layer} is stored as its authors did, which only whole models are; "
                "copy the model to this node"
            )
        for job in jobs:
            for piece in job.pieces(reader):
                yield np.ascontiguousarray(piece).view(np.uint8)

    def hash(self, key: Key) -> str:
        """Of these bytes, from where the model lies. Raises InputError when they cannot be read."""
        digest = hashlib.sha256()
        for piece in self.pieces(key, self.description.checkpoint.files):
            digest.update(piece.data)
        return digest.hexdigest()

    @cached_property
    def _tensors(self) -> dict[str, TensorInfo]:
        return dict(self.description.checkpoint.tensors)


class PulledExperts(Files):
    """The experts' files of a model that is on the hub, each of which is pulled when it is first read."""

    def __init__(self, of: Origin):
        """Reads the configuration and the headers of the model, and none of its weights.

        Raises:
            InputError: the hub cannot be reached or does not have this commit any more, or there is no place for files.
        """
        super().__init__()
        self._repository = repository(of.repo_id, of.revision, _wait)
        self._written = Written(describe_repository(self._repository), of.recipe)
        self.folder, self._held = of.folder, ExitStack()
        try:
            make(self.folder)
            self._work = _claimed(self.folder, self._held)
        except OSError as error:
            raise self._unwritable(error) from error
        self._keys: dict[Path, Key] = {}
        self._fresh: dict[Key, str] = {}
        keys = self._written.keys()
        tensors = self._layout(keys)
        checkpoint = Checkpoint(self.folder, tensors, LAYOUT, files=self)
        experts = {
            key: {weight.name.rpartition(".")[2]: checkpoint[weight.name] for weight in self._written.weights(key)}
            for key in keys
        }
        self.store = ExpertStore(self, experts)
        stored = (sum(extent.nbytes for extent in self._extents(key)) for key in keys)
        self.working_bytes = READERS * max(stored)
        """The most memory that pulling takes: of each that is pulled at a time what the hub has of it."""

    @property
    def description(self) -> Description:
        return self._written.description

    def _layout(self, keys: Collection[Key]) -> dict[str, TensorInfo]:
        """Where each tensor will lie."""
        tensors = {}
        for key in keys:
            path = self.folder / "{}-{}.safetensors".format(*key)
            self._keys[path] = key
            outputs = self._written.outputs(key)
            offset = len(_start(outputs))
            for output in outputs:
                tensors[output.name] = TensorInfo(output.name, output.dtype, output.shape, path, offset, output.nbytes)
                offset += output.nbytes
        return tensors

    def _extents(self, key: Key) -> list[Extent]:
        return [extent for weight in self._written.weights(key) for extent in weight.stored.extents()]

    # ------------------------------------------------------------------------------------------------ what is here

    def keep_only(self, keys: Collection[Key]) -> None:
        """Remove the files of all others. Raises InputError where that is not possible."""
        wanted = set(keys)
        try:
            for path, key in self._keys.items():
                if key not in wanted:
                    path.unlink(missing_ok=True)
                    self._new(path).unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

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
        fetched = Fetched(self._repository, self._extents(key))
        digest = hashlib.sha256()

        def pieces() -> Iterator[bytes | memoryview]:
            yield _start(self._written.outputs(key))
            for piece in self._written.pieces(key, fetched):
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


def _start(outputs: Collection[Output]) -> bytes:
    return file_start(((one.name, one.dtype, one.shape) for one in outputs), LAYOUT)


def _wait(seconds: float, trouble: str) -> None:
    """Raises HubError where the hub is out of reach for long."""
    if seconds > _PATIENCE:
        raise HubError(trouble.rpartition("; ")[0])
    time.sleep(seconds)
