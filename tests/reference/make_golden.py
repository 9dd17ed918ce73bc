"""Make the golden numbers of tests/golden with transformers, in float32 on the CPU.

Run: pip install -e '.[reference]' && python tests/reference/make_golden.py [CASE ...]

For every case the model is built from its config and saved by transformers; only the config.json and the tensor
listing of that folder are kept, `tiny.write_checkpoint` fills the same folder with reproducible numbers, and
transformers computes the logits and a greedy continuation of a random prompt from it. The two cases in a released
layout (FP8, FP4) have their listing here and are dequantized by torch before transformers loads them.

Random models have near ties, where any two correct implementations may part: a case is drawn again (another salt)
until rounding noise in the weights leaves its logits alone and its greedy continuation is decided clearly.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny

Listing = list[tuple[str, str, tuple[int, ...]]]

GREEDY_TOKENS = 28
MIN_MARGIN = 0.02  # between the two best logits, along the greedy path
MIN_GREEDY_IDS = 6  # different ids in the continuation: a constant one would test little
MAX_NOISE = 5e-5  # change of any logit when the weights change by a rounding error
MAX_NOISE_RECURRENT = 2.5e-4  # where every token's rounding goes on through a state
RECURRENT = (*tiny.RECURRENT, "nemotron_h", "granitemoehybrid")  # of which the last two were found to be steady


ALIASES = {"kimi_k2": "deepseek_v3", "bailing_moe": "glm4_moe"}
"""What transformers calls a family that config.json calls otherwise."""
MODELS = {"mistral4": transformers.Mistral4ForCausalLM}
"""Decoders that its AutoModelForCausalLM does not know."""
PARTS = ("qwen3_vl_text", "qwen3_vl_moe_text", "qwen2_5_vl_text", "qwen2_vl_text", "glm4v_moe_text")
"""Decoders that transformers has in models of several parts alone."""
VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "num_position_embeddings": 4,
    "deepstack_visual_indexes": [0], "patch_size": 2, "spatial_merge_size": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """`config` is what config.json starts from; `listing` (released layouts only) makes the tensor listing from it."""

    model_type: str
    tokens: int
    config: dict[str, Any]
    listing: Callable[[dict[str, Any]], Listing] | None = None
    shards: int = 1


def define(
    model_type: str,
    tokens: int,
    /,
    *,
    listing: Callable[[dict[str, Any]], Listing] | None = None,
    shards: int = 1,
    **config: Any,
) -> Case:
    """A case with its config spelled as keywords."""
    return Case(model_type, tokens, config, listing, shards)


def released_v4(config: dict[str, Any]) -> Listing:
    """DeepSeek-V4 as released: FP8 in 128x128 blocks with e8m0 scales, FP4 experts in blocks of 32, MTP layers."""
    hidden, width, hc = config["hidden_size"], config["moe_intermediate_size"], config["hc_mult"]
    heads, head_dim, q_lora = config["num_attention_heads"], config["head_dim"], config["q_lora_rank"]
    groups, o_lora = config["o_groups"], config["o_lora_rank"]
    experts, vocab, top_k = config["n_routed_experts"], config["vocab_size"], config["num_experts_per_tok"]
    index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]

    def fp8(name: str, rows: int, columns: int) -> Listing:
        blocks = (-(-rows // 128), -(-columns // 128))
        return [(f"{name}.weight", "F8_E4M3", (rows, columns)), (f"{name}.scale", "F8_E8M0", blocks)]

    def fp4(name: str, rows: int, columns: int) -> Listing:
        return [
            (f"{name}.weight", "I8", (rows, columns // 2)),
            (f"{name}.scale", "F8_E8M0", (rows, columns // 32)),
        ]

    def collapse(prefix: str, rows: int, scales: int) -> Listing:
        return [
            (f"{prefix}_fn", "F32", (rows, hc * hidden)),
            (f"{prefix}_base", "F32", (rows,)),
            (f"{prefix}_scale", "F32", (scales,)),
        ]

    def compressor(prefix: str, ratio: int, dim: int) -> Listing:
        channels = 2 * dim if ratio == 4 else dim
        return [
            (f"{prefix}.ape", "F32", (ratio, channels)),
            (f"{prefix}.wkv.weight", "BF16", (channels, hidden)),
            (f"{prefix}.wgate.weight", "BF16", (channels, hidden)),
            (f"{prefix}.norm.weight", "BF16", (dim,)),
        ]

    def block(prefix: str, ratio: int, hashed: bool) -> Iterator[Listing]:
        yield collapse(f"{prefix}.hc_attn", (2 + hc) * hc, 3)
        yield collapse(f"{prefix}.hc_ffn", (2 + hc) * hc, 3)
        yield [(f"{prefix}.{norm}.weight", "BF16", (hidden,)) for norm in ("attn_norm", "ffn_norm")]
        attn, ffn = f"{prefix}.attn", f"{prefix}.ffn"
        yield [(f"{attn}.attn_sink", "F32", (heads,))]
        yield fp8(f"{attn}.wq_a", q_lora, hidden)
        yield fp8(f"{attn}.wq_b", heads * head_dim, q_lora)
        yield fp8(f"{attn}.wkv", head_dim, hidden)
        yield fp8(f"{attn}.wo_a", groups * o_lora, heads * head_dim // groups)
        yield fp8(f"{attn}.wo_b", hidden, groups * o_lora)
        yield [(f"{attn}.q_norm.weight", "BF16", (q_lora,)), (f"{attn}.kv_norm.weight", "BF16", (head_dim,))]
        if ratio:
            yield compressor(f"{attn}.compressor", ratio, head_dim)
        if ratio == 4:
            yield compressor(f"{attn}.indexer.compressor", ratio, index_dim)
            yield fp8(f"{attn}.indexer.wq_b", index_heads * index_dim, q_lora)
            yield [(f"{attn}.indexer.weights_proj.weight", "BF16", (index_heads, hidden))]
        yield [(f"{ffn}.gate.weight", "BF16", (experts, hidden))]
        if hashed:
            yield [(f"{ffn}.gate.tid2eid", "I64", (vocab, top_k))]
        else:
            yield [(f"{ffn}.gate.bias", "F32", (experts,))]
        for pack, expert in [(fp4, f"experts.{e}") for e in range(experts)] + [(fp8, "shared_experts")]:
            yield pack(f"{ffn}.{expert}.w1", width, hidden)
            yield pack(f"{ffn}.{expert}.w2", hidden, width)
            yield pack(f"{ffn}.{expert}.w3", width, hidden)

    def parts() -> Iterator[Listing]:
        layers, ratios = config["num_hidden_layers"], config["compress_ratios"]
        yield [("embed.weight", "BF16", (vocab, hidden))]
        for layer in range(layers):
            yield from block(f"layers.{layer}", ratios[layer], layer < config["num_hash_layers"])
        yield [("norm.weight", "BF16", (hidden,)), ("head.weight", "BF16", (vocab, hidden))]
        yield collapse("hc_head", hc, 1)
        for m in range(config["num_nextn_predict_layers"]):
            yield from block(f"mtp.{m}", ratios[layers + m], False)
            yield fp8(f"mtp.{m}.e_proj", hidden, hidden)
            yield fp8(f"mtp.{m}.h_proj", hidden, hidden)
            yield [(f"mtp.{m}.{norm}.weight", "BF16", (hidden,)) for norm in ("enorm", "hnorm", "norm")]
            yield collapse(f"mtp.{m}.hc_head", hc, 1)

    return [entry for part in parts() for entry in part]


def released_v3(config: dict[str, Any]) -> Listing:
    """DeepSeek-V3 as released: FP8 in 128x128 blocks with float32 `weight_scale_inv`, one MTP layer after the last."""
    hidden, heads, vocab = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    q_lora, kv_lora, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    experts, width = config["n_routed_experts"], config["moe_intermediate_size"]

    def fp8(name: str, rows: int, columns: int) -> Listing:
        blocks = (-(-rows // 128), -(-columns // 128))
        return [
            (f"{name}.weight", "F8_E4M3", (rows, columns)),
            (f"{name}.weight_scale_inv", "F32", blocks),
        ]

    def swiglu(prefix: str, inner: int) -> Listing:
        return [
            *fp8(f"{prefix}.gate_proj", inner, hidden),
            *fp8(f"{prefix}.up_proj", inner, hidden),
            *fp8(f"{prefix}.down_proj", hidden, inner),
        ]

    def block(prefix: str, dense: bool) -> Iterator[Listing]:
        attn, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        yield fp8(f"{attn}.q_a_proj", q_lora, hidden)
        yield [(f"{attn}.q_a_layernorm.weight", "BF16", (q_lora,))]
        yield fp8(f"{attn}.q_b_proj", heads * (nope + rope), q_lora)
        yield fp8(f"{attn}.kv_a_proj_with_mqa", kv_lora + rope, hidden)
        yield [(f"{attn}.kv_a_layernorm.weight", "BF16", (kv_lora,))]
        yield fp8(f"{attn}.kv_b_proj", heads * (nope + value), kv_lora)
        yield fp8(f"{attn}.o_proj", hidden, heads * value)
        yield [
            (f"{prefix}.{norm}.weight", "BF16", (hidden,)) for norm in ("input_layernorm", "post_attention_layernorm")
        ]
        if dense:
            yield swiglu(mlp, config["intermediate_size"])
            return
        yield [
            (f"{mlp}.gate.weight", "BF16", (experts, hidden)),
            (f"{mlp}.gate.e_score_correction_bias", "F32", (experts,)),
        ]
        for expert in range(experts):
            yield swiglu(f"{mlp}.experts.{expert}", width)
        yield swiglu(f"{mlp}.shared_experts", width * config["n_shared_experts"])

    def parts() -> Iterator[Listing]:
        layers = config["num_hidden_layers"]
        yield [("model.embed_tokens.weight", "BF16", (vocab, hidden))]
        for layer in range(layers + config["num_nextn_predict_layers"]):
            yield from block(f"model.layers.{layer}", layer < config["first_k_dense_replace"])
        if config["num_nextn_predict_layers"]:
            mtp = f"model.layers.{layers}"
            yield [
                (f"{mtp}.embed_tokens.weight", "BF16", (vocab, hidden)),
                (f"{mtp}.enorm.weight", "BF16", (hidden,)),
                (f"{mtp}.hnorm.weight", "BF16", (hidden,)),
            ]
            yield fp8(f"{mtp}.eh_proj", hidden, 2 * hidden)
            yield [
                (f"{mtp}.shared_head.norm.weight", "BF16", (hidden,)),
                (f"{mtp}.shared_head.head.weight", "BF16", (vocab, hidden)),
            ]
        yield [("model.norm.weight", "BF16", (hidden,)), ("lm_head.weight", "BF16", (vocab, hidden))]

    return [entry for part in parts() for entry in part]


def released_ling(config: dict[str, Any]) -> Listing:
    """Ling 2.0 as released: queries, keys and values in one tensor, and names of its own."""
    hidden, width, vocab = config["hidden_size"], config["moe_intermediate_size"], config["vocab_size"]
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    listing: Listing = [(f"{n}.weight", "F32", (vocab, hidden)) for n in ("model.word_embeddings", "lm_head")]
    listing.append(("model.norm.weight", "F32", (hidden,)))
    for layer in range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
        at = f"model.layers.{layer}"
        rows = (heads + 2 * kv_heads) * dim
        listing.append((f"{at}.attention.query_key_value.weight", "F32", (rows, hidden)))
        if config["use_qkv_bias"]:
            listing.append((f"{at}.attention.query_key_value.bias", "F32", (rows,)))
        listing.append((f"{at}.attention.dense.weight", "F32", (hidden, heads * dim)))
        listing += [(f"{at}.attention.{n}_layernorm.weight", "F32", (dim,)) for n in ("query", "key")]
        listing += [(f"{at}.{n}_layernorm.weight", "F32", (hidden,)) for n in ("input", "post_attention")]
        experts = {f"mlp.experts.{e}": width for e in range(config["num_experts"])}
        parts = experts | {"mlp.shared_experts": width * config["num_shared_experts"]}
        if layer < config["first_k_dense_replace"]:
            parts = {"mlp": config["intermediate_size"]}
        else:
            listing.append((f"{at}.mlp.gate.weight", "F32", (config["num_experts"], hidden)))
            listing.append((f"{at}.mlp.gate.expert_bias", "F32", (config["num_experts"],)))
        for part, inner in parts.items():
            listing += [(f"{at}.{part}.{n}_proj.weight", "F32", (inner, hidden)) for n in ("gate", "up")]
            listing.append((f"{at}.{part}.down_proj.weight", "F32", (hidden, inner)))
    return listing


def as_glm(config: dict[str, Any], stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Ling's tensors under GLM-4.5's names; and what its config calls otherwise."""
    config |= {"n_routed_experts": config["num_experts"], "n_shared_experts": config["num_shared_experts"]}
    config |= {"attention_bias": config["use_qkv_bias"]}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rows = [n * config["head_dim"] for n in (heads, kv_heads, kv_heads)]
    places = {"word_embeddings": "embed_tokens", ".attention.": ".self_attn.", ".dense.": ".o_proj.",
              "query_layernorm": "q_norm", "key_layernorm": "k_norm",
              "expert_bias": "e_score_correction_bias"}  # fmt: skip
    out: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        for theirs, ours in places.items():
            name = name.replace(theirs, ours)
        if "query_key_value" in name:
            for n, part in zip("qkv", tensor.split(rows), strict=True):
                out[name.replace("query_key_value", f"{n}_proj")] = part.contiguous()
        else:
            out[name] = tensor
    return out


YARN = {
    "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip


def released_gpt_oss(config: dict[str, Any]) -> Listing:
    """gpt-oss as released: BF16, and experts in MXFP4 with gate and up in alternating rows."""
    hidden, width, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    vocab = config["vocab_size"]
    listing: Listing = [(f"{name}.weight", "BF16", (vocab, hidden)) for name in ("model.embed_tokens", "lm_head")]
    listing.append(("model.norm.weight", "BF16", (hidden,)))
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        sizes = {"q": (heads * dim, hidden), "k": (kv_heads * dim, hidden), "v": (kv_heads * dim, hidden)}
        for name, shape in (sizes | {"o": (hidden, heads * dim)}).items():
            listing.append((f"{at}.self_attn.{name}_proj.weight", "BF16", shape))
            listing.append((f"{at}.self_attn.{name}_proj.bias", "BF16", shape[:1]))
        listing.append((f"{at}.self_attn.sinks", "BF16", (heads,)))
        listing.append((f"{at}.mlp.router.weight", "BF16", (experts, hidden)))
        listing.append((f"{at}.mlp.router.bias", "BF16", (experts,)))
        for name, rows, columns in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
            part = f"{at}.mlp.experts.{name}"
            listing.append((f"{part}_blocks", "U8", (experts, rows, columns // 32, 16)))
            listing.append((f"{part}_scales", "U8", (experts, rows, columns // 32)))
            listing.append((f"{part}_bias", "BF16", (experts, rows)))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            listing.append((f"{at}.{norm}.weight", "BF16", (hidden,)))
    return listing


CASES = {
    # All three attention kinds, hash and score routing, YaRN on the compressed layers, three closed 128-token windows.
    "v4_a": define("deepseek_v4", 420,
        vocab_size=96, hidden_size=80, moe_intermediate_size=48, num_hidden_layers=7, num_attention_heads=6,
        head_dim=32, partial_rotary_factor=0.25, q_lora_rank=40, o_groups=2, o_lora_rank=28,
        compress_ratios=[0, 4, 128, 4, 128, 0, 4], num_hash_layers=2, sliding_window=24,
        index_n_heads=24, index_head_dim=16, index_topk=6, hc_mult=4, hc_sinkhorn_iters=20,
        n_routed_experts=10, num_experts_per_tok=3, routed_scaling_factor=1.7, swiglu_limit=1.5,
        compress_rope_theta=2000.0, rope_theta=500.0, max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "yarn", "factor": 6.0, "original_max_position_embeddings": 100, "beta_fast": 8, "beta_slow": 1,
        },
    ),
    # Other ratios, one head a group, an odd number of streams, tied embeddings, no hash layer, no rope scaling.
    "v4_b": define("deepseek_v4", 337,
        vocab_size=73, hidden_size=60, moe_intermediate_size=36, num_hidden_layers=5, num_attention_heads=5,
        head_dim=20, partial_rotary_factor=0.5, q_lora_rank=30, o_groups=5, o_lora_rank=12,
        layer_types=[
            "heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention",
            "compressed_sparse_attention", "heavily_compressed_attention",
        ],
        compress_rates={"compressed_sparse_attention": 3, "heavily_compressed_attention": 20},
        num_hash_layers=0, sliding_window=40, index_n_heads=25, index_head_dim=14, index_topk=9,
        hc_mult=3, hc_sinkhorn_iters=4, hc_eps=1e-3, n_routed_experts=7, num_experts_per_tok=2,
        routed_scaling_factor=2.5, swiglu_limit=10.0, rms_norm_eps=1e-5, tie_word_embeddings=True,
        max_position_embeddings=2048,
    ),
    "v4_released": define("deepseek_v4", 400,
        architectures=["DeepseekV4ForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=0,
        eos_token_id=1, expert_dtype="fp4", hc_eps=1e-06, hc_mult=4, hc_sinkhorn_iters=20, head_dim=64,
        hidden_act="silu", hidden_size=160, index_head_dim=32, index_n_heads=24, index_topk=8,
        initializer_range=0.02, max_position_embeddings=4096, model_type="deepseek_v4", moe_intermediate_size=96,
        n_routed_experts=9, n_shared_experts=1, norm_topk_prob=True, num_attention_heads=6, num_experts_per_tok=3,
        num_hidden_layers=5, num_hash_layers=2, num_key_value_heads=1, num_nextn_predict_layers=1, o_groups=3,
        o_lora_rank=64, q_lora_rank=96, qk_rope_head_dim=16,
        quantization_config={
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        rms_norm_eps=1e-06,
        rope_scaling={
            "beta_fast": 32, "beta_slow": 1, "factor": 16, "original_max_position_embeddings": 1024, "type": "yarn",
        },
        rope_theta=10000, routed_scaling_factor=1.5, scoring_func="sqrtsoftplus", sliding_window=32,
        swiglu_limit=2.0, tie_word_embeddings=False, topk_method="noaux_tc", torch_dtype="bfloat16",
        transformers_version="4.57.1", use_cache=True, vocab_size=100, compress_rope_theta=160000,
        compress_ratios=[0, 0, 4, 128, 4, 0],
        listing=released_v4, shards=4,
    ),
    # Short convolutions of four tokens with biases, two dense layers, no bias of the choice; odd sizes.
    "lfm2_moe_a": define("lfm2_moe", 150,
        vocab_size=83, hidden_size=60, intermediate_size=72, moe_intermediate_size=36, num_hidden_layers=5,
        num_attention_heads=6, num_key_value_heads=2, num_dense_layers=1, num_experts=7, num_experts_per_tok=3,
        layer_types=["conv", "full_attention", "conv", "conv", "full_attention"], conv_L_cache=4, conv_bias=True,
        use_expert_bias=False, norm_topk_prob=True, routed_scaling_factor=1.6, max_position_embeddings=2048,
    ),
    "lfm2_moe_b": define("lfm2_moe", 130,
        vocab_size=70, hidden_size=48, intermediate_size=56, moe_intermediate_size=40, num_hidden_layers=4,
        num_attention_heads=3, num_key_value_heads=3, num_dense_layers=2, num_experts=5, num_experts_per_tok=2,
        layer_types=["full_attention", "conv", "full_attention", "conv"], conv_L_cache=3, norm_topk_prob=False,
        max_position_embeddings=1024, tie_word_embeddings=False, norm_eps=1e-4,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    ),
    # Dense beside routed, two sizes of heads, keys that are values, a bound on logits; and dense alone, with biases.
    "gemma4_a": define("gemma4_text", 150,
        vocab_size=81, hidden_size=60, intermediate_size=52, moe_intermediate_size=28, num_hidden_layers=5,
        num_attention_heads=6, num_key_value_heads=3, head_dim=14, global_head_dim=24, num_global_key_value_heads=2,
        attention_k_eq_v=True, enable_moe_block=True, num_experts=9, top_k_experts=3, hidden_size_per_layer_input=0,
        sliding_window=33, final_logit_softcapping=8.0, max_position_embeddings=1024,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention",
                     "full_attention"],
    ),
    "gemma4_b": define("gemma4_text", 120,
        vocab_size=70, hidden_size=44, intermediate_size=66, num_hidden_layers=7, num_attention_heads=4,
        num_key_value_heads=2, head_dim=10, global_head_dim=16, hidden_size_per_layer_input=0, sliding_window=20,
        attention_bias=True, max_position_embeddings=1024, tie_word_embeddings=False, rms_norm_eps=1e-5,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {
                "rope_type": "proportional", "rope_theta": 9000.0, "partial_rotary_factor": 0.5, "factor": 2.0,
            },
        },
    ),
    "gemma3_a": define("gemma3_text", 150,
        vocab_size=77, hidden_size=48, intermediate_size=76, num_hidden_layers=7, num_attention_heads=6,
        num_key_value_heads=2, head_dim=14, sliding_window=31, query_pre_attn_scalar=14, max_position_embeddings=1024,
        final_logit_softcapping=9.0,
    ),
    "gemma3_b": define("gemma3_text", 130,
        vocab_size=66, hidden_size=40, intermediate_size=50, num_hidden_layers=4, num_attention_heads=5,
        num_key_value_heads=5, head_dim=12, sliding_window=18, query_pre_attn_scalar=20, max_position_embeddings=1024,
        attention_bias=True, tie_word_embeddings=False, rms_norm_eps=1e-5,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 600.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 8000.0, "factor": 4.0},
        },
    ),
    "granitemoe_a": define("granitemoe", 140,
        vocab_size=75, hidden_size=60, intermediate_size=28, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, num_local_experts=7, num_experts_per_tok=3, max_position_embeddings=1024,
        attention_multiplier=0.25, embedding_multiplier=0.6, residual_multiplier=1.4, logits_scaling=0.9,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    ),
    "granitemoe_b": define("granitemoeshared", 130,
        vocab_size=66, hidden_size=54, intermediate_size=22, shared_intermediate_size=38, num_hidden_layers=4,
        num_attention_heads=3, num_key_value_heads=3, num_local_experts=5, num_experts_per_tok=2,
        max_position_embeddings=1024, attention_bias=True, attention_multiplier=0.4, embedding_multiplier=0.8,
        residual_multiplier=1.2, logits_scaling=0.7, rms_norm_eps=1e-5,
    ),
    # No rope, two groups of heads, steps bounded on both sides.
    "granitemoehybrid_a": define("granitemoehybrid", 150,
        vocab_size=74, hidden_size=60, intermediate_size=26, shared_intermediate_size=34, num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        num_attention_heads=6, num_key_value_heads=2, num_local_experts=7, num_experts_per_tok=3, mamba_n_heads=8,
        mamba_n_groups=2, mamba_d_state=9, mamba_d_conv=3, mamba_proj_bias=True, time_step_limit=[0.3, 1.2],
        attention_multiplier=0.25, embedding_multiplier=0.6, residual_multiplier=1.4, logits_scaling=0.9,
        tie_word_embeddings=True, max_position_embeddings=1024,
    ),
    # With rope, and without experts.
    "granitemoehybrid_b": define("granitemoehybrid", 120,
        vocab_size=66, hidden_size=54, shared_intermediate_size=70, num_hidden_layers=4, num_attention_heads=3,
        layer_types=["full_attention", "linear_attention", "linear_attention", "full_attention"],
        num_key_value_heads=1, num_local_experts=0, mamba_n_heads=6, mamba_n_groups=1, mamba_d_state=12,
        mamba_conv_bias=False, position_embedding_type="rope", attention_bias=True, attention_multiplier=0.4,
        embedding_multiplier=0.8, residual_multiplier=1.2, logits_scaling=0.7, max_position_embeddings=1024,
    ),
    # All four kinds of layers, groups of heads, biases, all tokens through one shared expert.
    "nemotron_h_a": define("nemotron_h", 150,
        vocab_size=78, hidden_size=60, intermediate_size=70, moe_intermediate_size=36, n_routed_experts=8,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe"],
        num_attention_heads=4, num_key_value_heads=2, head_dim=14, ssm_state_size=10, mamba_num_heads=6,
        mamba_head_dim=9, n_groups=3, conv_kernel=4, num_experts_per_tok=3, routed_scaling_factor=1.6,
        moe_shared_expert_intermediate_size=44, mlp_bias=True, use_bias=True, max_position_embeddings=1024,
    ),
    # Experts on latent channels, chosen from two groups of four; steps bounded from below.
    "nemotron_h_b": define("nemotron_h", 120,
        vocab_size=66, hidden_size=52, intermediate_size=40, moe_intermediate_size=30, n_routed_experts=12,
        layers_block_type=["moe", "full_attention", "linear_attention", "moe", "linear_attention"],
        num_attention_heads=3, num_key_value_heads=1, head_dim=16, ssm_state_size=6, mamba_num_heads=4,
        mamba_head_dim=12, n_groups=1, conv_kernel=3, use_conv_bias=False, num_experts_per_tok=2, n_group=4,
        topk_group=2, norm_topk_prob=False, moe_latent_size=28, moe_shared_expert_intermediate_size=34,
        time_step_min=0.7, layer_norm_epsilon=1e-4, max_position_embeddings=1024,
    ),
    # Grouped sigmoid routing with a bias, low-rank queries, YaRN with the softmax scale of mscale_all_dim.
    "v3_a": define("deepseek_v3", 220,
        vocab_size=72, hidden_size=60, intermediate_size=88, moe_intermediate_size=28, num_hidden_layers=4,
        num_attention_heads=3, num_key_value_heads=3, n_routed_experts=12, num_experts_per_tok=3, n_group=4,
        topk_group=2, n_shared_experts=1, first_k_dense_replace=1, norm_topk_prob=True, routed_scaling_factor=2.5,
        q_lora_rank=36, kv_lora_rank=20, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
        max_position_embeddings=2048, rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        num_mtp_layers=0,
    ),
    "v3_b": define("deepseek_v3", 150,
        vocab_size=65, hidden_size=70, intermediate_size=90, moe_intermediate_size=30, num_hidden_layers=3,
        num_attention_heads=5, num_key_value_heads=5, n_routed_experts=7, num_experts_per_tok=2, n_group=1,
        topk_group=1, n_shared_experts=2, first_k_dense_replace=0, norm_topk_prob=False, routed_scaling_factor=1.0,
        q_lora_rank=None, kv_lora_rank=24, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=18,
        max_position_embeddings=1024, num_mtp_layers=0,
    ),
    # Kimi-K2's config: one group, and YaRN whose two bounds are one.
    "kimi_k2_a": define("kimi_k2", 160,
        architectures=["DeepseekV3ForCausalLM"], attention_bias=False, attention_dropout=0.0, aux_loss_alpha=0.001,
        bos_token_id=0, eos_token_id=1, first_k_dense_replace=1, hidden_act="silu", hidden_size=140,
        initializer_range=0.02, intermediate_size=200, kv_lora_rank=40, max_position_embeddings=2048,
        model_type="kimi_k2", moe_intermediate_size=60, moe_layer_freq=1, n_group=1, n_routed_experts=9,
        n_shared_experts=1, norm_topk_prob=True, num_attention_heads=5, num_experts_per_tok=3, num_hidden_layers=3,
        num_key_value_heads=5, num_nextn_predict_layers=0, pretraining_tp=1, q_lora_rank=52, qk_nope_head_dim=20,
        qk_rope_head_dim=16,
        quantization_config={
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        },
        rms_norm_eps=1e-06,
        rope_scaling={
            "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 128, "type": "yarn",
        },
        rope_theta=50000.0, routed_scaling_factor=2.827, scoring_func="sigmoid", seq_aux=True,
        tie_word_embeddings=False, topk_group=1, topk_method="noaux_tc", torch_dtype="bfloat16",
        transformers_version="4.48.3", use_cache=True, v_head_dim=24, vocab_size=90,
        listing=released_v3,
    ),
    # Six tokens of all before it for each one; groups and YaRN as V3.
    "deepseek_v32_a": define("deepseek_v32", 180,
        vocab_size=74, hidden_size=60, intermediate_size=88, moe_intermediate_size=28, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=3, n_routed_experts=12, num_experts_per_tok=3, n_group=4,
        topk_group=2, first_k_dense_replace=1, routed_scaling_factor=2.5, q_lora_rank=36, kv_lora_rank=20,
        qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, index_n_heads=24, index_head_dim=18, index_topk=6,
        max_position_embeddings=2048, rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "deepseek_v32_b": define("deepseek_v32", 130,
        vocab_size=63, hidden_size=50, intermediate_size=70, moe_intermediate_size=26, num_hidden_layers=4,
        num_attention_heads=5, num_key_value_heads=5, n_routed_experts=6, num_experts_per_tok=2, n_group=1,
        topk_group=1, n_shared_experts=2, mlp_layer_types=["sparse", "dense", "sparse", "sparse"],
        norm_topk_prob=False, routed_scaling_factor=1.2, q_lora_rank=30, kv_lora_rank=24, qk_nope_head_dim=10,
        qk_rope_head_dim=6, v_head_dim=18, index_n_heads=28, index_head_dim=6, index_topk=60,
        max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=True,
    ),
    # Layers that take the choice of one before them.
    "glm_moe_dsa_a": define("glm_moe_dsa", 160,
        vocab_size=71, hidden_size=56, intermediate_size=80, moe_intermediate_size=30, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=9, num_experts_per_tok=3,
        first_k_dense_replace=2, q_lora_rank=34, kv_lora_rank=22, qk_nope_head_dim=12, qk_rope_head_dim=8,
        v_head_dim=14, index_n_heads=24, index_head_dim=16, index_topk=9, max_position_embeddings=1024,
        indexer_types=["full", "shared", "full", "shared", "shared"],
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    ),
    "glm_moe_dsa_b": define("glm_moe_dsa", 110,
        vocab_size=66, hidden_size=46, intermediate_size=62, moe_intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=3, n_routed_experts=6, num_experts_per_tok=2, n_group=2,
        topk_group=1, n_shared_experts=2, norm_topk_prob=False, routed_scaling_factor=1.0, first_k_dense_replace=0,
        q_lora_rank=28, kv_lora_rank=18, qk_nope_head_dim=14, qk_rope_head_dim=4, v_head_dim=10, index_n_heads=26,
        index_head_dim=12, index_topk=5, max_position_embeddings=1024,
    ),
    "v3_fp8": define("deepseek_v3", 200,
        architectures=["DeepseekV3ForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=0,
        eos_token_id=1, ep_size=1, first_k_dense_replace=1, hidden_act="silu", hidden_size=160,
        initializer_range=0.02, intermediate_size=208, kv_lora_rank=48, max_position_embeddings=2048,
        model_type="deepseek_v3", moe_intermediate_size=72, moe_layer_freq=1, n_group=2, n_routed_experts=8,
        n_shared_experts=1, norm_topk_prob=True, num_attention_heads=6, num_experts_per_tok=3, num_hidden_layers=3,
        num_key_value_heads=6, num_nextn_predict_layers=1, q_lora_rank=56, qk_nope_head_dim=24, qk_rope_head_dim=16,
        quantization_config={
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        },
        rms_norm_eps=1e-06,
        rope_scaling={
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 1024, "type": "yarn",
        },
        rope_theta=10000, routed_scaling_factor=2.5, scoring_func="sigmoid", tie_word_embeddings=False,
        topk_group=1, topk_method="noaux_tc", torch_dtype="bfloat16", transformers_version="4.33.1",
        use_cache=True, v_head_dim=24, vocab_size=80,
        listing=released_v3, shards=2,
    ),
    # V2-Lite's shape: greedy softmax routing, two shared experts, full-rank queries.
    "v2_a": define("deepseek_v2", 220,
        vocab_size=68, hidden_size=60, intermediate_size=84, moe_intermediate_size=26, num_hidden_layers=4,
        num_attention_heads=3, num_key_value_heads=3, n_routed_experts=9, num_experts_per_tok=4, n_group=1,
        topk_group=1, topk_method="greedy", n_shared_experts=2, first_k_dense_replace=1, norm_topk_prob=False,
        routed_scaling_factor=1.0, q_lora_rank=None, kv_lora_rank=20, qk_nope_head_dim=14, qk_rope_head_dim=8,
        v_head_dim=10, max_position_embeddings=2048,
        rope_parameters=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    # V2's shape: group-limited routing; unequal mscales also scale cos and sin.
    "v2_b": define("deepseek_v2", 180,
        vocab_size=66, hidden_size=50, intermediate_size=70, moe_intermediate_size=22, num_hidden_layers=3,
        num_attention_heads=5, num_key_value_heads=5, n_routed_experts=12, num_experts_per_tok=3, n_group=3,
        topk_group=2, topk_method="group_limited_greedy", n_shared_experts=1, first_k_dense_replace=1,
        norm_topk_prob=False, routed_scaling_factor=16.0, q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=12,
        qk_rope_head_dim=10, v_head_dim=12, max_position_embeddings=2048,
        rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 0.707},
    ),
    "qwen3_moe_a": define("qwen3_moe", 200,
        vocab_size=70, hidden_size=64, intermediate_size=100, moe_intermediate_size=26, num_hidden_layers=6,
        num_attention_heads=6, num_key_value_heads=3, head_dim=18, num_experts=9, num_experts_per_tok=3,
        norm_topk_prob=True, decoder_sparse_step=2, mlp_only_layers=[3], rope_parameters={"rope_theta": 1000000.0},
        max_position_embeddings=1024,
    ),
    "qwen3_moe_b": define("qwen3_moe", 160,
        vocab_size=64, hidden_size=56, intermediate_size=80, moe_intermediate_size=30, num_hidden_layers=3,
        num_attention_heads=7, num_key_value_heads=1, head_dim=10, num_experts=6, num_experts_per_tok=4,
        norm_topk_prob=False, attention_bias=True, tie_word_embeddings=True, max_position_embeddings=1024,
    ),
    "mixtral_a": define("mixtral", 170,
        vocab_size=67, hidden_size=60, intermediate_size=44, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, num_local_experts=5, num_experts_per_tok=2, max_position_embeddings=1024,
    ),
    "mixtral_b": define("mixtral", 190,
        vocab_size=64, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=3, head_dim=14, num_local_experts=7, num_experts_per_tok=3, sliding_window=37,
        rope_parameters={"rope_theta": 5000.0}, max_position_embeddings=1024,
    ),
    "llama_a": define("llama", 180,
        vocab_size=90, hidden_size=72, intermediate_size=100, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=1024, rms_norm_eps=1e-5,
    ),
    "llama_b": define("llama", 200,
        vocab_size=64, hidden_size=60, intermediate_size=84, num_hidden_layers=3, num_attention_heads=5,
        num_key_value_heads=1, head_dim=24, tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
        max_position_embeddings=1024,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    ),
    "llama_c": define("llama", 150,
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    ),
    "qwen3_a": define("qwen3", 160,
        vocab_size=76, hidden_size=60, intermediate_size=90, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, rope_parameters={"rope_theta": 1000000.0},
        max_position_embeddings=1024,
    ),
    "qwen3_b": define("qwen3", 190,
        vocab_size=64, hidden_size=54, intermediate_size=80, num_hidden_layers=5, num_attention_heads=3,
        num_key_value_heads=3, head_dim=20, use_sliding_window=True, sliding_window=29, max_window_layers=2,
        max_position_embeddings=1024,
    ),
    "glm4_moe_lite_a": define("glm4_moe_lite", 160,
        vocab_size=72, hidden_size=56, intermediate_size=80, moe_intermediate_size=28, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=10, n_shared_experts=1, num_experts_per_tok=3,
        kv_lora_rank=20, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=14, v_head_dim=18,
        routed_scaling_factor=1.8, max_position_embeddings=1024, rope_parameters={"rope_theta": 10000.0},
    ),
    "glm4_moe_lite_b": define("glm4_moe_lite", 140,
        vocab_size=64, hidden_size=48, intermediate_size=64, moe_intermediate_size=20, num_hidden_layers=4,
        num_attention_heads=3, num_key_value_heads=3, n_routed_experts=7, n_shared_experts=2, num_experts_per_tok=2,
        kv_lora_rank=16, q_lora_rank=20, qk_rope_head_dim=6, qk_nope_head_dim=10, v_head_dim=12,
        routed_scaling_factor=1.0, norm_topk_prob=False, rope_interleave=False, max_position_embeddings=1024,
        mlp_layer_types=["dense", "sparse", "dense", "sparse"], rope_parameters={"rope_theta": 1000000.0},
    ),
    "qwen3_5_a": define("qwen3_5_text", 170,
        vocab_size=80, hidden_size=60, intermediate_size=90, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=2, head_dim=24, linear_conv_kernel_dim=4, linear_key_head_dim=10, linear_value_head_dim=12,
        linear_num_key_heads=3, linear_num_value_heads=6, max_position_embeddings=1024, tie_word_embeddings=True,
        rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [1, 1, 1]},
    ),
    "qwen3_5_b": define("qwen3_5_text", 130,
        vocab_size=64, hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, linear_conv_kernel_dim=3, linear_key_head_dim=8, linear_value_head_dim=16,
        linear_num_key_heads=4, linear_num_value_heads=4, max_position_embeddings=1024, attention_bias=True,
        layer_types=["full_attention", "linear_attention", "linear_attention"],
        rope_parameters={"rope_theta": 100000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
    ),
    "qwen3_5_moe_a": define("qwen3_5_moe_text", 180,
        vocab_size=72, hidden_size=56, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=1, head_dim=32,
        linear_conv_kernel_dim=4, linear_key_head_dim=12, linear_value_head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=8, moe_intermediate_size=24, shared_expert_intermediate_size=30, num_experts=12,
        num_experts_per_tok=3, max_position_embeddings=1024,
        rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]},
    ),
    "qwen3_5_moe_b": define("qwen3_5_moe_text", 120,
        vocab_size=64, hidden_size=40, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3, head_dim=12,
        linear_conv_kernel_dim=2, linear_key_head_dim=6, linear_value_head_dim=10, linear_num_key_heads=5,
        linear_num_value_heads=5, moe_intermediate_size=14, shared_expert_intermediate_size=22, num_experts=7,
        num_experts_per_tok=4, max_position_embeddings=1024,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 1]},
    ),
    # n-grams in the first layer and in a later one; the end of a text among the prompt's tokens; blocks unseen.
    "qwen4_exp_a": define("qwen4_exp_text", 150,
        vocab_size=70, hidden_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        linear_conv_kernel_dim=4, linear_key_head_dim=12, linear_value_head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=6, moe_intermediate_size=20, shared_expert_intermediate_size=26, num_experts=11,
        num_experts_per_tok=3, norm_topk_prob=False, max_position_embeddings=1024, hc_count=3, hc_lowrank=10,
        ple_layer_ids=[1, 3],
        ple_embed_dim=36, ple_conv_kernel_size=3, ngram_size=3, heads_per_ngram=3, ngram_vocab_size_base=40,
        make_ngram_vocab_size_divisible_by=16, split_ngram_parts=5, indexer_n_heads=24, indexer_kv_heads=1,
        indexer_head_dim=10, indexer_budget=24, indexer_compress_ratio=4, eos_token_id=3,
        rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
    ),
    "qwen4_exp_b": define("qwen4_exp_text", 120,
        vocab_size=64, hidden_size=40, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=3, head_dim=12,
        linear_conv_kernel_dim=3, linear_key_head_dim=6, linear_value_head_dim=10, linear_num_key_heads=4,
        linear_num_value_heads=4, moe_intermediate_size=14, shared_expert_intermediate_size=18, num_experts=7,
        num_experts_per_tok=2, max_position_embeddings=1024, hc_count=2, hc_lowrank=14,
        ple_layer_ids=[2], ple_conv_kernel_size=4, ngram_size=4, heads_per_ngram=5, ple_embed_dim=30,
        ngram_vocab_size_base=53, make_ngram_vocab_size_divisible_by=8, split_ngram_parts=3, seed=77,
        indexer_n_heads=26, indexer_kv_heads=1, indexer_head_dim=14, indexer_budget=15, indexer_compress_ratio=5,
        eos_token_id=[5], output_gate_type="sigmoid", tie_word_embeddings=True,
        layer_types=["indexed_attention", "linear_attention", "indexed_attention"],
        rope_parameters={"rope_theta": 50000.0, "partial_rotary_factor": 1.0, "mrope_section": [2, 2, 2]},
    ),
    "mistral_a": define("mistral", 170,
        vocab_size=72, hidden_size=60, intermediate_size=76, num_hidden_layers=3, num_attention_heads=5,
        num_key_value_heads=1, head_dim=14, sliding_window=41, max_position_embeddings=1024,
    ),
    "mistral_b": define("mistral", 130,
        vocab_size=64, hidden_size=48, intermediate_size=70, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=3, sliding_window=None, tie_word_embeddings=True, max_position_embeddings=1024,
        rope_parameters={"rope_theta": 1000000.0},
    ),
    # Queries that grow with their positions, with a window and YaRN; as transformers has it; without growth.
    "ministral3_a": define("ministral3", 170,
        vocab_size=75, hidden_size=60, intermediate_size=76, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=14, sliding_window=63, max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 9000.0, "factor": 16.0, "original_max_position_embeddings": 31,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3,
        },
    ),
    "ministral3_b": define("ministral3", 130,
        vocab_size=66, hidden_size=48, intermediate_size=70, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=12, tie_word_embeddings=True, max_position_embeddings=1024,
    ),
    "granite_a": define("granite", 160,
        vocab_size=78, hidden_size=60, intermediate_size=84, num_hidden_layers=3, num_attention_heads=5,
        num_key_value_heads=1, embedding_multiplier=12.0, logits_scaling=2.5, residual_multiplier=0.22,
        attention_multiplier=0.3, max_position_embeddings=1024,
    ),
    "granite_b": define("granite", 120,
        vocab_size=65, hidden_size=48, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, mlp_bias=True, embedding_multiplier=3.0,
        max_position_embeddings=1024, attention_multiplier=0.25,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    # Half of each head turns; LongRoPE of its short factors, and a window.
    "phi3_a": define("phi3", 150,
        vocab_size=79, hidden_size=60, intermediate_size=84, num_hidden_layers=3, num_attention_heads=5,
        num_key_value_heads=1, max_position_embeddings=4096, original_max_position_embeddings=1024, pad_token_id=None,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 9000.0, "partial_rotary_factor": 0.7,
            "original_max_position_embeddings": 1024,
            "short_factor": [1.0, 1.2, 1.7, 2.4], "long_factor": [1.0, 2.0, 4.0, 8.0],
        },
    ),
    "phi3_b": define("phi3", 120,
        vocab_size=66, hidden_size=48, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, sliding_window=47, tie_word_embeddings=True, max_position_embeddings=1024,
        pad_token_id=None,
    ),
    "olmo2_a": define("olmo2", 150,
        vocab_size=79, hidden_size=60, intermediate_size=84, num_hidden_layers=3, num_attention_heads=5,
        num_key_value_heads=1, max_position_embeddings=1024, pad_token_id=None,
    ),
    "olmo2_b": define("olmo2", 120,
        vocab_size=66, hidden_size=48, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, attention_bias=True, max_position_embeddings=1024,
        rms_norm_eps=1e-6, pad_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    ),
    "olmo3_a": define("olmo3", 150,
        vocab_size=79, hidden_size=60, intermediate_size=84, num_hidden_layers=4, num_attention_heads=5,
        num_key_value_heads=1, sliding_window=41, max_position_embeddings=2048, pad_token_id=None,
        rope_parameters={
            "full_attention": {"rope_type": "yarn", "rope_theta": 9000.0, "factor": 8.0,
                               "original_max_position_embeddings": 64, "attention_factor": 1.2079441541679836,
                               "beta_fast": 32, "beta_slow": 1},
            "sliding_attention": {"rope_type": "default", "rope_theta": 9000.0},
        },
    ),
    "olmo3_b": define("olmo3", 120,
        vocab_size=66, hidden_size=48, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, sliding_window=29, layer_types=["full_attention", *["sliding_attention"] * 2],
        tie_word_embeddings=True, max_position_embeddings=1024, pad_token_id=None,
    ),
    "exaone4_a": define("exaone4", 150,
        vocab_size=79, hidden_size=60, intermediate_size=84, num_hidden_layers=4, num_attention_heads=5,
        num_key_value_heads=1, sliding_window=37, max_position_embeddings=2048,
        rope_parameters={"rope_type": "llama3", "rope_theta": 9000.0, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "exaone4_b": define("exaone4", 120,
        vocab_size=66, hidden_size=48, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=None, layer_types=["full_attention"] * 3, tie_word_embeddings=True,
        max_position_embeddings=1024,
    ),
    "exaone_moe_a": define("exaone_moe", 150,
        vocab_size=81, hidden_size=60, intermediate_size=84, moe_intermediate_size=28, num_hidden_layers=4,
        num_attention_heads=5, num_key_value_heads=1, num_experts=12, num_experts_per_tok=3, num_shared_experts=2,
        n_group=4, topk_group=2, sliding_window=33, max_position_embeddings=1024,
    ),
    "exaone_moe_b": define("exaone_moe", 120,
        vocab_size=66, hidden_size=48, intermediate_size=52, moe_intermediate_size=36, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, head_dim=14, num_experts=7, num_experts_per_tok=2,
        mlp_layer_types=["sparse", "dense", "sparse"], norm_topk_prob=False, sliding_window=44,
        layer_types=["full_attention", *["sliding_attention"] * 2], tie_word_embeddings=True,
        max_position_embeddings=1024, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "glm4_a": define("glm4", 150,
        vocab_size=79, hidden_size=60, intermediate_size=84, num_hidden_layers=3, num_attention_heads=5,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=1024, pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    ),
    "glm4_b": define("glm4", 120,
        vocab_size=66, hidden_size=48, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, head_dim=14, attention_bias=False, tie_word_embeddings=True, rms_norm_eps=1e-5,
        max_position_embeddings=1024, pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.86},
    ),
    "mistral4_a": define("mistral4", 150,
        vocab_size=81, hidden_size=60, intermediate_size=84, moe_intermediate_size=28, num_hidden_layers=4,
        num_attention_heads=5, num_key_value_heads=5, q_lora_rank=22, kv_lora_rank=18, qk_nope_head_dim=10,
        qk_rope_head_dim=6, v_head_dim=14, n_routed_experts=12, num_experts_per_tok=3, n_shared_experts=2, n_group=4,
        topk_group=2, first_k_dense_replace=1, routed_scaling_factor=1.7, max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 9000.0, "factor": 8.0, "original_max_position_embeddings": 29,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.4,
            "partial_rotary_factor": 0.375,
        },
    ),
    "mistral4_b": define("mistral4", 120,
        vocab_size=64, hidden_size=44, intermediate_size=52, moe_intermediate_size=36, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=3, q_lora_rank=None, kv_lora_rank=26, qk_nope_head_dim=12,
        qk_rope_head_dim=8, v_head_dim=10, n_routed_experts=7, num_experts_per_tok=2, norm_topk_prob=False,
        rope_interleave=False, tie_word_embeddings=True, max_position_embeddings=1024,
    ),
    "seed_oss_a": define("seed_oss", 160,
        vocab_size=78, hidden_size=60, intermediate_size=84, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=14, max_position_embeddings=1024,
    ),
    "seed_oss_b": define("seed_oss", 120,
        vocab_size=65, hidden_size=44, intermediate_size=52, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=3, head_dim=16, attention_bias=False, attention_out_bias=True, mlp_bias=True,
        tie_word_embeddings=True, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7},
    ),
    "qwen2_5_vl_a": define("qwen2_5_vl_text", 150,
        vocab_size=79, hidden_size=60, intermediate_size=72, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [1, 2, 2]},
    ),
    "qwen2_5_vl_b": define("qwen2_vl_text", 120,
        vocab_size=70, hidden_size=48, intermediate_size=52, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=3, rms_norm_eps=1e-6, tie_word_embeddings=True, max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    ),
    "glm4v_moe_a": define("glm4v_moe_text", 150,
        vocab_size=81, hidden_size=60, intermediate_size=72, moe_intermediate_size=28, num_hidden_layers=4,
        num_attention_heads=3, num_key_value_heads=1, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2,
        n_group=2, topk_group=1, routed_scaling_factor=1.5, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [1, 2, 2],
                         "partial_rotary_factor": 0.5},
    ),
    "glm4v_moe_b": define("glm4v_moe_text", 120,
        vocab_size=70, hidden_size=48, intermediate_size=52, moe_intermediate_size=36, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=5, num_experts_per_tok=2, attention_bias=False,
        first_k_dense_replace=2, norm_topk_prob=False, rms_norm_eps=1e-6, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1],
                         "partial_rotary_factor": 0.5},
    ),
    "qwen2_a": define("qwen2", 160,
        vocab_size=76, hidden_size=60, intermediate_size=84, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=1024,
        rope_parameters={"rope_theta": 1000000.0},
    ),
    "qwen2_b": define("qwen2", 140,
        vocab_size=64, hidden_size=48, intermediate_size=60, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, use_sliding_window=True, sliding_window=31, max_window_layers=2,
        max_position_embeddings=1024,
    ),
    "qwen2_moe_a": define("qwen2_moe", 170,
        vocab_size=70, hidden_size=56, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, moe_intermediate_size=26, shared_expert_intermediate_size=38, num_experts=9,
        num_experts_per_tok=3, max_position_embeddings=1024, rope_parameters={"rope_theta": 1000000.0},
    ),
    "qwen2_moe_b": define("qwen2_moe", 130,
        vocab_size=64, hidden_size=40, intermediate_size=66, num_hidden_layers=4, num_attention_heads=5,
        num_key_value_heads=5, moe_intermediate_size=18, shared_expert_intermediate_size=22, num_experts=7,
        num_experts_per_tok=2, norm_topk_prob=True, qkv_bias=False, decoder_sparse_step=2, mlp_only_layers=[3],
        max_position_embeddings=1024,
    ),
    "glm4_moe_a": define("glm4_moe", 160,
        vocab_size=72, hidden_size=56, intermediate_size=80, moe_intermediate_size=28, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=20, n_routed_experts=10, num_experts_per_tok=3,
        attention_bias=True, use_qk_norm=True, routed_scaling_factor=2.5, max_position_embeddings=1024,
        num_mtp_layers=0,
    ),
    "glm4_moe_b": define("glm4_moe", 140,
        vocab_size=64, hidden_size=48, intermediate_size=64, moe_intermediate_size=18, num_hidden_layers=4,
        num_attention_heads=3, num_key_value_heads=3, head_dim=16, n_routed_experts=12, n_shared_experts=2,
        num_experts_per_tok=4, n_group=3, topk_group=2, first_k_dense_replace=2, norm_topk_prob=False,
        max_position_embeddings=1024, rope_parameters={"rope_theta": 50000.0, "partial_rotary_factor": 0.75},
        num_mtp_layers=0,
    ),
    # Rows of a key head beside one another; and one dense layer, weights of experts as they are.
    "qwen3_next_a": define("qwen3_next", 170,
        vocab_size=75, hidden_size=52, intermediate_size=60, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, linear_conv_kernel_dim=4, linear_key_head_dim=10, linear_value_head_dim=6,
        linear_num_key_heads=3, linear_num_value_heads=6, moe_intermediate_size=22, shared_expert_intermediate_size=26,
        num_experts=11, num_experts_per_tok=3, max_position_embeddings=1024,
        rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    ),
    "qwen3_next_b": define("qwen3_next", 110,
        vocab_size=67, hidden_size=44, intermediate_size=30, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=3, head_dim=12, linear_conv_kernel_dim=2, linear_key_head_dim=6, linear_value_head_dim=14,
        linear_num_key_heads=4, linear_num_value_heads=4, moe_intermediate_size=18, shared_expert_intermediate_size=20,
        num_experts=6, num_experts_per_tok=2, norm_topk_prob=False, max_position_embeddings=1024, mlp_only_layers=[1],
        layer_types=["linear_attention", "full_attention", "linear_attention"], rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
    # Kimi Delta Attention beside latent attention without rope; channels that forget slowly and fast.
    "kimi_linear_a": define("kimi_linear", 150,
        vocab_size=73, hidden_size=52, intermediate_size=70, moe_intermediate_size=26, num_hidden_layers=4,
        num_attention_heads=3, num_key_value_heads=3, num_local_experts=10, num_experts_per_tok=3, n_group=5,
        topk_group=2, kv_lora_rank=20, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=14, linear_head_dim=12,
        linear_num_heads=4, linear_conv_kernel_dim=4, max_position_embeddings=1024, pad_token_id=0, bos_token_id=0,
        layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"], eos_token_id=1,
    ),
    "kimi_linear_b": define("kimi_linear", 110,
        vocab_size=66, hidden_size=44, intermediate_size=56, moe_intermediate_size=22, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, num_local_experts=6, num_experts_per_tok=2, n_shared_experts=2,
        q_lora_rank=24, kv_lora_rank=18, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=10, linear_head_dim=14,
        linear_num_heads=3, linear_conv_kernel_dim=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=0,
        layer_types=["full_attention", "linear_attention", "linear_attention"], eos_token_id=1, norm_topk_prob=False,
        mlp_layer_types=["sparse", "dense", "sparse"], rms_norm_eps=1e-6,
    ),
    # Decays with a lower bound, gated latent attention; and decays without one.
    "bailing_hybrid_a": define("bailing_hybrid", 150,
        vocab_size=71, hidden_size=54, intermediate_size=66, moe_intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=3, num_key_value_heads=3, num_local_experts=12, num_experts_per_tok=3, n_group=4,
        topk_group=2, first_k_dense_replace=1, kv_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10,
        head_dim=14, short_conv_kernel_size=4, layer_group_size=2, kda_lower_bound=-3.0, num_mtp_layers=0,
        max_position_embeddings=1024, pad_token_id=0, eos_token_id=1,
    ),
    "bailing_hybrid_b": define("bailing_hybrid", 110,
        vocab_size=65, hidden_size=42, intermediate_size=52, moe_intermediate_size=20, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, num_local_experts=6, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=0, norm_topk_prob=False, kv_lora_rank=16, qk_nope_head_dim=6,
        qk_rope_head_dim=4, v_head_dim=12, head_dim=10, short_conv_kernel_size=3, kda_safe_gate=False,
        layer_types=["full_attention", "linear_attention", "full_attention"], num_mtp_layers=0,
        max_position_embeddings=1024, pad_token_id=0, eos_token_id=1, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
    ),
    "gpt_oss_a": define("gpt_oss", 180, listing=released_gpt_oss,
        model_type="gpt_oss", vocab_size=80, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=2, head_dim=20, num_local_experts=9, num_experts_per_tok=3,
        sliding_window=33, max_position_embeddings=1024, rms_norm_eps=1e-5, attention_bias=True, swiglu_limit=7.0,
        tie_word_embeddings=False, rope_theta=150000, quantization_config={"quant_method": "mxfp4"},
        rope_scaling={
            "rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 64,
        },
    ),
    "gpt_oss_b": define("gpt_oss", 140, listing=released_gpt_oss,
        model_type="gpt_oss", vocab_size=64, hidden_size=96, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=3, head_dim=16, num_local_experts=6, num_experts_per_tok=2,
        sliding_window=20, max_position_embeddings=1024, rms_norm_eps=1e-5, attention_bias=True, swiglu_limit=1.0,
        tie_word_embeddings=False, rope_theta=10000, quantization_config={"quant_method": "mxfp4"},
        layer_types=["full_attention", "full_attention", "sliding_attention"],
        rope_scaling={
            "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 256,
        },
    ),
    # Attention beside the feed-forward: a dense layer that turns and sees all, LayerNorm, averages; RMS norms, sums.
    "cohere2_moe_a": define("cohere2_moe", 150,
        vocab_size=73, hidden_size=52, intermediate_size=28, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=2, head_dim=14, num_experts=7, num_experts_per_tok=3, num_shared_experts=2,
        first_k_dense_replace=1, prefix_dense_intermediate_size=60, sliding_window=30, sliding_window_pattern=3,
        expert_selection_fn="sigmoid", logit_scale=0.8, eos_token_id=2, max_position_embeddings=1024,
    ),
    "cohere2_moe_b": define("cohere2_moe", 130,
        vocab_size=64, hidden_size=44, intermediate_size=36, num_hidden_layers=4, num_attention_heads=3,
        head_dim=12, num_experts=5, num_experts_per_tok=2, num_shared_experts=1, sliding_window=19,
        shared_expert_combination_strategy="sum", rms_norm_eps=1e-6, attention_bias=True, eos_token_id=2,
        layer_types=["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        mlp_layer_types=["sparse", "dense", "sparse", "sparse"], prefix_dense_sliding_window_pattern=2,
        tie_word_embeddings=False, logit_scale=1.3, max_position_embeddings=1024,
    ),
    # Norms over all heads together, half of a head rotated or all of it, a correction of the choice; odd sizes.
    "minimax_m2_a": define("minimax_m2", 150,
        vocab_size=81, hidden_size=60, intermediate_size=36, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=14, rotary_dim=8, num_local_experts=7, num_experts_per_tok=3,
        max_position_embeddings=1024,
    ),
    "minimax_m2_b": define("minimax_m2", 120,
        vocab_size=70, hidden_size=44, intermediate_size=28, num_hidden_layers=4, num_attention_heads=3,
        num_key_value_heads=3, head_dim=16, num_local_experts=5, num_experts_per_tok=2, rms_norm_eps=1e-5,
        tie_word_embeddings=True, max_position_embeddings=1024,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 9000.0, "factor": 4.0, "original_max_position_embeddings": 64,
            "partial_rotary_factor": 0.5,
        },
    ),
    # GLM-4.5's without norms of heads, with a whole rope, biases, groups of experts.
    "solar_open_a": define("solar_open", 150,
        vocab_size=79, hidden_size=60, moe_intermediate_size=32, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=12, n_routed_experts=9, n_shared_experts=2, num_experts_per_tok=3,
        routed_scaling_factor=1.6, max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 8000.0, "factor": 4.0, "original_max_position_embeddings": 512,
        },
    ),
    "solar_open_b": define("solar_open", 120,
        vocab_size=68, hidden_size=44, moe_intermediate_size=28, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=2,
        norm_topk_prob=False, attention_bias=True, max_position_embeddings=1024,
    ),
    # Two dense layers or one, biases in attention and dense feed-forwards, two shared experts.
    "hy_v3_a": define("hy_v3", 150,
        vocab_size=77, hidden_size=60, intermediate_size=72, moe_intermediate_size=28, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=2, head_dim=14, num_experts=7, num_experts_per_tok=3,
        num_shared_experts=2, mlp_layer_types=["dense", "sparse", "dense", "sparse"], max_position_embeddings=1024,
    ),
    "hy_v3_b": define("hy_v3", 120,
        vocab_size=70, hidden_size=44, intermediate_size=52, moe_intermediate_size=36, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=3, head_dim=16, num_experts=5, num_experts_per_tok=2,
        router_scaling_factor=1.3, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
        max_position_embeddings=1024,
    ),
    # Norms after rope, whose base an alpha makes larger, as many experts for each layer as it says; plain rope, biases.
    "hunyuan_v1_moe_a": define("hunyuan_v1_moe", 150,
        vocab_size=81, hidden_size=60, intermediate_size=36, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=12, num_experts=7, moe_topk=[3, 1, 2], max_position_embeddings=1024,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1000.0, "alpha": 30.0, "factor": 1.0},
    ),
    "hunyuan_v1_moe_b": define("hunyuan_v1_moe", 120,
        vocab_size=70, hidden_size=48, intermediate_size=28, num_hidden_layers=4, num_attention_heads=3,
        num_key_value_heads=3, head_dim=16, num_experts=5, moe_topk=2, attention_bias=True, tie_word_embeddings=True,
        max_position_embeddings=1024,
    ),
    # Windows with sinks, twice the key/value heads and their own rope; values of another size; groups, biases.
    "mimo_v2_flash_a": define("mimo_v2_flash", 150,
        vocab_size=79, hidden_size=60, intermediate_size=72, moe_intermediate_size=28, num_hidden_layers=7,
        num_attention_heads=8, num_key_value_heads=2, head_dim=18, v_head_dim=10, n_routed_experts=9,
        num_experts_per_tok=3, sliding_window=33, max_position_embeddings=1024,
    ),
    "mimo_v2_flash_b": define("mimo_v2_flash", 120,
        vocab_size=70, hidden_size=44, intermediate_size=52, moe_intermediate_size=36, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=3, head_dim=12, v_head_dim=16, n_routed_experts=8, n_group=4,
        topk_group=2, num_experts_per_tok=2, norm_topk_prob=False, routed_scaling_factor=1.4, attention_bias=True,
        attention_value_scale=None, sliding_window=20, max_position_embeddings=1024,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        mlp_layer_types=["sparse", "dense", "sparse", "sparse"],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 9000.0, "partial_rotary_factor": 1.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        },
    ),
    # Layers without rope, and windows there; biases.
    "smollm3_a": define("smollm3", 150,
        vocab_size=79, hidden_size=60, intermediate_size=72, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    ),
    "smollm3_b": define("smollm3", 120,
        vocab_size=70, hidden_size=48, intermediate_size=56, num_hidden_layers=5, num_attention_heads=3,
        num_key_value_heads=3, no_rope_layers=[1, 0, 1, 0, 0], use_sliding_window=True, sliding_window=23,
        attention_bias=True, mlp_bias=True, tie_word_embeddings=False, max_position_embeddings=1024,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    ),
    # The text parts of models of several parts: sections of positions, YaRN, biases, dense layers.
    "qwen3_vl_a": define("qwen3_vl_text", 150,
        vocab_size=79, hidden_size=60, intermediate_size=72, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=12, max_position_embeddings=1024,
        rope_parameters={
            "rope_type": "default", "rope_theta": 5000.0, "mrope_section": [2, 2, 2], "mrope_interleaved": True,
        },
    ),
    "qwen3_vl_b": define("qwen3_vl_text", 120,
        vocab_size=70, hidden_size=44, intermediate_size=52, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=3, head_dim=16, attention_bias=True, tie_word_embeddings=True,
        max_position_embeddings=2048, rope_parameters={
            "rope_type": "yarn", "rope_theta": 9000.0, "factor": 4.0, "original_max_position_embeddings": 512,
            "mrope_section": [4, 2, 2],
        },
    ),
    "qwen3_vl_moe_a": define("qwen3_vl_moe_text", 150,
        vocab_size=81, hidden_size=60, intermediate_size=72, moe_intermediate_size=28, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=2, head_dim=14, num_experts=7, num_experts_per_tok=3,
        mlp_only_layers=[1], max_position_embeddings=1024,
    ),
    "qwen3_vl_moe_b": define("qwen3_vl_moe_text", 120,
        vocab_size=70, hidden_size=48, intermediate_size=52, moe_intermediate_size=36, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, num_experts=5, num_experts_per_tok=2, attention_bias=True,
        rms_norm_eps=1e-5, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [3, 1, 1]},
    ),
    # Ling 2.0, in GLM-4.5's stead: groups and a layer that drafts; biases, one group, whole rope.
    "bailing_moe_a": define("bailing_moe", 150,
        architectures=["BailingMoeV2ForCausalLM"], model_type="bailing_moe", vocab_size=81, hidden_size=60,
        intermediate_size=72, moe_intermediate_size=28, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, head_dim=12, num_experts=8, num_experts_per_tok=3, num_shared_experts=1, n_group=4,
        topk_group=2, first_k_dense_replace=1, num_nextn_predict_layers=1, partial_rotary_factor=0.5,
        rope_theta=6000, rope_scaling=None, max_position_embeddings=1024, routed_scaling_factor=2.5,
        norm_topk_prob=True, score_function="sigmoid", moe_router_enable_expert_bias=True, use_qk_norm=True,
        use_qkv_bias=False, use_bias=False, use_rmsnorm=True, rms_norm_eps=1e-6, tie_word_embeddings=False,
        hidden_act="silu", router_dtype="fp32", moe_shared_expert_intermediate_size=28, max_window_layers=4,
        listing=released_ling,
    ),
    "bailing_moe_b": define("bailing_moe", 120,
        architectures=["BailingMoeV2ForCausalLM"], model_type="bailing_moe", vocab_size=70, hidden_size=44,
        intermediate_size=52, moe_intermediate_size=36, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=3, head_dim=16, num_experts=5, num_experts_per_tok=2, num_shared_experts=2, n_group=1,
        topk_group=1, first_k_dense_replace=2, num_nextn_predict_layers=0, partial_rotary_factor=1.0,
        rope_theta=9000, max_position_embeddings=1024, routed_scaling_factor=1.0, norm_topk_prob=True,
        use_qk_norm=True, use_qkv_bias=True, use_bias=False, rms_norm_eps=1e-5, tie_word_embeddings=False,
        hidden_act="silu", listing=released_ling,
    ),
    # Chunks, layers without rope and with a temperature, a dense layer; several experts, no norm of heads, biases.
    "llama4_a": define("llama4_text", 150,
        vocab_size=74, hidden_size=60, intermediate_size=36, intermediate_size_mlp=52, num_hidden_layers=5,
        num_attention_heads=6, num_key_value_heads=2, head_dim=12, num_local_experts=7, num_experts_per_tok=1,
        moe_layers=[0, 1, 3, 4], attention_chunk_size=32, floor_scale=20, attn_scale=0.4, no_rope_layer_interval=3,
        pad_token_id=0, max_position_embeddings=1024,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 1.0, "original_max_position_embeddings": 64,
        },
    ),
    "llama4_b": define("llama4_text", 120,
        vocab_size=68, hidden_size=48, intermediate_size=28, intermediate_size_mlp=44, num_hidden_layers=4,
        num_attention_heads=3, num_key_value_heads=3, head_dim=16, num_local_experts=5, num_experts_per_tok=2,
        interleave_moe_layer_step=2, attention_chunk_size=25, use_qk_norm=False, attn_temperature_tuning=False,
        no_rope_layers=[1, 0, 1, 1], attention_bias=True, pad_token_id=0, max_position_embeddings=1024,
    ),
    # LayerNorms and biases, also of the head, a sparse mixer that is quick to share; LongRoPE for short ones, windows.
    "phimoe_a": define("phimoe", 150,
        vocab_size=79, hidden_size=60, intermediate_size=34, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, num_local_experts=7, router_jitter_noise=0.2, attention_bias=True, lm_head_bias=True,
        max_position_embeddings=1024,
    ),
    "phimoe_b": define("phimoe", 130,
        vocab_size=71, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=5, sliding_window=37, max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 3000.0, "original_max_position_embeddings": 1024,
            "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5], "long_factor": [2.0, 2.2, 2.6, 3.2, 4.0, 5.0],
            "short_mscale": 1.2, "long_mscale": 1.3,
        },
    ),
    # Windows and full layers with their own ropes, YaRN on one; a dense layer. No windows, weights as they are.
    "mellum_a": define("mellum", 150,
        vocab_size=77, hidden_size=60, intermediate_size=52, moe_intermediate_size=28, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=2, head_dim=14, num_experts=7, num_experts_per_tok=3,
        sliding_window=29, max_position_embeddings=1024, mlp_layer_types=["sparse", "dense", "sparse", "sparse"],
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": YARN | {"rope_theta": 50000.0, "original_max_position_embeddings": 64},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
        },
    ),
    "mellum_b": define("mellum", 120,
        vocab_size=66, hidden_size=44, moe_intermediate_size=20, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=3, head_dim=10, num_experts=5, num_experts_per_tok=2, norm_topk_prob=False,
        attention_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-5, max_position_embeddings=1024,
    ),
    # Gates of heads, as many heads as each layer has, part of a head rotated with YaRN; gates of channels, a cap.
    "laguna_a": define("laguna", 150,
        vocab_size=79, hidden_size=60, intermediate_size=52, moe_intermediate_size=28,
        shared_expert_intermediate_size=36, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
        num_attention_heads_per_layer=[6, 8, 4, 8], head_dim=16, num_experts=7, num_experts_per_tok=3,
        sliding_window=27, moe_routed_scaling_factor=2.5, max_position_embeddings=1024,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": YARN | {
                "rope_theta": 50000.0, "original_max_position_embeddings": 64, "partial_rotary_factor": 0.5,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0, "partial_rotary_factor": 1.0},
        },
    ),
    "laguna_b": define("laguna", 120,
        vocab_size=68, hidden_size=44, intermediate_size=48, moe_intermediate_size=20,
        shared_expert_intermediate_size=24, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=3,
        head_dim=12, num_experts=6, num_experts_per_tok=2, gating="per-element", moe_router_logit_softcapping=0.7,
        attention_bias=True, mlp_layer_types=["sparse", "dense", "sparse"], rms_norm_eps=1e-5,
        max_position_embeddings=1024,
    ),
    # Sinks, windows with rope and full layers without, a shared expert; all layers sparse, weights as they are.
    "flint_a": define("flint", 150,
        vocab_size=81, hidden_size=60, intermediate_size=64, moe_intermediate_size=28,
        shared_expert_intermediate_size=36, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
        head_dim=14, num_experts=9, num_experts_per_tok=3, sliding_window=33, max_position_embeddings=1024,
    ),
    "flint_b": define("flint", 120,
        vocab_size=64, hidden_size=44, intermediate_size=48, moe_intermediate_size=20,
        shared_expert_intermediate_size=24, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=3,
        head_dim=10, num_experts=5, num_experts_per_tok=2, sliding_window=21, norm_topk_prob=False,
        mlp_only_layers=[], attention_bias=True, tie_word_embeddings=True, max_position_embeddings=1024,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
    ),
    # Gates of channels, norms on both sides, windows with rope and full layers without; scaled embeddings or not.
    "afmoe_a": define("afmoe", 150,
        vocab_size=75, hidden_size=60, intermediate_size=64, moe_intermediate_size=28, num_hidden_layers=5,
        num_attention_heads=6, num_key_value_heads=2, head_dim=14, num_experts=9, num_experts_per_tok=3,
        num_shared_experts=1, num_dense_layers=2, route_scale=2.8, sliding_window=31, global_attn_every_n_layers=3,
        mup_enabled=True, max_position_embeddings=1024,
    ),
    "afmoe_b": define("afmoe", 120,
        vocab_size=69, hidden_size=44, intermediate_size=48, moe_intermediate_size=20, num_hidden_layers=3,
        num_attention_heads=3, head_dim=10, num_experts=5, num_experts_per_tok=2, num_shared_experts=2,
        num_dense_layers=0, sliding_window=19, attention_bias=True, tie_word_embeddings=True,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
    ),
    # Every other layer with experts up to one, a sum with a floor; biases, no shared expert.
    "ernie4_5_moe_a": define("ernie4_5_moe", 150,
        vocab_size=76, hidden_size=60, intermediate_size=64, moe_intermediate_size=28, num_hidden_layers=6,
        num_attention_heads=6, num_key_value_heads=2, moe_num_experts=7, moe_k=3, moe_num_shared_experts=2,
        moe_layer_start_index=1, moe_layer_end_index=4, moe_layer_interval=2, moe_norm_min=0.6,
        max_position_embeddings=1024,
    ),
    "ernie4_5_moe_b": define("ernie4_5_moe", 120,
        vocab_size=67, hidden_size=48, intermediate_size=52, moe_intermediate_size=20, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, moe_num_experts=5, moe_k=2, moe_num_shared_experts=0,
        moe_layer_start_index=0, use_bias=True, tie_word_embeddings=False, rms_norm_eps=1e-6,
        max_position_embeddings=1024, rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
    ),
    # Norms over all heads, few key heads, clipped values; biases.
    "olmoe_a": define("olmoe", 150,
        vocab_size=78, hidden_size=60, intermediate_size=28, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, num_experts=9, num_experts_per_tok=3, clip_qkv=0.8, max_position_embeddings=1024,
        pad_token_id=0, eos_token_id=1,
    ),
    "olmoe_b": define("olmoe", 120,
        vocab_size=71, hidden_size=48, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4,
        num_experts=5, num_experts_per_tok=2, norm_topk_prob=True, attention_bias=True, tie_word_embeddings=True,
        rms_norm_eps=1e-6, max_position_embeddings=1024, pad_token_id=0, eos_token_id=1,
    ),
    # Windows from a layer on, groups of experts; biases, one group.
    "dots1_a": define("dots1", 150,
        vocab_size=74, hidden_size=60, intermediate_size=64, moe_intermediate_size=28, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=2, head_dim=14, n_routed_experts=9, n_shared_experts=2, n_group=3,
        topk_group=2, num_experts_per_tok=3, first_k_dense_replace=1, norm_topk_prob=True, routed_scaling_factor=2.5,
        sliding_window=35, max_window_layers=2, max_position_embeddings=1024,
    ),
    "dots1_b": define("dots1", 120,
        vocab_size=65, hidden_size=48, intermediate_size=52, moe_intermediate_size=20, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=5, n_shared_experts=1, num_experts_per_tok=2,
        attention_bias=True, sliding_window=None, rms_norm_eps=1e-5, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
    ),
}  # fmt: skip


def whole_model(text: dict[str, Any]) -> transformers.PreTrainedModel:
    """A model of several parts with this decoder, all of it random."""
    config = transformers.AutoConfig.for_model(
        text["model_type"].removesuffix("_text"),
        text_config=text,
        vision_config=VISION | {"out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )
    return transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def saved_part(case: Case) -> tuple[dict[str, Any], Listing]:
    """`saved_listing` of the decoder in a model of several parts, whose names its tensors keep."""
    with tempfile.TemporaryDirectory() as folder:
        whole_model({"model_type": case.model_type, **case.config}).save_pretrained(folder)
        saved = json.loads((Path(folder) / "config.json").read_text())
        with safe_open(Path(folder) / "model.safetensors", framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys() if ".visual." not in name}  # noqa: SIM118
            listing = [(n, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()]
    return saved["text_config"] | {"tie_word_embeddings": saved["tie_word_embeddings"]}, listing


def put_into_whole(folder: Path) -> Path:
    """A folder below this one with a model of several parts that has the decoder here."""
    text, whole = json.loads((folder / "config.json").read_text()), folder / "whole"
    stored: dict[str, torch.Tensor] = {}
    whole_model(text).save_pretrained(whole)
    for path in (whole / "model.safetensors", folder / "model.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    save_file(stored, whole / "model.safetensors", metadata={"format": "pt"})
    return whole


def saved_listing(case: Case) -> tuple[dict[str, Any], Listing]:
    """config.json and the tensors, as transformers' own save_pretrained writes them."""
    if case.model_type in PARTS:
        return saved_part(case)
    config = transformers.AutoConfig.for_model(case.model_type, **case.config)
    kind = MODELS.get(case.model_type)
    make = kind._from_config if kind else transformers.AutoModelForCausalLM.from_config
    model = make(config, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = json.loads((Path(folder) / "config.json").read_text())
        with safe_open(Path(folder) / "model.safetensors", framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            listing = [(n, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()]
            return saved, [one for one in listing if ".ple_embedding." not in one[0] or one[1] != "I64"]


def dequantized(folder: Path, target: Path, layers: int) -> Path:
    """Copy a released checkpoint to float32 (its tid2eid to int64), without scales and MTP layers."""
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            stored.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    e2m1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if name.startswith(("mtp.", f"model.layers.{layers}.")) or name.endswith(("_scale_inv", ".scale", "_scales")):
            continue
        if name.endswith("_blocks"):  # (E, out, in / 32, 16) -> (E, in, out), as transformers has gpt-oss's experts
            codes = tensor.int()
            values = e2m1[torch.stack((codes & 15, codes >> 4), dim=-1)].flatten(3)
            scale = torch.exp2(stored[name.removesuffix("blocks") + "scales"].float() - 127)
            plain[name.removesuffix("_blocks")] = (values * scale[..., None]).flatten(2).transpose(1, 2).contiguous()
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            scale = stored.get(f"{name}_scale_inv", stored.get(name.removesuffix("weight") + "scale")).float()
            blocks = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            plain[name] = tensor.float() * blocks[: tensor.shape[0], : tensor.shape[1]]
        elif tensor.dtype == torch.int8:
            codes = tensor.view(torch.uint8).int()
            values = e2m1[torch.stack((codes & 15, codes >> 4), dim=-1)].flatten(1)
            scale = stored[name.removesuffix("weight") + "scale"].float()
            plain[name] = values * scale.repeat_interleave(32, 1)
        else:
            plain[name] = tensor if tensor.dtype == torch.int64 else tensor.float()
    config = json.loads((folder / "config.json").read_text())
    target.mkdir()
    kept = {k: v for k, v in config.items() if k not in ("quantization_config", "expert_dtype", "torch_dtype")}
    if kept["model_type"] == "bailing_moe":
        plain = as_glm(kept, plain)
    kept["model_type"] = ALIASES.get(kept["model_type"], kept["model_type"])
    (target / "config.json").write_text(json.dumps(kept))
    save_file(plain, target / "model.safetensors", metadata={"format": "pt"})
    return target


def load_reference(folder: Path) -> transformers.PreTrainedModel:
    """The model in float32 with eager attention; every tensor of the folder is used and none is missing."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    kind = MODELS.get(model_type, transformers.AutoModelForCausalLM)
    if model_type in PARTS:
        folder = put_into_whole(folder)
        kind = transformers.AutoModelForImageTextToText
    model, info = kind.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",  # the grouped kernel wants widths in multiples of 4
        output_loading_info=True,
    )
    made = {name for name, _ in model.named_buffers() if ".ple_embedding." in name}  # of the config
    left = {kind: keys for kind, keys in info.items() if set(keys) - made}
    if left:
        raise SystemExit(f"{folder}: not loaded cleanly: {left}")
    rope = json.loads((folder / "config.json").read_text()).get("rope_scaling") or {}
    parameters = getattr(model.config, "rope_parameters", None) or {}
    if rope and parameters.get("compress", parameters).get("rope_type") != "yarn":
        raise SystemExit(f"{folder}: the rope scaling was not understood")
    return model.eval()


def logits_of(model: transformers.PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """float32 (T, vocab)"""
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()


def rounding_noise(model: transformers.PreTrainedModel, ids: np.ndarray, logits: np.ndarray) -> float:
    """Largest change of a logit when every weight is moved by about a float32 rounding error, three times over."""
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(3):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(original[name] * (1 + 2e-7 * torch.randn(p.shape, generator=generator)))
        worst = max(worst, float(np.abs(logits_of(model, ids) - logits).max()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(original[name])
    return worst


def greedy_path(model: transformers.PreTrainedModel, ids: np.ndarray) -> tuple[np.ndarray, float]:
    """The greedy continuation, the whole sequence computed anew for each token, and its smallest margin."""
    sequence, margin = ids, np.inf
    for _ in range(GREEDY_TOKENS):
        last = logits_of(model, sequence)[-1]
        second, best = np.sort(last)[-2:]
        margin = min(margin, float(best - second))
        sequence = np.append(sequence, last.argmax())
        if margin < MIN_MARGIN:
            break
    return sequence[len(ids) :], margin


def make(name: str, case: Case) -> None:
    """Write golden/NAME.json and golden/NAME.npz with the first salt that makes a fair test."""
    config, listing = (case.config, case.listing(case.config)) if case.listing else saved_listing(case)
    eos = config.get("eos_token_id")
    for salt in range(100):
        write_description(name, {"salt": salt, "shards": case.shards, "config": config}, listing)
        ids = tiny.random_ids(f"{name}/{salt}/prompt", case.tokens, config["vocab_size"])
        with tempfile.TemporaryDirectory() as temporary:
            folder = tiny.write_checkpoint(name, Path(temporary) / "stored")
            if case.listing:
                folder = dequantized(folder, Path(temporary) / "plain", config["num_hidden_layers"])
            model = load_reference(folder)
        greedy, margin = greedy_path(model, ids)
        if margin < MIN_MARGIN or np.isin(eos, greedy).any() or len(set(greedy)) < MIN_GREEDY_IDS:
            continue
        logits = logits_of(model, ids)
        noise = rounding_noise(model, ids, logits)
        if noise > (MAX_NOISE_RECURRENT if case.model_type.startswith(RECURRENT) else MAX_NOISE):
            continue
        np.savez_compressed(tiny.GOLDEN / f"{name}.npz", ids=ids, logits=logits, greedy=greedy)
        print(
            f"{name:12} salt {salt:2} tensors {len(listing):4} tokens {len(ids)} logits std {logits.std():.2f} "
            f"margin {margin:.3f} noise {noise:.1e} different greedy ids {len(set(greedy))}",
            flush=True,
        )
        return
    raise SystemExit(f"{name}: no fair draw in 100 salts")


def write_description(name: str, description: dict[str, Any], listing: Listing) -> None:
    """golden/NAME.json, a tensor a line."""
    head = json.dumps(description, indent=1).removesuffix("\n}")
    rows = ",\n  ".join(json.dumps(entry) for entry in listing)
    (tiny.GOLDEN / f"{name}.json").write_text(f'{head},\n "listing": [\n  {rows}\n ]\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"one of {', '.join(CASES)} (default: all)")
    names = parser.parse_args().cases or list(CASES)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the numbers do not depend on the machine's cores
    tiny.GOLDEN.mkdir(exist_ok=True)
    for name in names:
        make(name, CASES[name])


if __name__ == "__main__":
    main()
