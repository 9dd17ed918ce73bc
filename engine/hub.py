"""The Hugging Face hub: what a repository holds, and its bytes, checked on arrival.

Transfers go on where they were cut, also those of an earlier process, and wait and try again as long as the hub asks
for it or is out of reach. (huggingface_hub's own downloads begin anew in every process.)
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from numoe.quant import safetensors_file
from numoe.quant.checkpoint import PICKLES, Checkpoint
from numoe.quant.errors import InputError
from numoe.quant.safetensors_file import INDEX_NAME

_RETRY_WAITS = (1, 2, 4, 8, 16, 32)  # seconds before each further try; any progress begins the row anew
_LONGEST_WAIT = 300  # seconds that the hub may ask for at a time: the window of its rate limits
_HEADER_BYTES = 1 << 18  # more than most shards' headers take
_PARALLEL = 8
_BLOCK = 1 << 20

Wait = Callable[[float], object]
"""Called with the seconds to let pass before another try."""
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its bytes, and the hash that the hub keeps of them.

    `sha256` is None for small files, which have the `git_sha1` of a git blob instead.
    """

    size: int
    sha256: str | None
    git_sha1: str | None = None

    def digest(self) -> Any:
        """An unfinished hash of the kind that `matches` compares."""
        return hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.size)

    def matches(self, digest: Any) -> bool:
        """Whether a finished `digest()` is that of this file."""
        return digest.hexdigest() == (self.sha256 or self.git_sha1)


@dataclass(frozen=True)
class Repository:
    """A model on the hub at one commit. `files` are by their path within it."""

    repo_id: str
    revision: str
    files: Mapping[str, RemoteFile]
    wait: Wait = field(default=time.sleep, compare=False, repr=False)

    def read(self, name: str) -> bytes:
        """The whole of a small file.

        Raises:
            InputError: it is not there, cannot be had, or arrives with other bytes than the hub promises.
        """
        file = self._file(name)
        for _ in range(2):
            data = self._range(name, 0, file.size)
            digest = file.digest()
            digest.update(data)
            if file.matches(digest):
                return data
        raise self._wrong(name)

    def config(self) -> dict[str, Any]:
        """config.json. Raises InputError when it is no JSON object, or as `read` does."""
        try:
            config = json.loads(self.read("config.json"))
        except ValueError as error:
            raise InputError(f"{self.repo_id}: config.json is not JSON ({error}); tell the model's authors") from None
        if not isinstance(config, dict):
            raise InputError(f"{self.repo_id}: config.json is not a JSON object; tell the model's authors")
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
        shards = sorted(set(weight_map.values())) if weight_map else self._weights()
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
        path, part = folder / name, folder / f"{name}.incomplete"
        if path.exists() and path.stat().st_size == file.size:
            received(file.size)
            return path
        for _ in range(2):
            digest = self._complete(name, part, received)
            if file.matches(digest):
                part.replace(path)
                return path
            part.unlink()
        raise self._wrong(name)

    def fetch_to_cache(self, name: str) -> Path:
        """The path of a file in the Hugging Face cache, downloaded if it is not there.

        Raises:
            InputError: as `fetch`.
            OSError: the cache cannot be written or is full.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        file = self._file(name)
        for again in (False, True):

            def attempt(again: bool = again) -> Path:
                place = _endpoint()
                found = hf_hub_download(
                    self.repo_id, name, revision=self.revision, endpoint=place, force_download=again
                )
                return Path(found)

            path = self._patiently(attempt)
            digest = file.digest()
            with path.open("rb") as stored:
                while block := stored.read(_BLOCK):
                    digest.update(block)
            if file.matches(digest):
                return path
        path.resolve().unlink()  # what the cache's entry links to
        path.unlink(missing_ok=True)
        raise self._wrong(name)

    def cached(self, name: str) -> Path | None:
        """Where the Hugging Face cache has a file, if it has."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.repo_id, name, revision=self.revision)
        return Path(path) if isinstance(path, str) else None

    def _file(self, name: str) -> RemoteFile:
        if name not in self.files:
            raise InputError(f"{self.repo_id} has no {name}, which a model needs; choose another repository")
        return self.files[name]

    def _weights(self) -> list[str]:
        return sorted(name for name in self.files if name.endswith(".safetensors") and "/" not in name)

    def _wrong(self, name: str) -> InputError:
        return InputError(
            f"{name} of {self.repo_id} arrived twice with other bytes than the hub promises and was not kept; "
            "check the network for a proxy that changes them and try again later"
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

        def attempt() -> bytes:
            data = bytearray()
            with self._stream(name, start, stop) as response:
                for block in response.iter_bytes():
                    data += block
                    if len(data) >= stop - start:
                        break
            if len(data) < stop - start:
                raise _Cut
            return bytes(data[: stop - start])

        return self._patiently(attempt) if stop > start else b""

    def _complete(self, name: str, part: Path, received: Callable[[int], None]) -> Any:
        """Makes `part` as long as the file, from where it ends; gives the digest of its bytes."""
        size = self._file(name).size
        with part.open("ab+") as file:
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
                nonlocal digest
                with self._stream(name, file.tell(), size) as response:
                    if response.status_code != 206:  # the server sends all of it
                        file.seek(0)
                        file.truncate()
                        digest = self._file(name).digest()
                    for block in response.iter_bytes():
                        file.write(block)
                        digest.update(block)
                        received(file.tell())
                if file.tell() < size:
                    raise _Cut

            if file.tell() < size:
                self._patiently(attempt, progress=file.tell)
            file.flush()
            os.fsync(file.fileno())
        return digest

    @contextmanager
    def _stream(self, name: str, start: int, stop: int) -> Iterator[Any]:
        """The response of httpx or httpx2, as the version of huggingface_hub has it."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.repo_id, name, revision=self.revision, endpoint=_endpoint())
        headers = build_hf_headers(library_name="numoe") | {
            "Accept-Encoding": "identity",
            "Range": f"bytes={start}-{stop - 1}",
        }
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            yield response

    def _patiently(self, attempt: Callable[[], _Answer], progress: Callable[[], int] = lambda: 0) -> _Answer:
        return _patiently(attempt, self.repo_id, self.wait, progress)


def repository(repo_id: str, revision: str | None = None, wait: Wait = time.sleep) -> Repository:
    """What a repository holds.

    Args:
        repo_id: OWNER/NAME.
        revision: a branch, tag or commit; None: the main branch.

    Raises:
        InputError: there is no such repository or revision, it is gated or the hub cannot be reached; or it holds no
            model that numoe reads: no config.json, no safetensors, several of them without an index, or names that
            lead out of a folder.
    """
    from huggingface_hub import HfApi

    def attempt() -> Any:
        try:
            return HfApi(endpoint=_endpoint()).model_info(repo_id, revision=revision, files_metadata=True)
        except json.JSONDecodeError:
            return None

    info = _patiently(attempt, repo_id, wait)
    if info is None or not info.siblings or any(s.size is None or not s.blob_id for s in info.siblings):
        raise InputError(
            f"what answers at {_host()} does not list the files of {repo_id} with sizes and hashes as the hub does; "
            "check the network and HF_ENDPOINT"
        )
    files = {}
    for sibling in info.siblings:
        name = sibling.rfilename
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or any(c in "\\:" or not c.isprintable() for c in name):
            raise InputError(f"{repo_id} names the file {name!r}, which would lie outside its folder: do not use it")
        files[name] = RemoteFile(sibling.size, sibling.lfs.sha256 if sibling.lfs else None, sibling.blob_id)
    found = Repository(info.id, info.sha, files, wait)
    _refuse_unreadable(found)
    return found


def cached_snapshot(repo_id: str) -> Path | None:
    """The folder of a repository in the Hugging Face cache, if its config.json and some weights are there."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo_id, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return folder if any(folder.glob("*.safetensors")) else None


def cache_folder() -> Path:
    """The Hugging Face cache, made if it is not there."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _refuse_unreadable(found: Repository) -> None:
    weights = found._weights()
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
    if INDEX_NAME not in found.files and len(weights) > 1:
        raise InputError(
            f"{found.repo_id} holds {len(weights)} .safetensors files and no {INDEX_NAME} that says which make up "
            "the model; choose another repository or revision"
        )


class _Cut(Exception):
    """The connection ended too soon."""


def _endpoint() -> str | None:
    # huggingface_hub reads it once, when it is imported.
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _host() -> str:
    from huggingface_hub import constants

    return _endpoint() or constants.ENDPOINT


def _patiently(
    attempt: Callable[[], _Answer], repo_id: str, wait: Wait, progress: Callable[[], int] = lambda: 0
) -> _Answer:
    """attempt(), tried again while it fails in a way that passes.

    `progress`: bytes that are there; once they grow, patience is new.

    Raises:
        InputError: it fails in another way or for too long.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    tries, before = 0, progress()
    while True:
        try:
            return attempt()
        except (_Cut, HTTPError, LocalEntryNotFoundError) as error:
            cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
            status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
            if progress() > before:
                tries, before = 0, progress()
            passing = status is None or status in (408, 429) or status >= 500
            if not passing or tries == len(_RETRY_WAITS):
                raise _refusal(cause, repo_id) from error
            asked = _asked_wait(cause.response.headers) if isinstance(cause, HfHubHTTPError) else None
            wait(max(_RETRY_WAITS[tries], asked or 0))
            tries += 1
        except (OSError, ValueError) as error:
            if type(error).__module__.startswith("huggingface_hub"):
                raise _refusal(error, repo_id) from error
            raise


def _asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that the hub asks to wait, by either way it has of saying so."""
    from huggingface_hub.utils import parse_ratelimit_headers

    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return min(limit.reset_in_seconds + 1, _LONGEST_WAIT)
    after = headers.get("Retry-After", "")
    return min(int(after), _LONGEST_WAIT) if after.isdecimal() else None


def _refusal(error: BaseException, repo_id: str) -> InputError:
    """An error of huggingface_hub or of the connection as one sentence with the next step."""
    from huggingface_hub import errors

    host = _host()
    if isinstance(error, errors.GatedRepoError):
        return InputError(
            f"{repo_id} is gated: accept its licence at {host}/{repo_id}, log in with `hf auth login` and try again"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{repo_id} has no such revision; see {host}/{repo_id}/tree/main for those it has")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return InputError(f"{repo_id} lacks a file that it lists; try again later")
    if isinstance(error, errors.HFValidationError):
        return InputError(f'"{repo_id}" is not the id of a repository; write it as OWNER/NAME')
    if isinstance(error, errors.OfflineModeIsEnabled):
        return InputError(f"the hub is not asked about {repo_id}, as HF_HUB_OFFLINE is set; unset it and try again")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
            return InputError(
                f'{host} has no repository "{repo_id}", or it is private; check the spelling, or log in with '
                "`hf auth login` if you may see it"
            )
        if status == 403:
            return InputError(f"{host} does not let you read {repo_id}; log in with `hf auth login` and try again")
        return InputError(f"{host} answers {repo_id} with status {status}; try again later: what is here is kept")
    return InputError(
        f"the connection to {host} fails ({str(error) or 'it is cut'}); check the network and try again: what is here "
        "is kept"
    )
