"""`numoe verify`: every byte that is not as it was made is found, and a pull gets just that file anew."""

import json
import os
import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from helpers import reshard
from hub_server import Hub

from numoe.engine import Description, InputError, describe, home, load
from numoe.engine.experts.share import experts_on_disk
from numoe.engine.experts.store import ExpertStore
from numoe.engine.load import _read
from numoe.engine.pull import pull
from numoe.engine.verify import verify
from numoe.quant.convert.convert import Folder, convert
from numoe.quant.files import Files
from numoe.quant.stored.manifest import read_manifest, sealed

Checkpoints = Callable[[str], Path]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    source = describe(checkpoint("mixtral_a"))
    convert(source.checkpoint, source.weights(), tmp_path / "model", "int4", Folder(source.path, "x"))
    return tmp_path / "model"


def flip(path: Path, byte: int) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ 1]))


def test_what_is_whole_is_said_to_be(folder: Path, command: Run) -> None:
    for model in (str(folder), "tiny"):
        code, out, _ = command("verify", model)
        assert code == 0
        assert "all as they were made" in out
        document = json.loads(command("verify", model, "--json")[1])
        assert document["damaged"] == document["missing"] == document["extra"] == []
        assert not document["repaired"]
    done: list[tuple[int, int]] = []
    total = verify(folder, lambda *counts: done.append(counts)).nbytes
    assert (
        done[-1] == (total, total) == (sum(p.stat().st_size for p in folder.iterdir() if p.name != "numoe.json"),) * 2
    )


def test_any_changed_byte_is_found(folder: Path) -> None:
    size = (folder / "model.safetensors").stat().st_size
    for byte in (0, size - 1, *(random.Random(0).randrange(size) for _ in range(20))):
        flip(folder / "model.safetensors", byte)
        assert verify(folder).damaged == ("model.safetensors",)
        flip(folder / "model.safetensors", byte)
    assert verify(folder).whole


def test_a_manifest_has_a_sum_itself(folder: Path) -> None:
    path = folder / "numoe.json"
    text = path.read_bytes()
    for byte in range(0, len(text), 17):
        for bit in (1, 4, 32):
            path.write_bytes(text[:byte] + bytes([text[byte] ^ bit]) + text[byte + 1 :])
            with pytest.raises(InputError, match=r"numoe\.json (is damaged|has format|names the file)"):
                verify(folder)


@pytest.fixture
def blocks(checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose hashes are of 4096 bytes each."""
    monkeypatch.setattr("numoe.quant.stored.manifest.BLOCK", 4096)
    source = describe(checkpoint("qwen3_moe_a"))
    convert(source.checkpoint, source.weights(), tmp_path / "blocks", "native", Folder(source.path, "x"))
    return tmp_path / "blocks"


def few(described: Description) -> ExpertStore:
    """The experts of a model, of which one fits into memory."""
    store = experts_on_disk(described)
    assert store is not None
    store.allow(max(store.largest.values()))
    return store


def use(store: ExpertStore, layer: int, expert: int) -> None:
    with store.stream(layer, [expert]) as arriving:
        list(arriving)


def use_all(folder: Path) -> None:
    """Read all of a model, checked."""
    described = describe(folder, check=True)
    with closing(described.checkpoint):
        _read(described, wide=False)
        store = few(described)
        for layer, expert in store._units:
            use(store, layer, expert)


@pytest.mark.parametrize("paged", [False, True], ids=["through the cache", "past the cache"])
def test_what_is_read_is_compared_with_its_hash(blocks: Path, paged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    past: list[Path] = []
    read_once = Files.read_once
    monkeypatch.setattr(Files, "read_once", lambda files, path, *of: past.append(path) or read_once(files, path, *of))
    monkeypatch.setattr("numoe.engine.experts.unit._PAGED", 1 if paged else 1 << 40)
    path = blocks / "model.safetensors"
    size = path.stat().st_size
    use_all(blocks)
    assert len(read_manifest(blocks).files["model.safetensors"].blocks) == -(-size // 4096) * 32
    assert bool(past) == paged
    for byte in (0, 4096, size - 1, *(random.Random(1).randrange(size) for _ in range(20))):
        flip(path, byte)
        with pytest.raises(InputError, match=r"not as it was written, between bytes|damaged header"):
            use_all(blocks)
        assert verify(blocks).damaged == ("model.safetensors",)
        flip(path, byte)
    assert verify(blocks).whole


def test_a_check_reads_a_block_once(blocks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    monkeypatch.setattr(
        "numoe.quant.stored.checked.is_intact", lambda read, path, record, block: checked.append((path, block)) or True
    )
    use_all(blocks)
    assert len(checked) == len(set(checked)) > 10
    assert {path.name for path, _ in checked} == set(read_manifest(blocks).files)


def test_a_check_reads_what_is_beside_the_weights(folder: Path, command: Run) -> None:
    describe(folder, check=True)
    flip(folder / "config.json", 30)
    for how in (("run", str(folder), "x"), ("chat", str(folder))):
        assert "config.json is not as it was written, between bytes 0" in command(*how, "--check")[2]
    flip(folder / "config.json", 30)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert "'chat_template.jinja' is no part of what was made" in command("bench", str(folder), "--check")[2]
    (folder / "chat_template.jinja").unlink()
    (folder / "model.safetensors").unlink()
    assert "'model.safetensors' is missing" in command("run", str(folder), "--check", "x")[2]


def test_without_hashes_nothing_is_checked(checkpoint: Checkpoints) -> None:
    with pytest.raises(InputError, match=r"has no numoe\.json with the hashes"):
        describe(checkpoint("mixtral_a"), check=True)


def test_a_model_that_changes_while_it_is_used_is_noticed(blocks: Path) -> None:
    """Also a file of it that was not opened yet."""
    path, store = blocks / "model.safetensors", few(describe(blocks))
    first, second, *_ = store._units
    use(store, *first)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(InputError, match="has changed since it was first read"):
        use(store, *second)
    described = describe(blocks)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(InputError, match="has changed since it was first read"):
        load(described)


def test_every_file_that_is_wrong_is_named(folder: Path, command: Run) -> None:
    (folder / "config.json").unlink()
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    (folder / "stranger.txt").write_text("")
    (folder / "inner").mkdir()
    (folder / "inner" / "other.bin").write_text("")
    (folder / ".DS_Store").write_text("")
    (folder / ".config.json.0a1b2c3d.part").write_text("")
    code, out, _ = command("verify", str(folder))
    assert code == 1
    assert out.splitlines() == [
        f"damaged: {folder / 'model.safetensors'}",
        f"missing: {folder / 'config.json'}",
        f"extra: {folder / '.config.json.0a1b2c3d.part'}",
        f"extra: {folder / 'inner' / 'other.bin'}",
        f"extra: {folder / 'stranger.txt'}",
    ]
    document = json.loads(command("verify", str(folder), "--json")[1])
    assert document["damaged"] == ["model.safetensors"]
    assert document["extra"] == [".config.json.0a1b2c3d.part", "inner/other.bin", "stranger.txt"]
    code, _, err = command("verify", str(folder), "--repair")
    assert code == 1
    assert "was not pulled; make it anew with `numoe quantize`" in err
    assert (folder / "model.safetensors").exists()


def test_repairs_stay_within_the_folder(
    folder: Path, tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the manifest names, and wherever links lead."""
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path / "home"))
    model = tmp_path / "home" / "models" / "Org--Model-int4"
    model.parent.mkdir(parents=True)
    folder.rename(model)
    (tmp_path / "mine").write_text("mine")
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(tmp_path / "mine")
    manifest = json.loads((model / "numoe.json").read_text())
    record = manifest["files"]["config.json"]
    for name in ("../../../mine", str(tmp_path / "mine"), "..\\..\\mine", "./config.json", "sub/../config.json"):
        changed = manifest | {"files": manifest["files"] | {name: record}}
        (model / "numoe.json").write_text(json.dumps(sealed(changed)))
        code, _, err = command("verify", str(model), "--repair")
        assert code == 1 and "which is none beside it: do not use it" in err
        assert (model / "model.safetensors").exists()
    (model / "numoe.json").write_text(json.dumps(manifest))
    part = model.with_name(model.name + ".part")
    part.mkdir()
    (part / "numoe.json").touch()
    code, _, err = command("verify", str(model), "--repair")
    assert code == 1 and "is there too, from another pull; remove it first" in err
    assert (model / "config.json").is_symlink() and not (tmp_path / "home" / "models" / f".{part.name}.lock").exists()
    (part / "numoe.json").unlink()
    part.rmdir()
    assert command("verify", str(model), "--repair")[0] == 1
    assert part.is_dir() and not (part / "config.json").is_symlink()
    assert (tmp_path / "mine").read_text() == "mine"


def test_without_hashes_there_is_nothing_to_compare(checkpoint: Checkpoints, folder: Path, command: Run) -> None:
    for model in (checkpoint("mixtral_a"), folder / "model.safetensors"):
        code, out, err = command("verify", str(model))
        assert (code, out) == (2, "")
        assert "has no numoe.json" in err
    (folder / "numoe.json").write_text("{")
    with pytest.raises(InputError, match=r"numoe\.json is damaged"):
        verify(folder)


def test_a_repair_gets_the_damaged_file_and_no_other(
    checkpoint: Checkpoints, command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    source = reshard(checkpoint("qwen3_moe_a"), tmp_path / "source", 5)
    (source / "tokenizer.json").write_text("{}")
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.add("Org/Model", source)
        folder = pull("Org/Model", "int8").path
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        shards = sorted(name for name in before if name.endswith(".safetensors"))
        flip(folder / shards[2], 5000)
        (folder / "config.json").unlink()

        code, out, _ = command("verify", "model")
        assert code == 1
        assert out.splitlines()[-1] == "Get these anew: numoe verify Org/Model:int8 --repair"
        code, out, _ = command("verify", "model", "--repair")
        assert code == 1
        assert out.splitlines()[-1] == "Get what is missing: numoe pull Org/Model --quant int8"
        with pytest.raises(InputError, match="numoe pull Org/Model quant=int8"):
            home.locate("Org/Model")

        hub.log.clear()
        assert command("pull", "Org/Model", "--quant", "int8")[0] == 0
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        # The header of every shard is read; the rest of the damaged one, and of those it shares an expert with.
        fetched = [name for name in shards if len(hub.transfers(name)) > 1]
        assert shards[2] in fetched and len(fetched) <= 3
        assert command("verify", "model")[0] == 0
