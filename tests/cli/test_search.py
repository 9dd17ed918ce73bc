"""`numoe search`, names that are addresses, and what is offered in place of a model that does not fit."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import reshard
from hub_server import Hub
from machines import a_machine, keep

from numoe.engine.hub.hub_id import named

Checkpoints = Callable[[str], Path]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoints) -> Iterator[Hub]:
    """A hub with two models of a family, one of another, and one that is not known."""
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "home").mkdir()
    keep(replace(a_machine(), read_bytes_per_s={str(1 << power): 1e9 for power in range(16, 25)}))
    with Hub() as server:
        for name, case in (("Org/Large", "qwen3_moe_a"), ("Org/Small", "qwen3_moe_b"), ("Other/Dense", "llama_a")):
            folder = reshard(checkpoint(case), tmp_path / name.replace("/", "-"), 2)
            (folder / "tokenizer.json").write_text("{}")
            server.add(name, folder)
        strange = Path(shutil.copytree(tmp_path / "Other-Dense", tmp_path / "strange"))
        config = json.loads((strange / "config.json").read_text()) | {"model_type": "gpt9"}
        (strange / "config.json").write_text(json.dumps(config))
        server.add("Org/Strange", strange)
        server.add("Org/Code", {"README.md": b"no model"})
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_search_lists_what_runs_here(hub: Hub, command: Run) -> None:
    code, out, err = command("search", "org", "--ram", "1GB")
    rows = [line.split() for line in out.splitlines()]
    assert code == 0 and rows[0] == ["model", "download", "as", "on", "disk", "verdict"]
    assert [row[0] for row in rows[1:]] == ["Org/Large", "Org/Small"]
    assert all(line.endswith("FITS IN RAM") for line in out.splitlines()[1:])
    assert "2 more were found that numoe does not run." in err and "numoe fit Org/Large" in err
    assert hub.sent < 100_000  # no weights, and no headers


def test_search_says_about_what_fit_says(hub: Hub, command: Run) -> None:
    fitted = json.loads(command("fit", "Org/Large", "--json", "--ram", "1GB")[1])
    for ram in ("1GB", "53MB"):
        [told] = json.loads(command("search", "large", "--json", "--ram", ram)[1])["models"]
        exact = json.loads(command("fit", "Org/Large", "--json", "--ram", ram)[1])["formats"][told["quant"]]
        assert told["download_bytes"] == pytest.approx(fitted["download_bytes"], rel=0.02)
        assert told["disk_bytes"] == pytest.approx(exact["disk_bytes"], rel=0.1)
        assert told["verdict"] == exact["verdict"]


def test_search_knows_gguf_repositories(hub: Hub, command: Run) -> None:
    rows = [
        {"id": f"Org/{name}-GGUF", "gguf": {"total": total, "architecture": architecture}, "downloads": None}
        for name, total, architecture in (
            ("Small", 10**9, "llama"), ("Large", 10**12, "qwen3moe"), ("Strange", 10**9, "gpt9"), ("Odd", -1, "llama"),
        )
    ]  # fmt: skip
    hub.answer("/api/models", json.dumps([*rows, {"id": "../x"}, 7, {"id": "Org/None", "gguf": []}]).encode())
    found = json.loads(command("search", "gguf", "--json", "--ram", "8GB")[1])
    told = [(one["model"], one["quant"], one["disk_bytes"] // 10**8, one["verdict"]) for one in found["models"]]
    assert told == [("Org/Small-GGUF", "Q4_K_M", 6, "FITS IN RAM"), ("Org/Large-GGUF", "Q4_K_M", 6062, None)]
    assert found["others"] == 5


def test_search_that_finds_nothing_says_so(hub: Hub, command: Run) -> None:
    code, out, err = command("search", "strange")
    assert (code, out) == (0, "") and "nothing" in err and "1 more was found" in err
    assert json.loads(command("search", "nowhere", "--json")[1])["models"] == []
    hub.answer("/api/models", b'{"error": 1}')
    code, out, err = command("search", "x")
    assert (code, out) == (1, "") and "has no list" in err
    hub.answer("/api/models", b"<html>")
    assert "is not the hub" in command("search", "x")[2]
    hub.fail("/api/models", 400)
    assert command("search", "x")[2].startswith("error: ")


def test_what_does_not_fit_ends_with_what_would(hub: Hub, command: Run) -> None:
    large, small = (json.loads(command("fit", f"Org/{name}", "--json")[1])["formats"] for name in ("Large", "Small"))
    least = {name: min(told["least_ram_bytes"] for told in formats.values())
             for name, formats in (("Large", large), ("Small", small))}  # fmt: skip
    first, second = sorted(least, key=lambda name: -least[name])
    code, out, _ = command("fit", f"Org/{first}", "--ram", f"{least[first] - 1}B")
    assert code == 2 and "numoe pull" not in out
    assert f"numoe fit Org/{second}" in out and "--ctx " in out  # which would both do
    tokens = int(out.split("--ctx ")[1].split()[0])
    assert command("fit", f"Org/{first}", "--ram", f"{least[first] - 1}B", "--ctx", str(tokens))[0] == 0
    code, out, _ = command("fit", f"Org/{first}", "--ram", "1MB")
    assert code == 2 and "`numoe search Org` lists what there is" in out


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("https://huggingface.co/Org/Large", ("Org/Large", None)),
        ("hf.co/Org/Large", ("Org/Large", None)),
        ("huggingface.co/Org/Large/", ("Org/Large", None)),
        ("http://HF.co/Org/Large/tree/v1", ("Org/Large", "v1")),
        ("https://huggingface.co/Org/Large/blob/refs%2Fpr%2F1/config.json?download=true", ("Org/Large", "refs/pr/1")),
        ("https://huggingface.co/Org/Large.git", ("Org/Large", None)),
        ("hf://Org/Large", ("Org/Large", None)),
        ("hf.co/Org/Large-GGUF:Q4_K_M", ("Org/Large-GGUF:Q4_K_M", None)),
        *((same, (same, None)) for same in ("Org/Large", "tiny", "./hf.co", "https://hf.co/", "http://[::1", "C:\\x")),
        ("https://example.com/Org/Large", ("https://example.com/Org/Large", None)),
    ],
)
def test_addresses_of_the_hub_are_names(text: str, meant: tuple[str, str | None]) -> None:
    assert named(text) == meant


def test_fit_and_pull_take_addresses_and_revisions(hub: Hub, command: Run, checkpoint: Checkpoints) -> None:
    before = next(iter(hub._repositories["Org/Large"]))
    hub.add("Org/Large", checkpoint("llama_a"))  # what the main branch has become
    told = json.loads(command("fit", f"https://huggingface.co/Org/Large/tree/{before}", "--json", "--ram", "1GB")[1])
    assert told["model"] == "Org/Large" and told["family"] == "qwen3_moe"
    assert json.loads(command("fit", "hf.co/Org/Large", "--revision", before, "--json", "--ram", "1GB")[1]) == told
    code, _, err = command("fit", "Org/Large", "--revision", "v9")
    assert code == 1 and "has no such revision" in err
    assert command("pull", f"https://huggingface.co/Org/Large/tree/{before}", "--quant", "native")[0] == 0
    for name in ("https://huggingface.co/Org/Large", "hf.co/Org/Large"):
        code, out, _ = command("show", name)
        assert code == 0 and "qwen3_moe" in out


def test_nobody_at_the_address_is_told_in_seconds(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for asked in (["fit", "Org/Large"], ["search", "x"]):
        code, out, err = command(*asked)
        first, last = err.splitlines()
        assert (code, out) == (1, "") and first.endswith("trying again in 1 s") and last.startswith("error: ")
    assert waited == [1, 1]
