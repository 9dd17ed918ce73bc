"""Real configs become the right architecture; what is not understood is refused by name."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from helpers import dequantized
from safetensors.numpy import load_file, save_file

from numoe.engine import InputError, describe, families, load
from numoe.engine.families import family, family_of, found
from numoe.engine.families.harmless import HARMLESS
from numoe.engine.layers.attention.compressed import CompressedAttention
from numoe.engine.layers.mixture import MixtureOfExperts
from numoe.engine.layers.rope import frequencies
from numoe.engine.layers.spec import ModelSpec
from numoe.engine.plan import plan
from numoe.quant.convert.convert import Folder, convert
from numoe.quant.formats.plain import BF16
from numoe.quant.stored.quantization import read_quantization

CONFIGS = Path(__file__).parents[1] / "configs"
DEFAULTS = json.loads((tiny.GOLDEN / "defaults.json").read_text())


def config(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def spec(values: dict[str, Any]) -> ModelSpec:
    return family_of(values).spec(values)


# Parameters as the model cards give them, all and active (V4: without the multi-token prediction layers). Cards differ
# in what they count as active: what a token's computation touches; with the whole embedding (+), or without what we
# count of embedding and head (-).
@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("deepseek-ai__DeepSeek-V4-Flash", "284B", "13B"),
        ("deepseek-ai__DeepSeek-V4-Pro", "1.6T", "49B"),
        ("deepseek-ai__DeepSeek-V3", "671B", "37B"),
        ("deepseek-ai__DeepSeek-R1", "671B", "37B"),
        ("deepseek-ai__DeepSeek-V2-Lite", "15.7B", "2.4B"),
        ("Qwen__Qwen3-30B-A3B", "30.5B", "3.3B+"),
        ("Qwen__Qwen3.6-35B-A3B", "35B", "3B"),
        ("zai-org__GLM-4.7-Flash", "30B", "3.6B"),
        ("openai__gpt-oss-20b", "20.9B", "3.6B"),
        ("openai__gpt-oss-120b", "116.8B", "5.1B"),
        ("mistralai__Mixtral-8x7B-v0.1", "46.7B", "12.9B+"),
        ("google__gemma-4-26B-A4B", "25.2B", "3.8B"),
        ("meta-llama__Llama-4-Scout-17B-16E-Instruct", "108B", "17B+"),  # 109B with its vision tower
        ("nvidia__NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "31.6B", "3.2B"),
        ("nvidia__NVIDIA-Nemotron-3-Super-120B-A12B-BF16", "120.6B", "12.7B+"),
        ("nvidia__Nemotron-H-56B-Base-8K", "56B", "56B+"),
        ("ibm-granite__granite-3.1-1b-a400m-instruct", "1.3B", "0.4B"),
        ("ibm-granite__granite-3.1-3b-a800m-instruct", "3.3B", "0.8B-"),
        ("ibm-granite__granite-4.0-h-tiny", "7B", "1B-"),
        ("Qwen__Qwen3-Next-80B-A3B-Instruct", "80B", "3B-"),
        ("deepseek-ai__DeepSeek-V3.2", "671B", "37B"),
        ("zai-org__GLM-5", "744B", "40B"),
        ("zai-org__GLM-5.2", "744B", "40B"),
        ("moonshotai__Kimi-Linear-48B-A3B-Instruct", "49.1B", "3B"),
        ("moonshotai__Kimi-K2-Instruct", "1.03T", "32B"),
        ("moonshotai__Kimi-K2.5", "1.03T", "32B"),
        ("MiniMaxAI__MiniMax-M2.7", "229B", "10B"),
        ("Qwen__Qwen3-VL-30B-A3B-Instruct", "30.5B", "3.3B+"),
        ("Qwen__Qwen3-VL-2B-Instruct", "1.7B", "1.7B"),
        ("XiaomiMiMo__MiMo-V2-Flash", "309B", "15B"),
        ("allenai__OLMoE-1B-7B-0924", "6.9B", "1.3B+"),
        ("zai-org__GLM-4.5", "355B", "32B-"),
        ("zai-org__GLM-4.5-Air", "106B", "12B-"),
        ("CohereLabs__North-Mini-Code-1.0", "30.5B", "3B"),
        ("LiquidAI__LFM2-8B-A1B", "8.3B", "1.5B"),
        ("google__gemma-3-27b-it", "27.0B", "27.0B"),  # 27.4B with its vision tower
        ("google__gemma-3-1b-it", "1.0B", "1.0B"),
        ("rednote-hilab__dots.llm1.inst", "142B", "14B+"),
        ("arcee-ai__Trinity-Mini", "26B", "3B"),
        ("inclusionAI__Ling-mini-2.0", "16B", "1.4B+"),
        ("tencent__Hunyuan-A13B-Instruct", "80B", "13B"),
        ("Qwen__Qwen2.5-7B", "7.61B", "7.61B+"),
        ("Qwen__Qwen3-8B", "8.2B", "8.2B+"),
        ("meta-llama__Llama-3.1-8B", "8.03B", "8.03B+"),
        ("LGAI-EXAONE__EXAONE-4.0-32B", "32B", "32B+"),
        ("LGAI-EXAONE__K-EXAONE-236B-A23B", "236B", "23B"),
        ("allenai__Olmo-3-1025-7B", "7B", "7B+"),
        ("ibm-granite__granite-4.1-3b-base", "3B", "3B"),
    ],
)
def test_real_configs_have_their_cards_parameter_counts(name: str, total: str, active: str) -> None:
    model = spec(config(name))
    assert_counts(model, total, active)


# Of families whose released config.json is not here, transformers' defaults are the model's named there.
@pytest.mark.parametrize(
    ("model_type", "total", "active"),
    [
        ("bailing_hybrid", "124B", "5.1B"),
        ("ernie4_5_moe", "21.8B", "3.3B"),
        ("flint", "40B", "2.5B"),
        ("glm4", "9.4B", "9.4B+"),
        ("hy_v3", "295B", "21B+"),
        ("laguna", "33B", "2.6B"),
        ("mellum", "12B", "2.4B+"),
        ("mistral", "7.24B", "7.24B+"),
        ("mistral4", "119B", "6B"),
        ("phi3", "3.8B", "3.8B+"),
        ("phimoe", "41.9B", "6.6B+"),
        ("qwen2_moe", "14.3B", "2.7B+"),
        ("smollm3", "3.08B", "3.08B"),
        ("solar_open", "102.6B", "12B+"),
    ],
)
def test_default_configs_have_their_models_parameter_counts(model_type: str, total: str, active: str) -> None:
    model = spec({"model_type": model_type} | DEFAULTS[model_type])
    planned = plan(model, dict.fromkeys(model.tensors(), BF16.format), 1)
    assert_published(planned.parameters, total)
    assert_published(planned.active_parameters + (active[-1] == "+") * model.vocab * model.hidden, active.rstrip("+"))


def assert_counts(model: ModelSpec, total: str, active: str) -> None:
    """The parameters of a model, and those of a token: + or - behind where the card counts the embedding or not."""
    planned = plan(model, dict.fromkeys(model.tensors(), BF16.format), 1)
    assert_published(planned.parameters, total)
    embedding = {"+": 1, "-": -1}.get(active[-1], 0) * model.vocab * model.hidden
    assert_published(planned.active_parameters + embedding, active.rstrip("+-"))


def assert_published(count: int, told: str) -> None:
    """Within one percent of what is published, which is rounded."""
    digits, unit = told[:-1], {"T": 1e12, "B": 1e9}[told[-1]]
    half = 0.5 * 10.0 ** -len(digits.partition(".")[2])
    assert abs(count / unit - float(digits)) <= half + 0.01 * float(digits), count


def test_v4_flash_layers_are_of_the_released_kinds() -> None:
    layers = spec(config("deepseek-ai__DeepSeek-V4-Flash")).layers
    ratios, hashed = [], []
    for attention, ffn in (tuple(block.kind for block in layer) for layer in layers):
        assert isinstance(attention, CompressedAttention)
        assert isinstance(ffn, MixtureOfExperts)
        ratios.append(attention.compressor.ratio if attention.compressor else 0)
        hashed.append(ffn.router.hash_vocab > 0)
        assert (attention.indexer is not None) == (ratios[-1] == 4)
        assert attention.rope.theta == (10000 if ratios[-1] == 0 else 160000)
        assert (attention.rope.scaling is None) == (ratios[-1] == 0)
    assert ratios == [0, 0] + [4, 128] * 20 + [4]
    assert hashed == [True] * 3 + [False] * 40


def test_granite_4_tiny_is_mamba_and_attention_without_rope() -> None:
    model = spec(config("ibm-granite__granite-4.0-h-tiny"))
    mixers = [layer[0].kind for layer in model.layers]
    assert [mixer.label for mixer in mixers].count("Mamba-2") == 36
    assert [mixers[i].rope for i in (5, 15, 25, 35)] == [None] * 4
    without = config("ibm-granite__granite-4.0-h-tiny") | {"layer_types": ["linear_attention"] * 40}
    assert {layer[0].kind.label for layer in spec(without).layers} == {"Mamba-2"}
    assert sum(tensor.size for tensor in model.tensors().values()) == pytest.approx(6.94e9, rel=1e-3)


def test_a_dated_release_with_drafting_keys_is_the_same_model() -> None:
    assert spec(config("deepseek-ai__DeepSeek-V4-Flash-0731")) == spec(config("deepseek-ai__DeepSeek-V4-Flash"))


def test_v4_flash_cache_of_a_long_context_grows_as_the_architecture_promises() -> None:
    model = spec(config("deepseek-ai__DeepSeek-V4-Flash"))
    stored = dict.fromkeys(model.tensors(), BF16.format)
    per_token = (plan(model, stored, 1_048_576).kv_bytes - plan(model, stored, 131_072).kv_bytes) / (
        1_048_576 - 131_072
    )
    # 21 sparse layers with (512 + 128) / 4 values a token and 20 heavy ones with 512 / 128, in float32.
    assert per_token == pytest.approx(4 * (21 * 640 / 4 + 20 * 512 / 128), rel=1e-3)


def test_unknown_model_types_are_named_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r'"gemma5" is not supported yet; known are .*deepseek_v2, .*qwen3_moe'):
        spec({"model_type": "gemma5"})
    with pytest.raises(InputError, match='"None" is not supported'):
        spec({})
    for kind in (["mistral3"], {"mistral3": 1}, 3):  # also beside a decoder's
        with pytest.raises(InputError, match="is not supported yet"):
            spec({"model_type": kind, "text_config": {"model_type": "mistral4"}})


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("deepseek-ai__DeepSeek-V4-Flash", {"engram_table": 3}, '"engram_table" is not understood'),
        ("deepseek-ai__DeepSeek-V4-Flash", {"hidden_act": "gelu"}, "\"hidden_act\" is 'gelu'"),
        (
            "deepseek-ai__DeepSeek-V4-Flash",
            {"compress_ratios": [0, 0, 16] * 20},
            "has 16, and only 0, 4, 128",
        ),
        ("deepseek-ai__DeepSeek-V4-Flash", {"compress_ratios": [0] * 42}, "about 42 layers, but has to be about 43"),
        ("deepseek-ai__DeepSeek-V4-Flash", {"head_dim": None}, '"head_dim" is null'),
        ("deepseek-ai__DeepSeek-V4-Flash", {"qk_rope_head_dim": 63}, '"qk_rope_head_dim" must be even'),
        ("deepseek-ai__DeepSeek-V4-Flash", {"o_groups": 7}, '"o_groups" 7 does not divide'),
        ("deepseek-ai__DeepSeek-V4-Flash", {"n_shared_experts": 2}, '"n_shared_experts" is 2'),
        (
            "deepseek-ai__DeepSeek-V4-Flash",
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            "rope_type\" is 'dynamic'",
        ),
        ("deepseek-ai__DeepSeek-V3", {"n_group": 7}, '"n_group" 7'),
        ("deepseek-ai__DeepSeek-V3", {"scoring_func": "softmax"}, "\"scoring_func\" is 'softmax'"),
        (
            "deepseek-ai__DeepSeek-V3",
            {"rope_scaling": {"type": "yarn", "factor": 4, "warmth": 1}},
            'scaling.warmth"',
        ),
        ("deepseek-ai__DeepSeek-V2-Lite", {"topk_method": "lottery"}, "'greedy' or 'group_limited_greedy'"),
        ("Qwen__Qwen3-30B-A3B", {"num_attention_heads": 33}, "33 attention heads cannot share 4"),
        ("Qwen__Qwen3-30B-A3B", {"vocab_size": -1}, '"vocab_size" must be a positive integer'),
        ("Qwen__Qwen3-30B-A3B", {"rms_norm_eps": "small"}, '"rms_norm_eps" must be a positive number'),
        ("Qwen__Qwen3-30B-A3B", {"rms_norm_eps": 1e20}, r'"rms_norm_eps" is 1e\+20, and only 0 to 1 makes sense'),
        ("Qwen__Qwen3-30B-A3B", {"rope_theta": 1}, r'"rope_theta" is 1, and only 2 to 1e\+15 makes sense'),
        ("Qwen__Qwen3-30B-A3B", {"tie_word_embeddings": "no"}, '"tie_word_embeddings" must be true or false, not'),
        (
            "nvidia__NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
            {"hybrid_override_pattern": "MEX" + 49 * "M"},
            "\"hybrid_override_pattern\" has 'X', and only",
        ),
        (
            "nvidia__NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
            {"layers_block_type": ["mamba"] * 3},
            '"layers_block_type" is about 3 layers, but has to be about 52',
        ),
        ("nvidia__NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", {"hybrid_override_pattern": None}, 'block_type" is missing'),
        ("nvidia__NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", {"n_groups": 7}, '"n_groups" is 7, which does not divide 64'),
        ("nvidia__NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", {"conv_kernel": 1}, '"conv_kernel" is 1, and only 2 and more'),
        ("nvidia__NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", {"mlp_hidden_act": "silu"}, "\"mlp_hidden_act\" is 'silu'"),
        ("nvidia__NVIDIA-Nemotron-3-Super-120B-A12B-BF16", {"mlp_bias": True}, '"mlp_bias" is true, and projections'),
        ("ibm-granite__granite-4.0-h-tiny", {"mamba_n_heads": 47}, '"mamba_n_heads" is 47, which 3072 channels'),
        ("ibm-granite__granite-4.0-h-tiny", {"position_embedding_type": "alibi"}, "is 'alibi', and only 'rope' and"),
        ("ibm-granite__granite-4.0-h-tiny", {"time_step_limit": [0.1]}, '"time_step_limit" must be two numbers'),
        ("ibm-granite__granite-3.1-1b-a400m-instruct", {"logits_scaling": 0}, '"logits_scaling" must be a positive'),
        ("mistralai__Mixtral-8x7B-v0.1", {"partial_rotary_factor": 0.5}, '"partial_rotary_factor" is 0.5, and only 1'),
    ],
)
def test_what_a_family_does_not_compute_is_refused_by_name(name: str, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        spec(config(name) | change)


def outcome(values: dict[str, Any]) -> ModelSpec | str:
    """The spec of a config, or why it is refused."""
    try:
        return spec(values)
    except InputError as error:
        return str(error)


SMALL = {tiny.load_golden(case).config["model_type"]: case for case in reversed(tiny.cases())}
DECODERS = list(SMALL)


def test_every_family_has_a_golden_case() -> None:
    assert all(SMALL.keys() & set(family.model_types) for family in found().values())


@pytest.mark.parametrize("model_type", DECODERS)
def test_keys_left_out_mean_what_transformers_takes_for_them(model_type: str) -> None:
    """Leaving a key out is the same as writing the family's default, or is refused because the key is needed."""
    theirs = DEFAULTS[model_type]
    ours = found()[model_type].defaults
    assert {key: ours[key] for key in ours if key in theirs} == {key: theirs[key] for key in ours if key in theirs}
    base = tiny.load_golden(SMALL[model_type]).config
    base = {k: v for k, v in base.items() if k not in ("rope_parameters", "qk_rope_head_dim", "compress_rates")}
    for key, default in theirs.items():
        if key == "num_key_value_heads" and "kv_lora_rank" in theirs:
            continue  # it says nothing of latent attention
        left_out = {k: v for k, v in base.items() if k != key}
        without = outcome(left_out)
        if without != outcome(left_out | {key: default}):
            assert f'no "{key}"' in str(without)


def test_one_model_waits_for_no_other_family() -> None:
    code = "import sys; from numoe.engine.families import family; family('qwen3_moe'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "numoe.engine.families.qwen3_moe" in loaded and "numoe.engine.families.deepseek_v4" not in loaded


@pytest.mark.parametrize(
    ("case", "change", "reason"),
    [
        ("qwen3_a", {"mlp_bias": True}, '"mlp_bias" is not understood'),
        ("mixtral_a", {"mlp_bias": True}, '"mlp_bias" is not understood'),
        ("mixtral_a", {"attention_bias": True}, '"attention_bias" is not understood'),
        ("qwen3_moe_a", {"qkv_bias": True}, '"qkv_bias" is not understood'),
        ("v2_a", {"mlp_bias": True}, '"mlp_bias" is not understood'),
        ("v3_a", {"attention_bias": True}, '"attention_bias" is not understood'),
        ("v4_a", {"mlp_bias": True}, '"mlp_bias" is not understood'),
        ("qwen3_moe_a", {"use_qk_norm": False}, '"use_qk_norm" is False, and only True'),
        ("llama_a", {"use_qk_norm": True}, '"use_qk_norm" is not understood'),
        ("llama_a", {"rope_interleaved": True}, '"rope_interleaved" is True'),
        ("llama_a", {"is_causal": False}, '"is_causal" is False'),
        ("llama_a", {"per_layer_config": {"0": {"head_dim": 8}}}, '"per_layer_config" is not understood'),
        ("llama_a", {"num_hidden_layers": 10**12}, '"num_hidden_layers" is 1000000000000, more than the 10000'),
        ("mixtral_a", {"num_local_experts": 3 * 10**7}, "30000000 experts in 3 layers are more than any model has"),
        ("mixtral_a", {"num_experts_per_tok": 99}, '"num_experts_per_tok" is 99, more than the experts'),
        ("v3_a", {"topk_group": 99}, '"topk_group" 99'),
        ("v3_a", {"num_key_value_heads": 1}, '"num_key_value_heads" is 1, and only'),
        ("v3_a", {"n_group": None}, '"n_group" is null'),
        ("v4_a", {"hc_sinkhorn_iters": 10**9}, '"hc_sinkhorn_iters" is 1000000000'),
        ("v4_a", {"compress_rates": {"compressed_sparse_attention": 0}}, '"compress_rates" has'),
        ("qwen3_b", {"layer_types": ["full_attention"]}, '"layer_types" is about 1 layers, but has to be about 5'),
        ("llama_a", {"tie_word_embeddings": "no"}, "\"tie_word_embeddings\" must be true or false, not 'no'"),
        ("llama_a", {"rope_parameters": {"rope_type": []}}, '"rope_parameters.rope_type" is \\[\\]'),
        ("llama_a", {"rope_parameters": {"rope_type": "linear", "factor": 0}}, 'parameters.factor" must be a positive'),
        ("llama_a", {"head_dim": 7}, "turn pairs of channels, and heads have 7"),
        ("gemma4_a", {"hidden_size_per_layer_input": 256}, '"hidden_size_per_layer_input" is 256, and only 0'),
        ("gemma4_a", {"num_kv_shared_layers": 2}, '"num_kv_shared_layers" is 2, and only 0'),
        ("gemma4_a", {"use_bidirectional_attention": "all"}, "\"use_bidirectional_attention\" is 'all'"),
        ("gemma4_a", {"per_layer_config": {"7": {}}}, "\"per_layer_config\" has '7', which is no layer"),
        (
            "gemma4_a",
            {"per_layer_config": {"1": {"sliding_window": 3}}},
            r'"per_layer_config\.1\.sliding_window" is not',
        ),
        ("gemma4_a", {"rope_parameters": {"rope_type": "default"}}, "has no table sliding_attention"),
        ("gemma4_a", {"hidden_activation": "gelu"}, "\"hidden_activation\" is 'gelu'"),
        ("phimoe_a", {"num_experts_per_tok": 3}, '"num_experts_per_tok" must be 2'),
        ("phimoe_b", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, 'short_factor" must be 6'),
        ("llama4_a", {"moe_layers": ["x"]}, "\"moe_layers\" has 'x', which is not the number of a layer"),
        ("llama4_a", {"no_rope_layers": [2] * 5}, '"no_rope_layers" has 2, and only 0, 1'),
        ("llama4_a", {"attention_chunk_size": None}, '"attention_chunk_size" must be a positive integer|is null'),
        ("cohere2_moe_a", {"use_parallel_block": False}, '"use_parallel_block" is False, and only True'),
        ("cohere2_moe_a", {"use_qk_norm": True}, '"use_qk_norm" is not understood'),
        ("cohere2_moe_a", {"position_embedding_type": "rope_neox"}, "\"position_embedding_type\" is 'rope_neox'"),
        ("cohere2_moe_a", {"expert_selection_fn": "max"}, "'softmax' or 'sigmoid' is supported"),
        ("cohere2_moe_a", {"shared_expert_combination_strategy": "max"}, "'average' or 'sum' is supported"),
        ("minimax_m2_a", {"qk_norm_type": "per_head"}, "\"qk_norm_type\" is 'per_head'"),
        ("minimax_m2_a", {"attn_type_list": [1, 0, 1]}, '"attn_type_list" has 0, and only 1'),
        ("minimax_m2_a", {"shared_intermediate_size": 8}, '"shared_intermediate_size" is 8, and only 0'),
        ("minimax_m2_b", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "is 1.5, and a head has no more"),
        ("solar_open_a", {"use_qk_norm": True}, '"use_qk_norm" is True, and only False'),
        ("solar_open_a", {"first_k_dense_replace": 2}, '"first_k_dense_replace" is 2, and only 0'),
        ("hy_v3_a", {"route_norm": False}, '"route_norm" is False, and only True'),
        ("hy_v3_a", {"expert_hidden_dim": 9}, '"expert_hidden_dim" is 9, and only 28'),
        ("hunyuan_v1_moe_a", {"use_cla": True}, '"use_cla" is not understood'),
        ("hunyuan_v1_moe_a", {"use_qk_norm": False}, '"use_qk_norm" is False, and only True'),
        ("hunyuan_v1_moe_a", {"moe_topk": [3, 1]}, '"moe_topk" is about 2 layers, but has to be about 3'),
        ("hunyuan_v1_moe_a", {"moe_topk": [3, 9, 1]}, '"moe_topk" is 9, more than the experts'),
        ("hunyuan_v1_moe_a", {"num_shared_expert": [1, 2, 1]}, '"num_shared_expert" has 2, and only 1'),
        ("hunyuan_v1_moe_a", {"rope_parameters": {"rope_type": "dynamic", "alpha": 0}}, 'alpha" must be a positive'),
        ("hunyuan_v1_moe_a", {"rope_parameters": {"rope_type": "dynamic", "factor": 2}}, "rope_type\" is 'dynamic'"),
        ("mimo_v2_flash_a", {"swa_num_key_value_heads": 3}, "8 attention heads cannot share 3"),
        ("mimo_v2_flash_a", {"swa_head_dim": 4}, '"swa_head_dim" is 4, and only 18'),
        ("mimo_v2_flash_a", {"n_shared_experts": 1}, '"n_shared_experts" is 1, and only None'),
        ("mimo_v2_flash_a", {"layer_types": None, "hybrid_layer_pattern": [2] * 7}, "has 2, and only 0, 1"),
        ("smollm3_a", {"layer_types": ["sliding_attention"] * 5}, '"sliding_window" is null, and there are such'),
        ("smollm3_a", {"no_rope_layers": [1, 0]}, '"no_rope_layers" is about 2 layers, but has to be about 5'),
        ("qwen3_vl_moe_a", {"norm_topk_prob": False}, '"norm_topk_prob" is False, and only True'),
        ("qwen3_vl_a", {"use_sliding_window": True}, '"use_sliding_window" is True, and only False'),
        ("bailing_moe_a", {"use_qk_norm": None}, '"use_qk_norm" is not true, and of this family Ling 2.0'),
        ("bailing_moe_a", {"score_function": "softmax"}, "\"score_function\" is 'softmax'"),
        ("bailing_moe_a", {"moe_shared_expert_intermediate_size": 9}, 'size" is 9, and only 28'),
        ("bailing_moe_a", {"norm_head": True}, '"norm_head" is not understood'),
        ("laguna_a", {"gating": False}, '"gating" is False; true,'),
        ("laguna_a", {"gating_types": ["per_element"] * 4}, "\"gating_types\" has 'per_element'"),
        ("laguna_a", {"num_attention_heads_per_layer": [6, 8]}, '"num_attention_heads_per_layer" must be 4'),
        (
            "laguna_a",
            {"moe_apply_router_weight_on_input": True},
            '"moe_apply_router_weight_on_input" is not understood',
        ),
        ("mellum_a", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "has no table sliding_attention"),
        ("afmoe_a", {"score_func": "softmax"}, "\"score_func\" is 'softmax'"),
        ("ernie4_5_moe_a", {"moe_layer_end_index": -2}, '"moe_layer_end_index" must be the number of a layer'),
        ("dots1_a", {"scoring_func": "softmax"}, "\"scoring_func\" is 'softmax'"),
        ("gemma3_a", {"attn_logit_softcapping": 50.0}, '"attn_logit_softcapping" is not understood'),
        ("gemma3_a", {"use_bidirectional_attention": True}, '"use_bidirectional_attention" is not understood'),
        ("qwen4_exp_a", {"eos_token_id": None}, '"eos_token_id" is None, and n-grams begin anew'),
        ("qwen4_exp_a", {"ple_layer_ids": [9]}, '"ple_layer_ids" has 9, and layers are 1 to 4'),
        ("qwen4_exp_a", {"ple_embed_dim": 37}, '"ple_embed_dim" is 37, which 6 heads of n-grams cannot share'),
        ("qwen4_exp_a", {"indexer_head_dim": 6}, '"indexer_head_dim" is 6, and rotary embeddings turn 8'),
        ("qwen4_exp_a", {"indexer_kv_heads": 2}, '"indexer_kv_heads" is 2, and only 1 is supported'),
    ],
)
def test_what_is_of_a_wrong_type_or_size_is_refused_by_name(case: str, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        spec(tiny.load_golden(case).config | change)


ROPES = (
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0}
    | {"attention_factor": 1.0, "beta_fast": 32, "beta_slow": 1, "truncate": True, "partial_rotary_factor": 1.0},
    {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4},
)
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "packing_format": "auto_round"}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
MORE = ("layer_types", "mlp_layer_types", "mlp_only_layers", "compress_ratios", "compress_rates", "num_hash_layers",
        "partial_rotary_factor", "rope_scaling", "quantization", "num_experts", "num_local_experts")  # fmt: skip
ODD = (None, True, False, "x", "", "5", "no", -1, 0, 1, 1.5, 10**12, 10**400, float("nan"), float("inf"), [], {},
       [None], ["x"], {"a": [{}]})  # fmt: skip


def spoilt(config: dict[str, Any], number: int) -> Iterator[dict[str, Any]]:
    """The config with a value of any type in any key. In keys that most families have, and in rope tables, which they
    read by the same functions, with a third of them, which is another one for the next number."""
    counts = Counter(key for case in SMALL.values() for key in tiny.load_golden(case).config)
    shared = {key for key, count in counts.items() if count > len(SMALL) // 2}.union(MORE)
    some = ODD[number % 3 :: 3]
    for key in (*config, *MORE):
        for odd in some if key in shared else ODD:
            yield config | {key: odd}
    for odd in some:
        for rope in ROPES:
            for key in rope:
                block = rope | {key: odd}
                nested = {"main": {"rope_type": "default"}, "compress": block}
                yield config | {"rope_parameters": nested if "hc_mult" in config else block}
                yield config | {"rope_parameters": None, "rope_scaling": block}


@pytest.mark.parametrize("model_type", DECODERS)
def test_any_value_in_any_key_is_read_or_refused_in_a_sentence(model_type: str) -> None:
    most = 400 + len(", ".join(found()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for config in spoilt(tiny.load_golden(SMALL[model_type]).config, DECODERS.index(model_type)):
            try:
                for _, kind in spec(config).parts():
                    rope = getattr(kind, "rope", None)
                    if rope and rope.dim < 1000:  # else there is no such tensor
                        frequencies(rope)
            except InputError as error:
                assert "\n" not in str(error) and len(str(error)) < most


def test_any_value_in_any_key_of_a_quantization_is_read_or_refused_in_a_sentence() -> None:
    config = tiny.load_golden("v4_released").config
    keys = (*FP8, "quant_algo", "moe_quant_algo", "bits", "config_groups", "anything")
    odd = [config | {key: value} for key in ("quantization", "quantization_config") for value in ODD]
    for one in [*odd, *(config | {"quantization_config": FP8 | {key: value}} for key in keys for value in ODD)]:
        try:
            read_quantization(one)
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 400


FLAGS = ("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "use_qk_norm", "qk_norm", "tie_word_embeddings",
         "attn_output_gate", "norm_topk_prob", "use_sliding_window", "rope_interleave", "moe_gated")  # fmt: skip


def flipped() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each config with each of its true or false keys, and of those that some configs have, the other way round."""
    configs = {path.stem: config(path.stem) for path in CONFIGS.glob("*.json")}
    configs |= {case: tiny.load_golden(case).config for case in tiny.cases()}
    for name, values in configs.items():
        text = values.get("text_config", values)
        for key in {key for key, value in text.items() if type(value) is bool} | set(FLAGS):
            changed = text | {key: not text.get(key, False)}
            yield f"{name} {key}", values | {"text_config": changed} if "text_config" in values else changed


def test_every_setting_that_passes_has_names_for_its_tensors() -> None:
    """A bias or norm that a config asks for is computed, or refused by name; never a tensor that nobody can name."""
    passed = set()
    for name, values in flipped():
        kind = family(values["model_type"])
        try:
            spec = kind.spec(values)
        except InputError as error:
            assert '"' in str(error), name
            continue
        passed.add(name)
        numbers = {layer: number for number, layer in enumerate(spec.layers)}.values()
        tensors: list[tuple[str, int | None, int | None]] = [
            (tensor, None, None) for tensor in ("embed", "norm", "head") if tensor != "norm" or spec.norm
        ]
        for number in numbers:
            table = spec.layer_tensors(number)
            tensors += [(tensor, number, one.expert) for tensor, one in table.items() if one.expert in (None, 0)]
        for tensor in tensors:
            for one in (kind, *(replace(kind, names=gguf.names) for gguf in kind.gguf)):
                assert list(one.sources(*tensor)), f"{name}: {tensor}"
    assert "qwen3_a attention_bias" in passed
    assert "mistralai__Mixtral-8x7B-v0.1 mlp_bias" not in passed


# Keys of real configs that change no logit: old conversions, other programs' notes, decoding defaults.
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Qwen__Qwen3-30B-A3B", {"use_qk_norm": True, "shared_expert_intermediate_size": 0, "qkv_bias": False}),
        ("mistralai__Mixtral-8x7B-v0.1", {"attn_implementation": None, "_flash_attn_2_enabled": True, "top_k": 50}),
        (
            "mistralai__Mixtral-8x7B-v0.1",
            {"tokenizer_class": "LlamaTokenizer", "badwordsids": [[1]], "do_sample": True},
        ),
        ("mistralai__Mixtral-8x7B-v0.1", {"max_sequence_length": 2048, "eos_token": "</s>", "num_key_value_groups": 4}),
        ("Qwen__Qwen3.6-35B-A3B", {"output_gate_type": "swish"}),
        ("zai-org__GLM-5.2", {"layer_types": ["deepseek_sparse_attention"] * 78}),
        ("deepseek-ai__DeepSeek-V3", {"model_max_length": 4096, "custom_generate": "x", "use_flash_attn": True}),
        (
            "deepseek-ai__DeepSeek-V3",
            {"temperature": 0.6, "pad_token_id": -1, "something": [], "other": {}, "none": None},
        ),
    ],
)
def test_keys_without_influence_are_no_obstacle(name: str, change: dict[str, Any]) -> None:
    values = config(name)
    changed = {"text_config": values["text_config"] | change} if "text_config" in values else change
    assert spec(values | changed) == spec(values)


@pytest.mark.parametrize(
    "names",
    [
        {"M": "mamba", "E": "moe", "*": "attention"},
        {"M": "linear_attention", "E": "moe", "*": "full_attention"},
    ],
)
@pytest.mark.parametrize("key", ["layers_block_type", "layer_types"])
def test_kinds_of_layers_are_read_under_all_their_spellings(names: dict[str, str], key: str) -> None:
    old = config("nvidia__NVIDIA-Nemotron-3-Nano-30B-A3B-BF16")
    new = {one: value for one, value in old.items() if one not in ("hybrid_override_pattern", "num_hidden_layers")}
    assert spec(new | {key: [names[letter] for letter in old["hybrid_override_pattern"]]}) == spec(old)


@pytest.mark.parametrize("most", [float("inf"), {"__float__": "Infinity"}])
def test_infinity_is_read_as_it_is_written(most: object) -> None:
    values = config("ibm-granite__granite-4.0-h-tiny")
    assert spec(values | {"time_step_limit": [0.0, most]}) == spec(values)
    assert spec(values | {"mamba_d_head": "auto"}) == spec(values)


def test_the_harmless_keys_touch_no_setting_of_a_family() -> None:
    everything = {key for model_type in found() for key in found()[model_type].defaults}
    assert not everything & set(HARMLESS)


def test_an_old_llama_config_is_read() -> None:
    """The first conversions had no max_position_embeddings, rope_theta or num_key_value_heads, and padding -1."""
    old = {
        "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_sequence_length": 2048,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": -1,
        "rms_norm_eps": 1e-06, "torch_dtype": "float16", "use_cache": True, "vocab_size": 32000,
    }  # fmt: skip
    assert spec(old).context == 2048


# What transformers 5 makes of two spellings of one setting: `rope_scaling` wins over `rope_parameters`, `rope_theta` in
# a table over that beside it, `rope_type` over `type`, and the newer name of a number of experts over the older.
@pytest.mark.parametrize(
    ("case", "both", "one"),
    [
        ("llama_a", {"rope_theta": 77.0}, {}),
        (
            "llama_a",
            {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 5e5}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        ),
        (
            "llama_a",
            {"rope_parameters": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        ),
        ("qwen3_moe_a", {"num_experts": 4, "num_local_experts": 8}, {"num_experts": 8, "num_local_experts": None}),
        ("mixtral_a", {"num_experts": 4, "num_local_experts": 8}, {"num_experts": None, "num_local_experts": 4}),
        ("v4_a", {"qk_rope_head_dim": 4, "partial_rotary_factor": 0.25}, {"partial_rotary_factor": 0.25}),
        ("llama_a", {"dtype": "float32", "torch_dtype": "bfloat16"}, {}),
    ],
)
def test_of_two_spellings_the_one_counts_that_counts_in_transformers(
    case: str, both: dict[str, Any], one: dict[str, Any]
) -> None:
    values = tiny.load_golden(case).config
    assert spec(values | both) == spec(values | one)


# Releases say things in other words than transformers 5.23 saves them in.
@pytest.mark.parametrize(
    ("case", "one", "other"),
    [
        (
            "gemma4_a",
            {},
            {"per_layer_config": None, "global_head_dim": 24, "num_global_key_value_heads": 2},
        ),
        ("gemma4_a", {}, {"rope_parameters": None}),
        ("gemma4_a", {}, {"layer_types": ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 2}),
        ("gemma3_a", {}, {"rope_parameters": None, "layer_types": None}),
        (
            "gemma3_a",
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}},
            {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6},
        ),
        ("gemma3_a", {"layer_types": ["full_attention"] * 7}, {"layer_types": None, "sliding_window_pattern": 1}),
        ("llama4_a", {}, {"layer_types": None, "no_rope_layers": [], "no_rope_layer_interval": 3}),
        ("llama4_b", {}, {"layer_types": None, "moe_layers": None}),
        ("hy_v3_b", {}, {"mlp_layer_types": None, "first_k_dense_replace": 1, "expert_hidden_dim": 36}),
        (
            "hunyuan_v1_moe_a",
            {},
            {
                "rope_parameters": None,
                "rope_theta": 1000.0,
                "rope_scaling": {
                    "alpha": 30.0,
                    "beta_fast": 32,
                    "beta_slow": 1,
                    "factor": 1.0,
                    "mscale": 1.0,
                    "type": "dynamic",
                },
                "moe_intermediate_size": [36] * 3,
                "num_shared_expert": [1] * 3,
                "use_mixed_mlp_moe": True,
                "vit_patch": 1,
                "attention_head_dim": 12,
                "kv_lora_rank": None,
                "use_cla": False,
            },
        ),
        ("mimo_v2_flash_a", {}, {"layer_types": None, "mlp_layer_types": None, "rope_parameters": None}),
        (
            "mimo_v2_flash_b",
            {"rope_parameters": None},
            {
                "rope_parameters": None,
                "rope_theta": 5000000,
                "swa_rope_theta": 10000,
                "layer_types": None,
                "partial_rotary_factor": 0.334,
                "hybrid_layer_pattern": [1, 0, 1, 0],
                "mlp_layer_types": None,
                "moe_layer_freq": [1, 0, 1, 1],
                "swa_num_key_value_heads": 6,
                "swa_head_dim": 12,
                "sliding_window": 19,
                "sliding_window_size": 19,
                "rms_norm_eps": None,
                "layernorm_epsilon": 1e-5,
            },
        ),
        ("smollm3_a", {}, {"layer_types": None, "no_rope_layers": None}),
        ("smollm3_b", {}, {"layer_types": None}),
        ("minimax_m2_a", {}, {"rope_parameters": None, "rope_theta": 5000000}),
        (
            "laguna_a",
            {},
            {
                "gating": "per-head",
                "gating_types": ["per_head"] * 4,
                "mlp_layer_types": None,
                "mlp_only_layers": [0],
                "decoder_sparse_step": 1,
                "norm_topk_prob": True,
            },
        ),
        ("flint_a", {}, {"layer_types": None, "mlp_only_layers": None}),
        ("afmoe_a", {}, {"layer_types": None, "score_func": "sigmoid", "route_norm": True, "n_group": 1}),
        ("ernie4_5_moe_b", {}, {"moe_layer_end_index": -1, "moe_use_aux_free": True, "num_nextn_predict_layers": 1}),
        ("dots1_a", {}, {"layer_types": None, "scoring_func": "noaux_tc"}),
        ("cohere2_moe_a", {}, {"layer_types": None, "mlp_layer_types": None, "first_k_dense_replace": 1}),
    ],
)
def test_released_configs_are_the_models_that_are_saved(case: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    values = tiny.load_golden(case).config
    assert spec(values | one) == spec(values | other)


def test_two_tables_of_rope_settings_that_would_lose_a_theta_are_refused() -> None:
    values = tiny.load_golden("llama_a").config
    table = {"rope_type": "default", "rope_theta": 777.0}
    with pytest.raises(
        InputError, match=r'"rope_parameters" has the rope_theta 777\.0, which "rope_scaling" leaves out'
    ):
        spec(values | {"rope_parameters": table, "rope_scaling": {"type": "linear", "factor": 2.0}})
    same = {"rope_parameters": table, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 777.0}
    assert spec(values | same).layers[0][0].kind.rope.theta == 777


@pytest.mark.parametrize(
    ("table", "name"),
    [
        ({"quant_method": "exl3", "bits": 3.5}, "EXL3 3.5-bit"),
        ({"quant_method": "hqq", "nbits": 4}, "HQQ 4-bit"),
        ({"quant_method": "quanto", "weights": "int8"}, "Quanto int8"),
        ({"quant_method": "torchao", "quant_type": "int4wo"}, "torchao int4wo"),
        (ROUND | {"packing_format": None}, "AutoRound int with no packing_format"),
        (ROUND | {"packing_format": "auto_round:llm_compressor"}, "AutoRound int with auto_round:llm_compressor"),
        (ROUND | {"data_type": "mx_fp"}, "AutoRound mx_fp with auto_round"),
        (ROUND | {"extra_config": {"a": {"scale": 8}}}, "AutoRound with other bits, groups or zero points for a"),
        ({"quant_method": "awq", "pack_method": "order"}, "AWQ with pack_method order"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
            "bitsandbytes fp4 stored as bfloat16",
        ),
        ({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A8_AWQ"}}, "ModelOpt W4A8_AWQ"),
        ({"quant_method": "someone's"}, "someone's"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv_fast"}, "AWQ gemv_fast"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "GPTQ marlin 4-bit"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "compressed-tensors with sparse",
        ),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}},
            "compressed-tensors with tr",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"type": "float", "strategy": "channel", "symmetric": False}}},
            },
            "compressed-tensors float with zero points",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {"g": {}}},
            "compressed-tensors marlin",
        ),
        ({"quant_algo": "W4A16_AWQ"}, "ModelOpt W4A16_AWQ"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "W4A8_AWQ"}}}, "ModelOpt W4A8_AWQ"),
        ({"quant_method": "quark", "algo_config": [{"name": "rotation"}]}, "Quark with rotated weights"),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "int4"}}}, "Quark int4"),
        ({"group_size": 32, "bits": 4, "mode": "new"}, "MLX new"),
        (FP8 | {"fmt": "e5m2"}, "FP8 e5m2"),
    ],
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_quantizations_that_are_not_read_are_called_by_their_names(table: dict[str, Any], name: str, key: str) -> None:
    with pytest.raises(
        InputError, match=f'quantization "{re.escape(name)}.* is not supported.* BF16 or FP8 release of the same'
    ):
        read_quantization({key: table})


def test_a_mixture_of_quantizations_is_read_beside_the_config() -> None:
    layers = {"a": {"quant_algo": "NVFP4"}, "b": {"quant_algo": "FP8"}, "c": {"quant_algo": "NVFP4"}}
    side = {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}
    assert read_quantization({}, side).name == "ModelOpt"
    layers["c"]["quant_algo"] = "W4A8_AWQ"
    with pytest.raises(InputError, match=r'hf_quant_config.json.*: quantization "ModelOpt W4A8_AWQ" is not supported'):
        read_quantization({}, side)


def test_what_mlx_says_counts_where_the_original_is_told_too() -> None:
    told = {"quantization_config": FP8, "quantization": {"group_size": 64, "bits": 4}}
    assert (read_quantization(told).name, read_quantization({"quantization_config": FP8}).name) == ("MLX", "FP8")


@pytest.mark.parametrize(
    "method", ["auto-round", "awq", "gptq", "compressed-tensors", "modelopt", "quark", "bitsandbytes", "fp8"]
)
def test_unknown_keys_of_a_quantization_are_refused_by_name(method: str) -> None:
    table = {"quant_method": method} | ({"bits": 4} if method in ("awq", "gptq") else {})
    table = ROUND if method == "auto-round" else table
    assert read_quantization({"text_config": {"quantization_config": table}}).spellings
    with pytest.raises(InputError, match='"turned_by" is not known'):
        read_quantization({"text_config": {"quantization_config": table | {"turned_by": 3}}})


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"rotation": "hadamard"}}}, "rotation"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"codebook": [1]}}}}, "codebook"),
        ({"quant_method": "compressed-tensors", "transform_config": {"type": "hadamard"}}, "type"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*": {"adapter": "lora"}}}, "adapter"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {".*": {"format": "gptq_v2"}}}, "format"),
    ],
)
def test_unknown_keys_inside_a_quantization_are_refused_by_name(table: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=f'"{key}" is not known'):
        read_quantization({"quantization_config": table})


@pytest.mark.parametrize(
    "table",
    [
        FP8 | {"dequantize": False, "modules_to_convert": None, "modules_to_not_convert": ["lm_head"]},
        FP8 | {"fmt": "float8_e4m3fn", "ignored_layers": ["gate"]},
        {"quant_method": "fp8"},
        FP8 | {"scale_fmt": "ue8m0", "expert_dtype": "fp4"},
    ],
)
def test_fp8_in_blocks_is_read_under_all_its_spellings(table: dict[str, Any]) -> None:
    assert read_quantization({"quantization_config": table}).name == "FP8"
    assert read_quantization({}, {"quantization": {"quant_algo": None}}).name == "FP8"


def test_the_readme_lists_the_families_that_there_are() -> None:
    """`python tests/reference/families.py --table` prints them."""
    root = Path(__file__).parents[2]
    table = runpy.run_path(str(root / "tests" / "reference" / "families.py"))["table"]()
    assert table in (root / "engine" / "families" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("case", "prefix", "others"),
    [
        ("qwen3_5_moe_a", "model.language_model.", ("model.visual.merger.weight", "mtp.fc.weight")),
        ("gemma4_a", "model.language_model.", ("model.vision_tower.a.weight", "model.embed_vision.b.weight")),
        ("llama4_a", "language_model.model.", ("vision_model.a.weight", "multi_modal_projector.b.weight")),
        ("gemma3_a", "language_model.model.", ("vision_tower.a.weight", "multi_modal_projector.b.weight")),
        ("qwen3_vl_a", "model.", ("model.visual.merger.norm.weight",)),
        ("qwen3_vl_moe_a", "model.", ("model.visual.merger.norm.weight",)),
        ("qwen2_5_vl_a", "model.", ("model.visual.merger.norm.weight", "visual.blocks.0.norm1.weight")),
        ("glm4v_moe_a", "model.", ("model.visual.merger.norm.weight",)),
        ("mistral4_a", "language_model.model.", ("vision_tower.a.weight", "multi_modal_projector.b.weight")),
        ("ministral3_a", "language_model.model.", ("vision_tower.a.weight", "multi_modal_projector.b.weight")),
        ("mistral_b", "model.language_model.", ("model.vision_tower.a.weight", "model.multi_modal_projector.b.weight")),
    ],
)
def test_the_decoder_of_a_model_of_several_parts_is_read(
    checkpoint: Callable[[str], Path], tmp_path: Path, case: str, prefix: str, others: tuple[str, ...]
) -> None:
    golden = tiny.load_golden(case)
    text = golden.config
    kind = text["model_type"].removesuffix("_text")
    kind = "mistral3" if "istral" in kind else kind
    whole = {"model_type": kind, "text_config": text, "vision_config": {"depth": 1}, "image_token_id": 3}
    head = "language_model.lm_head." if prefix.startswith("language") else "lm_head."
    tensors = {
        name.replace("model.", prefix, 1).replace("lm_head.", head, 1): values
        for name, values in load_file(checkpoint(case) / "model.safetensors").items()
    }
    tensors |= dict.fromkeys(others, np.zeros(3, np.float32))
    (tmp_path / "config.json").write_text(json.dumps(whole))
    save_file(tensors, tmp_path / "model.safetensors")
    logits = load(tmp_path).session(64).feed(golden.ids[:40])
    np.testing.assert_allclose(logits, golden.logits[:40], atol=1e-3)
    for said, part, tied in ((True, False, True), (False, True, False), (None, True, True)):  # the whole says it
        both = {"tie_word_embeddings": said, "text_config": text | {"tie_word_embeddings": part}}
        assert spec(whole | both).tied is tied


@pytest.mark.parametrize("moved", ["language_model.{}", "{}"])
def test_the_text_part_of_kimi_k25_is_read(checkpoint: Callable[[str], Path], tmp_path: Path, moved: str) -> None:
    """As it was released, and as transformers saves it."""
    golden = tiny.load_golden("v3_b")
    text = golden.config | {"model_type": "kimi_k2"}
    tensors = {"vision_tower.encoder.blocks.0.wo.weight": np.zeros(3, np.float32), "mm_projector.proj.0.weight":
               np.zeros(3, np.float32)}  # fmt: skip
    for name, values in load_file(checkpoint("v3_b") / "model.safetensors").items():
        name = name.replace("model.", "model.language_model.", 1) if moved == "{}" else name
        tensors[moved.format(name)] = values
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_k25", "text_config": text}))
    save_file(tensors, tmp_path / "model.safetensors")
    logits = load(tmp_path).session(64).feed(golden.ids[:40])
    np.testing.assert_allclose(logits, golden.logits[:40], atol=2e-4)


def test_kimi_linear_is_read_as_it_was_released(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """A table of the linear layers, which are counted from one; dense layers below `mlp`."""
    golden = tiny.load_golden("kimi_linear_a")
    kept = {k: v for k, v in golden.config.items() if not k.startswith(("linear_", "layer_types", "mlp_layer_types"))}
    linear = {"num_heads": 4, "head_dim": 12, "short_conv_kernel_size": 4, "kda_layers": [1, 3, 4]}
    released = kept | {"first_k_dense_replace": 1, "linear_attn_config": linear | {"full_attn_layers": [2]}}
    assert spec(released) == spec(golden.config)
    tensors = {
        name.replace("layers.0.block_sparse_moe", "layers.0.mlp"): values
        for name, values in load_file(checkpoint("kimi_linear_a") / "model.safetensors").items()
    }
    (tmp_path / "config.json").write_text(json.dumps(released))
    save_file(tensors, tmp_path / "model.safetensors")
    logits = load(tmp_path).session(64).feed(golden.ids[:40])
    np.testing.assert_allclose(logits, golden.logits[:40], atol=1e-3)
    with pytest.raises(
        InputError, match=r'"linear_attn_config\.kda_layers" and "full_attn_layers" do not name each of'
    ):
        spec(released | {"linear_attn_config": linear | {"full_attn_layers": [2, 3]}})
    with pytest.raises(InputError, match=r'"linear_attn_config\.gate_lower_bound" is not understood'):
        spec(released | {"linear_attn_config": linear | {"gate_lower_bound": -5.0}})


def test_experts_are_turned_unless_they_have_the_right_shape(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Qwen3-VL's are released as (experts, in, out); transformers saves (experts, out, in)."""
    golden = tiny.load_golden("qwen3_vl_moe_a")
    tensors = load_file(checkpoint("qwen3_vl_moe_a") / "model.safetensors")
    turned = {
        name: np.ascontiguousarray(values.swapaxes(1, 2)) if ".experts." in name else values
        for name, values in tensors.items()
    }
    (tmp_path / "config.json").write_text(json.dumps(golden.config))
    save_file(turned, tmp_path / "model.safetensors")
    logits = load(tmp_path).session(64).feed(golden.ids[:40])
    np.testing.assert_allclose(logits, golden.logits[:40], atol=2e-4)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_experts_that_are_stored_transposed_are_turned(
    checkpoint: Callable[[str], Path], tmp_path: Path, dtype: str
) -> None:
    golden = tiny.load_golden("gpt_oss_a")
    folder = dequantized(checkpoint("gpt_oss_a"), tmp_path / "model", dtype)
    whole = load(folder)
    logits = whole.session(512).feed(golden.ids)
    assert np.abs(logits - golden.logits).max() < 2e-4
    # No more than is stored, whatever the order, but for the form that there is room for.
    assert whole.stats()["weight_bytes"] - whole.wide_bytes == whole.plan(512).weight_bytes


@pytest.mark.parametrize("quant", ["native", "int8", "int4"])
def test_a_conversion_of_transposed_experts_is_one_of_turned_ones(
    checkpoint: Callable[[str], Path], tmp_path: Path, quant: str
) -> None:
    golden = tiny.load_golden("gpt_oss_a")
    source = describe(dequantized(checkpoint("gpt_oss_a"), tmp_path / "model", "BF16"))
    convert(source.checkpoint, source.weights(), tmp_path / quant, quant, Folder(source.path, "x"))
    logits = load(tmp_path / quant).session(512).feed(golden.ids)
    assert np.abs(logits - golden.logits).max() < {"native": 2e-4, "int8": 0.6, "int4": 4}[quant]
    assert not any("gate_up" in name for name in describe(tmp_path / quant).checkpoint.tensors if "bias" not in name)


WITHOUT = """
import pkgutil, sys
from importlib import import_module
from pathlib import Path

import numoe.cli, numoe.engine, numoe.quant
from numoe.engine.families import family, found
from numoe.quant.errors import InputError

assert Path(numoe.engine.__file__).is_relative_to(sys.argv[1])
for part in (numoe.cli, numoe.engine, numoe.quant):
    for module in pkgutil.walk_packages(part.__path__, f"{part.__name__}."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
for model_type in sys.argv[2].split(","):
    try:
        family(model_type)
    except InputError as error:
        assert f'"{model_type}" is not supported yet; known are ' in str(error), error
    else:
        raise AssertionError(model_type)
model = numoe.engine.load("tiny")
assert model.session(64).feed(model.tokenizer.encode("What colour is a frog?")).shape[1] == model.spec.vocab
assert model.description.chat_format
"""


@pytest.mark.parametrize(
    ("model_types", "files"),
    [
        (("glm4_moe_lite",), ("families/glm4_moe_lite.py",)),
        (("gpt_oss",), ("families/gpt_oss.py", "chat/formats/harmony.py")),
        (
            ("kimi_linear", "bailing_hybrid"),
            ("families/kimi_linear.py", "families/bailing_hybrid.py", "families/kda.py", "layers/recurrent/kda.py"),
        ),
        (
            ("qwen3_5", "qwen3_5_moe", "qwen3_next", "qwen4_exp"),
            (
                "families/qwen3_5.py",
                "families/qwen3_next.py",
                "families/qwen4_exp.py",
                "families/deltanet.py",
                "layers/recurrent/deltanet.py",
                "layers/ngram.py",
            ),
        ),
    ],
)
def test_nothing_else_knows_a_family(model_types: tuple[str, ...], files: tuple[str, ...], tmp_path: Path) -> None:
    """Without its files everything works, and its models are refused by name."""
    for part in ("cli", "engine", "quant"):
        whole = Path(families.__file__).parents[2] / part
        shutil.copytree(whole, tmp_path / "numoe" / part)  # with what is compiled
    for file in files:
        (tmp_path / "numoe" / "engine" / file).unlink()
    command = [sys.executable, "-c", WITHOUT, str(tmp_path), ",".join(model_types)]
    ran = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()
