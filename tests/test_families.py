"""Real configs become the right architecture; what is not understood is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from numoe.engine import InputError
from numoe.engine.families import family
from numoe.engine.layers.attention.compressed import CompressedAttention
from numoe.engine.layers.mixture import MixtureOfExperts
from numoe.engine.layers.spec import ModelSpec
from numoe.engine.plan import plan

CONFIGS = Path(__file__).parent / "configs"


def config(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def spec(values: dict[str, Any]) -> ModelSpec:
    return family(values.get("model_type")).spec(values)


# Parameter counts as the model cards give them (V4: without the multi-token prediction layers).
@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("deepseek-ai__DeepSeek-V4-Flash", 284e9, 13e9),
        ("deepseek-ai__DeepSeek-V4-Pro", 1.6e12, 49e9),
        ("deepseek-ai__DeepSeek-V3", 671e9, 37e9),
        ("deepseek-ai__DeepSeek-R1", 671e9, 37e9),
        ("deepseek-ai__DeepSeek-V2-Lite", 15.7e9, 2.4e9),
        ("Qwen__Qwen3-30B-A3B", 30.5e9, 3.3e9),
        ("mistralai__Mixtral-8x7B-v0.1", 46.7e9, 12.9e9),
    ],
)
def test_real_configs_have_their_cards_parameter_counts(name: str, total: float, active: float) -> None:
    model = spec(config(name))
    planned = plan(model, dict.fromkeys(model.tensors(), ("bf16", 0)), 1)
    assert planned.parameters == pytest.approx(total, rel=0.02)
    # Cards differ in whether they count embedding and head among the active parameters.
    assert planned.active_parameters == pytest.approx(active, rel=0.12)


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


def test_a_dated_release_with_drafting_keys_is_the_same_model() -> None:
    assert spec(config("deepseek-ai__DeepSeek-V4-Flash-0731")) == spec(config("deepseek-ai__DeepSeek-V4-Flash"))


def test_v4_flash_cache_of_a_long_context_grows_as_the_architecture_promises() -> None:
    model = spec(config("deepseek-ai__DeepSeek-V4-Flash"))
    stored = dict.fromkeys(model.tensors(), ("bf16", 0))
    per_token = (plan(model, stored, 1_048_576).kv_bytes - plan(model, stored, 131_072).kv_bytes) / (
        1_048_576 - 131_072
    )
    # 21 sparse layers with (512 + 128) / 4 values a token and 20 heavy ones with 512 / 128, in float32.
    assert per_token == pytest.approx(4 * (21 * 640 / 4 + 20 * 512 / 128), rel=1e-3)


def test_unknown_model_types_are_named_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r'"glm4_moe_lite" is not supported yet; known are deepseek_v2, .*qwen3_moe'):
        spec(config("zai-org__GLM-4.7-Flash"))
    with pytest.raises(InputError, match='"None" is not supported'):
        spec({})


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
        ("mistralai__Mixtral-8x7B-v0.1", {"partial_rotary_factor": 0.5}, '"partial_rotary_factor" is 0.5, and only 1'),
    ],
)
def test_what_a_family_does_not_compute_is_refused_by_name(name: str, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        spec(config(name) | change)


def test_keys_without_influence_are_no_obstacle() -> None:
    values = config("Qwen__Qwen3-30B-A3B")
    assert spec(values | {"router_jitter_noise": 0.1, "torch_dtype": "float16", "some_flag": False}) == spec(values)
