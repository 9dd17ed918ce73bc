"""The Hugging Face hub: what a repository holds, and its bytes, checked on arrival.

Transfers go on where they were cut, also those of an earlier process, and wait and try again as long as the hub asks
for it or is out of reach. (huggingface_hub's own downloads begin anew in every process.) Nothing that an answer claims
is believed: lengths, parts and types are compared with what was asked for, and no body is read further than that.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any, TypeVar
from urllib.parse import quote

from numoe.engine.hub import network, segments
from numoe.engine.hub.hub_id import is_hub_id
from numoe.engine.hub.network import HubError, Wait
from numoe.quant.documents import parse_json, refuse_lfs_pointer
from numoe.quant.errors import InputError, WrongUsage
from numoe.quant.files import lock, shortened
from numoe.quant.stored import shards
from numoe.quant.stored.checkpoint import PICKLES, Checkpoint
from numoe.quant.stored.gguf_sets import GgufSet, gguf_sets
from numoe.quant.stored.quantization import PLAIN, Convention
from numoe.quant.stored.shards import INDEX_NAME, model_shards

LARGEST_SMALL = 64 << 20
"""Bytes of what is read into memory as a whole: the listing, config.json, vocabularies."""

_PARALLEL = 8
_BLOCK = 1 << 20

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its bytes, and the hash that the hub keeps of them.

    `sha256` is None for small files, which have the `git_sha1` of a git blob instead.
    """

    size: int
    sha256: str | None
    git_sha1: str | None = None

    @property
    def hash(self) -> str:
        """What `matches` compares, and the file's name in the Hugging Face cache."""
        return self.sha256 or self.git_sha1 or ""

    def digest(self) -> Any:
        """An unfinished hash of the kind that `matches` compares."""
        return hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.size)

    def matches(self, digest: Any) -> bool:
        """Whether a finished `digest()` is that of this file."""
        return digest.hexdigest() == self.hash

    def is_at(self, path: Path) -> bool:
        """Whether a file on the disk holds the same bytes; reads all of them. Raises OSError."""
        if path.stat().st_size != self.size:
            return False
        digest = self.digest()
        with path.open("rb") as stored:
            while block := stored.read(_BLOCK):
                digest.update(block)
        return self.matches(digest)


@dataclass(frozen=True)
class Repository:
    """A model on the hub at one commit. `files` are by their path within it."""

    repo_id: str
    revision: str
    files: Mapping[str, RemoteFile]
    wait: Wait = field(default=network.sleep, compare=False, repr=False)
    connections: int = field(default=1, compare=False, repr=False)
    """Over how many at once a large file is fetched, from a hub that gives parts of files."""
    gives_parts: Event = field(default_factory=Event, compare=False, repr=False)
    """Set when it has given one."""

    def read(self, name: str) -> bytes:
        """The whole of a small file.

        Raises:
            InputError: it is not there, has more than `LARGEST_SMALL` bytes, cannot be had, or arrives with other
                bytes than the hub promises.
        """
        file = self._file(name)
        if file.size > LARGEST_SMALL:
            raise InputError(
                f"{self.repo_id} lists {name} with {file.size:,} bytes, and no such file needs so many; "
                "choose another repository"
            )
        for _ in range(2):
            data = self.read_range(name, 0, file.size)
            digest = file.digest()
            digest.update(data)
            if file.matches(digest):
                return data
        raise self._wrong(name)

    def config(self) -> dict[str, Any]:
        """config.json. Raises InputError when it is no JSON object, or as `read` does."""
        name = f"config.json of {self.repo_id}"
        config = parse_json(self.read("config.json"), name, "tell the model's authors")
        if not isinstance(config, dict):
            raise InputError(f"{name} is not a JSON object; tell the model's authors")
        return config

    def checkpoint(self, convention: Convention = PLAIN) -> Checkpoint:
        """The listing of all tensors, from the index and the headers of the shards alone.

        Their paths are REPO_ID/SHARD: there is nothing to read there.

        Raises:
            InputError: a header is damaged, the index and the shards disagree, or they cannot be had.
        """
        folder = Path(self.repo_id)
        weight_map = None
        if INDEX_NAME in self.files:
            weight_map = shards.parse_index(self.read(INDEX_NAME), folder / INDEX_NAME)
        names = sorted(set(weight_map.values())) if weight_map else model_shards(self.files, self.repo_id)
        with ThreadPoolExecutor(_PARALLEL) as pool:
            headers = dict(zip(names, pool.map(self._header, names), strict=True))
        return Checkpoint(folder, *shards.join_shards(folder, headers, weight_map), convention)

    @cached_property
    def ggufs(self) -> list[GgufSet]:
        """The models in GGUF that it holds."""
        return gguf_sets(self.files)

    @cached_property
    def in_safetensors(self) -> bool:
        """Whether there are safetensors files at its top."""
        return any(name.endswith(".safetensors") and name[0] != "." and "/" not in name for name in self.files)

    def fetch(self, name: str, folder: Path, received: Callable[[int], None] = lambda count: None) -> Path:
        """Download a file into a folder that exists, or take it as it is there; gives its path.

        What is in a folder of the repository comes to the top.

        Until it is whole, checked and safe on disk it is called NAME.incomplete; a later call goes on with that.
        A file that arrives with a wrong hash is fetched once more.

        Args:
            received: called with the bytes of the file that are there so far; what it raises ends the download.

        Raises:
            InputError: it cannot be had, or arrives twice with other bytes than the hub promises.
            OSError: the folder cannot be written or is full.
        """
        file = self._file(name)
        path = folder / PurePosixPath(name).name
        if path.exists() and path.stat().st_size == file.size:
            received(file.size)
            return path
        self._download(name, path, path.with_name(f"{path.name}.incomplete"), received)
        return path

    def fetch_to_cache(self, name: str, received: Callable[[int], None] = lambda count: None) -> Path:
        """The path of a file in the Hugging Face cache, downloaded if it is not there with the bytes that are listed.

        Only checked bytes come into the cache, and what other programs have put there stays. As `fetch` otherwise.
        """
        file = self._file(name)
        if there := self.verified(name):
            received(file.size)
            return there
        storage = cache_folder() / f"models--{self.repo_id.replace('/', '--')}"
        blob, path = storage / "blobs" / file.hash, storage / "snapshots" / self.revision / name
        for parent in (blob.parent, path.parent):
            parent.mkdir(parents=True, exist_ok=True)
        if not (blob.exists() and file.is_at(blob)):
            self._download(name, blob, blob.with_name(f"{blob.name}.numoe.incomplete"), received)
        new = path.with_name(f"{path.name}.numoe.new")
        new.unlink(missing_ok=True)
        try:
            new.symlink_to(os.path.relpath(blob, path.parent))
        except OSError:  # Windows lets not everybody make links; huggingface_hub then puts the file itself there
            shutil.move(blob, new)
        new.replace(path)
        return path

    def verified(self, name: str) -> Path | None:
        """Where the Hugging Face cache has a file with the bytes that are listed, if it has; reads all of them."""
        path = self.cached(name)
        return path if path and self._file(name).is_at(path) else None

    def cached(self, name: str) -> Path | None:
        """Where the Hugging Face cache has a file of the size that is listed, if it has."""
        found = network.library().try_to_load_from_cache(self.repo_id, name, revision=self.revision)
        path = Path(found) if isinstance(found, str) else None
        return path if path and path.stat().st_size == self._file(name).size else None

    def _file(self, name: str) -> RemoteFile:
        if name not in self.files:
            raise InputError(f"{self.repo_id} has no {name}, which a model needs; choose another repository")
        return self.files[name]

    def _wrong(self, name: str) -> HubError:
        return HubError(
            f"{name} of {self.repo_id} arrived twice with other bytes than the hub promises and was not kept; "
            f"{network.or_endpoint()}check the network for a proxy that changes them and try again later"
        )

    def _header(self, name: str) -> tuple[dict[str, Any], dict[str, str]]:
        """The tensors and metadata of a shard."""
        return shards.distant_header(
            lambda start, stop: self.read_range(name, start, stop), Path(self.repo_id) / name, self._file(name).size
        )

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start..stop of a file. Raises InputError when they cannot be had."""
        if stop <= start:
            return b""
        data = self._patiently(lambda: b"".join(self._bytes(name, start, stop)))
        if start == 0:
            refuse_lfs_pointer(data, f"{name} of {self.repo_id}", f"{network.or_endpoint()}choose another repository")
        return data

    def _download(self, name: str, path: Path, part: Path, received: Callable[[int], None]) -> None:
        for _ in range(2):
            if self._file(name).matches(self._complete(name, part, received)):
                part.replace(path)
                return
            part.unlink()
        raise self._wrong(name)

    def _complete(self, name: str, part: Path, received: Callable[[int], None]) -> Any:
        """Makes `part` as long as the file, from where it ends; gives the digest of its bytes."""
        size = self._file(name).size
        with part.open("ab+") as file:
            if not lock(file):
                raise InputError(f"{part} is being written by another process; wait until that has ended")
            digest = self._file(name).digest()
            file.seek(0)
            while block := file.read(_BLOCK):
                digest.update(block)
            if file.tell() > size:
                file.seek(0)
                file.truncate()
                digest = self._file(name).digest()
            received(file.tell())

            def take(block: bytes, ahead: int = 0) -> None:
                file.write(block)
                digest.update(block)
                received(file.tell() + ahead)

            if self.connections > 1 and self.gives_parts.is_set():
                with closing(self._at_once(name, file.tell(), size)) as blocks:
                    for block, ahead in blocks:
                        take(block, ahead)
            else:
                self._fetch(name, file.tell(), size, take)
            file.flush()
            os.fsync(file.fileno())
        return digest

    def _at_once(self, name: str, start: int, stop: int) -> Generator[tuple[bytes, int]]:
        """Bytes start..stop of a file, over several connections, with how many are here of those that follow."""

        def fetch(first: int, last: int, put: Callable[[bytes], None]) -> None:
            self._fetch(name, first, last, put)

        return segments.in_order(fetch, segments.cut(start, stop), self.connections)

    def _fetch(self, name: str, start: int, stop: int, put: Callable[[bytes], None]) -> None:
        """Have bytes start..stop of a file put as they arrive; goes on where a connection was cut."""
        at = start

        def attempt() -> None:
            nonlocal at
            with closing(self._bytes(name, at, stop)) as blocks:
                for block in blocks:
                    put(block)
                    at += len(block)

        if start < stop:
            self._patiently(attempt, progress=lambda: at)

    def _bytes(self, name: str, start: int, stop: int) -> Generator[bytes]:
        """Bytes start..stop of a file as they arrive; where the hub gives no parts, they are picked from the whole."""
        path = f"/{self.repo_id}/resolve/{self.revision}/{quote(name)}"
        in_parts = True
        while start < stop:
            headers = {"Range": f"bytes={start}-{stop - 1}"} if in_parts else {}
            with network.ask(path, self.repo_id, headers) as response:
                first = _first_byte(response, name, start, self._file(name).size)
                if first is None and not in_parts:
                    raise network.foreign(name, "it is another part than was asked for")
                if first is None:
                    in_parts = False
                    continue
                if response.status_code == 206:
                    self.gives_parts.set()
                skip, before = start - first, start
                for block in network.blocks(response):
                    wanted = block[skip : skip + stop - start]
                    skip -= min(skip, len(block))
                    start += len(wanted)
                    if wanted:
                        yield wanted
                    if start == stop:
                        return
                if "html" in response.headers.get("Content-Type", ""):
                    raise network.foreign(name, "it is a web page")
                if response.status_code == 200 or start == before:
                    raise network.cut("it is cut")

    def _patiently(self, attempt: Callable[[], _Answer], progress: Callable[[], int] = lambda: 0) -> _Answer:
        return network.patiently(attempt, self.wait, progress)


def repository(repo_id: str, revision: str | None = None, wait: Wait = network.sleep) -> Repository:
    """What a repository holds.

    Args:
        repo_id: OWNER/NAME.
        revision: a branch, tag or commit; None: the main branch.

    Raises:
        WrongUsage: it is not the id of one.
        NoSuchRevision: the repository does not have it.
        InputError: there is no such repository, it is gated or the hub cannot be reached; or it holds no model that
            numoe reads: neither GGUF nor safetensors, no config.json, several safetensors without an index, or names
            that lead out of a folder.
    """
    if not is_hub_id(repo_id):
        raise WrongUsage(f'"{network.said(repo_id)}" is not the id of a repository; write it as OWNER/NAME')
    at = "" if revision is None else f"/revision/{quote(revision, safe='', errors='surrogateescape')}"

    def attempt() -> bytes:
        data = bytearray()
        with network.ask(f"/api/models/{repo_id}{at}?blobs=true", repo_id) as response:
            for block in network.blocks(response):
                data += block
                if len(data) > LARGEST_SMALL:
                    raise _no_hub(repo_id)
        return bytes(data)

    repo_id, commit, files = _listing(network.patiently(attempt, wait, known=False), repo_id)
    for name in files:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or any(c in "\\:" or not c.isprintable() for c in name):
            raise InputError(
                f"{repo_id} names the file {shortened(name)}, which would lie outside its folder: do not use it"
            )
    found = Repository(repo_id, commit, files, wait)
    if not found.ggufs:
        _refuse_unreadable(found)
    return found


def cached_snapshot(repo_id: str, whole: bool = True) -> Path | None:
    """The folder of a repository in the Hugging Face cache, if its config.json and all its shards are there.

    whole: False: also if only some of them are.
    """
    config = network.library().try_to_load_from_cache(repo_id, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    index = folder / INDEX_NAME
    try:
        names = [path.name for path in folder.iterdir()]
        wanted = set(shards.read_index(index).values() if index.exists() else model_shards(names, folder))
    except InputError:  # what is missing is the index, or a part of it
        wanted = set()
    there = wanted and all((folder / shard).exists() for shard in wanted)
    return folder if there or not whole else None


def cache_folder() -> Path:
    """The Hugging Face cache, made if it is not there."""
    folder = Path(network.library().constants.HF_HUB_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _listing(data: bytes, asked: str) -> tuple[str, str, dict[str, RemoteFile]]:
    """A repository's id, commit and files, from the hub's description of it."""
    try:
        info = parse_json(data, "the listing")
    except InputError as error:
        raise _no_hub(asked) from error
    found = info if isinstance(info, dict) else {}
    repo_id, commit, siblings = found.get("id"), found.get("sha"), found.get("siblings")
    listed = [_remote_file(sibling) for sibling in siblings] if isinstance(siblings, list) else []
    files = dict(one for one in listed if one)
    if (
        not (isinstance(repo_id, str) and is_hub_id(repo_id))
        or not (isinstance(commit, str) and _HASH.fullmatch(commit))
        or not (files and all(listed))
    ):
        raise _no_hub(asked)
    return repo_id, commit, files


_HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


def _remote_file(sibling: Any) -> tuple[str, RemoteFile] | None:
    """One file of a listing by its name."""
    if not isinstance(sibling, dict):
        return None
    name, size, blob, lfs = (sibling.get(key) for key in ("rfilename", "size", "blobId", "lfs"))
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else None
    hashed = sha256 if lfs else blob
    if not (isinstance(hashed, str) and _HASH.fullmatch(hashed) and len(hashed) == (64 if lfs else 40)):
        return None
    if not isinstance(name, str) or type(size) is not int or not 0 <= size < 1 << 63:
        return None
    return name, RemoteFile(size, sha256, blob if isinstance(blob, str) else None)


def _refuse_unreadable(found: Repository) -> None:
    weights = [n for n in found.files if n.endswith(".safetensors") and "/" not in n and not n.startswith(".")]
    if not weights:
        for suffixes, kind, way in (
            ((".gguf",), "GGUF files that are no models", "choose another repository"),
            (PICKLES, "pickled weights, which can run code when opened", "look for a safetensors version of it"),
        ):
            if example := next((name for name in sorted(found.files) if name.endswith(suffixes)), None):
                raise InputError(f"{found.repo_id} holds only {kind} ({example}); {way}")
        raise InputError(f"{found.repo_id} holds no .safetensors files; choose a repository with a model's weights")
    if "config.json" not in found.files:
        raise InputError(f"{found.repo_id} has no config.json, which a model needs; choose another repository")
    if INDEX_NAME not in found.files:
        try:
            model_shards(weights, found.repo_id)
        except InputError:
            raise InputError(
                f"{found.repo_id} holds {len(weights)} .safetensors files and no {INDEX_NAME} that says which make up "
                "the model; choose another repository or revision"
            ) from None


def _first_byte(response: Any, name: str, start: int, size: int) -> int | None:
    """Where in a file the body of a response begins; None if it is not of use for what follows `start`."""
    packed = response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity")
    if response.status_code == 200:
        length = response.headers.get("Content-Length")
        if length is not None and not packed and length.strip() != str(size):
            kind = response.headers.get("Content-Type", "unknown type").partition(";")[0]
            raise network.foreign(name, f"{network.said(length)} bytes of {network.said(kind)} in place of {size:,}")
        return 0
    part = re.fullmatch(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", response.headers.get("Content-Range", "").strip())
    if response.status_code == 416 or packed or not part or part[3] not in ("*", str(size)):
        return None
    return int(part[1]) if int(part[1]) <= start <= int(part[2]) else None


def _no_hub(repo_id: str) -> HubError:
    return HubError(
        f"what answers at {network.hub_name()} does not list the files of {repo_id} with sizes and hashes as the hub "
        f"does; {network.CHECK_HUB}"
    )
