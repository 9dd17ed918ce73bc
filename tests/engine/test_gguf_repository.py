"""Repositories of GGUF files: which of them is meant, what is told before a download, and pulls that stay GGUF."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from gguf_files import write_gguf
from hub_server import Hub
from machines import a_machine, keep

from numoe.engine import describe, home, load
from numoe.engine.description import describe_repository
from numoe.engine.hub.gguf import chosen
from numoe.engine.hub.repository import repository
from numoe.engine.pull import Progress, pull
from numoe.engine.verify import verify
from numoe.quant.errors import InputError
from numoe.quant.stored.gguf_sets import gguf_set, gguf_sets

Checkpoints = Callable[[str], Path]
Run = Callable[..., tuple[int, str, str]]

ID = "owner/Model-GGUF"
ALPHABET = [chr(c) for c in range(33, 127)]
FIRST_PART = "Q8_0/Model-Q8_0-00001-of-00003.gguf"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    keep(replace(a_machine(), read_bytes_per_s={str(1 << power): 1e9 for power in range(16, 25)}))
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture(scope="session")
def whole(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts with a vocabulary."""
    return write(checkpoint, tmp_path_factory.mktemp("whole") / "Model-Q4_K_M.gguf")


def write(checkpoint: Checkpoints, path: Path, split: int = 0) -> Path:
    config = tiny.load_golden("qwen3_moe_b").config
    vocabulary = [*ALPHABET[: config["vocab_size"] - 2], "AB", "end"]
    return write_gguf(checkpoint("qwen3_moe_b"), config, path, "qwen3moe", split=split, vocabulary=vocabulary)


@pytest.fixture(scope="session")
def files(whole: Path, checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Three quantizations, by their names: one file, three parts in a folder, and parts of which one is missing."""
    folder = tmp_path_factory.mktemp("split")
    write(checkpoint, folder / "Model-Q8_0.gguf", split=20)
    parts = sorted(folder.iterdir())
    assert len(parts) == 3
    files = {whole.name: whole.read_bytes(), "mmproj-F16.gguf": b"GGUF", "Model-imatrix.gguf": b"GGUF"}
    files |= {f"Q8_0/{path.name}": path.read_bytes() for path in parts}
    files |= {f"Model-UD-Q2_K_XL-0000{k}-of-00003.gguf": parts[k - 1].read_bytes() for k in (1, 3)}
    return files


def no_wait(seconds: float) -> None:
    pass


# ------------------------------------------------------------------------------------------------------- names


NAMES = ["M-Q4_K_M.gguf", "M-UD-Q4_K_XL.gguf", "BF16/M-BF16-00001-of-00002.gguf", "BF16/M-BF16-00002-of-00002.gguf",
         "M-IQ2_XXS/M-IQ2_XXS-00001-of-00001.gguf", "M.i1-Q6_K.gguf", "old/M-Q5_0.gguf", "new/M-Q5_0.gguf",
         "m-q3_k_s.gguf", "M-Q8_0-imat.gguf", "odd name.gguf", "M.mmproj-Q8_0.gguf", "mmproj-M-F16.gguf",
         "imatrix_unsloth.gguf", "M.imatrix.gguf", "README.md", ".hidden.gguf"]  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "first", "name"),
    [
        ("Q4_K_M", NAMES[0], "Q4_K_M"),
        ("q4_k_m", NAMES[0], "Q4_K_M"),
        ("M-Q4_K_M.gguf", NAMES[0], "Q4_K_M"),
        ("M-Q4_K_M", NAMES[0], "Q4_K_M"),
        ("UD-Q4_K_XL", NAMES[1], "UD-Q4_K_XL"),
        ("Q4_K_XL", NAMES[1], "UD-Q4_K_XL"),
        ("BF16", NAMES[2], "BF16"),
        ("BF16/", NAMES[2], "BF16"),
        ("M-BF16-00002-of-00002.gguf", NAMES[2], "BF16"),
        ("BF16/M-BF16-00001-of-00002.gguf", NAMES[2], "BF16"),
        ("M-IQ2_XXS/", NAMES[4], "IQ2_XXS"),
        ("Q6_K", NAMES[5], "Q6_K"),
        ("old", NAMES[6], "old.M-Q5_0"),
        ("new/M-Q5_0.gguf", NAMES[7], "new.M-Q5_0"),
        ("old.M-Q5_0", NAMES[6], "old.M-Q5_0"),
        ("Q3_K_S", NAMES[8], "q3_k_s"),
        ("Q8_0", NAMES[9], "Q8_0"),
        ("odd name", NAMES[10], "odd name"),
    ],
)
def test_a_model_is_told_by_its_quantization_a_file_or_a_folder(wanted: str, first: str, name: str) -> None:
    found = gguf_set(gguf_sets(reversed(NAMES)), wanted, ID)
    assert (found.files[0], found.name) == (first, name)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("", r"owner/Model-GGUF holds 10 models in GGUF: .*; say which after a colon, such as owner/Model-GGUF:"),
        ("Q5_0", r"holds 2 models in GGUF that are Q5_0: new.M-Q5_0, old.M-Q5_0; say which"),
        ("Q9_K", r'has no "Q9_K"; it has BF16, IQ2_XXS, Q4_K_M, '),
        ("mmproj-M-F16.gguf", "has no"),
        ("Q4", "has no"),
    ],
)
def test_what_means_none_or_several_is_said(wanted: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gguf_set(gguf_sets(NAMES), wanted, ID)


@pytest.mark.parametrize(
    "wanted", ["latest", "LATEST", "M", "0", "K_M", "XS", "Q4_K_M.gguf", "/Q8_0", "8_0", "*", "..", " "]
)
def test_a_tag_that_is_none_means_no_model(wanted: str) -> None:
    sets = gguf_sets(["Some-Q4_K_M.gguf", "Some-Q8_0.gguf", "Some-IQ4_XS.gguf"])
    with pytest.raises(InputError, match=re.escape(f'has no "{wanted}"; it has IQ4_XS, Q4_K_M, Q8_0')):
        gguf_set(sets, wanted, ID)


def test_models_that_differ_in_their_number_of_parts_have_names_of_their_own() -> None:
    names = [f"M-Q8_0-0000{k}-of-0000{n}.gguf" for n in (2, 3) for k in range(1, n + 1)]
    sets = gguf_sets(names)
    assert [one.name for one in sets] == ["M-Q8_0-00001-of-00002", "M-Q8_0-00001-of-00003"]
    for one in sets:
        assert gguf_set(sets, one.name, ID) == one
    with pytest.raises(InputError, match="say which after a colon"):
        gguf_set(sets, "Q8_0", ID)


def test_what_no_model_is_may_lie_in_folders() -> None:
    names = [
        "mmproj/M.gguf",
        "M-F16.mmproj.gguf",
        "imatrix/M.gguf",
        "imatrix/M-Q4_K_M.GGUF",
        "M-Q8_0-00003-of-00002.gguf",
    ]
    assert [one.files for one in gguf_sets(names)] == [("M-Q8_0-00003-of-00002.gguf",), ("imatrix/M-Q4_K_M.GGUF",)]


@pytest.mark.parametrize("address", [
    "https://huggingface.co/owner/Model-GGUF/blob/main/Q8_0/Model-Q8_0-00001-of-00003.gguf",
    "https://huggingface.co/owner/Model-GGUF/resolve/main/Q8_0/Model-Q8_0-00001-of-00003.gguf?download=true",
    "hf.co/owner/Model-GGUF/blob/main/Q8_0/Model-Q8_0-00002-of-00003.gguf",
])  # fmt: skip
def test_the_address_of_a_file_means_its_model(address: str, hub: Hub, files: dict[str, bytes], command: Run) -> None:
    hub.add(ID, files)
    assert command("pull", address)[0] == 0
    assert [one.name for one in home.models()] == [f"{ID}:Q8_0"]


@pytest.mark.parametrize("there", [{1, 3}, {2, 3}, {1, 2}])
def test_a_missing_part_is_named(there: set[int]) -> None:
    [found] = gguf_sets(f"q/M-Q8_0-0000{k}-of-00003.gguf" for k in there)
    [lost] = {1, 2, 3} - there
    with pytest.raises(InputError, match=f"lacks q/M-Q8_0-0000{lost}-of-00003.gguf, one of the 3 parts of Q8_0"):
        gguf_set([found], "", ID)


# --------------------------------------------------------------------------------------- before a download


@pytest.mark.parametrize("wanted", ["Q4_K_M", "Q8_0"])
def test_a_distant_file_is_described_from_its_header(
    wanted: str, hub: Hub, files: dict[str, bytes], whole: Path
) -> None:
    hub.add(ID, files)
    found = repository(ID)
    described, here = describe_repository(found, chosen(found, wanted)), describe(whole)
    assert described.spec == here.spec
    assert described.plan() == here.plan()
    assert described.tokenizer.encode("AB") == here.tokenizer.encode("AB")


def test_no_more_than_the_header_is_read(hub: Hub, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numoe.quant.stored.gguf._FIRST_BYTES", 512)
    hub.add(ID, {whole.name: whole.read_bytes()})
    found = repository(ID)
    assert describe_repository(found, chosen(found, "")).spec == describe(whole).spec
    assert sum(request.sent for request in hub.log[1:]) < whole.stat().st_size / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"GGML" + data[4:], "does not begin with GGUF"),
        (lambda data: data[:900], "header ends too soon"),
        (lambda data: data[:-9], "is truncated or damaged"),
        (lambda data: b"", "does not begin with GGUF"),
    ],
)
def test_damaged_headers_are_refused(change: Any, message: str, hub: Hub, whole: Path) -> None:
    hub.add(ID, {whole.name: change(whole.read_bytes())})
    with pytest.raises(InputError, match=message):
        describe_repository(found := repository(ID), chosen(found, ""))


def test_fit_prices_one_of_them(hub: Hub, files: dict[str, bytes], command: Run) -> None:
    hub.add(ID, files)
    for wanted, parts in (("Q4_K_M", 1), ("Q8_0", 3)):
        code, out, _ = command("fit", f"{ID}:{wanted}", "--ram", "1GB")
        assert code == 0 and "FITS IN RAM" in out
        assert out.splitlines()[-1] == f"numoe pull {ID}:{wanted}"
        document = json.loads(command("fit", f"{ID}:{wanted}", "--ram", "1GB", "--json")[1])
        sizes = [len(data) for name, data in files.items() if wanted in name]
        assert len(sizes) == parts and 0.9 * sum(sizes) < document["download_bytes"] < sum(sizes)
        assert list(document["formats"]) == ["native"]
    code, _, err = command("fit", f"{ID}:UD-Q2_K_XL")
    assert code == 1 and "lacks Model-UD-Q2_K_XL-00002-of-00003.gguf, one of the 3 parts" in err


def test_fit_lists_what_is_there(hub: Hub, files: dict[str, bytes], command: Run) -> None:
    hub.add(ID, files)
    code, out, _ = command("fit", ID, "--ram", "1GB")
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert code == 0
    assert "FITS IN RAM" in lines["Q4_K_M"] and "FITS IN RAM" in lines["Q8_0"]
    assert "lacks Model-UD-Q2_K_XL-00002-of-00003.gguf" in lines["UD-Q2_K_XL"]
    assert not {"F16", "mmproj-F16", "Model-imatrix"} & lines.keys()
    code, out, _ = command("fit", ID, "--ram", "100kB", "--json")
    listed = {one["name"]: one for one in json.loads(out)["ggufs"]}
    assert code == 2 and listed["Q8_0"]["verdict"] == "DOES NOT FIT" and listed["UD-Q2_K_XL"]["verdict"] is None
    assert listed["Q8_0"]["bytes"] == sum(len(data) for name, data in files.items() if name.startswith("Q8_0/"))


def test_what_numoe_does_not_run_is_listed_with_the_reason(
    hub: Hub, checkpoint: Checkpoints, tmp_path: Path, command: Run
) -> None:
    path = write_gguf(checkpoint("llama_a"), tiny.load_golden("llama_a").config, tmp_path / "a", "mamba")
    hub.add(ID, {"M-Q8_0.gguf": path.read_bytes(), "M-Q4_0.gguf": path.read_bytes()})
    code, out, _ = command("fit", ID)
    assert code == 2 and "Q8_0" in out and 'GGUF architecture "mamba" is not supported' in " ".join(out.split())
    code, out, _ = command("fit", f"{ID}:Q8_0", "--json")
    assert code == 2 and json.loads(out)["dtypes"]["F32"] < path.stat().st_size


# --------------------------------------------------------------------------------------------------- pulls


@pytest.mark.parametrize("wanted", ["Q4_K_M", "Q8_0", "q8_0", "Q8_0/", FIRST_PART, "Model-Q8_0-00002-of-00003.gguf"])
def test_a_pull_stays_gguf_and_runs(wanted: str, hub: Hub, files: dict[str, bytes], whole: Path, command: Run) -> None:
    hub.add(ID, files)
    code, _, err = command("pull", f"{ID}:{wanted}")
    name = "Q4_K_M" if wanted == "Q4_K_M" else "Q8_0"
    folder = home.folder_for(ID, name)
    assert code == 0 and err.splitlines()[-2].endswith(f"kB in {folder}")
    wanted_files = {path.rpartition("/")[2]: data for path, data in files.items() if name in path}
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "numoe.json"} == wanted_files
    assert verify(folder).whole
    spelled = f"{ID}:{wanted}"
    assert command("pull", spelled) == (0, "", f"{spelled} is complete already, in {folder}\nnumoe chat {ID}\n")
    ids = list(range(20))
    assert np.array_equal(load(spelled).session().feed(ids), load(whole).session().feed(ids))
    code, out, _ = command("run", "-q", "--raw", "-n", "3", spelled, "AB")
    assert code == 0 and out.strip()
    assert command("run", "-q", "--raw", "-n", "3", ID, "AB")[1] == out
    assert "Q8_0" in command("list")[1] or "Q4_K_M" in command("list")[1]


def test_a_missing_part_is_not_pulled(hub: Hub, files: dict[str, bytes], command: Run) -> None:
    hub.add(ID, files)
    code, _, err = command("pull", f"{ID}:UD-Q2_K_XL")
    assert code == 1 and "lacks Model-UD-Q2_K_XL-00002-of-00003.gguf" in err
    assert command("pull", ID)[2].startswith(f"error: {ID} holds 3 models in GGUF: Q4_K_M, UD-Q2_K_XL, Q8_0; say which")
    code, _, err = command("run", f"{ID}:Q4_K_M", "x")
    assert code == 2 and f"`numoe pull {ID}:Q4_K_M` gets it" in err
    assert not list(home.models_folder().iterdir())


def test_a_gguf_file_is_converted_on_the_way(hub: Hub, files: dict[str, bytes], tmp_path: Path, command: Run) -> None:
    hub.add(ID, files | {"README.md": b"of all of them"})
    for model, refusal in ((ID, "holds 3 models in GGUF"), (f"{ID}:UD-Q2_K_XL", "lacks Model-UD-Q2_K_XL-00002")):
        for words in (("fit", model), ("pull", model)):
            code, out, err = command(*words, "--quant", "int4")
            assert (code, out) == (1, "") and refusal in err
    told = json.loads(command("fit", f"{ID}:Q8_0", "--quant", "int4", "--json")[1])
    code, _, err = command("pull", f"{ID}:Q8_0", "--quant", "int4")
    assert code == 0 and "of weights became" in err
    [one] = home.models()
    assert (one.name, one.command) == (f"{ID}:Q8_0+int4", f"numoe pull {ID}:Q8_0 quant=int4")
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert command("quantize", str(tmp_path / FIRST_PART), str(tmp_path / "here"), "--quant", "int4")[0] == 0
    made, here = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (one.path, tmp_path / "here"))
    assert made.keys() == here.keys() and {name for name in made if made[name] != here[name]} == {"numoe.json"}
    tensors = sum(info.nbytes for info in describe(one.path).checkpoint.tensors.values())
    assert told["formats"]["int4"]["disk_bytes"] == tensors
    parts = sorted(len(data) for name, data in files.items() if name.startswith("Q8_0/"))
    assert told["formats"]["int4"]["peak_disk_bytes"] == tensors + sum(parts[-2:])
    hub.log.clear()
    for name in (f"{ID}:Q8_0+int4", f"{ID}:int4", f"{ID}:q8_0", ID, "model-gguf"):
        assert home.locate(name) == one.path
    assert command("pull", f"{ID}:Q8_0", "--quant", "int4")[2].startswith(f"{ID}:Q8_0 is complete already")
    assert not hub.log
    pull(f"{ID}:Q8_0")
    pull(f"{ID}:Q4_K_M", "experts=int4")
    assert {found.quant for found in home.models()} == {"Q8_0", "Q8_0+int4", "Q4_K_M+experts=int4"}
    assert home.locate(f"{ID}:Q8_0").name == "owner--Model-GGUF-Q8_0"
    assert home.locate(f"{ID}:experts=int4").name == "owner--Model-GGUF--Q4_K_M+experts=int4"
    with pytest.raises(InputError, match=r"can be .*; say which"):
        home.locate(ID)
    assert command("rm", "-y", f"{ID}:Q8_0+int4")[0] == 0 and not one.path.exists()


def pull_first_part(quant: str) -> None:
    """A pull of two parts that ends after the first."""

    class Stop(Exception):
        pass

    def stop(at: Progress) -> None:
        if at.shards == 2:
            raise Stop

    with pytest.raises(Stop):
        pull(f"{ID}:Q8_0", quant, report=stop)


def test_a_stopped_conversion_goes_on(hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numoe.quant.stored.gguf._FIRST_BYTES", 512)
    hub.add(ID, files)
    pull(f"{ID}:Q8_0", "int8")
    whole = home.locate(f"{ID}:Q8_0+int8").rename(home.home() / "whole")

    pull_first_part("int8")
    with pytest.raises(InputError, match=f"`numoe pull {ID}:Q8_0 quant=int8` goes on"):
        load(f"{ID}:Q8_0+int8")
    hub.log.clear()
    path = pull(f"{ID}:Q8_0", "int8").path
    assert sum(request.sent for request in hub.log if request.path == FIRST_PART) < len(files[FIRST_PART]) / 4
    assert {p.name: p.read_bytes() for p in path.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
    assert verify(path).whole


def test_the_only_one_needs_no_name(hub: Hub, files: dict[str, bytes], whole: Path) -> None:
    hub.add(ID, {whole.name: whole.read_bytes(), "mmproj-F16.gguf": b"GGUF"})
    assert pull(ID).path == home.folder_for(ID, "Q4_K_M")


def test_safetensors_beside_are_taken_without_a_name(hub: Hub, whole: Path, checkpoint: Checkpoints) -> None:
    both = {path.name: path.read_bytes() for path in checkpoint("qwen3_moe_b").iterdir()}
    hub.add(ID, both | {whole.name: whole.read_bytes(), "tokenizer.json": b"{}"})
    assert pull(ID).path == home.folder_for(ID, "native")
    assert pull(f"{ID}:Q4_K_M").path == home.folder_for(ID, "Q4_K_M")
    hub.add("owner/plain", both)
    with pytest.raises(InputError, match="has no GGUF files, and what the colon names would be one of them"):
        pull("owner/plain:int4")


def test_a_pull_that_was_stopped_goes_on(hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numoe.quant.stored.gguf._FIRST_BYTES", 512)
    hub.add(ID, files)

    pull_first_part("native")
    [unfinished] = home.models()
    assert (unfinished.complete, unfinished.name) == (False, f"{ID}:Q8_0")
    with pytest.raises(InputError, match=f"`numoe pull {ID}:Q8_0` goes on"):
        load(f"{ID}:Q8_0")
    hub.log.clear()
    assert verify(pull(f"{ID}:q8_0").path).whole
    assert sum(request.sent for request in hub.log if request.path == FIRST_PART) < len(files[FIRST_PART]) / 4


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("quant", ["native", "int8"])
def test_a_pull_that_was_killed_goes_on(quant: str, hub: Hub, files: dict[str, bytes]) -> None:
    hub.add(ID, files)
    total = sum(len(data) for name, data in files.items() if name.startswith("Q8_0/"))
    process = None

    def kill(sent: int) -> None:
        if process and sent > total // 2:
            process.send_signal(signal.SIGKILL)

    hub.on_sent = kill
    words = [sys.executable, "-m", "numoe.cli", "pull", f"{ID}:Q8_0", "--quant", quant]
    env = os.environ | {"HF_HUB_CACHE": str(home.home() / "cache")}
    process = subprocess.Popen(words, stderr=subprocess.PIPE, env=env)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    hub.on_sent = lambda sent: None
    path = pull(f"{ID}:Q8_0", quant).path
    assert verify(path).whole and path == home.folder_for(ID, home.called("Q8_0", quant))
    assert [one.name for one in home.models()] == [f"{ID}:{home.called('Q8_0', quant)}"]


def test_what_is_damaged_is_fetched_anew(hub: Hub, files: dict[str, bytes], command: Run) -> None:
    hub.add(ID, files)
    damaged = pull(f"{ID}:Q8_0").path / FIRST_PART.rpartition("/")[2]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    code, out, _ = command("verify", f"{ID}:Q8_0")
    assert code == 1 and f"damaged: {damaged}" in out
    out = command("verify", f"{ID}:Q8_0", "--repair")[1]
    assert out.splitlines()[-1] == f"Get what is missing: numoe pull {ID}:Q8_0"
    hub.log.clear()
    assert command(*out.splitlines()[-1].split(": ")[1].split()[1:])[0] == 0
    assert command("verify", f"{ID}:Q8_0")[0] == 0
    assert command("rm", "-y", f"{ID}:Q8_0")[0] == 0 and not damaged.exists()


def test_the_hugging_face_cache_is_used_in_place(
    hub: Hub, files: dict[str, bytes], whole: Path, tmp_path: Path
) -> None:
    commit = hub.add(ID, files)
    storage = tmp_path / "cache" / "models--owner--Model-GGUF"
    snapshot = storage / "snapshots" / commit
    for name, data in files.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(data)
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text(commit)
    assert home.locate(f"{ID}:Q8_0") == pull(f"{ID}:Q8_0").path == snapshot / FIRST_PART
    assert describe(f"{ID}:Q8_0").spec == describe(whole).spec
    assert not home.models() and not hub.log
    (snapshot / FIRST_PART).unlink()
    assert home.lookup(f"{ID}:Q8_0") is None


def test_a_name_that_no_disk_can_have_is_refused(hub: Hub, whole: Path) -> None:
    hub.add(ID, {"a/CON.gguf": whole.read_bytes()})
    with pytest.raises(InputError, match="which is none beside it"):
        pull(ID)
