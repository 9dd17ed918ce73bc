"""A small mixture in each convention gives the logits of the same one in float32, also converted, also from disk."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
from helpers import RawTensor, write_safetensors
from packers import CASES

from numoe.engine import InputError, describe, load
from numoe.quant.convert.convert import Folder, convert
from numoe.quant.stored.safetensors import read_header

SIZE, EXPERTS, VOCAB = 128, 4, 32
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": SIZE, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 32, "moe_intermediate_size": SIZE, "intermediate_size": SIZE,
    "num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": True, "vocab_size": VOCAB, "hidden_act": "silu",
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}  # fmt: skip
LAYER = "model.layers.0."
PACKED = [f"{LAYER}self_attn.{part}_proj" for part in "qkvo"] + [
    f"{LAYER}mlp.experts.{expert}.{part}_proj" for expert in range(EXPERTS) for part in ("gate", "up", "down")
]


def f32(seed: int, *shape: int, scale: float = 1.0) -> RawTensor:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(scale)
    return "F32", shape, values.tobytes()


def plain() -> dict[str, RawTensor]:
    """The tensors that stay as they are."""
    ones = "F32", (SIZE,), np.ones(SIZE, np.float32).tobytes()
    head = "F32", (32,), np.ones(32, np.float32).tobytes()
    norms = ("model.norm", f"{LAYER}input_layernorm", f"{LAYER}post_attention_layernorm")
    return {
        "model.embed_tokens.weight": f32(1, VOCAB, SIZE),
        "lm_head.weight": f32(2, VOCAB, SIZE, scale=0.1),
        f"{LAYER}mlp.gate.weight": f32(3, EXPERTS, SIZE, scale=0.3),
        **{f"{name}.weight": ones for name in norms},
        **{f"{LAYER}self_attn.{part}_norm.weight": head for part in "qk"},
    }


def written(folder: Path, config: dict[str, Any], tensors: dict[str, RawTensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


@pytest.fixture
def square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packers, "ROWS", SIZE)
    monkeypatch.setattr(packers, "WIDTH", SIZE)


def pair(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The folders of a model in a convention, and of the same one in float32."""
    case, packed, floats = CASES[name], plain(), plain()
    for number, module in enumerate(PACKED):
        monkeypatch.setattr(packers, "SEED", number)
        tensors, values = case.make()
        packed |= {f"{module}{part.removeprefix('a')}": tensor for part, tensor in tensors.items()}
        floats[f"{module}.weight"] = ("F32", (SIZE, SIZE), values.astype("<f4").tobytes())
    table = dict(case.config)
    if own := table.pop("a", None):  # what holds for a layer alone holds for each
        table |= dict.fromkeys(PACKED, own)
    return written(folder / "packed", {case.key: table}, packed), written(folder / "floats", {}, floats)


def logits(folder: Path, ram: int | None = None) -> np.ndarray:
    return load(folder, ram=ram, threads=1, ctx=16).session().feed([3, 1, 4, 1, 5])


@pytest.mark.usefixtures("square")
@pytest.mark.parametrize("name", CASES)
def test_quantized_models_give_the_logits_of_their_values(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, floats = pair(name, tmp_path, monkeypatch)
    wanted, description = logits(floats), describe(packed)
    bound = 1e-5 * float(np.abs(wanted).max())
    found = logits(packed)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=bound)
    planned = description.plan(16)
    assert 0 < planned.expert_bytes < describe(floats).plan(16).expert_bytes or CASES[name].kind == "f32"
    least = planned.least_bytes + planned.scratch_bytes
    np.testing.assert_array_equal(logits(packed, least), found)  # most experts stay on disk
    for quant in ("native", "int4"):
        made = tmp_path / quant
        convert(description.checkpoint, description.weights(), made, quant, Folder(packed, "source"))
        if quant == "native":
            np.testing.assert_allclose(logits(made), wanted, rtol=0, atol=bound)
        else:
            assert np.isfinite(logits(made)).all()


@pytest.mark.usefixtures("square")
@pytest.mark.parametrize(("of_experts", "of_attention"), [
    ("ct several 4", "ct several 8"), ("ct several 4 in order", "ct several 8 a row"),
    ("gptq several 4", "gptq several 8"), ("gptq several 3 a row", "gptq several 8 in order"),
    ("auto-round several 4", "auto-round several 8"),
])  # fmt: skip
def test_experts_may_be_packed_otherwise_than_attention(
    of_experts: str, of_attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, floats = plain(), plain()
    for number, module in enumerate(PACKED):
        monkeypatch.setattr(packers, "SEED", number)
        tensors, values = CASES[of_experts if ".experts." in module else of_attention].make()
        packed |= {f"{module}{part.removeprefix('a')}": tensor for part, tensor in tensors.items()}
        floats[f"{module}.weight"] = ("F32", (SIZE, SIZE), values.astype("<f4").tobytes())
    folder = written(tmp_path / "packed", CASES[of_experts].table, packed)
    wanted = logits(written(tmp_path / "floats", {}, floats))
    np.testing.assert_allclose(logits(folder), wanted, rtol=0, atol=1e-5 * float(np.abs(wanted).max()))
    kinds = {(role, format.kind) for role, format in describe(folder).plan(16).sizes}
    assert kinds >= {("experts", "int4"), ("attention", "int8")}


def joined(tensors: Sequence[RawTensor]) -> RawTensor:
    """Of what has rows those of both; what is of the whole is the same in both."""
    dtype, shape, _ = tensors[0]
    if not shape or shape[0] == 1:
        return tensors[0]
    return dtype, (sum(one[1][0] for one in tensors), *shape[1:]), b"".join(one[2] for one in tensors)


STACKED = [
    "fp8 blocks", "fp8 scalar", "ct fp8 channel", "ct fp8 block", "ct w4a16", "ct w8a8", "ct w4a16 asymmetric",
    "ct nvfp4", "ct mxfp4", "ct mxfp8", "modelopt fp8", "modelopt nvfp4", "modelopt mxfp8", "quark mxfp4",
]  # fmt: skip


@pytest.mark.usefixtures("square")
@pytest.mark.parametrize("name", STACKED)
def test_stacked_experts_give_the_same_logits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gate and up in one tensor for all experts of a layer, and down, as transformers saves them."""
    packed, floats = pair(name, tmp_path, monkeypatch)
    tensors, values = plain(), plain()

    def made(module: str, seed: int) -> dict[str, RawTensor]:
        monkeypatch.setattr(packers, "SEED", seed)
        parts, matrix = CASES[name].make()
        values[f"{module}.weight"] = ("F32", (SIZE, SIZE), matrix.astype("<f4").tobytes())
        return {part: tensor for part, tensor in parts.items() if part != "a.weight_shape"}

    for number, module in enumerate(PACKED[:4]):
        tensors |= {f"{module}{part.removeprefix('a')}": one for part, one in made(module, number).items()}
    experts = f"{LAYER}mlp.experts"
    for fused, whole in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        stacks: dict[str, list[RawTensor]] = {}
        for expert in range(EXPERTS):
            # One scale of a whole matrix is that of gate and up together, which the same seed gives them.
            each = [made(f"{experts}.{expert}.{part}", 10 + expert) for part in whole]
            for part in each[0]:
                stacks.setdefault(part, []).append(joined([one[part] for one in each]))
        for part, of_experts in stacks.items():
            dtype, shape, _ = of_experts[0]
            ending = part.removeprefix("a.weight") if part.startswith("a.weight") else part.removeprefix("a")
            data = b"".join(data for _, _, data in of_experts)
            tensors[f"{experts}.{fused}{ending}"] = (dtype, (EXPERTS, *shape), data)
    write_safetensors(packed / "model.safetensors", tensors)
    write_safetensors(floats / "model.safetensors", values)
    wanted, planned = logits(floats), describe(packed).plan(16)
    bound = 1e-5 * float(np.abs(wanted).max())
    np.testing.assert_allclose(logits(packed), wanted, rtol=0, atol=bound)
    few = logits(packed, planned.least_bytes + planned.scratch_bytes)
    np.testing.assert_allclose(few, wanted, rtol=0, atol=bound)


@pytest.mark.usefixtures("square")
def test_stacked_experts_of_mlx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, floats = pair("mlx 4 bits", tmp_path, monkeypatch)
    tensors, stacks = plain(), dict[str, list[RawTensor]]()
    for number, module in enumerate(PACKED):
        monkeypatch.setattr(packers, "SEED", number)
        for part, tensor in CASES["mlx 4 bits"].make()[0].items():
            name = f"{module}{part.removeprefix('a')}"
            stacks.setdefault(re.sub(r"experts\.\d", "switch_mlp", name), []).append(tensor)
    for name, parts in stacks.items():
        dtype, shape, _ = parts[0]
        stack = (len(parts), *shape) if "switch_mlp" in name else shape
        tensors[name] = (dtype, stack, b"".join(data for _, _, data in parts))
    write_safetensors(packed / "model.safetensors", tensors)
    wanted = logits(floats)
    np.testing.assert_allclose(logits(packed), wanted, rtol=0, atol=1e-5 * float(np.abs(wanted).max()))
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_next"}))
    with pytest.raises(InputError, match="MLX stores other weights of qwen3_next"):
        describe(packed)


SERVES_ACTIVATIONS = ".input_scale", ".input_global_scale", ".weight_shape", ".weight_format"


@pytest.mark.usefixtures("square")
@pytest.mark.parametrize("name", CASES)
def test_a_model_that_lacks_one_part_of_one_expert_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, _ = pair(name, tmp_path, monkeypatch)
    path, module = packed / "model.safetensors", PACKED[5]
    data = path.read_bytes()
    whole = {
        one.name: (one.dtype, one.shape, data[one.offset : one.offset + one.nbytes])
        for one in read_header(path)[0].values()
    }
    optional = (*SERVES_ACTIVATIONS, *(part.removeprefix("a") for part in CASES[name].optional))
    parts = [part for part in whole if part.startswith(f"{module}.") and not part.endswith(optional)]
    assert len(parts) > 1
    for part in parts:
        write_safetensors(path, {one: tensor for one, tensor in whole.items() if one != part})
        with pytest.raises(InputError, match=re.escape(module.rpartition(".")[0])):
            describe(packed)
    if name == "ct w4a16":
        write_safetensors(path, {one: tensor for one, tensor in whole.items() if one != f"{module}.weight_scale"})
        with pytest.raises(InputError, match=r"up_proj\.weight_packed.*without .*up_proj\.weight_scale'"):
            load(packed)
