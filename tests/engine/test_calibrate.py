"""Moments of what matrices are multiplied with: against plain computations, and what conversion makes of them."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import tiny
from helpers import tiny_tokenizer
from numpy.typing import NDArray

from numoe.engine import InputError, Model, describe, load
from numoe.engine.measure.calibrate import MOST_TOKENS, calibrate
from numoe.quant.convert.convert import Folder, convert
from numoe.quant.convert.folder import Part
from numoe.quant.formats.pack import Moments
from numoe.quant.stored.manifest import read_manifest

Checkpoints = Callable[[str], Path]
Models = Callable[[str], Model]
MASTER = Path(__file__).parents[1] / "reference" / "tiny" / "master"
HELD_OUT = Path(__file__).parents[1] / "golden" / "tiny_held_out.txt"


def assert_same(a: Moments, b: Moments) -> None:
    np.testing.assert_array_equal(a.mean, b.mean)
    np.testing.assert_array_equal(a.square, b.square)


@pytest.mark.parametrize("bos", [None, 5])
def test_the_first_layers_inputs_are_the_normed_embedding(model: Models, bos: int | None) -> None:
    ids = tiny.random_ids("calibrate", 700, 64).tolist()
    told: list[tuple[int, int]] = []
    found = calibrate(model("qwen3_b"), ids, bos=bos, progress=lambda done, total: told.append((done, total)))
    pieces = 1 if bos is None else 2  # each of at most 512 tokens, the BOS included
    read = ids if bos is None else [*[bos] * pieces, *ids]
    assert found.tokens == 700 and told[-1] == (700, 700) and len(told) == 2
    decoder = model("qwen3_b").decoder
    x: NDArray = decoder.embedding.rows(read).astype(np.float64)
    x /= np.sqrt((x**2).mean(axis=1, keepdims=True) + decoder.spec.norm_eps)
    x *= model("qwen3_b").weights.arrays["layers.0.attention_norm"]
    for name in ("q", "k", "v"):
        moments = found.inputs[f"layers.0.attention.{name}"]
        np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(moments.square, (x**2).mean(axis=0), rtol=1e-3)


@pytest.mark.parametrize("case", ["llama_a", "v2_a", "v4_a", "qwen3_moe_a", "nemotron_h_a"])
def test_every_weight_that_int4_rounds_is_met(case: str, model: Models) -> None:
    """Of every kind of attention too, but for what the latent kind never multiplies with as it is."""
    tested = model(case)
    found = calibrate(tested, tiny.load_golden(case).ids[:200].tolist())
    for name, tensor in tested.spec.tensors().items():
        if tensor.held == "matrix" and tensor.role not in ("embedding", "head"):
            moments = found.inputs[name]
            assert moments.mean.shape == moments.square.shape == tensor.shape[1:]
            assert moments.mean.dtype == moments.square.dtype == np.float32
            assert (moments.square >= moments.mean**2 * np.float32(0.999)).all()


def test_rare_experts_have_the_average_of_their_layer(model: Models) -> None:
    tested = model("mixtral_b")
    found = calibrate(tested, [7] * 128)  # layer 0 sends every one of them to the same experts
    count = tested.spec.routed[0][0]
    gates = [found.inputs[f"layers.0.ffn.experts.{expert}.gate"] for expert in range(count)]
    downs = [found.inputs[f"layers.0.ffn.experts.{expert}.down"] for expert in range(count)]
    for expert, gate in enumerate(gates):  # there is one input: the average is that of every expert
        np.testing.assert_allclose(gate.mean, gates[0].mean, rtol=1e-4)
        assert_same(gate, found.inputs[f"layers.0.ffn.experts.{expert}.up"])
    distinct = {down.square.tobytes() for down in downs}
    assert len(distinct) == 1 + tested.spec.routed[0][1]  # the average, and each chosen one's own


def test_it_is_the_same_from_disk(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tiny.load_golden("qwen3_moe_a").ids[:200].tolist()
    whole = load(checkpoint("qwen3_moe_a"))
    monkeypatch.setattr(import_module("numoe.engine.plan"), "scratch_bytes", lambda spec: 0)
    planned = whole.plan()
    part = load(checkpoint("qwen3_moe_a"), ram=planned.total_bytes - planned.expert_bytes // 2)
    assert part.experts and not part.experts.complete
    one, other = calibrate(whole, ids), calibrate(part, ids)
    assert one.text == other.text and one.inputs.keys() == other.inputs.keys()
    for name, moments in one.inputs.items():
        assert_same(moments, other.inputs[name])


@pytest.mark.parametrize("case", ["qwen3_b", "qwen3_moe_a", "nemotron_h_a"])
def test_sums_are_taken_from_the_memory_for_sessions(case: str, checkpoint: Callable[[str], Path]) -> None:
    planned = describe(checkpoint(case)).plan()
    tight = load(checkpoint(case), ram=planned.total_bytes)
    before = tight.memory.sessions.parts_bytes
    ids = tiny.random_ids("some", 130, 64).tolist()
    calibrate(tight, ids)
    assert tight.memory.sessions.parts_bytes == before == 0
    taken = tight.session(planned.context - 64)
    with pytest.raises(InputError, match=r"^calibrating needs .* are allowed; raise `ram` to \d+MB"):
        calibrate(tight, ids)
    taken.close()
    calibrate(tight, ids)


def test_only_so_much_is_read_and_too_little_is_refused(model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="has 127 tokens and calibration takes 128 at least"):
        calibrate(model("qwen3_b"), [1] * 127)
    monkeypatch.setattr("numoe.engine.measure.calibrate.MOST_TOKENS", 600)
    assert MOST_TOKENS > 600
    ids = tiny.random_ids("much", 900, 64).tolist()
    much, enough = calibrate(model("qwen3_b"), ids), calibrate(model("qwen3_b"), ids[:600])
    assert much.tokens == 600 and much.text == enough.text
    assert_same(much.inputs["layers.1.ffn.down"], enough.inputs["layers.1.ffn.down"])


def test_products_with_another_text_change_less(tmp_path: Path) -> None:
    """Of the routed experts of trained weights, by the moments that the other text has."""
    described = describe(MASTER)
    master = load(described)
    ids = master.tokenizer.encode(HELD_OUT.read_text(encoding="utf-8"))
    calibration, other = calibrate(master, ids[-2000:]), calibrate(master, ids[:2000])
    cost = {}
    for name, inputs, text in [("plain", None, None), ("calibrated", calibration.inputs, calibration.text)]:
        folder, origin = tmp_path / name, Folder(MASTER, "master")
        convert(described.checkpoint, described.weights(inputs), folder, "int4", origin, calibration=text)
        made = describe(folder)
        for weight, tensor in described.spec.tensors().items():
            if tensor.role == "experts" and tensor.held == "matrix":
                before, after = (d.places[weight].stored.matrix().dequantize() for d in (described, made))
                key, met, error = (name, weight.rpartition(".")[2]), other.inputs[weight], after - before
                squares = error**2 @ (met.square - met.mean**2) + (error @ met.mean) ** 2
                cost[key] = cost.get(key, 0.0) + float(squares.sum())
    for part in ("gate", "up", "down"):
        assert cost["calibrated", part] < 0.97 * cost["plain", part]


# ---------------------------------------------------------------------------------------------------- the command

Run = Callable[..., tuple[int, str, str]]
TEXT = "the quick brown fox jumps over the lazy dog. what does the fox say?\n" * 4


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tiny.write_checkpoint("qwen3_b", tmp_path / "source")
    tiny_tokenizer(folder, 64)
    return folder


@pytest.fixture
def numoe(command: Run, source: Path, tmp_path: Path) -> Run:
    """numoe(*options) -> (exit code, stdout, stderr) of `quantize` into the folder `made`."""
    return partial(command, "quantize", str(source), str(tmp_path / "made"))


def test_the_command_calibrates(source: Path, tmp_path: Path, numoe: Run) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    code, out, err = numoe("--quant", "int4", "--calibrate", str(text))
    assert (code, out) == (0, "")
    assert err.startswith(f"calibrated by {len(TEXT)} tokens of {text}\n")
    described = describe(source)
    found = calibrate(load(described), described.tokenizer.encode(TEXT))
    made = read_manifest(tmp_path / "made")
    assert made is not None and (made.recipe, made.calibration) == ("int4", found.text)
    matrices = described.weights(found.inputs)
    convert(described.checkpoint, matrices, tmp_path / "again", "int4", Folder(source, str(source)))
    weights = "model.safetensors"
    assert (tmp_path / "made" / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()


def test_another_text_does_not_go_on(tmp_path: Path, numoe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text(TEXT)
    other.write_text(TEXT.replace("fox", "cat"))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    give_up = Part.give_up
    monkeypatch.setattr(Part, "give_up", lambda part: None)
    monkeypatch.setattr("numoe.quant.convert.convert._Shards.write", lambda *_: stop(0, 0))
    assert numoe("--quant", "int4", "--calibrate", str(one))[0] == 130
    monkeypatch.undo()
    assert Part.give_up is give_up
    for options, reason in ([], "this is one to int4 of"), (["--calibrate", str(other)], "(calibrated by text "):
        code, _, err = numoe("--quant", "int4", *options)
        assert code == 1 and "unfinished conversion to int4 (calibrated by text " in err and err.count(reason) >= 1
    assert numoe("--quant", "int4", "--calibrate", str(one))[0] == 0


@pytest.mark.parametrize(
    ("quant", "content", "code", "reason"),
    [
        ("int8", TEXT, 2, "only int4 is calibrated"),
        ("native", TEXT, 2, "only int4 is calibrated"),
        ("int4", "the fox", 1, "the text has 7 tokens"),
        ("int4", None, 2, "cannot be read (No such file or directory)"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    tmp_path: Path, numoe: Run, quant: str, content: str | None, code: int, reason: str
) -> None:
    text = tmp_path / "text"
    if content is not None:
        text.write_text(content)
    found, out, err = numoe("--quant", quant, "--calibrate", str(text))
    assert (found, out) == (code, "")
    assert reason in " ".join(err.split())
    assert not (tmp_path / "made").exists() and not list(tmp_path.glob("made.part"))
