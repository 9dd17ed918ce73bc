"""From a repository on the hub to a numoe folder: a shard is converted while the next one arrives, then it goes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

from numoe.engine import home
from numoe.engine.description import Description, describe_repository
from numoe.engine.hub import repository as hub_repository
from numoe.engine.hub.hub_id import is_hub_id
from numoe.engine.hub.network import NoSuchRevision
from numoe.engine.hub.repository import Repository
from numoe.quant.convert.convert import Conversion, convert
from numoe.quant.errors import InputError
from numoe.quant.stored.manifest import read_manifest

CONNECTIONS = 4
"""Where nothing else is said: a hub's servers often give each less than a line can carry."""
_REPORT_S = 0.2  # between two reports while nothing but the network is at work


@dataclass(frozen=True)
class Progress:
    """How far a pull is: shards that are done with, bytes that are here or were, bytes of the result."""

    shards: int
    of_shards: int
    received: int
    to_receive: int
    written: int
    to_write: int
    arriving: int = 0
    """Which shard is received just now, from 1 on; 0: none."""
    converting: int = 0
    """Which one's weights are converted."""


Report = Callable[[Progress], None]
"""Called often and from the thread that pulls; what it raises ends the pull."""
Wait = Callable[[float], object]
"""Called with the seconds to let pass before another try."""
Tell = Callable[[str], object]
"""Called with what goes wrong and when it is tried again."""


@dataclass(frozen=True)
class Pulled:
    """`path` is the folder; `conversion` is None for one that was complete already."""

    path: Path
    conversion: Conversion | None


def describe_runnable(repository: Repository) -> Description:
    """As `describe_repository`, of a model that comes with a tokenizer that can be read."""
    from numoe.engine.text.tokenizer import require_tokenizer

    description = describe_repository(repository)
    require_tokenizer(_small(repository), repository.repo_id)
    return description


def pull(
    repo_id: str,
    quant: str = "native",
    revision: str | None = None,
    keep: bool = False,
    report: Report = lambda progress: None,
    wait: Wait | None = None,
    tell: Tell = lambda trouble: None,
    connections: int = CONNECTIONS,
) -> Pulled:
    """Download a model into a folder of its id on the hub, its weights in the formats of a recipe.

    At most two shards of the repository are on the disk together. A pull that was interrupted goes on where it was,
    at the same commit.

    Args:
        repo_id: OWNER/NAME in any case, or an earlier name of the repository.
        quant: a key of `quant.recipe.RECIPES`.
        revision: a branch, tag or commit; None: the main branch, or what an interrupted pull began with.
        keep: download into the Hugging Face cache and leave the files there.
        wait: lets the seconds between two tries pass.
        tell: for what makes them necessary; called from several threads.
        connections: over how many at once a shard is fetched; each holds 32 MiB in memory.

    Raises:
        InputError: the model cannot be had or is none that numoe runs, or there is no room for it. See also `convert`.
    """
    stop = Event()

    def patience(seconds: float, trouble: str) -> None:
        tell(trouble)
        (wait or stop.wait)(seconds)
        if stop.is_set():
            raise _Stopped

    one = _here(repo_id, quant)
    if one and one.complete and revision is None:
        return Pulled(one.path, None)
    _make_models_folder()
    begun = read_manifest(one.path) if one and not one.complete else None
    wanted = begun.revision if begun and revision is None else revision
    try:
        repository = replace(hub_repository.repository(repo_id, wanted, patience), connections=connections)
        folder = one.finished_path if one else home.folder_for(repository.repo_id, quant)
        if folder.exists():
            _refuse_other(folder, repository, revision)
            return Pulled(folder, None)
        description = describe_runnable(repository)
        shards = sorted({info.path.name for info in description.checkpoint.tensors.values()})
        downloads = _Downloads(begun.source if begun else repository.repo_id, repository, shards, keep, report, stop)
        counted = downloads.count_written
        return Pulled(folder, convert(description.checkpoint, description.weights(), folder, quant, downloads, counted))
    except NoSuchRevision as error:
        if begun and one and wanted == begun.revision:
            raise InputError(
                f"the commit {wanted} that this pull of {one.name} began with is gone from the hub, as its authors "
                f"have rewritten their history; `numoe rm {one.name}` removes what is here, then a pull begins anew"
            ) from error
        raise


def _here(repo_id: str, quant: str) -> home.Pulled | None:
    """What is here of a model, by any of its names: the whole of it, or what an interrupted pull left."""
    known = sorted(home.find(f"{repo_id}:{quant}") if is_hub_id(repo_id) else (), key=lambda one: not one.complete)
    return known[0] if known else None


def _make_models_folder() -> None:
    """Raises InputError when it cannot be."""
    try:
        home.make(home.models_folder())
    except OSError as error:
        raise InputError(
            f"{home.models_folder()} cannot be made ({error.strerror}); set NUMOE_HOME to a folder you may write in"
        ) from error


def _refuse_other(folder: Path, repository: Repository, revision: str | None) -> None:
    """Raises InputError when a finished folder is not of the commit that was asked for."""
    there = read_manifest(folder)
    if revision is not None and (there is None or there.revision != repository.revision):
        one = next(one for one in home.models() if one.path == folder)
        raise InputError(
            f"{folder} holds revision {there.revision if there else 'unknown'} and not {repository.revision}; "
            f"remove it with `numoe rm {one.name}` to pull the other one"
        )


def _small(repository: Repository) -> list[str]:
    """The files of a repository that may come along; what is huge holds no settings that anybody reads."""
    return [
        name for name, file in repository.files.items() if "/" not in name and file.size <= hub_repository.LARGEST_SMALL
    ]


class _Downloads:
    """The shards of a repository as the origin of a conversion: one is there while the next arrives."""

    passing = True

    def __init__(
        self, name: str, repository: Repository, shards: Sequence[str], keep: bool, report: Report, stop: Event
    ) -> None:
        self.name = name
        self.revision = repository.revision
        self._keep = keep
        self._repository = repository
        self._sizes = {name: repository.files[name].size for name in shards}
        self._report = report
        self._stop = stop
        self._received = dict(self._sizes)
        self._written = 0, 0
        self._done = len(shards)
        self._converting = False

    def names(self) -> Sequence[str]:
        return _small(self._repository)

    def read(self, name: str) -> bytes:
        return self._repository.read(name)

    def room(self, names: Sequence[str], folder: Path) -> int:
        missing = sorted(self._sizes[name] for name in names if self._repository.cached(name) is None)
        if not self._keep:
            there = sum(path.stat().st_size for path in folder.glob("*.safetensors*"))
            return max(0, sum(missing[-2:]) - there)
        cache = hub_repository.cache_folder()
        free = shutil.disk_usage(cache).free
        if sum(missing) > free:
            raise InputError(
                f"{cache} needs {sum(missing) / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; make room, "
                "set HF_HOME to another disk, or pull without `keep`"
            )
        return sum(missing) if cache.stat().st_dev == folder.stat().st_dev else 0

    def shards(self, names: Sequence[str], folder: Path) -> Generator[Path]:
        self._received |= dict.fromkeys(names, 0)
        self._done = len(self._sizes) - len(names)

        def fetch(name: str) -> Path:
            def count(nbytes: int) -> None:
                if self._stop.is_set():
                    raise _Stopped
                self._received[name] = nbytes

            if self._keep:
                return self._repository.fetch_to_cache(name, count)
            if path := self._repository.verified(name):
                count(self._sizes[name])
                return path
            return self._repository.fetch(name, folder, count)

        with ThreadPoolExecutor(1, "numoe-download") as pool:
            try:
                arriving = [pool.submit(fetch, name) for name in names[:1]]
                for following in range(1, len(names) + 1):
                    while not wait_for(arriving, _REPORT_S).done:
                        self._tell()
                    path = arriving[0].result()
                    arriving = [pool.submit(fetch, name) for name in names[following : following + 1]]
                    self._converting = True
                    yield path
                    self._converting = False
                    if path.parent == folder:
                        path.unlink()
                    self._done += 1
                    self._tell()
            finally:
                self._stop.set()

    def count_written(self, done: int, total: int) -> None:
        """The progress of the conversion."""
        self._written = done, total
        self._tell()

    def _tell(self) -> None:
        received, total, of = sum(self._received.values()), sum(self._sizes.values()), len(self._sizes)
        converting = self._done + 1 if self._converting else 0
        following = self._done + (2 if self._converting else 1)
        arriving = following if following <= of else 0
        self._report(Progress(self._done, of, received, total, *self._written, arriving, converting))


class _Stopped(Exception):
    """The pull has ended in another thread."""
