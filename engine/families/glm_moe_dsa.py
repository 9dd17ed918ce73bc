"""GLM-5 to 5.3: DeepSeek-V3.2's layers; some attend to what the indexer of an earlier one picked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numoe.engine.families import common, latent
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, GgufFile
from numoe.engine.layers.spec import ModelSpec

FULL, SHARED = "full", "shared"
DEFAULTS = latent.DEFAULTS | {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 202752,
    "first_k_dense_replace": 3,
    "q_lora_rank": 2048,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "index_topk_freq": 1,
    "index_skip_topk_offset": 2,
}


def read(config: Config) -> ModelSpec:
    config.kinds("layer_types", common.layer_count(config), latent.INDEXED)
    config.expect("rope_interleave", True)
    config.expect("indexer_rope_interleave", True)
    config.expect("moe_router_dtype", "float32")
    config.ignore(["index_share_for_mtp_iteration"])  # of a head that only drafts tokens
    plain = latent.attention(config, interleaved=True)
    of_kind = {FULL: latent.indexed(config, plain, interleaved=True), SHARED: replace(plain, follows=True)}
    attention = [of_kind[kind] for kind in _indexers(config)]
    experts = config.size("n_routed_experts", also="num_local_experts")
    config.expect("num_experts", experts)  # as transformers called it before
    return latent.model(config, attention, experts, latent.sigmoid(config))


def _indexers(config: Config) -> list[str]:
    """Which layers have an indexer: `indexer_types` says it, or a pattern of letters, or every so many layers."""
    layers = common.layer_count(config)
    kinds = config.kinds("indexer_types", layers, (FULL, SHARED))
    pattern = config.take("index_topk_pattern", null=None) if "index_topk_pattern" in config.values else None
    every, offset = config.count("index_topk_freq"), config.count("index_skip_topk_offset")
    if kinds is None and pattern is not None:
        letters = {"F": FULL, "S": SHARED}
        if not isinstance(pattern, str) or len(pattern) != layers or not set(pattern) <= set(letters):
            raise config.refusal("index_topk_pattern", f"must be {layers} letters F and S")
        kinds = [letters[letter] for letter in pattern]
    if kinds is None:
        kinds = [FULL if max(i - offset + 1, 0) % max(every, 1) == 0 else SHARED for i in range(layers)]
    if kinds[0] != FULL:
        raise config.refusal("indexer_types", "begins with a layer that takes the choice of an earlier one")
    return kinds


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    OLDER.settle(config, file)
    types = config.get("indexer_types")
    if isinstance(types, list):  # layers that only draft tokens may follow
        config["indexer_types"] = [FULL if one else SHARED for one in types][: config["num_hidden_layers"]]


OLDER = latent.deepseek2(
    architecture="glm-dsa", keys=latent.INDEXER_KEYS | {"attention.indexer.types": "indexer_types"}
)
GGUF = replace(OLDER, optional={**OLDER.optional, "attention.indexer.types": None}, settle=_settle)
FAMILY = Family(
    "GLM-5, 5.1, 5.2, 5.3: an indexer picks the tokens, in some layers for those after them",
    ("glm_moe_dsa",),
    read,
    latent.NAMES,
    DEFAULTS,
    common.IGNORED,
    (GGUF,),
)
