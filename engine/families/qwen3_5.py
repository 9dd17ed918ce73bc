"""Qwen3.5 and 3.6, dense and with experts: three layers of gated DeltaNet to one of gated attention."""

from __future__ import annotations

from numoe.engine.families import common, deltanet, gguf
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf
from numoe.engine.layers.block import Kind
from numoe.engine.layers.spec import ModelSpec, decoder_layer

DEFAULTS = deltanet.DEFAULTS | {"num_experts": 256, "num_experts_per_tok": 8}


def read(config: Config) -> ModelSpec:
    config.expect("attn_output_gate", True)
    config.expect("mamba_ssm_dtype", "float32")
    if config.values.get("output_gate_type") is not None:
        config.choice("output_gate_type", "swish", "silu")
    config.ignore(["mtp_*"])  # a head that only drafts tokens
    mixers, ffn = deltanet.mixers(config), _feed_forward(config)
    return common.model(config, [decoder_layer(mixer, ffn) for mixer in mixers])


def _feed_forward(config: Config) -> Kind:
    if not str(config.values["model_type"]).startswith("qwen3_5_moe"):
        return common.swiglu(config)
    config.ignore(["intermediate_size"])
    return deltanet.mixture(config)


NAMES = deltanet.names({"qkv": "in_proj_qkv", "gate": "in_proj_z", "b": "in_proj_b", "a": "in_proj_a"})


def _gguf(architecture: str, model_type: str, keys: dict[str, str]) -> Gguf:
    return Gguf(
        architecture,
        deltanet.gguf_names({"b": "ssm_beta", "a": "ssm_alpha"}),
        deltanet.GGUF_KEYS | keys,
        optional=deltanet.GGUF_OPTIONAL,
        given={"model_type": model_type},
        unread=deltanet.GGUF_UNREAD,
        settle=deltanet.settle,
        arranged=lambda file: {"deltanet": {"tiled": True}},
    )


FAMILY = Family(
    "Qwen3.5 and 3.6, dense and with experts (text): gated DeltaNet and gated attention",
    ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    read,
    common.also_below(NAMES, "model.", "model.language_model."),
    DEFAULTS,
    (r"mtp\..*", r"model\.visual\..*", *common.IGNORED),
    (_gguf("qwen35", "qwen3_5", {}), _gguf("qwen35moe", "qwen3_5_moe", gguf.SHARED_EXPERT_KEYS)),
    mtp=deltanet.MTP,
)
