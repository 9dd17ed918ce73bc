"""From a repository on the hub to a numoe folder: a shard is converted while the next one arrives, then it goes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from threading import Event

from numoe.engine import home
from numoe.engine.description import Description, describe_repository
from numoe.engine.hub import repository as hub_repository
from numoe.engine.hub.gguf import cached_gguf, chosen
from numoe.engine.hub.hub_id import is_hub_id, parted
from numoe.engine.hub.network import NoSuchRevision
from numoe.engine.hub.repository import RemoteFile, Repository
from numoe.quant.convert.convert import Conversion, convert
from numoe.quant.convert.folder import unfinished
from numoe.quant.errors import InputError
from numoe.quant.stored.checkpoint import gguf_header
from numoe.quant.stored.gguf_sets import HEADER, GgufSet
from numoe.quant.stored.manifest import Manifest, read_manifest

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


def describe_runnable(repository: Repository, gguf: GgufSet | None = None) -> Description:
    """As `describe_repository`, of a model that comes with a tokenizer that can be read."""
    from numoe.engine.text.tokenizer import require_tokenizer

    description = describe_repository(repository, gguf)
    if gguf is None:
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

    With `native` a GGUF file stays one, and is left where it is when the Hugging Face cache has it. Else at most two
    shards of a repository are on the disk together. An interrupted pull goes on where it was, at the same commit.

    Args:
        repo_id: OWNER/NAME in any case, or an earlier name of the repository; with :QUANT, :FILE or :FOLDER the model
            in GGUF that is called so, see `gguf_set`.
        quant: see `recipes.roles`.
        revision: a branch, tag or commit; None: the main branch, or what an interrupted pull began with.
        keep: download into the Hugging Face cache and leave the files there.
        wait: lets the seconds between two tries pass; tell: for what makes them necessary, from several threads.
        connections: over how many at once a shard is fetched; each holds 32 MiB in memory.

    Raises:
        InputError: the model cannot be had or is none that numoe runs, or there is no room for it. See also `convert`.
    """
    stop = Event()

    def patience(seconds: float, trouble: str) -> None:
        tell(trouble)
        (wait or stop.wait)(seconds)
        _refuse_stopped(stop)

    repo_id, wanted = parted(repo_id) or (repo_id, "")
    one = _here(repo_id, home.called(wanted, quant))
    if revision is None and (path := _at_hand(one, repo_id, wanted, quant)):
        return Pulled(path, None)
    _make_models_folder()
    begun = read_manifest(one.path) if one and not one.complete else None
    asked = begun.revision if begun and revision is None else revision
    try:
        repository = replace(hub_repository.repository(repo_id, asked, patience), connections=connections)
        gguf = chosen(repository, wanted)
        folder = one.finished_path if one else _folder(repository, gguf, quant)
        if folder.exists():
            _refuse_other(folder, repository, revision)
            return Pulled(folder, None)
        description = describe_runnable(repository, gguf)
        whole = gguf if quant == "native" else None
        shards = whole.files if whole else _shards(repository, description)
        downloads = _Downloads(begun, repository, shards, _header(gguf, description), keep, report, stop)
        if whole:
            return Pulled(folder, _as_it_is(downloads, folder))
        of = description.checkpoint, description.weights()
        return Pulled(folder, convert(*of, folder, quant, downloads, downloads.count_written))
    except NoSuchRevision as error:
        if begun and one and asked == begun.revision:
            raise _gone(one, asked) from error
        raise


def _gone(one: home.Pulled, revision: str | None) -> InputError:
    return InputError(
        f"the commit {revision} that this pull of {one.name} began with is gone from the hub, as its authors have "
        f"rewritten their history; `numoe rm {one.name}` removes what is here, then a pull begins anew"
    )


def _folder(repository: Repository, gguf: GgufSet | None, quant: str) -> Path:
    return home.folder_for(repository.repo_id, home.called(gguf.name if gguf else "", quant))


def _header(gguf: GgufSet | None, description: Description) -> bytes | None:
    return gguf_header(description.checkpoint) if gguf else None


def _shards(repository: Repository, description: Description) -> list[str]:
    """The files of a repository that hold a model's tensors."""
    paths = {info.path for info in description.checkpoint.tensors.values()}
    return sorted(path.relative_to(repository.repo_id).as_posix() for path in paths)


def _here(repo_id: str, called: str) -> home.Pulled | None:
    """What is here of a model, by any of its names: the whole of it, or what an interrupted pull left."""
    found = home.find(f"{repo_id}:{called}") if is_hub_id(repo_id) else ()
    known = sorted((one for one in found if one.quant.lower() == called.lower()), key=lambda one: not one.complete)
    return known[0] if known else None


def _at_hand(one: home.Pulled | None, repo_id: str, wanted: str, quant: str) -> Path | None:
    """Where a model is already: pulled, or in GGUF in the Hugging Face cache."""
    if one:
        return one.path if one.complete else None
    return cached_gguf(repo_id, wanted) if wanted and quant == "native" else None


def _as_it_is(downloads: _Downloads, folder: Path) -> Conversion:
    """Download files into a new folder, as `convert` would put others there.

    Raises:
        InputError: see `convert`.
    """
    files = downloads.files  # as they are here, `keep` has nothing more to keep
    with unfinished(folder, Manifest(downloads.name, "native", {}, downloads.revision)) as part:
        part.forget_all_but(list(files))
        todo = [name for name in files if name not in part.files]
        for name in todo:
            if (part.path / name).exists():  # it was taken, and the process killed before it was recorded
                (part.path / name).replace(part.work / name)
        part.clear_work({*todo, *(f"{name}.incomplete" for name in todo)})
        there = sum(path.stat().st_size for path in part.work.iterdir())
        part.require_space(sum(files[name].size for name in todo) - there)
        with closing(downloads.shards(todo, part.work)) as paths:
            for name, path in zip(todo, paths, strict=True):
                part.take(name, path, files[name].sha256)
        part.finish()
    nbytes = sum(file.size for file in files.values())
    return Conversion(nbytes, nbytes, as_it_was=True)


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
        self,
        begun: Manifest | None,
        repository: Repository,
        shards: Sequence[str],
        header: bytes | None,
        keep: bool,
        report: Report,
        stop: Event,
    ) -> None:
        """begun: of the pull that goes on. header: what a GGUF file says in place of small files; None: these do."""
        self.name = begun.source if begun else repository.repo_id
        self._header = header
        self.revision = repository.revision
        self._keep = keep
        self._repository = repository
        self._paths = {PurePosixPath(shard).name: shard for shard in shards}
        self._sizes = {name: file.size for name, file in self.files.items()}
        self._report = report
        self._stop = stop
        self._received = dict(self._sizes)
        self._written = 0, 0
        self._done = len(shards)
        self._converting = False

    @property
    def files(self) -> dict[str, RemoteFile]:
        """The shards by the names that they have here."""
        return {name: self._repository.files[path] for name, path in self._paths.items()}

    def names(self) -> Sequence[str]:
        return _small(self._repository) if self._header is None else [HEADER]

    def read(self, name: str) -> bytes:
        return self._repository.read(name) if self._header is None else self._header

    def room(self, names: Sequence[str], folder: Path) -> int:
        missing = sorted(self._sizes[name] for name in names if self._repository.cached(self._paths[name]) is None)
        if not self._keep:
            begun = {begun for name in names for begun in (name, f"{name}.incomplete")}
            there = sum(path.stat().st_size for path in folder.iterdir() if path.name in begun)
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
                _refuse_stopped(self._stop)
                self._received[name] = nbytes

            path = self._paths[name]
            if self._keep:
                return self._repository.fetch_to_cache(path, count)
            if cached := self._repository.verified(path):
                count(self._sizes[name])
                return cached
            return self._repository.fetch(path, folder, count)

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
                        path.unlink(missing_ok=True)  # it may have been taken
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


def _refuse_stopped(stop: Event) -> None:
    if stop.is_set():
        raise _Stopped


class _Stopped(Exception):
    """The pull has ended in another thread."""
