"""What the families with Kimi Delta Attention share: layers of it, and others of latent attention."""

from __future__ import annotations

from collections.abc import Sequence

from numoe.engine.families import common, latent
from numoe.engine.families.config import Config
from numoe.engine.layers.attention.latent import MultiHeadLatentAttention
from numoe.engine.layers.recurrent.kda import KimiDeltaAttention
from numoe.engine.layers.spec import ModelSpec

LINEAR = "linear_attention"
SPELLINGS = {
    "model_max_length": "max_position_embeddings",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_experts": "num_local_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
}
"""What their config.json calls keys that others call otherwise."""
DEFAULTS = latent.DEFAULTS | {
    "q_lora_rank": None,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}


def kernel(config: Config, key: str) -> int:
    """Tokens that the convolutions see."""
    size: int = config.size(key)
    if size < 2:
        raise config.refusal(key, f"is {size}, and only 2 and more are supported")
    return size


def model(
    config: Config, kinds: Sequence[str], linear: KimiDeltaAttention, full: MultiHeadLatentAttention
) -> ModelSpec:
    """Layers of these kinds, with the router of DeepSeek-V3."""
    of_kind = {LINEAR: linear, common.FULL: full}
    experts = config.size("num_local_experts")
    return latent.model(config, [of_kind[kind] for kind in kinds], experts, latent.sigmoid(config))


_PROJECTIONS = {
    "b": "b_proj", "forget": "f_proj", "forget_a": "f_a_proj", "forget_b": "f_b_proj", "gate": "g_proj",
    "gate_a": "g_a_proj", "gate_b": "g_b_proj", "norm": "o_norm",
}  # fmt: skip
_LAYER = (
    {f"attention.{n}": f"self_attn.{n}_proj.weight" for n in "qkv"}
    | {f"attention.{n}_conv": f"self_attn.{n}_conv1d.weight" for n in "qkv"}
    | {f"attention.{ours}": f"self_attn.{theirs}.weight" for ours, theirs in _PROJECTIONS.items()}
    | {"attention.decay": "self_attn.A_log", "attention.dt_bias": "self_attn.dt_bias"}
)
NAMES = common.made(latent.NAMES | common.names(_LAYER), r".*\.decay", common.negative_exponential)
