"""What is known of a machine: measured once, kept, corrected by runs. No figure is compared with a clock."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import FORMATS, a_machine, keep

from numoe.engine import InputError, Model, describe, load
from numoe.engine.budget import Budget
from numoe.engine.families import family
from numoe.engine.layers.rows import FLOAT32
from numoe.engine.measure.machine import Machine, calibrate, known, record
from numoe.engine.plan import Plan, Verdict, parse_bytes
from numoe.quant.compute import kernels, threads
from numoe.quant.convert.recipe import Target

Models = Callable[[str], Model]

MACHINE, SPEEDS = (import_module(f"numoe.engine.measure.{name}") for name in ("machine", "speeds"))
GIGA = 10**9
INT8_G32 = Target("int8", 32).format


def a_plan() -> Plan:
    """A hundred gigabytes of experts, of which a token takes one."""
    return Plan(
        layers=10,
        parameters=101 * GIGA,
        weights={("attention", INT8_G32): GIGA, ("experts", INT8_G32): 100 * GIGA},
        sizes={("attention", INT8_G32): GIGA, ("experts", INT8_G32): 100 * GIGA},
        active={INT8_G32: 2 * GIGA},
        active_experts=dict.fromkeys(range(10), GIGA // 10),
        largest_expert=12_000_000,
        disk_bytes=101 * GIGA,
        context=8192,
        kv=FLOAT32,
        kv_bytes=GIGA,
        scratch_bytes=GIGA // 2,
        table_bytes=0,
        float32_bytes=0,
        wide_bytes=0,
    )


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def all_cores() -> Any:
    before = threads.in_use()
    threads.use(threads.usable_cores())
    yield
    threads.use(before)


# ------------------------------------------------------------------------------------------------------- predictions


def test_a_token_takes_its_weights_its_layers_and_what_is_read() -> None:
    machine = replace(a_machine(layer_s=0.05), runs=(MACHINE.Run("x", 1.0, 1.0, 1.0),))  # a perfect one: margin 1.1
    low, high = machine.decode(a_plan(), 1.0, False)
    assert (low * 1.1, high / 1.1) == pytest.approx((1 / 2.5, 1 / 2.5))
    low, high = machine.decode(a_plan(), 0.5, False)  # half a gigabyte is read, or a quarter beside computing
    assert (low * 1.1, high / 1.1) == pytest.approx((1 / 3.0, 1 / 2.5))
    slow_disk = machine.with_reading(12_000_000, 1e7)
    low, high = slow_disk.decode(a_plan(), 0.5, False)
    assert (low * 1.1, high / 1.1) == pytest.approx((1 / 52.5, 1 / 25))
    assert machine.with_cores(2 * machine.cores).decode(a_plan(), 1.0, False)[0] * 1.1 == pytest.approx(1 / 1.5)


@given(share=st.floats(0, 1), more=st.floats(0, 1), rate=st.floats(1e6, 1e11))
def test_memory_and_faster_disks_never_make_a_model_slower(share: float, more: float, rate: float) -> None:
    machine = a_machine().with_reading(12_000_000, rate)
    slow, fast = machine.decode(a_plan(), share, False)
    assert 0 < slow <= fast
    held = share + (1 - share) * more
    assert all(b >= a for a, b in zip((slow, fast), machine.decode(a_plan(), held, False), strict=True))
    faster = machine.with_reading(12_000_000, 2 * rate).decode(a_plan(), share, False)
    assert all(b >= a for a, b in zip((slow, fast), faster, strict=True))


def test_what_is_widened_has_the_speed_of_that_form() -> None:
    machine = replace(a_machine(), wide_weights_per_s={"int8": 2e9})
    plan = replace(a_plan(), wide_bytes=20 * GIGA)
    room = plan.total_bytes + plan.wide_bytes
    fast, slow = machine.forecast(plan, room), machine.forecast(plan, room - 1)
    assert fast.decode == pytest.approx([2 * speed for speed in slow.decode])
    assert fast.prefill[0] > slow.prefill[0]
    assert machine.with_cores(2 * machine.cores).forecast(plan, room).decode[0] == pytest.approx(2 * fast.decode[0])


def test_forecasts_name_the_verdict_and_the_memory() -> None:
    machine, plan = a_machine(), a_plan()
    large, middle, small = (machine.forecast(plan, room * GIGA) for room in (200, 50, 2))
    assert [f.verdict for f in (large, middle, small)] == list(Verdict)
    assert (large.expert_bytes, middle.expert_bytes) == (100 * GIGA, 47.5 * GIGA)
    assert large.peak_bytes == 102.5 * GIGA + 50_000_000
    assert middle.peak_bytes == 50 * GIGA + 50_000_000
    assert large.decode > middle.decode > small.decode == (0.0, 0.0)
    # A chunk of a prompt takes every expert: reading them is shared by its tokens.
    assert large.prefill > middle.prefill > middle.decode


def test_a_chunk_takes_all_weights_once_its_tokens_and_its_layers() -> None:
    machine = replace(a_machine(chunk_layer_s=2.0), runs=(MACHINE.Run("x", 1.0, 1.0, 1.0),))
    sizes = {**a_plan().sizes, ("embedding", INT8_G32): GIGA, ("head", INT8_G32): GIGA // 2}
    plan = replace(a_plan(), sizes=sizes)  # of the active weights a quarter is the head, which one token takes
    tied = replace(plan, sizes={key: size for key, size in sizes.items() if key[0] != "head"}, active={INT8_G32: 3e9})
    for each, taken in ((plan, 1.5e9), (tied, 2e9)):
        low, high = machine.forecast(each, 200 * GIGA).prefill
        seconds = 101 + 511 * taken / 5e9 + 10 * 2.0
        assert (low * 1.1, high / 1.1) == pytest.approx((512 / seconds, 512 / seconds))


@settings(max_examples=20, deadline=None)
@given(decode=st.floats(1e-12, 1e-8), each=st.floats(1e-12, 1e-9), tokens=st.sampled_from([2, 64, 512]))
def test_further_tokens_do_not_take_what_decoding_takes(decode: float, each: float, tokens: int) -> None:
    """But where decoding seems to be more than half of the whole, for what was measured is never exact."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SPEEDS, "_weights_per_s", lambda _, count: 1 / (decode + count * each))
        found = SPEEDS._further_macs_per_s([], tokens, 1 / (decode + each))
    whole = decode + tokens * each
    assert found == pytest.approx(1 / each if (tokens - 1) * each >= whole / 2 else 2 * (tokens - 1) / whole)


def test_a_size_of_reads_that_was_not_measured_is_no_guess() -> None:
    with pytest.raises(KeyError):
        replace(a_machine(), read_bytes_per_s={}).forecast(a_plan(), 50 * GIGA)


# ----------------------------------------------------------------------------------------------------- corrections


def runs_of(machine: Machine, factors: list[float]) -> Machine:
    """What the machine knows after runs that were so many times as fast as its uncorrected figures say."""
    for factor in factors:
        predicted = 2.0 * machine.correction
        run = MACHINE.Run("model", predicted, machine.correction, 2.0 * factor)
        machine = replace(machine, runs=(*machine.runs, run)[-MACHINE._KEPT :])
    return machine


def test_runs_correct_the_predictions() -> None:
    fresh = a_machine()
    before = fresh.decode(a_plan(), 1.0, False)
    once = runs_of(fresh, [0.5])
    assert once.correction == 0.5
    assert once.judged == (0.5,)
    settled = runs_of(fresh, [0.5] * 6)
    assert settled.judged == (1.0,) * 5
    after = settled.decode(a_plan(), 1.0, False)
    middle = [(low * high) ** 0.5 for low, high in (before, after)]
    assert middle[1] == pytest.approx(0.5 * middle[0])
    assert after[1] / after[0] < before[1] / before[0]  # what has proved itself is given more narrowly


def test_one_odd_run_changes_little() -> None:
    assert runs_of(a_machine(), [0.8, 0.8, 30.0, 0.8, 0.8]).correction == 0.8


def test_old_runs_are_forgotten() -> None:
    assert runs_of(a_machine(), [0.1] * 5 + [2.0] * 20).correction == 2.0


def test_a_run_is_recorded(model: Models, all_cores: None) -> None:
    keep(a_machine())
    loaded = load("tiny")
    record(loaded, 100, 2.0)
    machine = known()
    assert machine is not None
    [run] = machine.runs
    assert (run.model, run.measured, run.correction) == ("tiny", 50.0, 1.0)
    low, high = a_machine().decode(loaded.plan(), 1.0, False)
    assert low < run.predicted < high
    assert machine.correction == pytest.approx(50.0 / run.predicted)
    record(loaded, 100, 2.0)
    machine = known()
    assert machine is not None
    assert machine.judged[1] == pytest.approx(1.0)


def test_what_tells_nothing_is_not_recorded(all_cores: None) -> None:
    loaded = load("tiny")
    record(loaded, 100, 2.0)
    assert known() is None
    keep(a_machine())
    record(loaded, 7, 1.0)
    threads.use(threads.usable_cores() + 1)
    record(loaded, 100, 2.0)
    assert known() == a_machine()


def test_a_large_model_is_not_corrected_by_runs_of_a_tiny_one() -> None:
    plan = a_plan()
    tiny, like = MACHINE.Run("tiny", 1.0, 1.0, 50.0, 10**6), MACHINE.Run("like", 1.0, 1.0, 0.5, plan.active_parameters)
    room = plan.total_bytes
    fresh = a_machine().forecast(plan, room)
    assert replace(a_machine(), runs=(tiny,) * 5).forecast(plan, room) == fresh
    assert replace(a_machine(), runs=(tiny, like) * 5).forecast(plan, room).decode[1] < fresh.decode[1]
    assert replace(a_machine(), runs=(tiny, like)).about(plan).runs == (like,)
    for factor, counts in ((0.1, False), (0.2, True), (7.0, True), (9.0, False)):
        run = replace(like, weights=int(factor * plan.active_parameters))
        assert bool(replace(a_machine(), runs=(run,)).about(plan).judged) == counts


@pytest.mark.parametrize(
    ("ago", "load", "told"),
    [
        (None, 3.0, ""),
        (5, 0.1, ""),
        (5, 1.26, ", measured under a load of 1.3 from other programs"),
        (61, 0.0, ", measured 1 minute ago"),
        (2 * 3600 + 5, 0.0, ", measured 2 hours ago"),
        (86400 * 9, 0.5, ", measured 9 days ago under a load of 0.5 from other programs"),
        (-50, 0.0, ""),  # the clock was set back
    ],
)
def test_figures_tell_how_old_they_are(
    ago: float | None, load: float, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 1e9)
    machine = replace(a_machine(), measured_at=None if ago is None else 1e9 - ago, load=load)
    assert machine.measured_when == told


@pytest.mark.parametrize(
    ("ago", "computes", "reads", "again"),
    [
        (10, 9.0, 9.0, False),  # new: it is not even tried
        (4000, 1.2, 0.8, False),
        (4000, 2.0, 1.0, True),
        (4000, 0.5, 1.0, True),
        (4000, 1.0, 3.9, True),
        (4000, 1.0, 0.2, True),
        (-4000, 2.0, 1.0, True),  # from a clock that was wrong
    ],
)
def test_a_machine_that_changed_is_measured_again(
    ago: float, computes: float, reads: float, again: bool, all_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 1e9)
    monkeypatch.setattr(MACHINE, "_load", lambda: 0.7)
    monkeypatch.setattr(SPEEDS, "measure", lambda: a_machine(layer_s=1.0))
    monkeypatch.setattr(SPEEDS, "one_token_weights_per_s", lambda matrices: computes * 1e9)
    monkeypatch.setattr(SPEEDS, "read_speeds", lambda folder, pieces: dict.fromkeys(pieces, reads * 1e9))
    monkeypatch.setattr(MACHINE, "samples", lambda shape, nbytes: {"int8": []})
    before = replace(a_machine(), measured_at=1e9 - ago)
    keep(before)
    after = calibrate()
    assert after == known() == (replace(a_machine(layer_s=1.0), measured_at=1e9, load=0.7) if again else before)
    assert calibrate(anew=True).measured_at == 1e9


# ---------------------------------------------------------------------------------------------------- measurements


def test_a_model_is_computed_in_the_block_that_was_measured() -> None:
    before = kernels.block_elements()
    try:
        for block in kernels.BLOCKS:
            keep(replace(a_machine(), block=block))
            load("tiny", ctx=64)
            assert kernels.block_elements() == block
    finally:
        kernels.use_block(before)


def test_a_machine_is_measured_once(
    measured: tuple[Machine, Path], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    machine, kept = measured
    assert set(machine.weights_per_s) == set(FORMATS)
    assert set(machine.wide_weights_per_s) == {"int8", "int4", "mxfp4", "nvfp4"}
    assert min(*machine.weights_per_s.values(), *machine.wide_weights_per_s.values()) > 0
    assert (
        machine.macs_per_s > 0 and machine.expert_macs_per_s > 0 and machine.layer_s >= 0 and machine.chunk_layer_s > 0
    )
    assert 1e7 < machine.process_bytes < 5e8
    assert set(machine.read_bytes_per_s) == {str(1 << 24), str(1 << 16)}
    assert [path.name for path in kept.iterdir()] == ["machine.json"]
    shutil.copy(kept / "machine.json", folder)
    told: list[str] = []
    for part in ("measure", "read_speeds"):
        monkeypatch.setattr(SPEEDS, part, lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(MACHINE.time, "time", lambda: machine.measured_at)  # however long the tests before took
    assert calibrate([10_000_000], told.append) == machine == known()
    assert told == []
    monkeypatch.setattr(SPEEDS, "measure", a_machine)
    monkeypatch.setattr(SPEEDS, "read_speeds", lambda _, pieces: dict.fromkeys(pieces, 1e9))
    (folder / "machine.json").unlink()
    calibrate([9_000_000, 12_000_000, 60_000], told.append)
    assert len(told) == 2


def test_what_is_measured_with_fits_into_memory(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, sizes in ((10**9, ((2048, 4096), 1 << 26)), (10**9 - 1, ((512, 4096), 1 << 24))):
        monkeypatch.setattr(SPEEDS, "free_memory", lambda free=free: free)
        assert SPEEDS.sizes() == sizes
    monkeypatch.setattr(SPEEDS, "free_memory", lambda: 200_000_000)
    code, out, err = command("fit", "tiny")
    assert (code, out) == (2, "") and "computes needs 250 MB of memory and 200 MB are free now" in err


def test_block_types_are_measured_when_they_are_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(a_machine())
    for part, small in (("_SHAPE", (16, 256)), ("_WORKING_SET", 1 << 12), ("_SECONDS", 0.0)):
        monkeypatch.setattr(SPEEDS, part, small)
    told: list[str] = []
    machine = calibrate(told=told.append, kinds=["f32", "q4_k", "iq2_xxs"])
    assert told and machine == known()
    assert machine.weights_per_s.keys() == {*FORMATS, "q4_k", "iq2_xxs"}
    assert machine.wide_weights_per_s.keys() == {"q4_k", "iq2_xxs"}
    assert calibrate(told=pytest.fail, kinds=["q4_k", "int4"]) == machine


def test_the_file_that_is_read_for_measuring_has_no_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the process, no file stays."""
    fsync = os.fsync

    def look(handle: int) -> None:
        fsync(handle)
        assert os.fstat(handle).st_size == SPEEDS._SCRATCH_FILE and list(folder.iterdir()) == []

    monkeypatch.setattr(SPEEDS, "_SCRATCH_FILE", 1 << 24)
    monkeypatch.setattr(os, "fsync", look)
    assert SPEEDS.read_speeds(folder, [1 << 22])[1 << 22] > 0


@pytest.fixture(scope="module")
def tiny_model() -> Model:
    return load("tiny")


POISON = "import pathlib; pathlib.Path({!r}).touch()\nraise SystemExit('code of a stranger')\n"


@pytest.fixture
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is a stranger's, with a module by every name that one might import; gives what they make."""
    stranger, mark = tmp_path / "model", tmp_path / "mark"
    stranger.mkdir()
    for name in {*sys.stdlib_module_names, "sitecustomize", "usercustomize", "numpy", "numoe", "psutil", "typer"}:
        (stranger / f"{name}.py").write_text(POISON.format(str(mark)))
    monkeypatch.chdir(stranger)
    return mark


@pytest.mark.parametrize(
    "variables",
    [{}, {"PYTHONPATH": ":/nowhere", "PYTHONSTARTUP": "json.py", "PYTHONINSPECT": "1", "PYTHONSAFEPATH": ""}],
)
def test_what_lies_where_the_user_stands_is_not_run(
    variables: dict[str, str], poisoned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "path", ["", str(Path.cwd()), ".", *sys.path])
    figures = SPEEDS._probe()
    assert figures["layers"] and figures["token_s"] > 0
    assert not poisoned.exists()


@pytest.mark.parametrize("variables", [{}, {"PYTHONPATH": ":/nowhere:."}])
def test_the_command_does_not_look_there_either(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python itself imports some modules before any line of ours, by `-m` and PYTHONPATH: not those below."""
    monkeypatch.chdir(tmp_path)
    for name in ("statistics", "typer", "numpy", "psutil", "platform"):
        (tmp_path / f"{name}.py").write_text(POISON.format(str(tmp_path / "mark")))
    command = [sys.executable, "-m", "numoe.cli", "show", "tiny", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    assert (done.returncode, (tmp_path / "mark").exists()) == (0, False), done.stderr


def test_a_folder_that_is_gone_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setattr(sys, "path", ["", ".", *sys.path])
    assert SPEEDS._probe()["layers"]


def test_every_interpreter_that_is_started_is_told_where_to_look() -> None:
    """Whoever starts another one asks `python.isolated` how. A chat starts what the user lists, and nothing else."""
    for part in ("cli", "engine", "quant"):
        folder = Path(str(import_module(f"numoe.{part}").__file__)).parent
        for file in folder.rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            if file.name == "python.py":
                assert (text.count("sys.executable"), text.count('"-EBPc"')) == (1, 1)
            else:
                assert "sys.executable" not in text, file
                users = int(file.parts[-3:] == ("cli", "chat", "tools.py"))
                started = text.count("subprocess.run(") + text.count("subprocess.Popen(")
                assert started == text.count("isolated(") + users, file


@pytest.mark.parametrize("spoil", [lambda text: text[:50], lambda text: "[]", lambda text: text.replace("numpy", "n")])
def test_other_versions_and_damaged_files_are_measured_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[str], str]
) -> None:
    keep(a_machine())
    assert known() == a_machine()
    file = folder / "machine.json"
    file.write_text(spoil(file.read_text()))
    assert known() is None
    monkeypatch.setattr(SPEEDS, "measure", lambda: a_machine(layer_s=1.0))
    assert replace(calibrate(), measured_at=None, load=0.0) == a_machine(layer_s=1.0)
    assert json.loads(file.read_text())["layer_s"] == 1.0


WRONG = [
    None,
    0,
    -1.0,
    "1",
    [],
    {},
    True,
    float("nan"),
    float("inf"),
    1e-300,
    1e300,
    {"f32": 1e9},
    [{}],
    [{"model": 1}],
]


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize(
    "key",
    ["cores", "weights_per_s", "macs_per_s", "layer_s", "chunk_layer_s", "process_bytes", "block", "runs", "name"],
)
def test_figures_that_cannot_be_are_measured_anew(
    key: str, value: Any, folder: Path, all_cores: None, tiny_model: Model
) -> None:
    """And neither a run nor a forecast fails by what is in the file."""
    keep(a_machine())
    document = json.loads((folder / "machine.json").read_text())
    for changed in (document | {key: value}, value, document | {"strange": 1}):
        (folder / "machine.json").write_text(json.dumps(changed))
        machine = known()
        record(tiny_model, 100, 2.0)
        if machine is not None:
            assert (key in ("layer_s", "chunk_layer_s", "process_bytes") and value in (0, 1e-300)) or (key, value) in (
                ("runs", []),
                ("runs", {}),
            )
            machine.forecast(a_plan(), 50 * GIGA)


@pytest.mark.parametrize("rate", [0, -1, "1", None, [], float("nan"), 1e300, True])
@pytest.mark.parametrize("key", ["weights_per_s", "wide_weights_per_s", "read_bytes_per_s", "runs"])
def test_rates_that_cannot_be_are_measured_anew(key: str, rate: Any, folder: Path) -> None:
    machine = replace(a_machine(), wide_weights_per_s={"int8": 1e9}, runs=(MACHINE.Run("x", 1.0, 1.0, 1.0, 1),))
    keep(machine)
    assert known() == machine
    document = json.loads((folder / "machine.json").read_text())
    for name in document[key][0] if key == "runs" else document[key]:
        if name != "model" and (name, rate) != ("weights", None):  # which earlier versions did not note
            table = (document[key][0] if key == "runs" else document[key]) | {name: rate}
            (folder / "machine.json").write_text(json.dumps(document | {key: [table] if key == "runs" else table}))
            assert known() is None


@pytest.mark.parametrize("text", ["", "[" * 5000, "9" * 5000, "\0" * 9, "\ufeff{}"])
def test_what_is_no_document_is_measured_anew(text: str, folder: Path) -> None:
    (folder / "machine.json").write_text(text, encoding="utf-8")
    assert known() is None
    (folder / "machine.json").unlink()
    (folder / "machine.json").mkdir()
    assert known() is None


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(SPEEDS, "measure", a_machine)
    assert replace(calibrate(), measured_at=None, load=0.0) == a_machine()
    with pytest.raises(
        InputError, match=r"file cannot be written .* give that with `read_gb_s`, .* set NUMOE_HOME to a folder"
    ):
        calibrate([1 << 20])
    record(load("tiny"), 100, 2.0)


def test_every_format_of_a_model_has_a_speed(checkpoint: Callable[[str], Path]) -> None:
    for case in ("v4_released", "v3_fp8", "mixtral_a"):
        planned = describe(checkpoint(case)).plan(64)
        assert a_machine().forecast(planned, planned.total_bytes).decode > (0.0, 0.0)


# ------------------------------------------------------------------------------------------------------- peak memory

SHAPE = {"vocab_size": 2000, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 512}
SHAPE |= {"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False}
SHAPE |= {"hidden_act": "silu", "num_hidden_layers": 6}
MIXTURE = SHAPE | {"model_type": "qwen3_moe", "num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": True}
MIXTURE |= {"moe_intermediate_size": 384, "intermediate_size": 512, "decoder_sparse_step": 1, "mlp_only_layers": []}
DENSE = SHAPE | {"model_type": "llama", "intermediate_size": 4096}


def write_large(folder: Path, config: dict[str, Any], dtype: str) -> Path:
    """A model of some 200 MB whose weights repeat."""
    kind = family(config["model_type"])
    normal = np.random.default_rng(0).standard_normal(1 << 22, np.float32) / 32
    tensors = {}
    for layer, name, tensor in kind.spec(config).listing():
        source = next(s for s in kind.sources(name, layer, tensor.expert) if not s.stacked and not s.fused)
        values = normal[: math.prod(tensor.shape)]
        raw = (values.view("<u4") >> 16).astype("<u2") if dtype == "BF16" else values
        tensors[source.name] = dtype, tensor.shape, raw.tobytes()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize(
    ("config", "dtype", "rams"),
    [
        pytest.param(MIXTURE, "BF16", ("1GB", "150MB"), id="moe"),
        pytest.param(DENSE, "F32", ("1GB",), id="dense", marks=pytest.mark.slow),
    ],
)
def test_peak_memory_is_predicted(
    config: dict[str, Any], dtype: str, rams: tuple[str, ...], tmp_path: Path, measured: tuple[Machine, object]
) -> None:
    planned = describe(write_large(tmp_path / "model", config, dtype)).plan(600)
    assert planned.weight_bytes > 150e6
    machine = measured[0].with_reading(planned.largest_expert, 1e9)
    for ram in rams:
        predicted = machine.forecast(planned, Budget(ram, machine.process_bytes).total).peak_bytes
        command = [sys.executable, "-m", "numoe.cli", "bench", str(tmp_path / "model"), "--ram", ram, "--json"]
        command += ["--prompt-tokens", "550", "-n", "8", "--repetitions", "1"]
        measured = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)["peak_rss_bytes"]
        print(f"{ram}: predicted {predicted / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
        # What is fetched ahead, and so held, depends on which thread comes first.
        assert 0.85 * predicted <= measured <= min(1.1 * predicted, parse_bytes(ram))
