"""Folders that are made of GGUF files: the same model, in the formats of a recipe."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from ggml_blocks import HALVES, random_blocks, reference
from gguf_files import write_gguf
from machines import a_machine, keep
from test_gguf_models import ARCHITECTURES
from test_gguf_types import LAYERS, MIXED, PLAN, logits, weights, write

from numoe.engine import InputError, describe, load
from numoe.engine.verify import verify
from numoe.quant.convert.convert import Conversion, Folder, GgufFile, convert
from numoe.quant.convert.recipe import target
from numoe.quant.stored.checkpoint import open_checkpoint
from numoe.quant.stored.gguf_sets import HEADER

Checkpoints = Callable[[str], Path]
Run = Callable[..., tuple[int, str, str]]
IDS = list(range(1, 40))


def made(source: Path, destination: Path, quant: str, **options: Any) -> Conversion:
    description = describe(source)
    origin = (Folder if source.is_dir() else GgufFile)(source, source.name)
    with description.checkpoint as checkpoint:
        return convert(checkpoint, description.weights(), destination, quant, origin, **options)


def written(checkpoint: Checkpoints, case: str, path: Path, *arguments: Any, **more: Any) -> Path:
    config = tiny.load_golden(case).config
    architecture = ARCHITECTURES.get(config["model_type"], "llama")
    return write_gguf(checkpoint(case), config, path, architecture, *arguments, **more)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def fed(path: Path) -> np.ndarray:
    return load(path, threads=1).session(64).feed(IDS)


@pytest.mark.parametrize(
    "case",
    ["llama_a", "mixtral_a", "gpt_oss_a", "qwen3_5_moe_a", "gemma4_a", "granitemoehybrid_b", "nemotron_h_a",
     "lfm2_moe_a", "phimoe_b", "qwen4_exp_b", "deepseek_v32_a", "kimi_linear_a"],
)  # fmt: skip
def test_it_is_the_model_that_the_file_is(case: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = written(checkpoint, case, tmp_path / "model.gguf")
    made(source, tmp_path / "native", "native")
    np.testing.assert_array_equal(fed(tmp_path / "native"), fed(source))
    assert verify(tmp_path / "native").whole
    if case in ("deepseek_v32_a", "kimi_linear_a"):  # whose converters turn a matrix, whose groups are others then
        return
    made(source, tmp_path / "int4", "int4")
    made(checkpoint(case), tmp_path / "of-safetensors", "int4")
    np.testing.assert_allclose(fed(tmp_path / "int4"), fed(tmp_path / "of-safetensors"), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "types", [*({"": dtype} for dtype in HALVES), MIXED], ids=lambda types: "-".join(types.values())
)
def test_blocks_stay_what_they_are(types: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "blocks.gguf", weights(types))
    found = made(source, tmp_path / "native", "native")
    planned = describe(tmp_path / "native").plan(16)
    assert planned.sizes == describe(source).plan(16).sizes
    assert found.result_bytes == planned.disk_bytes
    if "NVFP4" not in types.values():  # of which each row has its factor beside it then
        assert found.result_bytes == found.source_bytes
    whole = logits(source, 1 << 30)[0]
    monkeypatch.setattr(PLAN, "scratch_bytes", lambda spec: 0)
    few, streaming = logits(
        tmp_path / "native", describe(source).plan(16).total_bytes - 1, planned.expert_bytes // LAYERS
    )
    np.testing.assert_array_equal(few, whole)
    assert not streaming.complete
    made(tmp_path / "native", tmp_path / "again", "native")
    first, second = tree(tmp_path / "native"), tree(tmp_path / "again")
    assert {name for name in first if first[name] != second[name]} == {"numoe.json"}


@pytest.mark.parametrize("quant", ["int4", "experts=int4", "int8,attention=native"])
def test_only_what_has_more_bits_is_rounded(quant: str, tmp_path: Path) -> None:
    types = {"": "Q6_K", "ffn_gate_exps": "Q4_K", "ffn_up_exps": "Q5_0", "ffn_down_exps": "Q8_0"}
    source = write(tmp_path / "blocks.gguf", weights(types))
    priced = describe(source).plan(16, quant)
    found = made(source, tmp_path / "out", quant)
    before, after = describe(source), describe(tmp_path / "out")
    kept = 0
    for name, tensor in before.spec.tensors().items():
        if tensor.held == "array":
            continue
        one, other = before.places[name].stored, after.places[name].stored
        wanted = target(quant, tensor.role, tensor.shape[1], 8 * one.nbytes / tensor.size)
        values = one.matrix().dequantize()
        kept += wanted is None and ".experts." in name
        expected = values if wanted is None else wanted.pack(values).dequantize()
        np.testing.assert_array_equal(other.matrix().dequantize(), expected, err_msg=name)
    assert kept or "int8" in quant
    assert priced.sizes == after.plan(16).sizes and priced.disk_bytes == found.result_bytes
    assert np.isfinite(fed(tmp_path / "out")).all()


@pytest.mark.parametrize("dtype", ["Q4_K", "Q8_0", "MXFP4", "NVFP4", "IQ2_XXS"])
def test_what_is_no_part_of_the_model_is_kept(dtype: str, tmp_path: Path) -> None:
    made_of = {"mtp.0.matrix": (64, 256), "mtp.0.odd": (3, 256), "mtp.0.stack": (3, 5, 256)}
    beside = {name: (dtype, random_blocks(dtype, *shape)) for name, shape in made_of.items()}
    source = write(tmp_path / "model.gguf", weights({"": "Q8_0"}) | beside)
    made(source, tmp_path / "out", "int4")
    made(tmp_path / "out", tmp_path / "again", "int4")
    for folder in ("out", "again"):
        with open_checkpoint(tmp_path / folder) as opened:
            for name, (_, raw) in beside.items():
                np.testing.assert_array_equal(opened[f"{name}.weight"].array(), reference(raw, dtype))
    assert describe(tmp_path / "out").aside.keys() == describe(source).aside.keys()


def test_a_stopped_one_goes_on(checkpoint: Checkpoints, tmp_path: Path) -> None:
    written(checkpoint, "qwen3_moe_b", tmp_path / "model.gguf", split=20)
    source = tmp_path / "model-00001-of-00003.gguf"
    written(checkpoint, "qwen3_moe_b", tmp_path / "whole.gguf")

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(source, tmp_path / "out", "int4", progress=stop)
    first = tmp_path / "out.part" / "model-00001-of-00003.safetensors"
    written_at = first.stat().st_mtime_ns
    made(source, tmp_path / "out", "int4")
    assert (tmp_path / "out" / first.name).stat().st_mtime_ns == written_at
    made(source, tmp_path / "at-once", "int4")
    assert tree(tmp_path / "out") == tree(tmp_path / "at-once")
    assert verify(tmp_path / "out").whole
    made(tmp_path / "whole.gguf", tmp_path / "of-one", "int4")
    np.testing.assert_array_equal(fed(tmp_path / "out"), fed(tmp_path / "of-one"))

    with pytest.raises(KeyboardInterrupt):
        made(source, tmp_path / "other", "int4", progress=stop)
    source.with_name("model-00003-of-00003.gguf").touch()  # it may be another file now
    with pytest.raises(InputError, match=r"holds an unfinished conversion to int4 of .* at revision"):
        made(source, tmp_path / "other", "int4")
    source.with_name("model-00002-of-00003.gguf").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00003\.gguf"):
        made(source, tmp_path / "third", "int4")


WORDS = [*(chr(c) for c in range(33, 127)), "AB", "end"]


def test_a_folder_has_all_that_the_file_has(
    checkpoint: Checkpoints, tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    keep(replace(a_machine(), read_bytes_per_s={str(1 << power): 1e9 for power in range(12, 25)}))
    size = tiny.load_golden("qwen3_moe_b").config["vocab_size"]
    vocabulary = [*WORDS[: size - 2], *WORDS[-2:]]
    said = {"tokenizer.chat_template": "{{ messages[0].content }}", "general.license": "apache-2.0"}
    source = written(checkpoint, "qwen3_moe_b", tmp_path / "model.gguf", vocabulary=vocabulary, **said)
    folder = tmp_path / "folder"
    (tmp_path / "README.md").write_text("of something else")
    code, _, err = command("quantize", str(source), str(folder), "--quant", "experts=int4")
    assert code == 0 and "of weights became" in err
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "numoe.json", HEADER}
    native = tmp_path / "native"
    assert command("quantize", str(source), str(native), "--quant", "native")[0] == 0
    run = ("run", "-q", "-n", "8", "--temp", "0")
    assert command(*run, str(native), "ABBA")[1] == command(*run, str(source), "ABBA")[1] != ""
    assert command("verify", str(folder))[0] == 0
    shown = [json.loads(command("show", str(path), "--json")[1]) for path in (source, native)]
    for key in ("family", "vocab", "parameters", "context", "tokenizer", "chat_format", "license"):
        assert shown[0][key] == shown[1][key], key
    assert shown[0]["license"] == "apache-2.0" and shown[0]["chat_format"]
    priced = json.loads(command("fit", str(source), "--quant", "experts=int4", "--json")[1])["formats"]
    assert priced.keys() == {"native", "experts=int4"}
    fit = json.loads(command("fit", str(folder), "--json")[1])["formats"]
    assert fit == {"experts=int4": priced["experts=int4"]}
    assert command("quantize", str(folder), str(tmp_path / "twice"), "--quant", "int4")[0] == 0
    assert command(*run, str(tmp_path / "twice"), "ABBA")[0] == 0


def test_a_damaged_header_is_told_of(checkpoint: Checkpoints, tmp_path: Path) -> None:
    made(written(checkpoint, "mixtral_a", tmp_path / "model.gguf"), tmp_path / "out", "native")
    header = tmp_path / "out" / HEADER
    whole = header.read_bytes()
    for data, message in (
        (whole[:200], "is not a sound GGUF file: its header ends too soon"),
        (b"", "does not begin with GGUF"),
        (b"GGUF", "ends too soon"),
        (b"x" * 400, "does not begin with GGUF"),
        (whole.replace(b"llama.block_count", b"llama.block_spent"), 'no key "llama.block_count"'),
        (whole.replace(b"blk.0.attn_q.weight", b"blk.0.attn_q.waigth"), None),
    ):
        header.write_bytes(data)
        if message is None:
            np.testing.assert_array_equal(fed(tmp_path / "out"), fed(tmp_path / "model.gguf"))
            continue
        with pytest.raises(InputError, match=message):
            describe(tmp_path / "out")
    with pytest.raises(InputError, match=HEADER):
        describe(tmp_path / "out", check=True)
    header.unlink()
    with pytest.raises(InputError, match=r"has no config\.json"):
        describe(tmp_path / "out")


def test_rope_divisors_come_along(checkpoint: Checkpoints, tmp_path: Path) -> None:
    config = tiny.load_golden("llama_a").config
    pairs = (config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]) // 2
    divisors = {"rope_freqs.weight": np.linspace(1, 8, pairs, dtype=np.float32)}
    source = written(checkpoint, "llama_a", tmp_path / "model.gguf", divisors, **{"rope.scaling.type": None,
                     "rope.scaling.factor": None, "rope.scaling.original_context_length": None})  # fmt: skip
    made(source, tmp_path / "out", "native")
    np.testing.assert_array_equal(fed(tmp_path / "out"), fed(source))
