"""What the families with Kimi Delta Attention share: layers of it, and others of latent attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from numoe.engine.families import common, gguf, latent
from numoe.engine.families.config import Config
from numoe.engine.families.names import Gguf, GgufFile, Source
from numoe.engine.layers.attention.latent import MultiHeadLatentAttention
from numoe.engine.layers.recurrent.kda import KimiDeltaAttention
from numoe.engine.layers.spec import ModelSpec
from numoe.quant.errors import InputError

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
    "linear_head_dim": 128,
    "linear_num_heads": 32,
    "linear_conv_kernel_dim": 4,
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


def of_gguf(architecture: str, keys: Mapping[str, str], decay: Source, optional: Mapping[str, Any]) -> Gguf:
    """llama.cpp's files: deepseek2's tensors and keys besides those of Kimi Delta Attention.

    decay: where they keep it, and what it is made of.
    """
    own: dict[str, str | tuple[str | Source, ...]] = {
        "attention.b": ("ssm_beta.weight",), "attention.norm": ("ssm_norm.weight",), "attention.decay": (decay,),
        "attention.dt_bias": ("ssm_dt.bias", "ssm_dt"), "attention.forget": ("ssm_f_a.weight",),
        "attention.forget_a": ("ssm_f_a.weight",), "attention.forget_b": ("ssm_f_b.weight",),
        "attention.gate": ("ssm_g_a.weight", "attn_gate.weight"), "attention.gate_a": ("ssm_g_a.weight",),
        "attention.gate_b": ("ssm_g_b.weight",),
        **{f"attention.{n}_conv": (f"ssm_conv1d_{n}.weight",) for n in "qkv"},
    }  # fmt: skip
    keys = {**keys, "ssm.conv_kernel": "linear_conv_kernel_dim", "kda.head_dim": "linear_head_dim"}
    made = latent.deepseek2(architecture=architecture, keys=keys)
    names = {**gguf.names(own), **made.names}
    return replace(made, names=names, optional={**made.optional, **optional}, settle=_settled(made.settle))


def _settled(settle: Callable[[dict[str, Any], GgufFile], None]) -> Callable[[dict[str, Any], GgufFile], None]:
    def settled(config: dict[str, Any], file: GgufFile) -> None:
        settle(config, file)
        config["num_local_experts"] = config.pop("n_routed_experts")
        dim = config["linear_head_dim"]
        config["layer_types"] = gguf.layer_kinds(config, file, {"ssm_f_a": LINEAR}, common.FULL)
        widths = {shape[0] for name, shape in file.shapes.items() if name.endswith(".ssm_dt.bias")}
        if type(dim) is not int or dim < 1 or len(widths) != 1 or max(widths) % dim:
            raise InputError(
                f"{file.path}: ssm_dt.bias is not of whole heads of kda.head_dim channels; convert it again"
            )
        config["linear_num_heads"] = max(widths) // dim

    return settled
