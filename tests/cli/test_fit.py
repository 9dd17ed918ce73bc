"""`numoe fit`: what it says of models on the hub, here and unknown; that nothing is downloaded."""

import errno
import json
import os
import re
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tiny
from gguf_files import write_gguf
from helpers import released_v4_listing, reshard, write_safetensors
from hub_server import Hub, virtual_release
from machines import a_machine, keep

from numoe.engine import describe, home
from numoe.engine.measure.machine import known
from numoe.quant.compute import threads
from numoe.quant.convert.convert import Folder, convert

Checkpoints = Callable[[str], Path]
Run = Callable[..., tuple[int, str, str]]

CONFIGS = Path(__file__).parents[1] / "configs"
MACHINE = import_module("numoe.engine.measure.machine")
CLUSTER = import_module("numoe.engine.measure.cluster")
DISK = namedtuple("DISK", "total used free")
FLASH, PRO = "deepseek-ai/DeepSeek-V4-Flash", "deepseek-ai/DeepSeek-V4-Pro"


@cache
def release(repo_id: str, shards: int) -> dict[str, Any]:
    config = json.loads((CONFIGS / f"{repo_id.replace('/', '__')}.json").read_text())
    return dict(virtual_release(config, released_v4_listing(config), shards))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, an empty NUMOE_HOME but for a calibrated machine, an empty Hugging Face cache, and 2 TB of free disk."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: DISK(4 * 10**12, 2 * 10**12, 2 * 10**12))
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    rates = {str(1 << power): 1e9 for power in range(16, 25)}
    keep(replace(a_machine(), read_bytes_per_s=rates))
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def flat(text: str) -> str:
    return " ".join(text.split())


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------- full size


def test_v4_flash_on_a_small_machine(hub: Hub, command: Run, tmp_path: Path) -> None:
    hub.add(FLASH, release(FLASH, 46))
    code, out, _ = command("fit", FLASH, "--ram", "24GB")
    assert code == 0
    assert "159,609,485,896 bytes to download" in out
    assert "RUNS FROM DISK" in out and "With --ram 157.0GB all are in memory." in flat(out)
    assert "stored in 4.25 bits each already" in flat(out)  # why there is one column
    assert re.search(r"^ +native, int8, int4$", out, re.MULTILINE)
    amounts = [float(cell) for cell in re.findall(r"^[a-z].* (\d+\.\d\d) GB$", out, re.MULTILINE)]
    assert amounts[-1] == round(sum(amounts[:-1]), 2) == 24.0 and len(amounts) == 6
    assert "Nothing was downloaded." in out
    assert out.endswith(f"\nnumoe pull {FLASH} --quant native\n")
    assert hub.sent < 20_000_000
    assert files(tmp_path) == {"machine.json"}


@pytest.mark.slow
def test_v4_pro_in_json(hub: Hub, command: Run) -> None:
    hub.add(PRO, release(PRO, 64))
    code, out, err = command("fit", PRO, "--ram", "24GB", "--json")
    assert (code, err) == (2, "")
    document = json.loads(out)
    assert (document["model"], document["download_bytes"]) == (PRO, 864_704_792_696)
    assert list(document["formats"]) == ["native", "int8", "int4"]
    native = document["formats"]["native"]
    assert native["disk_bytes"] == 864_704_792_696
    shards = sorted(file.size for name, file in release(PRO, 64).items() if name.endswith(".safetensors"))
    assert native["peak_disk_bytes"] == native["disk_bytes"] + sum(shards[-2:])
    assert list(native["kv_bytes"]) == ["8192", "32768", "1048576"]
    assert (native["verdict"], native["tokens_per_s"], native["expert_share"]) == ("DOES NOT FIT", [0, 0], 0)
    assert 24e9 < native["resident_bytes"] < native["least_ram_bytes"] < 32e9
    for quant in ("int8", "int4"):  # FP8 and FP4 are left as they are: only bf16 is rounded
        assert 0 < native["disk_bytes"] - document["formats"][quant]["disk_bytes"] < 1e9


# --------------------------------------------------------------------------------------------------- verdicts


@pytest.fixture(scope="module")
def repository(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = reshard(checkpoint("qwen3_moe_a"), tmp_path_factory.mktemp("repository") / "model", 3)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def tiny_repository(hub: Hub, repository: Path) -> str:
    hub.add("Org/Model", repository)
    return "Org/Model"


def test_a_quantization_is_looked_for_beside_the_config(hub: Hub, repository: Path, command: Run) -> None:
    named = b'{"quantization": {"quant_algo": "W4A16_AWQ"}}'
    hub.add("Org/Model", {p.name: p.read_bytes() for p in repository.iterdir()} | {"hf_quant_config.json": named})
    for arguments in (("fit", "Org/Model"), ("pull", "Org/Model", "--quant", "native")):
        code, out, err = command(*arguments)
        assert code and "W4A16_AWQ" in " ".join((out + err).split())


def test_numbers_are_those_of_the_downloaded_model(
    tiny_repository: str, checkpoint: Checkpoints, command: Run, tmp_path: Path
) -> None:
    document = json.loads(command("fit", tiny_repository, "--json", "--ctx", "100")[1])
    source = describe(checkpoint("qwen3_moe_a"))
    for quant, told in document["formats"].items():
        convert(source.checkpoint, source.weights(), tmp_path / quant, quant, Folder(source.path, "x"))
        planned = describe(tmp_path / quant).plan(100)
        assert (told["disk_bytes"], told["resident_bytes"]) == (planned.disk_bytes, planned.resident_bytes)
        assert told["kv_bytes"] == {"100": planned.kv_bytes}
        local = json.loads(command("fit", str(tmp_path / quant), "--json", "--ctx", "100")[1])
        assert list(local["formats"]) == [quant]
        assert local["download_bytes"] == 0
        assert local["formats"][quant] | {"peak_disk_bytes": 0} == told | {"peak_disk_bytes": 0}
    made = describe(tmp_path / "int8")
    again = json.loads(command("fit", str(tmp_path / "int8"), "--json", "--ctx", "100", "--quant", "int4")[1])
    convert(made.checkpoint, made.weights(), tmp_path / "again", "int4", Folder(made.path, "x"))
    assert list(again["formats"]) == ["int8", "int4"]
    assert again["formats"]["int4"]["disk_bytes"] == describe(tmp_path / "again").plan(100).disk_bytes


def test_the_best_format_is_the_one_to_pull(tiny_repository: str, command: Run) -> None:
    formats = json.loads(command("fit", tiny_repository, "--json")[1])["formats"]
    whole = {quant: told["whole_ram_bytes"] for quant, told in formats.items()}
    assert whole["native"] > whole["int8"] > whole["int4"]
    for quant in whole:
        code, out, _ = command("fit", tiny_repository, "--ram", f"{whole[quant]}B")
        assert code == 0
        assert out.endswith(f"numoe pull Org/Model --quant {quant}\n")
        verdicts = json.loads(command("fit", tiny_repository, "--ram", f"{whole[quant]}B", "--json")[1])["formats"]
        fits = [name for name, told in verdicts.items() if told["verdict"] == "FITS IN RAM"]
        assert fits == list(whole)[list(whole).index(quant) :]
    least = formats["int4"]["least_ram_bytes"]
    assert command("fit", tiny_repository, "--ram", f"{least}B")[0] == 0
    code, out, _ = command("fit", tiny_repository, "--ram", f"{least - 1}B")
    assert code == 2
    assert "native, int8, int4" not in out and out.count("DOES NOT FIT") == 3


@pytest.mark.parametrize("quant", ["native", "int4"])
def test_the_table_adds_up_to_a_peak_that_ram_bounds(tiny_repository: str, command: Run, quant: str) -> None:
    told = json.loads(command("fit", tiny_repository, "--json")[1])["formats"][quant]
    for ram in {told[edge] + more for edge in ("least_ram_bytes", "whole_ram_bytes") for more in (-1, 0, 1000, 10**7)}:
        document = json.loads(command("fit", tiny_repository, "--ram", f"{ram}B", "--json")[1])
        at = document["formats"][quant]
        parts = "resident_bytes", "scratch_bytes", "process_bytes", "expert_bytes"
        total = sum(at[part] for part in parts) + at["kv_bytes"]["1024"]
        runs = at["verdict"] != "DOES NOT FIT"
        assert runs == (ram >= told["least_ram_bytes"]) == (at["peak_memory_bytes"] <= ram)
        if runs:
            assert at["peak_memory_bytes"] - total in (0, at["wide_bytes"])


def test_what_cannot_run_or_has_no_room_is_not_to_be_pulled(
    tiny_repository: str, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = json.loads(command("fit", tiny_repository, "--json")[1])["formats"]

    def told(ram: int, free: int) -> str:
        monkeypatch.setattr("shutil.disk_usage", lambda path: DISK(10**12, 0, free))
        return " ".join(command("fit", tiny_repository, "--ram", f"{ram}B")[1].split())

    assert told(formats["int4"]["least_ram_bytes"] - 1, 10**12).endswith("Nothing was downloaded.")
    assert "numoe pull" not in told(formats["int4"]["least_ram_bytes"] - 1, 10**12)
    plenty = formats["native"]["whole_ram_bytes"]
    for quant in ("native", "int8", "int4"):
        assert told(plenty, formats[quant]["peak_disk_bytes"]).endswith(f"numoe pull Org/Model --quant {quant}")
    out = told(plenty, formats["int4"]["peak_disk_bytes"] - 1)
    assert out.endswith("or set NUMOE_HOME to a folder on another disk. Nothing was downloaded.")
    assert "pulling native takes" in out and "numoe pull" not in out and "What fits here: " in out


def test_a_model_without_a_tokenizer_does_not_run(hub: Hub, repository: Path, command: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(repository, tmp_path / "other"))
    (folder / "tokenizer.json").rename(folder / "vocab.bpe")
    hub.add("Org/Other", folder)
    code, out, _ = command("fit", "Org/Other")
    assert code == 2
    assert "Not supported yet: Org/Other has no tokenizer that numoe reads" in " ".join(out.split())
    assert "bytes to download" in out and "numoe pull" not in out


def test_a_hub_that_gives_no_parts_is_read_all_the_same(hub: Hub, tiny_repository: str, command: Run) -> None:
    told = command("fit", tiny_repository, "--json", "--ram", "1GB")
    hub.part = lambda start, stop: None
    assert command("fit", tiny_repository, "--json", "--ram", "1GB") == told


def test_a_partial_download_elsewhere_is_not_the_model(
    hub: Hub, tiny_repository: str, repository: Path, command: Run, tmp_path: Path
) -> None:
    told = command("fit", tiny_repository, "--json", "--ram", "1GB")
    snapshot = tmp_path / "cache" / "models--Org--Model" / "snapshots" / "abc"
    shutil.copytree(repository, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    assert json.loads(command("fit", tiny_repository, "--json", "--ram", "1GB")[1])["download_bytes"] == 0
    next(snapshot.glob("*-00002-*")).unlink()
    assert command("fit", tiny_repository, "--json", "--ram", "1GB") == told


def test_figures_that_cannot_be_kept_are_told_all_the_same(
    tiny_repository: str, command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **named: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    told = command("fit", tiny_repository, "--ram", "1GB")
    (tmp_path / "home" / "machine.json").unlink()
    monkeypatch.setattr("numoe.engine.measure.speeds.measure", a_machine)
    monkeypatch.setattr(MACHINE, "_load", lambda: 0.0)
    monkeypatch.setattr(MACHINE, "write_whole", refuse)
    assert command("fit", tiny_repository, "--ram", "1GB") == told


def test_a_lost_connection_is_no_verdict(
    hub: Hub, tiny_repository: str, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fail("config.json", 500, times=7)
    code, out, err = command("fit", tiny_repository)
    assert (code, out) == (1, "")
    answers = f"{hub.url} answers {tiny_repository} with status 500"
    assert err.splitlines() == [
        *(f"{answers}; trying again in {seconds} s" for seconds in (1, 2, 4, 8, 16, 32)),
        f"error: {answers}; try again later: what is here is kept",
    ]


def test_a_second_checkpoint_beside_the_model_takes_no_room(hub: Hub, checkpoint: Checkpoints, command: Run) -> None:
    files = {path.name: path.read_bytes() for path in checkpoint("mixtral_a").iterdir()} | {"tokenizer.json": b"{}"}
    hub.add("Org/One", files)
    hub.add("Org/Two", files | {"consolidated.safetensors": bytes(10**6)})
    one, two = (
        json.loads(command("fit", name, "--ram", "1GB", "--json")[1])["formats"] for name in ("Org/One", "Org/Two")
    )
    assert one == two


def test_what_if_answers(tiny_repository: str, command: Run) -> None:
    def speeds(*options: str) -> list[float]:
        out = command("fit", tiny_repository, "--json", *options)[1]
        return [told["tokens_per_s"][0] for told in json.loads(out)["formats"].values()]

    assert all(b > a for a, b in zip(speeds("--cores", "1"), speeds("--cores", "64"), strict=True))
    assert known() == replace(a_machine(), read_bytes_per_s={str(1 << power): 1e9 for power in range(16, 25)})


@pytest.mark.parametrize("columns", ["40", "60", "200"])
def test_narrow_screens_show_every_number(
    tiny_repository: str, command: Run, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    wide = command("fit", tiny_repository, "--ram", "1GB")[1]
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("NO_COLOR", "1")
    out = command("fit", tiny_repository, "--ram", "1GB")[1]
    assert "\x1b" not in out
    assert all(len(line) <= int(columns) for line in out.splitlines() if "bytes to download" not in line)
    assert sorted("".join(out.split())) == sorted("".join(wide.split()))


# ------------------------------------------------------------------------------------------- other than the hub


def test_what_is_here_needs_no_download(hub: Hub, checkpoint: Checkpoints, command: Run) -> None:
    for model, formats in (("tiny", ["int8"]), (str(checkpoint("v4_a")), ["native", "int8", "int4"])):
        code, out, _ = command("fit", model)
        assert code == 0
        assert "FITS IN RAM" in out and "Nothing to download" in out and "numoe pull" not in out
        assert list(json.loads(command("fit", model, "--json")[1])["formats"]) == formats
    assert hub.log == []


def test_a_gguf_file(hub: Hub, smollm2_file: Path, command: Run) -> None:
    told = json.loads(command("fit", str(smollm2_file), "--json")[1])["formats"]
    assert list(told) == ["native"]
    planned = describe(smollm2_file).plan()
    assert (told["native"]["resident_bytes"], told["native"]["expert_share"]) == (planned.weight_bytes, 1.0)


def test_a_recipe_by_role_is_priced(tiny_repository: str, command: Run) -> None:
    def told(*options: str) -> Any:
        return json.loads(command("fit", tiny_repository, "--ram", "1GB", "--json", *options)[1])["formats"]

    mixed = "experts=int4,attention=int8"
    sizes = {quant: one["disk_bytes"] for quant, one in (told() | told("--quant", mixed)).items()}
    assert list(told("--quant", mixed)) == ["native", mixed]
    assert sizes["int4"] < sizes[mixed] < sizes["native"]
    out = command("fit", tiny_repository, "--ram", "1GB", "--quant", mixed)[1]
    assert out.splitlines()[-1] in (f"numoe pull {tiny_repository} --quant {quant}" for quant in ("native", mixed))
    assert command("fit", tiny_repository, "--quant", "experts=int3")[0] == 2


def test_a_pulled_model_is_not_asked_for_again(
    hub: Hub, tiny_repository: str, checkpoint: Checkpoints, command: Run
) -> None:
    source = describe(checkpoint("qwen3_moe_a"))
    folder = home.folder_for(tiny_repository, "int4")
    folder.parent.mkdir()
    convert(source.checkpoint, source.weights(), folder, "int4", Folder(source.path, "x"))
    out = command("fit", tiny_repository, "--json")[1]
    assert list(json.loads(out)["formats"]) == ["int4"]
    assert hub.log == []


def test_architectures_that_are_not_known_get_their_totals(
    hub: Hub, tiny_repository: str, repository: Path, command: Run, tmp_path: Path
) -> None:
    told = json.loads(command("fit", tiny_repository, "--json")[1])
    folder = Path(shutil.copytree(repository, tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "gpt9"}
    (folder / "config.json").write_text(json.dumps(config))
    hub.add("Org/Other", folder)
    code, out, _ = command("fit", "Org/Other")
    assert code == 2
    assert f"{told['download_bytes']:,} bytes to download" in out
    assert "Not supported yet: " in out and 'model_type "gpt9"' in out
    assert "F32" in out and "Nothing was downloaded." in out and "numoe pull" not in out
    code, out, _ = command("fit", "Org/Other", "--json")
    document = json.loads(out)
    assert (code, document["download_bytes"], document["formats"]) == (2, told["download_bytes"], {})
    assert sum(document["dtypes"].values()) == told["download_bytes"]
    assert "gpt9" in document["unsupported"]


@pytest.mark.parametrize("remote", [True, False])
def test_what_does_not_run_is_priced_by_its_tensors_names(
    hub: Hub, checkpoint: Checkpoints, command: Run, tmp_path: Path, remote: bool
) -> None:
    """DeepSeek-V4 as released, called by a later one's name and with a table to look words up in."""
    source = describe(checkpoint("v4_released"))
    folder = reshard(source.path, tmp_path / "later", 2)
    write_safetensors(folder / "table.safetensors", {"layers.1.engram.embed.weight": ("F16", (100, 7), bytes(1400))})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["layers.1.engram.embed.weight"] = "table.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(source.config | {"model_type": "deepseek_v41"}))
    hub.add("Org/Later", folder)
    code, out, _ = command("fit", "Org/Later" if remote else str(folder), "--json")
    document = json.loads(out)
    plan, stored = source.plan(64), sum(place.stored.nbytes for place in source.places.values())
    assert (code, document["table_bytes"], document["aside_bytes"]) == (2, 1400, sum(source.aside.values()))
    assert document["expert_bytes"] == plan.expert_bytes == stored - document["resident_bytes"]
    assert (document["experts"], document["experts_per_token"]) == (9, 3)
    assert sum(document["parameters"].values()) - 700 > plan.parameters
    out = " ".join(command("fit", "Org/Later" if remote else str(folder))[1].split())
    assert "of routed experts, of which a token takes 3 of 9: they could stay on disk." in out
    assert 'Not supported yet: config.json: model_type "deepseek_v41" is DeepSeek-V4.1' in out


@pytest.mark.parametrize(
    ("architecture", "more", "reason"),
    [
        ("mamba", {}, 'GGUF architecture "mamba" is not supported yet'),
        ("llama", {"attention.max_alibi_bias": 8.0}, '"llama.attention.max_alibi_bias" is not understood'),
    ],
)
def test_gguf_files_that_do_not_run_get_their_totals(
    checkpoint: Checkpoints, command: Run, tmp_path: Path, architecture: str, more: dict[str, Any], reason: str
) -> None:
    config = tiny.load_golden("llama_a").config
    path = write_gguf(checkpoint("llama_a"), config, tmp_path / "model.gguf", architecture, **more)
    right = write_gguf(checkpoint("llama_a"), config, tmp_path / "right.gguf", "llama")
    total = describe(right).plan(512).disk_bytes
    code, out, _ = command("fit", str(path))
    assert code == 2 and f"{total:,} bytes on disk" in out and reason in " ".join(out.split()) and "F32" in out
    code, out, _ = command("fit", str(path), "--json")
    document = json.loads(out)
    assert (code, document["download_bytes"], document["dtypes"]) == (2, 0, {"F32": total})
    path.write_bytes(path.read_bytes()[:-100])
    code, out, err = command("fit", str(path))
    assert (code, out) == (1, "") and "model.gguf" in err


def test_what_is_nowhere_is_one_sentence(hub: Hub, command: Run) -> None:
    for model, left in (("nowhere", 2), ("Org/Nothing", 1)):
        code, out, err = command("fit", model)
        assert (code, out) == (left, "")
        assert err.startswith("error: ") and err.count("\n") == 1


# ---------------------------------------------------------------------------------------------- how good it has been


def test_runs_are_compared_with_what_was_expected(hub: Hub, command: Run) -> None:
    assert "No run has been compared" in re.sub(r"\s+", " ", command("fit", "tiny")[1])
    assert command("bench", "tiny", "--repetitions", "1", "-n", "8", "--prompt-tokens", "8")[0] == 0
    assert command("run", "tiny", "Hello! Who are you?", "-n", "12")[0] == 0
    machine = known()
    assert machine is not None
    assert [run.model for run in machine.runs] == ["tiny", "tiny"]
    assert threads.in_use() == machine.cores
    out = re.sub(r"\s+", " ", command("fit", "tiny")[1])
    assert re.search(r"The last 2 runs were within \d+% of what was expected", out)


# -------------------------------------------------------------------------------------------------- several machines


def test_machines_that_share_a_model(hub: Hub, checkpoint: Checkpoints, command: Run) -> None:
    model = str(checkpoint("v4_a"))
    plan = describe(model).plan()
    beside = 50_000_000 + CLUSTER._RAY_BYTES
    first, other = beside + plan.beside_experts + plan.least_experts, beside + plan.expert_bytes // 3
    asked = ["fit", model, "--nodes", f"{first}B,2x{other}B"]
    document = json.loads(command(*asked, "--json")[1])
    assert [node["ram_bytes"] for node in document["nodes"]] == [first, other, other]
    assert document["link_bytes_per_s"] == 125e6 and document["calls_measured"]
    native = document["formats"]["native"]
    assert sum(node["owned_bytes"] for node in native["nodes"]) == plan.expert_bytes
    assert all(node["always_bytes"] + node["expert_bytes"] <= node["ram_bytes"] for node in native["nodes"])
    assert native["verdict"] == "RUNS FROM DISK" and native["whole_nodes"] == 4
    assert 0 < native["tokens_per_s"][0] < native["tokens_per_s"][1]
    slower = json.loads(command(*asked, "--json", "--link", "1Mbit")[1])["formats"]["native"]
    assert slower["decides"] == "rows on the link" and slower["tokens_per_s"][1] < native["tokens_per_s"][1]
    code, out, _ = command(*asked, "--link", "1Mbit")
    told = flat(out)
    assert code == 0 and "RUNS FROM DISK of 3 machines" in told and "With 4 machines all are in memory." in told
    assert "What decides: the link of node 1" in told and "nodes 2-3, each" in told
    whole = f"4x{first + plan.expert_bytes}B"
    assert json.loads(command("fit", model, "--nodes", whole, "--json")[1])["formats"]["native"]["whole_nodes"] == 1
    assert "FITS IN RAM of 4 machines." in flat(command("fit", model, "--nodes", whole)[1])
    code, out, _ = command("fit", model, "--nodes", f"{beside}B,10x64GB", "--chart", "-")
    assert code == 2 and "more machines do not help, and a larger one as the first does" in flat(out)
    assert hub.log == []


def test_machines_are_of_no_use_to_a_model_without_experts(hub: Hub, smollm2_file: Path, command: Run) -> None:
    code, out, err = command("fit", str(smollm2_file), "--nodes", "2x8GB")
    assert (code, err) == (0, "") and "It has no routed experts, which are what machines share" in flat(out)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--nodes", "4x64GB", "--ram", "8GB"), "--nodes says what memory each machine has; leave out --ram"),
        (("--link", "10Gbit"), "--link is between machines; say which with --nodes, such as 4x64GB"),
        (
            ("--nodes", "4x64GB", "--link", "10GB"),
            '"10GB" is not the speed of a network; write it like 1Gbit or 300Mbit',
        ),
        (("--nodes", "4x64"), '"64" has no unit; write it like 64GB or 64MB; machines are written like 4x64GB'),
        (("--nodes", "many"), '"many" is not an amount of memory'),
    ],
)
def test_machines_that_are_none_are_refused(hub: Hub, command: Run, options: tuple[str, ...], said: str) -> None:
    code, out, err = command("fit", "Org/Model", *options)
    assert (code, out) == (2, "") and said in flat(err)
    assert hub.log == []
