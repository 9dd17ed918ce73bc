"""What a repository on the hub holds, told without downloading it; transfers that survive a bad connection."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ITEM_BYTES, released_v4_listing, write_sharded
from hub_server import Content, Hub, virtual_release

from numoe.engine import hub as client
from numoe.engine.hub import Repository, repository
from numoe.engine.load import describe, describe_repository
from numoe.quant.checkpoint import open_checkpoint
from numoe.quant.errors import InputError

ID = "owner/model"
SHARD = "model-00001-of-00002.safetensors"
CONFIGS = Path(__file__).parent / "configs"


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
    assert hub.sent < 2 * client._HEADER_BYTES + 10_000  # of 2.4 MB
    assert repository(ID, commit).files == found.files


def test_headers_longer_than_the_first_request_are_read_whole(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_HEADER_BYTES", 20)
    hub.add(ID, folder)
    assert list(repository(ID).checkpoint().tensors) == list(open_checkpoint(folder).tensors)


def test_a_repository_without_an_index_is_its_only_shard(hub: Hub, checkpoint: Callable[[str], Path]) -> None:
    hub.add(ID, checkpoint("mixtral_a"))
    remote, local = describe_repository(repository(ID)), describe(checkpoint("mixtral_a"))
    assert remote.plan() == local.plan()
    assert remote.matrices() == local.matrices()


@pytest.mark.parametrize(
    ("name", "shards", "total_size", "most"),
    [("V4-Flash", 46, 159_609_485_896, 20e6), ("V4-Pro", 64, 864_704_792_696, 30e6)],
)
def test_released_models_are_described_from_their_headers(
    name: str, shards: int, total_size: int, most: float, hub: Hub
) -> None:
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
            names("README.md", "m.Q4_K.gguf"),
            r"only GGUF files \(m.Q4_K.gguf\); download one of them with `hf download`",
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
    hub.ranged = ranged
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
    assert waits[4:] == [1, 2, 4, client._LONGEST_WAIT]


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
