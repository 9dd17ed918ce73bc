"""Bad input gets one clear sentence; both spellings and fused tensors are found; planned bytes are real bytes."""

import json
import os
import re
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from helpers import stack_experts, tiny_tokenizer, write_safetensors
from safetensors.numpy import load_file, save_file

from numoe.engine import InputError, Model, describe, load
from numoe.engine.description import describe_repository
from numoe.quant.convert.convert import Folder, convert
from numoe.quant.formats.qtensor import QTensor

Checkpoints = Callable[[str], Path]
Models = Callable[[str], Model]


@pytest.fixture
def folder(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A copy of a small mixture that a test may damage."""
    return Path(shutil.copytree(checkpoint("mixtral_a"), tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def refused(path: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors.index.json",
        "hf_quant_config.json",
        "numoe.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "generation_config.json",
    ],
)
def test_a_link_that_has_lost_its_file_leaves_nothing_out(name: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """As in a cache that was tidied: the model would be another one."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("mixtral_a"), folder, copy_function=os.symlink)
    tiny_tokenizer(folder, 60)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=rf"{re.escape(name)} is a link to a file that is not there"):
        described = describe(folder)
        assert described.tokenizer and described.sampling and described.identity


def test_missing_things_are_named(tmp_path: Path, folder: Path) -> None:
    assert 'no folder or file "nowhere"' in refused("nowhere")
    assert "`numoe pull some-org/some-model`" in refused("some-org/some-model")
    assert "has no config.json" in refused(tmp_path)
    (folder / "model.safetensors").unlink()
    assert str(folder) in refused(folder)


def test_broken_configs_are_refused(folder: Path) -> None:
    change_config(folder, model_type="gpt9")
    assert 'model_type "gpt9" is not supported yet; known are ' in refused(folder) and "deepseek_v2" in refused(folder)
    (folder / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refused(folder)
    (folder / "config.json").write_text("[]")
    assert "does not hold a JSON object" in refused(folder)


def test_a_config_may_begin_with_a_byte_order_mark(checkpoint: Checkpoints, folder: Path) -> None:
    file = folder / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert describe(folder).spec == describe(checkpoint("mixtral_a")).spec


def test_what_git_leaves_in_place_of_a_file_is_named(folder: Path, tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "model.gguf").write_bytes(pointer)
    assert "model.gguf is a Git LFS pointer" in refused(tmp_path / "model.gguf")
    (folder / "model.safetensors").write_bytes(pointer)
    assert "model.safetensors is a Git LFS pointer" in refused(folder)
    (folder / "config.json").write_bytes(pointer)
    assert "config.json is a Git LFS pointer" in refused(folder)


def test_one_file_of_a_model_is_not_taken_for_it(folder: Path) -> None:
    assert f"give its folder, {folder}" in refused(folder / "model.safetensors")


def logits(folder: Path, case: str) -> np.ndarray:
    return load(folder).session(256).feed(tiny.load_golden(case).ids)


@pytest.fixture
def copy(checkpoint: Checkpoints, tmp_path: Path) -> Checkpoints:
    """A copy of any small model that a test may change."""
    return lambda case: Path(shutil.copytree(checkpoint(case), tmp_path / case))


def test_a_head_of_its_own_counts_whatever_the_config_says(copy: Checkpoints) -> None:
    """transformers ties embedding and head only where they are equal or one is missing."""
    folder = copy("llama_a")
    change_config(folder, tie_word_embeddings=True)
    assert np.abs(logits(folder, "llama_a") - tiny.load_golden("llama_a").logits).max() < 2e-4


@pytest.mark.parametrize("case", ["llama_b", "qwen3_a"])
def test_a_head_alone_serves_as_embedding_and_an_equal_one_changes_nothing(copy: Checkpoints, case: str) -> None:
    folder = copy(case)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    both = logits(folder, case)
    change_tensors(folder, lambda t: t.pop("model.embed_tokens.weight"))
    alone = logits(folder, case)
    for got in (both, alone):
        assert np.abs(got - tiny.load_golden(case).logits).max() < 2e-4


def test_a_tensor_under_two_names_is_refused(copy: Checkpoints) -> None:
    folder = copy("v4_a")
    change_tensors(folder, lambda t: t.update({"embed.weight": t["model.embed_tokens.weight"] + 1}))
    assert "tensor model.embed_tokens.weight is not part of" in refused(folder)


def test_tables_that_old_versions_saved_are_left_alone(folder: Path, copy: Checkpoints) -> None:
    names = (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.masked_bias",
        "rotary_emb.inv_freq",
    )
    for case in ("mixtral_a", "qwen3_moe_a", "v3_a", "v4_a"):
        where = copy(case) if case != "mixtral_a" else folder
        change_tensors(where, lambda t: t.update(dict.fromkeys(names, np.ones(4, np.float32))))
        describe(where)


def fuse(tensors: dict[str, np.ndarray]) -> None:
    """What other programs do: q, k and v in one tensor, gate and up in one."""
    for together, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
        for first in [n for n in tensors if f".{together.split('.')[0]}.{parts[0]}_proj." in n]:
            prefix, kind = first.split(f".{together.split('.')[0]}.")[0], first.rpartition(".")[2]
            stored = [tensors.pop(f"{prefix}.{together.split('.')[0]}.{part}_proj.{kind}") for part in parts]
            tensors[f"{prefix}.{together}.{kind}"] = np.concatenate(stored)


@pytest.mark.parametrize("case", ["llama_b", "qwen3_a", "qwen3_moe_b"])
def test_fused_projections_are_the_same_model(copy: Checkpoints, tmp_path: Path, case: str) -> None:
    folder = copy(case)
    apart = logits(folder, case)
    change_tensors(folder, fuse)
    assert any("qkv_proj.weight" in name for name in load_file(folder / "model.safetensors"))
    np.testing.assert_array_equal(logits(folder, case), apart)
    described = describe(folder)
    convert(described.checkpoint, described.weights(), tmp_path / "out", "native", Folder(folder, "source"))
    np.testing.assert_array_equal(logits(tmp_path / "out", case), apart)


def test_fp8_is_read_under_the_keys_that_others_write(copy: Checkpoints) -> None:
    folder = copy("v3_fp8")
    table = {"quant_method": "fp8", "fmt": "float8_e4m3fn", "weight_block_size": [128, 128], "dequantize": False}
    change_config(folder, quantization_config=table | {"ignored_layers": ["gate"], "modules_to_convert": None})
    assert np.abs(logits(folder, "v3_fp8") - tiny.load_golden("v3_fp8").logits).max() < 2e-4


def test_drafting_layers_are_known_under_both_names_and_by_default(copy: Checkpoints) -> None:
    folder = copy("v3_fp8")
    change_config(folder, num_nextn_predict_layers=None, num_mtp_layers=1)
    describe(folder)
    change_config(folder, num_mtp_layers=0)
    assert "is not part of deepseek_v3 as config.json describes it" in refused(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["num_mtp_layers"], config["num_nextn_predict_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    describe(folder)


SIDE = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A16_AWQ", "group_size": 16}}


def test_a_quantization_named_in_a_file_beside_the_config_is_refused(folder: Path) -> None:
    (folder / "hf_quant_config.json").write_text(json.dumps(SIDE))
    assert 'hf_quant_config.json.quantization: quantization "ModelOpt W4A16_AWQ" is not supported' in refused(folder)
    config = json.loads((folder / "config.json").read_text())
    remote = SimpleNamespace(
        repo_id="some/model",
        files={"hf_quant_config.json": None},
        config=lambda: config,
        read=lambda name: json.dumps(SIDE).encode(),
    )
    with pytest.raises(InputError, match=r'hf_quant_config\.json.*: quantization "ModelOpt W4'):
        describe_repository(remote)


@pytest.mark.parametrize(
    ("name", "kind"), [("q_proj.qweight", "GPTQ or AWQ"), ("q_proj.weight_packed", "compressed-tensors"),
                       ("q_proj.weight_scale", "FP8 or int8"), ("q_proj.biases", "MLX")]
)  # fmt: skip
def test_tensors_of_a_quantization_that_the_config_hides_are_named(folder: Path, name: str, kind: str) -> None:
    change_tensors(folder, lambda t: t.update({f"model.layers.0.self_attn.{name}": np.ones(3, np.float32)}))
    message = refused(folder)
    assert name in message and f'quantization "{kind}' in message


def test_unknown_quantization_is_refused(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "exl3", "bits": 4})
    assert 'quantization "EXL3 4-bit" is not' in refused(folder)
    change_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [0, 128]})
    assert 'weight_block_size" must be' in refused(folder)


def test_a_shape_that_contradicts_the_config_is_refused(folder: Path) -> None:
    change_config(folder, intermediate_size=json.loads((folder / "config.json").read_text())["intermediate_size"] + 8)
    message = refused(folder)
    assert "has shape" in message
    assert "config.json says" in message


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))
    assert "tensor model.norm.weight is missing" in refused(folder)


def test_a_tensor_without_a_place_is_refused(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(3, np.float32)}))
    assert "tensor model.layers.0.self_attn.q_proj.bias is not part of mixtral" in refused(folder)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_nan_weights_are_refused(folder: Path, name: str) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].flat[5] = np.nan

    change_tensors(folder, spoil)
    message = refused(folder)
    assert name in message
    assert "NaN" in message


def test_damaged_files_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert "model.safetensors" in refused(folder)
    file.write_bytes((2**40).to_bytes(8, "little") + whole[8:])
    assert "model.safetensors" in refused(folder)


def test_a_missing_shard_is_named(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("v4_released"), tmp_path / "model"))
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused(folder)


def test_hash_tables_must_name_existing_experts(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("v4_a"), tmp_path / "model"))
    name = next(n for n in load_file(folder / "model.safetensors") if n.endswith("tid2eid"))

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name] + 8

    change_tensors(folder, spoil)
    assert f"tensor {name} names expert" in refused(folder)


def test_experts_in_a_stack_and_one_by_one_are_the_same_model(checkpoint: Checkpoints, folder: Path) -> None:
    ids = tiny.load_golden("mixtral_a").ids
    apart = load(folder).session(256).feed(ids)
    experts = json.loads((folder / "config.json").read_text())["num_local_experts"]

    change_tensors(folder, lambda tensors: stack_experts(tensors, experts))
    np.testing.assert_array_equal(load(folder).session(256).feed(ids), apart)
    change_config(folder, num_local_experts=experts - 1)
    assert "config.json says" in refused(folder)


def test_a_dense_model_cut_into_equal_experts_is_the_same_model(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Each FFN cut into slices that are all chosen with equal weight, `down` scaled by their number: sum = dense."""
    source, folder = checkpoint("llama_a"), tmp_path / "cut"
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    slices = next(n for n in (8, 6, 5, 4, 3, 2) if config["intermediate_size"] % n == 0)
    width = config["intermediate_size"] // slices
    config |= {
        "model_type": "mixtral",
        "num_local_experts": slices,
        "num_experts_per_tok": slices,
        "intermediate_size": width,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        mlp, moe = f"model.layers.{layer}.mlp", f"model.layers.{layer}.block_sparse_moe"
        gate, up, down = (tensors.pop(f"{mlp}.{n}_proj.weight") for n in ("gate", "up", "down"))
        tensors[f"{moe}.gate.weight"] = np.zeros((slices, config["hidden_size"]), np.float32)
        for e in range(slices):
            part = slice(e * width, (e + 1) * width)
            tensors[f"{moe}.experts.{e}.w1.weight"] = gate[part]
            tensors[f"{moe}.experts.{e}.w3.weight"] = up[part]
            tensors[f"{moe}.experts.{e}.w2.weight"] = np.ascontiguousarray(down[:, part] * slices)
    save_file(tensors, folder / "model.safetensors")
    golden = tiny.load_golden("llama_a")
    assert np.abs(load(folder).session(256).feed(golden.ids) - golden.logits).max() < 2e-4


@pytest.mark.parametrize("case", tiny.cases())
def test_planned_weight_bytes_are_those_in_memory(model: Models, case: str) -> None:
    loaded = model(case)
    assert loaded.plan().weight_bytes + loaded.wide_bytes == loaded.stats()["weight_bytes"]


def test_describing_reads_no_weights(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """A folder whose data is all NaN can be described, and not loaded."""
    folder = Path(shutil.copytree(checkpoint("llama_a"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    nan = {n: ("F32", t.shape, np.full(t.shape, np.nan, "<f4").tobytes()) for n, t in tensors.items()}
    write_safetensors(folder / "model.safetensors", nan)
    described = describe(folder)
    assert described.plan().parameters == sum(t.size for t in tensors.values())
    assert "NaN" in refused(folder)


def test_models_that_exceed_the_memory_allowed_are_refused(checkpoint: Checkpoints) -> None:
    with pytest.raises(InputError, match=r"needs .* of memory and 10 kB are allowed; raise `ram`"):
        load(checkpoint("llama_a"), ram="10kB")
    loaded = load(checkpoint("llama_a"), ram=describe(checkpoint("llama_a")).plan(64).total_bytes)
    loaded.session(64)
    with pytest.raises(InputError, match="a context of 128 tokens needs"):
        loaded.session(128)


@pytest.mark.parametrize("amount", ["", "much", "-3GB", "0", "3 parsecs", "1e9"])
def test_amounts_of_memory_that_are_none_are_refused(checkpoint: Checkpoints, amount: str) -> None:
    with pytest.raises(InputError, match="write it like 16GB"):
        load(checkpoint("llama_a"), ram=amount)


def test_a_matrix_as_it_is_stored_goes_when_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise loading takes the largest one's bytes more than the model does."""
    module = sys.modules["numoe.engine.load"]
    hold = module.hold
    stayed = []

    def watched(matrix: QTensor, **choices: bool) -> QTensor:
        stored = weakref.ref(matrix)
        held = hold(matrix, **choices)
        del matrix
        stayed.append(stored() is not None)
        return held

    monkeypatch.setattr(module, "hold", watched)
    load("tiny")
    assert stayed
    assert not any(stayed)


def test_loading_tells_how_far_it_is() -> None:
    told: list[tuple[int, int]] = []
    total = load("tiny", progress=lambda done, total: told.append((done, total))).plan().weight_bytes
    assert told == sorted(told) and len(told) > 20 and {of for _, of in told} == {total}
    assert 0.9 * total < told[-1][0] <= total
