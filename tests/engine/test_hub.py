"""What a repository on the hub holds, told without downloading it; transfers that survive a bad connection."""

import gzip
import json
import math
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import ITEM_BYTES, released_v4_listing, write_sharded
from hub_server import Content, Hub, virtual_release
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import close_session

from numoe.engine.description import describe, describe_repository
from numoe.engine.hub import network, segments
from numoe.engine.hub import repository as client
from numoe.engine.hub.repository import RemoteFile, Repository, repository
from numoe.quant.errors import InputError
from numoe.quant.stored import shards
from numoe.quant.stored.checkpoint import open_checkpoint

ID = "owner/model"
SHARD = "model-00001-of-00002.safetensors"
CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two shards of more than a megabyte, and two small files."""
    (tmp_path / "model").mkdir()
    tensors = {f"{i}.weight": ("U8", (1000, 600), bytes([i]) * 600_000) for i in range(4)}
    write_sharded(tmp_path / "model", tensors, 2)
    (tmp_path / "model" / "config.json").write_text('{"model_type": "none"}')
    (tmp_path / "model" / "LICENSE").write_text("free")
    return tmp_path / "model"


def patient() -> tuple[list[float], Callable[[float, str], None]]:
    """The waits that were asked for, and a way to wait that takes no time."""
    waits: list[float] = []
    return waits, lambda seconds, trouble: waits.append(seconds)


def test_a_repository_is_listed_as_its_folder(hub: Hub, folder: Path) -> None:
    commit = hub.add(ID, folder)
    found = repository(ID)
    assert (found.repo_id, found.revision) == (ID, commit)
    assert {name: file.size for name, file in found.files.items()} == {
        p.name: p.stat().st_size for p in folder.iterdir()
    }
    assert {name for name, file in found.files.items() if file.sha256} == {p.name for p in folder.glob("*.safetensors")}
    assert found.config() == {"model_type": "none"}
    listed = found.checkpoint().tensors
    here = open_checkpoint(folder).tensors
    assert list(listed) == list(here)
    for name, info in listed.items():
        there = here[name]
        assert (info.dtype, info.shape, info.offset, info.nbytes, info.path.name) == (
            (there.dtype, there.shape, there.offset, there.nbytes, there.path.name)
        )
    assert hub.sent < 2 * shards._FIRST_BYTES + 10_000  # of 2.4 MB
    assert repository(ID, commit).files == found.files


def test_headers_longer_than_the_first_request_are_read_whole(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_FIRST_BYTES", 20)
    hub.add(ID, folder)
    assert list(repository(ID).checkpoint().tensors) == list(open_checkpoint(folder).tensors)


def test_a_repository_without_an_index_is_its_only_shard(hub: Hub, checkpoint: Callable[[str], Path]) -> None:
    hub.add(ID, checkpoint("mixtral_a"))
    remote, local = describe_repository(repository(ID)), describe(checkpoint("mixtral_a"))
    assert remote.plan() == local.plan()
    assert remote.weights() == local.weights()
    assert [one.stored.name for one in remote.weights()] == [one.stored.name for one in local.weights()]


@pytest.mark.parametrize(
    ("name", "shards", "total_size", "most"),
    [("V4-Flash", 46, 159_609_485_896, 20e6), ("V4-Pro", 64, 864_704_792_696, 30e6)],
)
@pytest.mark.slow
def test_released_models_are_described_from_their_headers(
    name: str, shards: int, total_size: int, most: float, hub: Hub
) -> None:
    """`numoe fit` of V4-Flash does the same in the usual run."""
    config = json.loads((CONFIGS / f"deepseek-ai__DeepSeek-{name}.json").read_text())
    listing = released_v4_listing(config)
    hub.add(f"deepseek-ai/DeepSeek-{name}", virtual_release(config, listing, shards))
    described = describe_repository(repository(f"deepseek-ai/DeepSeek-{name}"))
    tensors = described.checkpoint.tensors
    assert sum(info.nbytes for info in tensors.values()) == total_size
    assert {n: (info.dtype, info.shape) for n, info in tensors.items()} == listing
    assert sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in listing.values()) == total_size
    assert len(hub.log) == shards + 3  # the listing, config.json, the index
    assert hub.sent < most


# What is refused


def names(*files: str) -> dict[str, bytes | Content]:
    return dict.fromkeys(files, b"{}")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (names("config.json", "../model.safetensors"), "outside its folder: do not use it"),
        (names("config.json", "a/../../b.safetensors"), "outside its folder"),
        (names("config.json", "/etc/passwd"), "outside its folder"),
        (names("config.json", "..\\model.safetensors"), "outside its folder"),
        (names("config.json", "C:model.safetensors"), "outside its folder"),
        (names("config.json", "a\nb.safetensors"), "outside its folder"),
        (
            names("config.json", "pytorch_model.bin"),
            r"only pickled weights.*\(pytorch_model.bin\); look for a safetens",
        ),
        (
            names("README.md", "mmproj-F16.gguf"),
            r"only GGUF files that are no models \(mmproj-F16.gguf\); choose another",
        ),
        (names("config.json", "original/model.safetensors"), "holds no .safetensors files; choose"),
        (names("model.safetensors"), "has no config.json"),
        (names("config.json", SHARD, "b.safetensors"), "2 .safetensors files and no model.safetensors.index.json"),
    ],
)
def test_repositories_without_a_readable_model_are_refused(hub: Hub, files: Any, message: str) -> None:
    hub.add(ID, files)
    with pytest.raises(InputError, match=message):
        repository(ID)


def test_what_is_no_hub_is_said(hub: Hub, folder: Path) -> None:
    hub.add(ID, folder)
    hub.answer(f"/api/models/{ID}", b"free")
    with pytest.raises(InputError, match=r"does not list the files of owner/model .* check the network and HF"):
        repository(ID)


def test_an_index_that_does_not_fit_is_refused(hub: Hub, folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for changed, message in (
        ({**weight_map, "more": SHARD}, "lacks the tensor 'more' of the index"),
        ({**weight_map, "0.weight": "../x.safetensors"}, "which is none beside it: do not use it"),
        ({**weight_map, "0.weight": "absent.safetensors"}, "has no absent.safetensors"),
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        hub.add(ID, folder)
        with pytest.raises(InputError, match=message):
            repository(ID).checkpoint()


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_config_that_is_no_object_is_refused(hub: Hub, text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    hub.add(ID, folder)
    with pytest.raises(InputError, match="is not"):
        repository(ID).config()


def test_what_the_hub_does_not_give_is_said_in_a_sentence(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, folder)
    hub.add("owner/private", folder)
    hub.private.add("owner/private")

    def refused(repo_id: str, message: str, revision: str | None = None) -> None:
        with pytest.raises(InputError, match=message) as caught:
            repository(repo_id, revision, wait=patient()[1])
        assert "\n" not in str(caught.value)

    refused("owner/absent", r'has no repository "owner/absent", or it is private; .*hf auth login')
    refused("owner/private", "hf auth login")
    refused(ID, "has no such revision", "v2")
    refused("owner/no/such", "is not the id of a repository; write it as OWNER/NAME")
    hub.gated.add(ID)
    with pytest.raises(
        InputError, match=f"is gated: accept its licence at {hub.url}/{ID}, log in with `hf auth login`"
    ):
        repository(ID).config()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(ID, "HF_HUB_OFFLINE is set; unset it")
    monkeypatch.undo()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused(ID, "the connection to http://127.0.0.1:9 fails .*check the network and try again")


# Transfers


def test_a_token_opens_a_private_repository(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(ID, folder)
    hub.private.add(ID)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert repository(ID).read("LICENSE") == b"free"


def test_a_file_arrives_whole(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.add(ID, folder)
    seen: list[int] = []
    path = repository(ID).fetch(SHARD, tmp_path, seen.append)
    assert path == tmp_path / SHARD
    assert path.read_bytes() == (folder / SHARD).read_bytes()
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, path.stat().st_size)
    repository(ID).fetch(SHARD, tmp_path)
    assert len(hub.transfers(SHARD)) == 1
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [SHARD]


@pytest.mark.parametrize("ranged", [True, False])
def test_a_cut_transfer_goes_on(hub: Hub, folder: Path, tmp_path: Path, ranged: bool) -> None:
    """Also when the server knows no ranges: then from the beginning."""
    hub.add(ID, folder)
    if not ranged:
        hub.part = lambda start, stop: None
    hub.cut(SHARD, 500_000)
    hub.cut(SHARD, 800_000)
    waits, wait = patient()
    path = repository(ID, wait=wait).fetch(SHARD, tmp_path)
    assert path.read_bytes() == (folder / SHARD).read_bytes()
    starts = [start for start, _ in hub.transfers(SHARD)]
    assert starts == ([0, 500_000, 800_000] if ranged else [0, 0, 0])
    assert waits == [1, 1]  # as there was progress


def test_a_transfer_of_an_earlier_process_goes_on(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.add(ID, folder)
    whole = (folder / SHARD).read_bytes()
    for there in (whole[:700_000], whole, whole + b"?", bytes(700_000)):
        (tmp_path / f"{SHARD}.incomplete").write_bytes(there)
        assert repository(ID).fetch(SHARD, tmp_path).read_bytes() == whole
        (tmp_path / SHARD).unlink()
    size = len(whole)
    # Continued; nothing to do; too long, so anew; wrong bytes, found out at the end.
    assert hub.transfers(SHARD) == [(700_000, size - 700_000), (0, size), (700_000, size - 700_000), (0, size)]


def stopped(count: int) -> None:
    if count > 300_000:
        raise KeyboardInterrupt


def test_a_download_can_be_stopped(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.add(ID, folder)
    with pytest.raises(KeyboardInterrupt):
        repository(ID).fetch(SHARD, tmp_path, stopped)
    assert not (tmp_path / SHARD).exists()
    assert repository(ID).fetch(SHARD, tmp_path).read_bytes() == (folder / SHARD).read_bytes()
    assert hub.transfers(SHARD)[1][0] >= 300_000


# Several connections


@pytest.fixture
def wide(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A repository whose shard takes ten requests, three at once."""
    hub.add(ID, folder)
    monkeypatch.setattr(segments, "SEGMENT", -(-(folder / SHARD).stat().st_size // 10))
    found = repository(ID, wait=patient()[1])
    found.checkpoint()  # whose headers are parts of files
    hub.log.clear()
    return replace(found, connections=3)


def test_several_parts_of_a_file_come_at_once(hub: Hub, folder: Path, tmp_path: Path, wide: Repository) -> None:
    meeting, met = Barrier(3), count()

    def part(start: int, stop: int) -> tuple[int, int]:
        if next(met) < 3:
            meeting.wait(60)  # until the other two have been asked for as well
        return start, stop

    hub.part = part
    seen: list[int] = []
    assert wide.fetch(SHARD, tmp_path, seen.append).read_bytes() == (folder / SHARD).read_bytes()
    assert not meeting.broken and len(hub.transfers(SHARD)) == 10
    assert (seen[0], seen[-1]) == (0, (folder / SHARD).stat().st_size) and seen == sorted(seen)


@pytest.mark.parametrize("fault", ["cut", "stopped", "corrupt", "gone"])
def test_several_connections_go_on_as_one_does(
    fault: str, hub: Hub, folder: Path, tmp_path: Path, wide: Repository
) -> None:
    whole, size = (folder / SHARD).read_bytes(), segments.SEGMENT
    if fault == "stopped":
        with pytest.raises(KeyboardInterrupt):
            wide.fetch(SHARD, tmp_path, stopped)
        there = (tmp_path / f"{SHARD}.incomplete").read_bytes()
        assert 0 < len(there) < len(whole) and whole.startswith(there)  # no holes
        hub.log.clear()
        wide.fetch(SHARD, tmp_path)
        assert min(start for start, _ in hub.transfers(SHARD)) == len(there)
    elif fault == "gone":
        hub.fail(SHARD, 418)
        with pytest.raises(InputError, match="status 418"):
            wide.fetch(SHARD, tmp_path)
        wide.fetch(SHARD, tmp_path)
    elif fault == "corrupt":
        hub.corrupt(SHARD, 0, times=10)  # the first part arrives with another byte
        wide.fetch(SHARD, tmp_path)
        assert len(hub.transfers(SHARD)) == 20
    else:
        hub.cut(SHARD, size // 2, times=1)
        wide.fetch(SHARD, tmp_path)
        assert len(hub.transfers(SHARD)) <= 11
    assert (tmp_path / SHARD).read_bytes() == whole


def test_a_hub_without_parts_is_asked_over_one_connection(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.add(ID, folder)
    hub.part = lambda start, stop: None
    found = replace(repository(ID), connections=3)
    found.checkpoint()
    hub.log.clear()
    assert found.fetch(SHARD, tmp_path).read_bytes() == (folder / SHARD).read_bytes()
    assert len(hub.transfers(SHARD)) == 1


@pytest.mark.parametrize("connections", [1, 3])
def test_what_nobody_has_taken_yet_is_bounded(connections: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT", 10)
    made, given, most = count(), 0, 0

    def fetch(first: int, last: int, put: segments.Put) -> None:
        for at in range(first, last):
            next(made)
            put(bytes([at]))

    parts = [(0, 100)] if connections == 1 else list(segments.cut(0, 100))
    for block, ahead in segments.in_order(fetch, parts, connections):
        assert block == bytes(range(given, given + len(block)))
        given += len(block)
        most = max(most, ahead)
    assert given == 100 and next(made) == 100 and most <= 10 * connections


def test_a_transfer_that_nobody_reads_on_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT", 10)
    ended = Barrier(3)  # two threads, and this one

    def fetch(first: int, last: int, put: segments.Put) -> None:
        try:
            while True:
                put(b"x")
        finally:
            ended.wait(60)

    with closing(segments.in_order(fetch, [(0, 10), (10, 20), (20, 30)], 2)) as blocks:
        next(blocks)
    ended.wait(60)


def test_passing_errors_are_waited_for(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.add(ID, folder)
    hub.fail(f"/api/models/{ID}", 503, times=2)
    hub.fail("LICENSE", 429, headers={"Retry-After": "17"})
    hub.fail("LICENSE", 429, headers={"RateLimit": '"resolvers";r=0;t=55'})
    hub.fail(SHARD, 500, times=3)
    hub.fail(SHARD, 429, headers={"Retry-After": "100000"})
    waits, wait = patient()
    found = repository(ID, wait=wait)
    assert waits == [1, 2]
    assert found.read("LICENSE") == b"free"
    assert waits[2:] == [17, 56]
    assert found.fetch(SHARD, tmp_path).read_bytes() == (folder / SHARD).read_bytes()
    assert waits[4:] == [1, 2, 4, network._LONGEST_WAIT]


def test_patience_ends(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.add(ID, folder)
    hub.fail(SHARD, 500, times=100)
    waits, wait = patient()
    with pytest.raises(InputError, match="with status 500; try again later"):
        repository(ID, wait=wait).fetch(SHARD, tmp_path)
    assert waits == [1, 2, 4, 8, 16, 32]
    hub.fail("LICENSE", 418)
    with pytest.raises(InputError, match="with status 418"):
        repository(ID, wait=wait).read("LICENSE")
    assert len(waits) == 6


def fetch(found: Repository, name: str, folder: Path) -> bytes:
    return found.fetch(name, folder).read_bytes()


def read(found: Repository, name: str, folder: Path) -> bytes:
    return found.read(name)


@pytest.mark.parametrize(("get", "name"), [(fetch, SHARD), (read, "LICENSE")])
def test_wrong_bytes_are_fetched_once_more(hub: Hub, folder: Path, tmp_path: Path, get: Any, name: str) -> None:
    hub.add(ID, folder)
    hub.corrupt(name, 3)
    assert get(repository(ID), name, tmp_path) == (folder / name).read_bytes()
    assert len(hub.transfers(name)) == 2
    (tmp_path / name).unlink(missing_ok=True)
    hub.corrupt(name, 3, times=2)
    with pytest.raises(InputError, match=f"{name} of {ID} arrived twice with other bytes"):
        get(repository(ID), name, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_the_cache_holds_no_wrong_bytes(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.add(ID, folder)
    found = repository(ID)
    hub.corrupt(SHARD, 700_000, times=2)
    with pytest.raises(InputError, match="arrived twice with other bytes"):
        found.fetch_to_cache(SHARD)
    assert found.cached(SHARD) is None
    assert not [path for path in (tmp_path / "cache" / "models--owner--model").rglob("*") if path.is_file()]
    hub.corrupt(SHARD, 700_000)
    path = found.fetch_to_cache(SHARD)
    assert path.read_bytes() == (folder / SHARD).read_bytes()
    assert found.cached(SHARD) == path
    path.resolve().write_bytes(b"damaged since")
    assert found.fetch_to_cache(SHARD).read_bytes() == (folder / SHARD).read_bytes()


# Answers that are not what was asked for


def tensors(found: Repository) -> dict[str, tuple[str, int]]:
    return {name: (info.path.name, info.offset) for name, info in found.checkpoint().tensors.items()}


PARTS: dict[str, Callable[[int, int], tuple[int, int] | None]] = {
    "the whole": lambda start, stop: None,
    "always the beginning": lambda start, stop: (0, stop - start),
    "more before it": lambda start, stop: (max(0, start - 7), stop),
    "what comes later": lambda start, stop: (start + 7, stop + 7),
    "less": lambda start, stop: (start, max(start + 1, stop - 5)),
    "nothing": lambda start, stop: (10**9, 10**9),
}


@pytest.mark.parametrize("part", PARTS)
def test_other_parts_than_were_asked_for_do_no_harm(
    part: str, hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_FIRST_BYTES", 20)
    hub.add(ID, folder)
    right = tensors(repository(ID))
    hub.part = PARTS[part]
    hub.cut(SHARD, 500_000)
    found = repository(ID, wait=patient()[1])
    assert tensors(found) == right
    assert found.fetch(SHARD, tmp_path).read_bytes() == (folder / SHARD).read_bytes()


def test_a_part_that_is_not_named_is_not_taken(hub: Hub, folder: Path) -> None:
    hub.add(ID, folder)
    right = tensors(repository(ID))
    for claim in ({}, {"Content_Range": "bytes 0-19/77"}, {"Content_Range": f"bytes 0-{'9' * 5000}/*"}):
        hub.answer(SHARD, bytes(262144), 206, **claim)
        assert tensors(repository(ID)) == right


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_what_arrives_packed_is_unpacked(hub: Hub, folder: Path, tmp_path: Path, coding: str) -> None:
    hub.add(ID, folder)
    found = repository(ID)
    for name in (SHARD, "LICENSE"):
        data = (folder / name).read_bytes()
        packed = gzip.compress(data) if coding == "gzip" else zlib.compress(data)
        hub.answer(name, packed, times=2, Content_Encoding=coding)
        hub.answer(name, packed, 206, Content_Encoding=coding, Content_Range=f"bytes 0-{len(data) - 1}/{len(data)}")
        assert read(found, name, tmp_path) == read(found, name, tmp_path) == read(found, name, tmp_path) == data


PORTAL = b"<html>Please log in</html>"


def zeros() -> Iterator[bytes]:
    while True:
        yield bytes(1 << 16)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"body": PORTAL, "Content_Type": "text/html"}, r"not that file \(26 bytes of text/html in place of 4\)"),
        ({"body": lambda: iter([PORTAL[:3]]), "Content_Type": "text/html"}, r"not that file \(it is a web page\)"),
        ({"body": b"freely"}, r"not that file \(6 bytes of unknown type in place of 4\)"),
        ({"body": b"f", "Content_Length": "4"}, r"the connection to \S+ fails"),
        ({"body": b"\x1f\x8bno", "Content_Encoding": "gzip"}, "not that file"),
        ({"body": b"free", "Content_Encoding": "br"}, r"packed \(br\), which it was asked not to"),
        ({"body": b"free", "Content_Encoding": "gzip, gzip"}, "packed"),
        ({"status": 302, "Location": "/owner/model/resolve/main/LICENSE"}, "from address to address without an end"),
        ({"status": 302, "Location": "file:///etc/passwd"}, "sends on to file://; check the network and HF_ENDPOINT"),
        ({"status": 302, "Location": "http://a..b/"}, "the connection to .* fails"),
        ({"status": 302}, "with status 302"),
        ({"status": 204}, "with status 204"),
        ({"status": 304}, "with status 304"),
        ({"status": 416}, "with status 416"),
        ({"status": 511}, "the network wants you to log in .* in a browser"),
        ({"status": 407}, "the proxy of the system wants a name and password"),
        ({"status": 404, "X_Error_Code": "EntryNotFound"}, "lacks a file that it lists"),
        ({"status": 404, "X_Error_Code": "RevisionNotFound"}, "changed meanwhile, and its commit of before is gone"),
        ({"status": 403}, "does not let you read owner/model; log in"),
        ({"status": 451, "X_Error_Message": "x" * 9000}, r"with status 451 \(x{200}\.\.\.\)"),
        ({"status": 500, "body": zeros}, "with status 500"),
    ],
)  # fmt: skip
def test_answers_that_are_no_files_are_said(hub: Hub, folder: Path, answer: dict[str, Any], message: str) -> None:
    """And what cannot pass is not waited for: no more than once for something else in place of a file."""
    hub.add(ID, folder)
    passing = answer.get("status") == 500 or "Content_Length" in answer
    waits, wait = patient()
    found = repository(ID, wait=wait)
    hub.answer("LICENSE", **{"body": b"", "times": 100, **answer})
    with pytest.raises(InputError, match=message) as caught:
        found.read("LICENSE")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert len(waits) == (6 if passing else "not that file" in message)
    assert hub.sent < 100_000_000


@pytest.mark.parametrize(("get", "name"), [("fetch", SHARD), ("read", "LICENSE"), ("list", f"/api/models/{ID}")])
@pytest.mark.parametrize("packed", [False, True])
def test_bodies_without_an_end_are_not_read_to_it(
    hub: Hub, folder: Path, tmp_path: Path, get: str, name: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "LARGEST_SMALL", 1 << 20)
    hub.add(ID, folder)
    found = repository(ID)

    def bomb() -> Iterator[bytes]:
        squeezer = zlib.compressobj(wbits=31)
        for block in zeros():
            yield squeezer.compress(block) + squeezer.flush(zlib.Z_FULL_FLUSH)

    hub.answer(name, bomb if packed else zeros, times=100, **({"Content_Encoding": "gzip"} if packed else {}))
    with pytest.raises(InputError, match=r"arrived twice with other bytes|does not list"):
        {
            "fetch": lambda: found.fetch(name, tmp_path),
            "read": lambda: found.read(name),
            "list": lambda: repository(ID),
        }[get]()
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_small_files_that_are_huge_are_not_read(hub: Hub, folder: Path) -> None:
    hub.add(ID, {**{p.name: p.read_bytes() for p in folder.iterdir()}, "config.json": Content.virtual(b"{", 6 << 30)})
    sent = hub.sent
    with pytest.raises(InputError, match=r"lists config.json with 6,442,450,944 bytes, and no such file needs so many"):
        repository(ID).config()
    assert hub.sent - sent < 10_000


@pytest.mark.parametrize("name", ["config.json", SHARD])
def test_pointers_in_place_of_files_are_named(hub: Hub, folder: Path, name: str) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    hub.add(ID, {**{p.name: p.read_bytes() for p in folder.iterdir()}, name: pointer})
    found = repository(ID)
    with pytest.raises(InputError, match=f"{name} of {ID} is a Git LFS pointer .* choose another repository"):
        found.config()
        found.checkpoint()


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""])
def test_a_config_is_read_as_that_of_a_folder(hub: Hub, folder: Path, mark: bytes) -> None:
    (folder / "config.json").write_bytes(mark + b'{"model_type": "none"}')
    hub.add(ID, folder)
    assert repository(ID).config() == {"model_type": "none"}


def test_a_lost_connection_is_not_told_as_a_bad_config(hub: Hub, folder: Path) -> None:
    hub.add(ID, folder)
    found = repository(ID, wait=patient()[1])
    hub.fail("config.json", 500, times=100)
    with pytest.raises(InputError, match="answers owner/model with status 500; try again later"):
        found.config()


GOOD = {"rfilename": "config.json", "size": 2, "blobId": "0" * 40}


@pytest.mark.parametrize(
    "changed",
    [
        [], 7, {"id": None}, {"id": "../../x"}, {"id": 7}, {"id": "one"}, {"sha": None}, {"sha": "main"}, {"sha": 1},
        {"siblings": None}, {"siblings": {}}, {"siblings": [7]}, {"siblings": []},
        *({"siblings": [GOOD | wrong]} for wrong in (
            {"rfilename": None}, {"rfilename": ["x"]}, {"size": None}, {"size": "2"}, {"size": -1}, {"size": 1e300},
            {"size": True}, {"size": 1 << 70}, {"blobId": None}, {"blobId": 7}, {"blobId": "zz"}, {"lfs": "x"},
            {"lfs": {"sha256": None}}, {"lfs": {"size": 3}}, {"lfs": [1]},
        )),
    ],
)  # fmt: skip
def test_listings_of_another_form_are_said(hub: Hub, changed: Any) -> None:
    listing = {"id": ID, "sha": "1" * 40, "siblings": [GOOD, GOOD | {"rfilename": "model.safetensors"}]}
    assert repository_of(hub, listing).files["config.json"].size == 2
    with pytest.raises(InputError, match="does not list the files of owner/model with sizes and hashes"):
        repository_of(hub, listing | changed if isinstance(changed, dict) else changed)


def repository_of(hub: Hub, listing: Any) -> Repository:
    hub.answer(f"/api/models/{ID}", json.dumps(listing).encode())
    return repository(ID)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        (["model.safetensors", "consolidated.safetensors"], None),
        (["._model.safetensors", "model.safetensors"], None),
        (["weights.safetensors"], None),
        (["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"], None),
        (["a-00001-of-00002.safetensors"], "1 .safetensors files and no model.safetensors.index.json"),
        (["._model.safetensors"], "holds no .safetensors files"),
    ],
)
def test_the_files_of_the_model_are_chosen_as_in_a_folder(
    hub: Hub, checkpoint: Callable[[str], Path], shards: list[str], message: str | None
) -> None:
    case = checkpoint("mixtral_a")
    weights = (case / "model.safetensors").read_bytes()
    data = {name: weights if name.startswith(("model", "weights")) else b"not the model" for name in shards}
    if len(shards) == 2 and shards[0].startswith("a-"):
        empty = b'{"__metadata__":{}}'
        data = {shards[0]: weights, shards[1]: len(empty).to_bytes(8, "little") + empty}
    hub.add(ID, {"config.json": (case / "config.json").read_bytes(), **data})
    if message:
        with pytest.raises(InputError, match=message):
            repository(ID)
    else:
        assert describe_repository(repository(ID)).plan() == describe(case).plan()


# Patience


def test_what_is_waited_for_is_told(hub: Hub, folder: Path) -> None:
    hub.add(ID, folder)
    hub.fail(f"/api/models/{ID}", 503, times=2)
    told: list[str] = []
    repository(ID, wait=lambda seconds, trouble: told.append(trouble))
    assert told == [f"{hub.url} answers {ID} with status 503; trying again in {n} s" for n in (1, 2)]


@pytest.mark.parametrize("after", ["25", "Thu, 01 Jan 2099 00:00:00 GMT", "9" * 5000, "soon", "-7", "1e9", ""])
def test_a_wait_that_is_asked_for_has_a_limit(hub: Hub, folder: Path, after: str) -> None:
    hub.add(ID, folder)
    hub.fail(f"/api/models/{ID}", 429, headers={"Retry-After": after})
    hub.fail(f"/api/models/{ID}", 429, headers={"RateLimit": f'"api";r=0;t={"9" * 5000}'})
    waits, wait = patient()
    repository(ID, wait=wait)
    longest = network._LONGEST_WAIT
    assert waits == [{"25": 25}.get(after, longest if after[-3:] in ("GMT", "999") else 1), longest]


def test_a_hub_that_stays_silent_is_left_soon(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.02)
    hub.add(ID, folder)
    found = repository(ID, wait=patient()[1])
    for name, tries, ask in (
        (f"/api/models/{ID}", 3, lambda wait: repository(ID, wait=wait)),
        ("LICENSE", 6, lambda wait: Repository(ID, found.revision, found.files, wait).read("LICENSE")),
    ):
        hub.answer(name, b"", 0, times=100)
        waits, wait = patient()
        with pytest.raises(InputError, match=r"the connection to .* fails .*timed out"):
            ask(wait)
        assert len(waits) == tries


def test_an_answer_that_drips_is_cut(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(ID, folder)
    seconds = iter(range(0, 10**9, 50))
    monkeypatch.setattr(network, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    hub.answer(f"/api/models/{ID}", lambda: iter([b"{", b"}"] * 9), times=100)
    with pytest.raises(InputError, match=r"fails \(\d bytes came in 100 seconds\)"):
        repository(ID, wait=patient()[1])


# What the user has set


@pytest.fixture
def own_client() -> Iterator[None]:
    """huggingface_hub's client is made anew, from the environment as it is now."""
    close_session()
    yield
    close_session()


def lasting(message: str, repo_id: str = ID) -> str:
    """It is said at once."""
    waits, wait = patient()
    with pytest.raises(InputError, match=message) as caught:
        repository(repo_id, wait=wait)
    assert waits == []
    said = str(caught.value)
    assert "\n" not in said and len(said) < 600 and "secret" not in said
    return said


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("huggingface.co", r'HF_ENDPOINT \("huggingface.co"\) lacks the https://'),
        ("localhost:8080", "begins neither with|lacks the https://"),
        ("'https://hf-mirror.com'", "has quotes or spaces in it; write it as https://HOST, or unset it"),
        ('"https://hf-mirror.com"', "has quotes"),
        ("https://hf mirror.com", "has quotes or spaces"),
        ("htps://huggingface.co", "begins neither with https:// nor with http://"),
        ("file:///etc", "begins neither"),
        ("https://", "names no host|lacks"),
        ("https://hf..co", "names no host"),
        ("https://huggingface.co:https", "is no address"),
        ("https://[::1", "is no address"),
        ("https://huggingface.co?x=secret", r'huggingface.co\?\.\.\."\) has more after the host'),
        ("https://huggingface.co/?x=a@secret", r'\("\.\.\."\) has a wrong port'),
        ("https://us?er:secret@mirror", r'\("\.\.\."\)'),
        ("https://user:secret@mirror:port", "is no address"),
        ("https://user:secret/secret@mirror", r"\(\"mirror\"\) (is no address|has a wrong port)"),
        ("user:secret@mirror", r"\(\"mirror\"\)"),
        ("https://no-such-host.invalid", "the connection to https://no-such-host.invalid .*fails .*check HF_ENDPOINT"),
        ("https://user:secret@no-such-host.invalid", "the connection to https://no-such-host.invalid fails"),
    ],
)
def test_a_wrong_endpoint_is_named_at_once(
    hub: Hub, endpoint: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert "HF_ENDPOINT" in lasting(message)


def test_an_endpoint_with_a_path_or_a_password(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(ID, folder)
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/api")
    lasting(f'{hub.url}/api has no repository "{ID}", or it is private; check HF_ENDPOINT, or check the spelling')
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("//", "//me:secret@"))
    hub.fail(f"/api/models/{ID}", 401)
    lasting(f"{hub.url} does not accept the name and password of HF_ENDPOINT")
    hub.fail("LICENSE", 418)
    found = repository(ID)
    with pytest.raises(InputError, match=f"{hub.url} answers") as caught:
        found.read("LICENSE")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["ALL_PROXY", "https_proxy", "Http_Proxy"])
@pytest.mark.parametrize(
    ("proxy", "message"),
    [
        ("socks5://user:secret@127.0.0.1:1080", "SOCKS takes the package socksio; `pip install socksio`, or unset it"),
        ("socks4://127.0.0.1:1080", "proxies of the kind socks4:// are not known"),
        ("ftp://127.0.0.1:1080", "proxies of the kind ftp:// are not known"),
        ("http://user:secret@127.0.0.1:port", "write it as http://HOST:PORT"),
        ("http://[::1", "write it as http://HOST:PORT"),
        (" http://127.0.0.1:1080", "write it as http://HOST:PORT"),
        ("http://ü..x:1080", "write it as http://HOST:PORT"),
    ],
)
def test_a_proxy_that_cannot_be_is_named(
    hub: Hub, own_client: None, name: str, proxy: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, proxy)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    lasting(f"{name} cannot be used as a proxy: .*{message}")


def test_a_proxy_that_is_not_there_is_named(hub: Hub, own_client: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://user:secret@127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(InputError, match=r"by the proxy of HTTP_PROXY fails .* check HTTP_PROXY, or check the network"):
        repository(ID, wait=patient()[1])


def test_certificates_that_are_not_there_are_named(hub: Hub, own_client: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    assert "PROXY" not in lasting("correct or unset .*SSL_CERT_FILE")


def test_a_hub_without_tls_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("http:", "https:"))
    lasting("the connection to https://127.0.0.1:.* fails .*check HF_ENDPOINT")


@pytest.mark.parametrize("token", ["hf_sécret", "hf_secret“", "hf_a\x00secret", "hf_secret\nX-Other: 1", "hf_x secret"])
def test_a_token_that_is_none_is_not_sent(hub: Hub, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    monkeypatch.setenv("HF_TOKEN", "set")
    lasting("the token of HF_TOKEN has characters that no token has; copy it anew")
    assert hub.log == []


def test_a_token_file_that_cannot_be_read_is_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path))
    lasting(f"the token in {tmp_path} cannot be read")
    (tmp_path / "token").write_bytes(b"\xff\xfe secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    lasting(f"the token in {tmp_path / 'token'} cannot be read")


BAD = {"X_Error_Message": "Invalid credentials in Authorization header"}
NONE, GATED = {"X_Error_Code": "RepoNotFound"}, {"X_Error_Code": "GatedRepo"}


@pytest.mark.parametrize(
    ("token", "status", "headers", "message"),
    [
        (
            True,
            401,
            BAD,
            r"does not accept the token of HF_TOKEN \(Invalid credentials .*\); remove it, or log in anew",
        ),
        (True, 401, {}, "does not accept the token of HF_TOKEN; remove it"),
        (True, 401, NONE, "does not accept the token of HF_TOKEN"),
        (True, 401, GATED, "does not accept the token of HF_TOKEN"),
        (True, 404, NONE, "has no repository"),
        (True, 403, GATED, "is gated"),
        (True, 403, {}, "does not let you read owner/model with the token of HF_TOKEN; take one that may"),
        (False, 401, NONE, "has no repository"),
        (False, 401, {}, "has no repository"),
        (False, 401, GATED, "is gated: accept its licence"),
    ],
)
def test_the_causes_of_a_refusal_are_told_apart(
    hub: Hub, token: bool, status: int, headers: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret" if token else None)
    monkeypatch.setenv("HF_TOKEN", "set")
    hub.answer(f"/api/models/{ID}", b"", status, **headers)
    assert token is False or status != 401 or "repository" not in lasting(message)
    hub.answer(f"/api/models/{ID}", b"", status, **headers)
    lasting(message)


@pytest.mark.parametrize(
    "repo_id", ["x", "a/b/c", f"a/{'b' * 97}", f"{'a' * 97}/b", "a/b--c", "-a/b", "a/b.", "ä/b", "a/b.git"]
)
def test_what_is_no_id_is_not_asked_for(hub: Hub, repo_id: str) -> None:
    lasting("is not the id of a repository; write it as OWNER/NAME", repo_id)
    assert hub.log == []


def test_settings_that_stop_the_library_are_said(tmp_path: Path) -> None:
    code = f"from numoe.engine.hub.repository import repository; repository({ID!r})"
    environment = os.environ | {"HF_HUB_DOWNLOAD_TIMEOUT": "soon", "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert "Error: huggingface_hub does not start (invalid literal" in run.stderr


# The cache of Hugging Face


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_files_of_others_stay_in_the_cache(hub: Hub, folder: Path, cache: Path) -> None:
    """The hub lists another hash than that of the bytes it sends, which another program has put into the cache."""
    commit = hub.add(ID, {p.name: p.read_bytes() for p in folder.iterdir()})
    good = repository(ID)
    path = good.fetch_to_cache(SHARD)
    files = dict(good.files) | {SHARD: RemoteFile(good.files[SHARD].size, "0" * 64)}
    listed = Repository(ID, commit, files, patient()[1])
    assert listed.verified(SHARD) is None
    with pytest.raises(InputError, match="arrived twice with other bytes"):
        listed.fetch_to_cache(SHARD)
    assert path.read_bytes() == (folder / SHARD).read_bytes()
    assert [p.name for p in cache.rglob("*.incomplete")] == []


def test_a_download_into_the_cache_goes_on(hub: Hub, folder: Path, cache: Path) -> None:
    hub.add(ID, folder)
    with pytest.raises(KeyboardInterrupt):
        repository(ID).fetch_to_cache(SHARD, stopped)
    assert repository(ID).cached(SHARD) is None
    path = repository(ID).fetch_to_cache(SHARD)
    assert path.read_bytes() == (folder / SHARD).read_bytes()
    assert hub.transfers(SHARD)[1][0] >= 300_000
    assert hf_hub_download(ID, SHARD, revision=hub_commit(hub), local_files_only=True) == str(path)


def hub_commit(hub: Hub) -> str:
    return repository(ID).revision


def test_two_downloads_of_one_file_are_kept_apart(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.add(ID, folder)

    def again(count: int) -> None:
        with pytest.raises(InputError, match="is being written by another process"):
            repository(ID).fetch(SHARD, tmp_path)

    repository(ID).fetch(SHARD, tmp_path, again)
