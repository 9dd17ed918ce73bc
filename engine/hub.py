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
import socket
import ssl
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

from numoe.engine.home import is_hub_id
from numoe.quant import safetensors_file
from numoe.quant.checkpoint import PICKLES, Checkpoint
from numoe.quant.documents import parse_json, refuse_lfs_pointer
from numoe.quant.errors import InputError
from numoe.quant.files import lock, shortened
from numoe.quant.safetensors_file import INDEX_NAME, model_shards

LARGEST_SMALL = 64 << 20
"""Bytes of what is read into memory as a whole: the listing, config.json, vocabularies."""

_RETRY_WAITS = (1, 2, 4, 8, 16, 32)  # seconds before each further try; any progress begins the row anew
_FIRST_TRIES = 3  # so many of them when the hub has not answered at all yet
_LONGEST_WAIT = 300  # seconds that the hub may ask for at a time: the window of its rate limits
_SLOW_S, _SLOW_RATE = 60, 1000  # an answer that gives fewer bytes a second for so long is cut
_REDIRECTS = 10
_HEADER_BYTES = 1 << 18  # more than most shards' headers take
_PARALLEL = 8
_BLOCK = 1 << 20
_HUB = "https://huggingface.co"

Wait = Callable[[float, str], object]
"""Called with the seconds to let pass before another try, and what to tell of that."""
_Answer = TypeVar("_Answer")


class HubError(InputError):
    """The hub cannot be asked, or does not give what it is asked for; nothing that is wrong with a model."""


class NoSuchRevision(HubError):
    """A repository does not have a branch, tag or commit, or no longer."""


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


def _sleep(seconds: float, telling: str) -> None:
    time.sleep(seconds)


@dataclass(frozen=True)
class Repository:
    """A model on the hub at one commit. `files` are by their path within it."""

    repo_id: str
    revision: str
    files: Mapping[str, RemoteFile]
    wait: Wait = field(default=_sleep, compare=False, repr=False)

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
            data = self._range(name, 0, file.size)
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

    def checkpoint(self, fp8_block: tuple[int, int] = (128, 128)) -> Checkpoint:
        """The listing of all tensors, from the index and the headers of the shards alone.

        Their paths are REPO_ID/SHARD: there is nothing to read there.

        Raises:
            InputError: a header is damaged, the index and the shards disagree, or they cannot be had.
        """
        folder = Path(self.repo_id)
        weight_map = None
        if INDEX_NAME in self.files:
            weight_map = safetensors_file.parse_index(self.read(INDEX_NAME), folder / INDEX_NAME)
        shards = sorted(set(weight_map.values())) if weight_map else model_shards(self.files, self.repo_id)
        with ThreadPoolExecutor(_PARALLEL) as pool:
            headers = dict(zip(shards, pool.map(self._header, shards), strict=True))
        return Checkpoint(folder, *safetensors_file.join_shards(folder, headers, weight_map), fp8_block)

    def fetch(self, name: str, folder: Path, received: Callable[[int], None] = lambda count: None) -> Path:
        """Download a file into a folder that exists, or take it as it is there; gives its path.

        Until it is whole, checked and safe on disk it is called NAME.incomplete; a later call goes on with that.
        A file that arrives with a wrong hash is fetched once more.

        Args:
            received: called with the bytes of the file that are there so far; what it raises ends the download.

        Raises:
            InputError: it cannot be had, or arrives twice with other bytes than the hub promises.
            OSError: the folder cannot be written or is full.
        """
        file = self._file(name)
        path = folder / name
        if path.exists() and path.stat().st_size == file.size:
            received(file.size)
            return path
        self._download(name, path, folder / f"{name}.incomplete", received)
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
        found = _library().try_to_load_from_cache(self.repo_id, name, revision=self.revision)
        path = Path(found) if isinstance(found, str) else None
        return path if path and path.stat().st_size == self._file(name).size else None

    def _file(self, name: str) -> RemoteFile:
        if name not in self.files:
            raise InputError(f"{self.repo_id} has no {name}, which a model needs; choose another repository")
        return self.files[name]

    def _wrong(self, name: str) -> HubError:
        return HubError(
            f"{name} of {self.repo_id} arrived twice with other bytes than the hub promises and was not kept; "
            f"{_or_endpoint()}check the network for a proxy that changes them and try again later"
        )

    def _header(self, name: str) -> tuple[dict[str, Any], dict[str, str]]:
        """The tensors and metadata of a shard."""
        size = self._file(name).size
        start = self._range(name, 0, min(size, _HEADER_BYTES))
        end = 8 + int.from_bytes(start[:8], "little")
        path = Path(self.repo_id) / name
        if len(start) < 8 or end > min(size, 8 + safetensors_file.HEADER_LIMIT):
            raise InputError(f"{path} is not a whole safetensors file; tell the model's authors")
        if end > len(start):
            start += self._range(name, len(start), end)
        return safetensors_file.parse_header(start[8:end], path, size)

    def _range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start..stop of a file."""
        if stop <= start:
            return b""
        data = self._patiently(lambda: b"".join(self._bytes(name, start, stop)))
        if start == 0:
            refuse_lfs_pointer(data, f"{name} of {self.repo_id}", f"{_or_endpoint()}choose another repository")
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

            def attempt() -> None:
                with closing(self._bytes(name, file.tell(), size)) as blocks:
                    for block in blocks:
                        file.write(block)
                        digest.update(block)
                        received(file.tell())

            if file.tell() < size:
                self._patiently(attempt, progress=file.tell)
            file.flush()
            os.fsync(file.fileno())
        return digest

    def _bytes(self, name: str, start: int, stop: int) -> Generator[bytes]:
        """Bytes start..stop of a file as they arrive; where the hub gives no parts, they are picked from the whole."""
        path = f"/{self.repo_id}/resolve/{self.revision}/{quote(name)}"
        in_parts = True
        while start < stop:
            headers = {"Range": f"bytes={start}-{stop - 1}"} if in_parts else {}
            with _ask(path, self.repo_id, headers) as response:
                first = _first_byte(response, name, start, self._file(name).size)
                if first is None and not in_parts:
                    raise _foreign(name, "it is another part than was asked for")
                if first is None:
                    in_parts = False
                    continue
                skip, before = start - first, start
                for block in _blocks(response):
                    wanted = block[skip : skip + stop - start]
                    skip -= min(skip, len(block))
                    start += len(wanted)
                    if wanted:
                        yield wanted
                    if start == stop:
                        return
                if "html" in response.headers.get("Content-Type", ""):
                    raise _foreign(name, "it is a web page")
                if response.status_code == 200 or start == before:
                    raise _cut("it is cut")

    def _patiently(self, attempt: Callable[[], _Answer], progress: Callable[[], int] = lambda: 0) -> _Answer:
        return _patiently(attempt, self.wait, progress)


def repository(repo_id: str, revision: str | None = None, wait: Wait = _sleep) -> Repository:
    """What a repository holds.

    Args:
        repo_id: OWNER/NAME.
        revision: a branch, tag or commit; None: the main branch.

    Raises:
        NoSuchRevision: the repository does not have it.
        InputError: there is no such repository, it is gated or the hub cannot be reached; or it holds no model that
            numoe reads: no config.json, no safetensors, several of them without an index, or names that lead out of a
            folder.
    """
    if not is_hub_id(repo_id):
        raise InputError(f'"{_said(repo_id)}" is not the id of a repository; write it as OWNER/NAME')
    at = "" if revision is None else f"/revision/{quote(revision, safe='', errors='surrogateescape')}"

    def attempt() -> bytes:
        data = bytearray()
        with _ask(f"/api/models/{repo_id}{at}?blobs=true", repo_id) as response:
            for block in _blocks(response):
                data += block
                if len(data) > LARGEST_SMALL:
                    raise _no_hub(repo_id)
        return bytes(data)

    repo_id, commit, files = _listing(_patiently(attempt, wait, known=False), repo_id)
    for name in files:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or any(c in "\\:" or not c.isprintable() for c in name):
            raise InputError(
                f"{repo_id} names the file {shortened(name)}, which would lie outside its folder: do not use it"
            )
    found = Repository(repo_id, commit, files, wait)
    _refuse_unreadable(found)
    return found


def cached_snapshot(repo_id: str, whole: bool = True) -> Path | None:
    """The folder of a repository in the Hugging Face cache, if its config.json and all its shards are there.

    whole: False: also if only some of them are.
    """
    config = _library().try_to_load_from_cache(repo_id, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    index = folder / INDEX_NAME
    try:
        names = [path.name for path in folder.iterdir()]
        shards = set(safetensors_file.read_index(index).values()) if index.exists() else model_shards(names, folder)
    except InputError:  # what is missing is the index, or a part of it
        shards = []
    there = shards and all((folder / shard).exists() for shard in shards)
    return folder if there or not whole else None


def cache_folder() -> Path:
    """The Hugging Face cache, made if it is not there."""
    folder = Path(_library().constants.HF_HUB_CACHE)
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
            ((".gguf",), "GGUF files", "download one of them with `hf download` and give its path"),
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


# ------------------------------------------------------------------------------------------------------- requests


@dataclass
class _Passing(Exception):
    """What goes wrong and may be over soon."""

    problem: str
    """What it is, in a few words."""
    remedy: str
    asked: float = 0
    """Seconds that the hub asks to wait."""
    tries: int = len(_RETRY_WAITS)
    first_tries: int = len(_RETRY_WAITS)
    """When the hub has not given anything yet."""


def _patiently(
    attempt: Callable[[], _Answer], wait: Wait, progress: Callable[[], int] = lambda: 0, known: bool = True
) -> _Answer:
    """attempt(), tried again while it fails in a way that passes.

    progress: bytes that are there; once they grow, patience is new.
    known: whether the hub has answered earlier.

    Raises:
        HubError: it fails in another way or for too long.
    """
    tries, before = 0, progress()
    while True:
        try:
            return attempt()
        except _Passing as error:
            if progress() > before:
                tries, before = 0, progress()
            if tries >= (error.tries if known else min(error.tries, error.first_tries)):
                raise HubError(f"{error.problem}; {error.remedy}") from error
            seconds = max(_RETRY_WAITS[tries], error.asked)
            wait(seconds, f"{error.problem}; trying again in {seconds:.0f} s")
            tries += 1


@contextmanager
def _ask(path: str, repo_id: str, headers: Mapping[str, str] | None = None) -> Iterator[Any]:
    """The response of httpx or httpx2, as the version of huggingface_hub has it; its status is 200, 206 or 416.

    416 only where a Range was asked for. Redirects are followed here, as httpx would read the whole body of each.

    Raises:
        HubError: the hub refuses, or it cannot be asked.
        _Passing: that may be over soon.
    """
    endpoint, library = _endpoint(), _library()
    headers = _headers() | dict(headers or {})
    client = _client()
    http = __import__(library.errors.HTTPError.__module__)
    try:
        request = client.build_request(
            "GET",
            endpoint + path,
            headers=headers,
            timeout=min(max(0.01, library.constants.HF_HUB_DOWNLOAD_TIMEOUT), 600),
        )
        for _ in range(_REDIRECTS):
            with closing(client.send(request, stream=True, follow_redirects=False)) as response:
                if response.next_request is not None:
                    request = response.next_request
                    if request.url.scheme not in ("http", "https"):
                        raise HubError(f"{_host()} sends on to {_said(request.url.scheme)}://; {_CHECK_HUB}")
                    continue
                if response.status_code not in (200, 206) and not (response.status_code == 416 and "Range" in headers):
                    raise _refusal(response, repo_id)
                packed = response.headers.get("Content-Encoding", "identity").strip().lower()
                if packed not in ("", "identity", "gzip", "deflate"):  # one layer of these is unpacked piece by piece
                    raise HubError(
                        f"{_host()} sends its files packed ({_said(packed)}), which it was asked not to; {_CHECK_HUB}"
                    )
                yield response
                return
        raise HubError(f"{_host()} sends on from address to address without an end; {_CHECK_HUB}")
    except library.errors.OfflineModeIsEnabled as error:
        raise HubError(
            f"the hub is not asked about {repo_id}, as HF_HUB_OFFLINE is set; unset it and try again"
        ) from error
    except http.DecodingError as error:
        raise _foreign(path.rpartition("/")[2], _said(error)) from error
    except (http.HTTPError, http.InvalidURL, http.CookieConflict, UnicodeError) as error:
        raise _trouble(error, http) from error


def _blocks(response: Any) -> Iterator[bytes]:
    """The body of a response, unless it comes so slowly that it would take for ever."""
    began, count = time.monotonic(), 0
    for block in response.iter_bytes():
        yield block
        count += len(block)
        seconds = time.monotonic() - began
        if seconds > _SLOW_S and count < seconds * _SLOW_RATE:
            raise _cut(f"{count} bytes came in {seconds:.0f} seconds")


def _first_byte(response: Any, name: str, start: int, size: int) -> int | None:
    """Where in a file the body of a response begins; None if it is not of use for what follows `start`."""
    packed = response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity")
    if response.status_code == 200:
        length = response.headers.get("Content-Length")
        if length is not None and not packed and length.strip() != str(size):
            kind = response.headers.get("Content-Type", "unknown type").partition(";")[0]
            raise _foreign(name, f"{_said(length)} bytes of {_said(kind)} in place of {size:,}")
        return 0
    part = re.fullmatch(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", response.headers.get("Content-Range", "").strip())
    if response.status_code == 416 or packed or not part or part[3] not in ("*", str(size)):
        return None
    return int(part[1]) if int(part[1]) <= start <= int(part[2]) else None


_CHECK_HUB = "check the network and HF_ENDPOINT"


def _foreign(name: str, reason: str) -> _Passing:
    """What answers is something else: a page to log in, a broken proxy or mirror."""
    return _Passing(
        f"what answers at {_host()} for {_said(name)} is not that file ({reason})",
        "log in to the network if a browser shows that it wants that, check HF_ENDPOINT, and try again: what is here "
        "is kept",
        tries=1,
    )


def _no_hub(repo_id: str) -> HubError:
    return HubError(
        f"what answers at {_host()} does not list the files of {repo_id} with sizes and hashes as the hub does; "
        f"{_CHECK_HUB}"
    )


def _cut(reason: str, **patience: int) -> _Passing:
    """There is no connection, or no longer."""
    variable = _proxy_variable()
    by, check = (f" by the proxy of {variable}", f"check {variable}, or ") if variable else ("", "")
    return _Passing(
        f"the connection to {_host()}{by} fails ({reason})",
        f"{_or_endpoint()}{check}check the network and try again: what is here is kept",
        **patience,
    )


def _trouble(error: Exception, http: ModuleType) -> HubError | _Passing:
    """What stops a request on its way."""
    causes: list[BaseException] = [error]
    while following := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(following)
    passing = isinstance(error, http.TransportError) and not isinstance(
        error, http.UnsupportedProtocol | http.LocalProtocolError
    )
    if isinstance(error, http.ProxyError):
        passing = re.match(r"(5\d\d|429)\b", str(error)) is not None
    tls = next((cause for cause in causes if isinstance(cause, ssl.SSLError)), None)
    if isinstance(tls, ssl.SSLCertVerificationError):
        return HubError(
            f"the certificate of {_host()} is not trusted ({_said(tls.verify_message)}); if your network has one of "
            "its own, give its file in SSL_CERT_FILE"
        )
    if tls is not None and tls.reason in ("WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "HTTP_REQUEST"):
        passing = False
    trouble = _cut(_said(error) or "it is cut", first_tries=_FIRST_TRIES)
    if os.environ.get("HF_ENDPOINT") and any(isinstance(cause, socket.gaierror) for cause in causes):
        trouble.first_tries = 0
    return trouble if passing else HubError(f"{trouble.problem}; {trouble.remedy}")


def _refusal(response: Any, repo_id: str) -> HubError | _Passing:
    """An answer without content as a sentence with the next step."""
    host, status = _host(), response.status_code
    code, reason = (_said(response.headers.get(f"X-Error-{key}", "")) for key in ("Code", "Message"))
    signed = "authorization" in response.request.headers
    if status == 511:
        return HubError(f"the network wants you to log in before it lets {host} through; do so in a browser")
    if status == 407:
        return HubError(
            f"the proxy of {_proxy_variable() or 'the system'} wants a name and password; write them into it as "
            "http://NAME:PASSWORD@HOST:PORT"
        )
    if status in (408, 425, 429) or status >= 500:
        return _Passing(
            f"{host} answers {repo_id} with status {status}",
            "try again later: what is here is kept",
            _asked_wait(response.headers),
        )
    if code == "GatedRepo" and not (signed and status == 401):
        return HubError(
            f"{repo_id} is gated: accept its licence at {host}/{repo_id}, log in with `hf auth login` and try again"
        )
    if code == "RevisionNotFound" and "/resolve/" in response.url.path:
        return NoSuchRevision(f"{repo_id} was changed meanwhile, and its commit of before is gone; repeat the command")
    if code == "RevisionNotFound":
        return NoSuchRevision(f"{repo_id} has no such revision; see {host}/{repo_id}/tree/main for those it has")
    if code == "EntryNotFound":
        return HubError(f"{repo_id} lacks a file that it lists; try again later")
    if signed and status == 401:
        return HubError(
            f"{host} does not accept {_token_source()}{f' ({reason})' if reason else ''}; remove it, or log in anew "
            "with `hf auth login`"
        )
    if code == "RepoNotFound" or status in (401, 404):
        return HubError(
            f'{host} has no repository "{repo_id}", or it is private; {_or_endpoint()}check the spelling, or log in '
            "with `hf auth login` if you may see it"
        )
    if status == 403:
        way = f" with {_token_source()}; take one that may" if signed else "; log in with `hf auth login`"
        return HubError(f"{host} does not let you read {repo_id}{way} and try again")
    return HubError(
        f"{host} answers {repo_id} with status {status}{f' ({reason})' if reason else ''}; "
        f"{_or_endpoint()}try again later: what is here is kept"
    )


def _asked_wait(headers: Mapping[str, str]) -> float:
    """Seconds that the hub asks to wait, in any way there is of saying so; 0: it does not."""
    after = headers.get("Retry-After", "").strip()
    seconds = 0.0
    if limit := re.search(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("RateLimit", "")):
        seconds = float(limit[1]) + 1
    elif after.isdecimal():
        seconds = float(after)
    elif after:
        try:
            seconds = parsedate_to_datetime(after).timestamp() - time.time()
        except (ValueError, OverflowError):
            seconds = 0.0  # no date either
    return max(0.0, min(seconds, _LONGEST_WAIT))


# ------------------------------------------------------------------------------------- what the user has set


def _endpoint() -> str:
    """The address of the hub. Raises HubError when HF_ENDPOINT is none."""
    # huggingface_hub reads it once, when it is imported.
    address = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/")
    if not address:
        return _HUB
    fault = None
    try:
        parts = urlsplit(address)
        labels = (parts.hostname or "").rstrip(".").split(".")
        if parts.port == 0 or "@" in parts.path + parts.query + parts.fragment:
            fault = "has a wrong port, or signs in its password that must be written as %XX"
        elif any(mark in address for mark in "\"'`“”‘’<>") or not address.isprintable() or " " in address:
            fault = "has quotes or spaces in it"
        elif "://" not in address:
            fault = "lacks the https:// before it"
        elif parts.scheme not in ("http", "https"):
            fault = "begins neither with https:// nor with http://"
        elif ":" not in (parts.hostname or "") and not all(0 < len(label) < 64 for label in labels):
            fault = "names no host"
        elif parts.query or parts.fragment or "?" in address or "#" in address:
            fault = "has more after the host"
    except ValueError:  # which may tell the password
        fault = "is no address"
    if fault:
        shown = _said(address.rpartition("@")[2])
        raise HubError(f'HF_ENDPOINT ("{shown}") {fault}; write it as https://HOST, or unset it')
    return address


def _host() -> str:
    """The address of the hub to show, without a name and password."""
    return _said(_endpoint())


def _or_endpoint() -> str:
    return "check HF_ENDPOINT, or " if os.environ.get("HF_ENDPOINT") else ""


def _library() -> ModuleType:
    """huggingface_hub, which reads a dozen variables of the environment when it is imported."""
    _endpoint()
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ValueError as error:
        raise HubError(
            f"huggingface_hub does not start ({_said(error)}); correct or unset the variables HF_* of the environment"
        ) from error
    return huggingface_hub


def _headers() -> dict[str, str]:
    """Who asks. (`build_hf_headers` of huggingface_hub would ask the hub for something else before.)"""
    library = _library()
    headers = {"User-Agent": f"numoe; hf_hub/{library.__version__}", "Accept-Encoding": "identity"}
    try:
        token = None if library.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else library.get_token()
    except Exception as error:
        raise HubError(
            f"{_token_source()} cannot be read ({type(error).__name__}: {_said(error)}); remove it, or log in anew "
            "with `hf auth login`"
        ) from error
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise HubError(
            f"{_token_source()} has characters that no token has; copy it anew, or log in anew with `hf auth login`"
        )
    return headers | ({"Authorization": f"Bearer {token}"} if token else {})


def _token_source() -> str:
    """What proves to the hub who asks, and where that is from."""
    if urlsplit(_endpoint()).username:
        return "the name and password of HF_ENDPOINT"
    for variable in ("HF_OIDC_RESOURCE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(variable, "").strip():
            return f"the token of {variable}"
    return f"the token in {_library().constants.HF_TOKEN_PATH}"


_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def _client() -> Any:
    """The one client of the process, which is made from all variables for proxies and certificates."""
    try:
        return _library().utils.get_session()
    except Exception as error:
        for name, value in os.environ.items():
            if name.lower() in _PROXIES and (fault := _proxy_fault(value.strip())):
                raise HubError(f"{name} cannot be used as a proxy: {fault}, or unset it") from error
        names = (*_PROXIES, "no_proxy", "ssl_cert_file", "ssl_cert_dir", "sslkeylogfile")
        known = [name for name in os.environ if name.lower() in names]
        raise HubError(
            f"there is no way to the network ({type(error).__name__}: {_said(error)}); correct or unset "
            f"{', '.join(known) or 'the proxy in the settings of the system'}"
        ) from error


def _proxy_fault(address: str) -> str | None:
    """What is wrong with a proxy, and what to do."""
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        host = parts.hostname if parts.port != 0 else None
    except ValueError:
        return "it is no address; write it as http://HOST:PORT"
    if parts.scheme not in ("http", "https", "socks5", "socks5h"):
        return f"proxies of the kind {_said(parts.scheme)}:// are not known; write it as http:// or socks5://HOST:PORT"
    if not host:
        return "it names no host; write it as http://HOST:PORT"
    if parts.scheme.startswith("socks") and find_spec("socksio") is None:
        return "SOCKS takes the package socksio; `pip install socksio`"
    return None


def _proxy_variable() -> str | None:
    """The variable of the proxy by which the hub is asked, if there is one."""
    parts = urlsplit(_endpoint())
    if not parts.hostname or proxy_bypass(parts.hostname):
        return None
    proxies = getproxies()
    used = next((kind for kind in (parts.scheme, "all") if proxies.get(kind)), None)
    return next((name for name in os.environ if name.lower() == f"{used}_proxy"), None)


def _said(text: object) -> str:
    """What others wrote, in a sentence of ours: on one line, not too long, without names and passwords of addresses."""
    line = re.sub(r"://[^/\s]*@", "://", " ".join(str(text).split()))
    return line if len(line) <= 200 else f"{line[:200]}..."
