"""A Hugging Face hub on loopback: what huggingface_hub asks of one, a log of it, and faults that tests set.

with Hub() as hub:
    hub.add("owner/name", folder)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
"""

import hashlib
import json
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from helpers import ITEM_BYTES, Listing

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Content:
    """The bytes of a file: `head`, then zeros up to `size`."""

    head: bytes
    size: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> Self:
        return cls(data, len(data), hashlib.sha256(data).hexdigest())

    @classmethod
    def virtual(cls, head: bytes, size: int) -> Self:
        """A file too large to make, whose hash is nobody's."""
        return cls(head, size, "0" * 64)

    @property
    def git_sha1(self) -> str:
        return hashlib.sha1(b"blob %d\0" % self.size + self.head).hexdigest()

    def blocks(self, start: int, stop: int) -> Iterator[bytes]:
        for at in range(start, stop, _BLOCK):
            end = min(at + _BLOCK, stop)
            yield self.head[at:end] + bytes(end - max(at, len(self.head)) if end > len(self.head) else 0)


@dataclass
class Request:
    """One line of the log. `path` is the file's name in its repository, or the API's own path."""

    method: str
    path: str
    start: int
    stop: int
    status: int = 0
    sent: int = 0


@dataclass
class Fault:
    """What goes wrong the next `times` times that a path is asked for.

    status: what to answer with instead, with these headers and this body; a function gives its pieces until none is
        wanted any more. 0: nothing at all, until the hub is left.
    """

    times: int
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Callable[[], Iterator[bytes]] = b""
    cut: int | None = None
    flip: int | None = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients that were killed
            super().handle_error(request, client_address)


class Hub:
    """Serves repositories until it is left as a context.

    gated: ids whose files are refused; private: ids that answer as if they were not there.
    part: the part of a file (first byte, byte after its last) that it gives when one is asked for; None: the whole.
    moved: ids by those that lead to them.
    rate: bytes a second that each connection gets at most; None: as many as it takes.
    on_sent: called with the bytes sent so far, of all files, after each block.
    """

    def __init__(self) -> None:
        self.log: list[Request] = []
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.part: Callable[[int, int], tuple[int, int] | None] = lambda start, stop: (start, stop)
        self.moved: dict[str, str] = {}
        self.on_sent: Callable[[int], None] = lambda total: None
        self.rate: float | None = None
        self.sent = 0
        self._repositories: dict[str, dict[str, dict[str, Content]]] = {}  # by id, then by commit
        self._faults: dict[str, list[Fault]] = {}
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo_id: str, files: Path | Mapping[str, bytes | Content]) -> str:
        """Serve a folder, or files by name, as a repository, or as its main branch from now on; returns the commit."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        contents = {name: data if isinstance(data, Content) else Content.of(data) for name, data in files.items()}
        listing = repr(sorted((name, c.size, c.sha256) for name, c in contents.items()))
        commit = hashlib.sha1(listing.encode()).hexdigest()
        self._repositories.setdefault(repo_id, {})[commit] = contents
        return commit

    def forget(self, repo_id: str, commit: str) -> None:
        """As if the history had been rewritten: the commit is not there any more."""
        del self._repositories[repo_id][commit]

    def contents(self, repo_id: str) -> Mapping[str, Content]:
        """The files of a repository's main branch."""
        return list(self._repositories[repo_id].values())[-1]

    def cut(self, path: str, after: int, times: int = 1) -> None:
        """Close the connection after so many bytes of a file."""
        self._add_fault(path, Fault(times, cut=after))

    def fail(self, path: str, status: int, times: int = 1, headers: Mapping[str, str] | None = None) -> None:
        """Answer with a status and no content."""
        self.answer(path, b"", status, times, **(headers or {}))

    def answer(
        self,
        path: str,
        body: bytes | Callable[[], Iterator[bytes]],
        status: int = 200,
        times: int = 1,
        **headers: str,
    ) -> None:
        """Answer with something else, as `Fault` tells; headers by their names, perhaps with _ for -."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._add_fault(path, Fault(times, status, named, body))

    def corrupt(self, path: str, byte: int, times: int = 1) -> None:
        """Send a file with one of its bytes inverted."""
        self._add_fault(path, Fault(times, flip=byte))

    def transfers(self, path: str) -> list[tuple[int, int]]:
        """(first byte, bytes sent) of each time that content of a file was asked for."""
        return [(r.start, r.sent) for r in self.log if r.path == path and r.method == "GET" and r.status in (200, 206)]

    def _add_fault(self, path: str, fault: Fault) -> None:
        self._faults.setdefault(path, []).append(fault)

    def _fault(self, path: str) -> Fault | None:
        with self._lock:
            waiting = self._faults.get(path)
            if not waiting:
                return None
            waiting[0].times -= 1
            return waiting[0] if waiting[0].times else waiting.pop(0)

    def _count(self, request: Request, count: int) -> None:
        with self._lock:
            request.sent += count
            self.sent += count
            total = self.sent
        self.on_sent(total)

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer()

            def do_GET(self) -> None:
                self._answer()

            def _answer(self) -> None:
                url = urlsplit(self.path)
                path = unquote(url.path)
                there = next((there for there in hub.moved if path.startswith(f"/api/models/{there}")), None)
                if there:
                    self._log(path)
                    self._send(307, {"Location": self.path.replace(there, hub.moved[there])})
                elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                    self._log(path)
                    if self._broken(path):
                        return
                    if commit := self._commit(match[1], match[2] or "main"):
                        self._json(hub._info(match[1], commit, blobs="blobs" in parse_qs(url.query)))
                elif path == "/api/models":
                    self._log(path)
                    if not self._broken(path):
                        self._json(hub._search({key: values[0] for key, values in parse_qs(url.query).items()}))
                elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                    self._log(match[3])
                    if commit := self._commit(match[1], match[2], content=True):
                        self._file(commit, hub._repositories[match[1]][commit], match[3])
                else:
                    self._log(path)
                    self._send(404, {})

            def _log(self, path: str) -> None:
                wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                start, stop = (int(wanted[1]), int(wanted[2] or -2) + 1) if wanted else (0, -1)
                self.request_log = Request(self.command, path, start, stop)
                with hub._lock:
                    hub.log.append(self.request_log)

            def _commit(self, repo_id: str, revision: str, content: bool = False) -> str | None:
                """The commit that is asked for; None when that is refused, and answered."""
                commits = hub._repositories.get(repo_id)
                signed = "Authorization" in self.headers
                if commits is None or (repo_id in hub.private and not signed):
                    self._send(404 if signed else 401, {"X-Error-Code": "RepoNotFound"})
                elif content and repo_id in hub.gated:
                    self._send(403 if signed else 401, {"X-Error-Code": "GatedRepo"})
                elif revision == "main":
                    return list(commits)[-1]
                elif revision in commits:
                    return revision
                else:
                    self._send(404, {"X-Error-Code": "RevisionNotFound"})
                return None

            def _broken(self, path: str) -> Fault | None:
                """The fault that is due, answered already if it is a status."""
                fault = hub._fault(path)
                if fault and fault.status == 0:
                    hub._left.wait()
                    self.close_connection = True
                elif fault and fault.status and isinstance(fault.body, bytes):
                    self._send(fault.status, fault.headers, len(fault.body))
                    self.wfile.write(fault.body)
                    self.close_connection = True
                elif fault and fault.status:
                    self._send(fault.status, {"Transfer-Encoding": "chunked", **fault.headers})
                    with suppress(ConnectionError):  # the client has enough
                        for block in fault.body():
                            self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))
                            hub._count(self.request_log, len(block))
                        self.wfile.write(b"0\r\n\r\n")
                    self.close_connection = True
                return fault

            def _file(self, commit: str, files: Mapping[str, Content], name: str) -> None:
                content = files.get(name)
                if content is None:
                    self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                    return
                fault = self._broken(name) if self.command == "GET" else None
                if fault and fault.status is not None:
                    return
                lfs = name.endswith(LFS_SUFFIXES)
                etag = f'"{content.sha256 if lfs else content.git_sha1}"'
                headers = {"X-Repo-Commit": commit, "ETag": etag, "Accept-Ranges": "bytes"}
                if lfs:
                    headers |= {"X-Linked-Size": str(content.size), "X-Linked-Etag": etag}
                start, stop = self.request_log.start, self.request_log.stop
                stop = content.size if stop < 0 else min(stop, content.size)
                part = hub.part(start, stop) if "Range" in self.headers else None
                ranged = part is not None
                start, stop = self.request_log.start, self.request_log.stop = part or (0, content.size)
                if ranged and start >= content.size:
                    self._send(416, {"Content-Range": f"bytes */{content.size}"})
                    return
                if ranged:
                    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{content.size}"
                self._send(206 if ranged else 200, headers, stop - start)
                if self.command == "GET":
                    self._body(content, start, stop, fault)

            def _body(self, content: Content, start: int, stop: int, fault: Fault | None) -> None:
                end = min(stop, fault.cut) if fault and fault.cut is not None else stop
                at = start
                try:
                    for block in content.blocks(start, end):
                        if fault and fault.flip is not None and at <= fault.flip < at + len(block):
                            k = fault.flip - at
                            block = block[:k] + bytes([block[k] ^ 0xFF]) + block[k + 1 :]
                        self.wfile.write(block)
                        at += len(block)
                        hub._count(self.request_log, len(block))
                        if hub.rate:
                            time.sleep(len(block) / hub.rate)
                except ConnectionError:  # the client has enough, or was killed
                    self.close_connection = True
                if end < stop:
                    self.close_connection = True

            def _json(self, document: Any) -> None:
                data = json.dumps(document).encode()
                self._send(200, {"Content-Type": "application/json"}, len(data))
                self.wfile.write(data)
                hub._count(self.request_log, len(data))

            def _send(self, status: int, headers: Mapping[str, str], length: int = 0) -> None:
                self.request_log.status = status
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if not {"Content-Length", "Transfer-Encoding"} & set(headers):
                    self.send_header("Content-Length", str(length))
                self.end_headers()

        return Handler

    def _search(self, asked: Mapping[str, str]) -> list[dict[str, Any]]:
        """What is listed of repositories that a search finds, as far as their files tell."""
        rows = []
        for number, repo_id in enumerate(self._repositories):
            files = self.contents(repo_id)
            config = json.loads(files["config.json"].head) if "config.json" in files else {}
            told: dict[str, int] = {}
            for name, content in files.items():
                if name.endswith(".safetensors"):
                    header = json.loads(content.head[8 : 8 + int.from_bytes(content.head[:8], "little")])
                    header.pop("__metadata__", None)
                    for one in header.values():
                        told[one["dtype"]] = told.get(one["dtype"], 0) + math.prod(one["shape"])
            row = {"id": repo_id, "downloads": 1000 - number, "gated": repo_id in self.gated, "config": config}
            row |= {"safetensors": {"parameters": told, "total": sum(told.values())}} if told else {}
            owner, wanted = asked.get("author"), asked.get("filter")
            if (
                asked.get("search", "").lower() in repo_id.lower()
                and owner in (None, repo_id.partition("/")[0])
                and wanted in (None, config.get("model_type"))
            ):
                rows.append(row)
        return rows[: int(asked["limit"])]

    def _info(self, repo_id: str, commit: str, blobs: bool) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = []
        for name, content in sorted(self._repositories[repo_id][commit].items()):
            siblings.append({"rfilename": name})
            if blobs:
                siblings[-1] |= {"size": content.size, "blobId": content.git_sha1}
                if name.endswith(LFS_SUFFIXES):
                    siblings[-1]["lfs"] = {"sha256": content.sha256, "size": content.size, "pointerSize": 135}
        return {"id": repo_id, "sha": commit, "gated": repo_id in self.gated, "siblings": siblings}


def virtual_release(config: Mapping[str, Any], listing: Listing, shards: int) -> dict[str, bytes | Content]:
    """The files of a released model at full size: config, index, and shards with real headers and zeros for weights."""
    sizes = {name: math.prod(shape) * ITEM_BYTES[dtype] for name, (dtype, shape) in listing.items()}
    total = sum(sizes.values())
    parts: list[dict[str, dict[str, Any]]] = [{} for _ in range(shards)]
    weight_map: dict[str, str] = {}
    ends = [0] * shards
    done = 0
    for name, (dtype, shape) in listing.items():
        number = done * shards // total
        done += sizes[name]
        span = [ends[number], ends[number] + sizes[name]]
        parts[number][name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
        ends[number] = span[1]
        weight_map[name] = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files: dict[str, bytes | Content] = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors.index.json": json.dumps(index, indent=2).encode(),
        "tokenizer.json": b"{}",
    }
    for number, (part, end) in enumerate(zip(parts, ends, strict=True), 1):
        header = json.dumps(part, separators=(",", ":")).encode()
        head = len(header).to_bytes(8, "little") + header
        files[f"model-{number:05d}-of-{shards:05d}.safetensors"] = Content.virtual(head, len(head) + end)
    return files
