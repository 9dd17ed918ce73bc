"""`numoe verify`: every byte that is not as it was made is found, and a pull gets just that file anew."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import reshard
from hub_server import Hub

from numoe.engine import InputError, describe, home
from numoe.engine.pull import pull
from numoe.engine.verify import verify
from numoe.quant.convert.convert import Folder, convert

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
        (model / "numoe.json").write_text(json.dumps(manifest | {"files": manifest["files"] | {name: record}}))
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
        assert (code, out) == (1, "")
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
