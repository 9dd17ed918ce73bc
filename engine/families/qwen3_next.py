"""Qwen3-Next: Qwen3.5's layers, with the projections of a DeltaNet's key heads beside one another in two matrices."""

from __future__ import annotations

from numoe.engine.families import common, deltanet, gguf
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf
from numoe.engine.layers.spec import ModelSpec, decoder_layer

DEFAULTS = deltanet.DEFAULTS | {
    "decoder_sparse_step": 1,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "norm_topk_prob": True,
}


def read(config: Config) -> ModelSpec:
    config.ignore(["mtp_*"])  # a head that only drafts tokens
    mixers = deltanet.mixers(config, ("qkvz", "ba"))
    moe = deltanet.mixture(config, normalize=config.flag("norm_topk_prob"))
    ffns = common.feed_forwards(config, moe, common.sparse_layers(config))
    return common.model(config, [decoder_layer(mixer, ffn) for mixer, ffn in zip(mixers, ffns, strict=True)])


# llama.cpp's converter takes the rows of "qkvz" apart, and leaves "ba" as it is.
GGUF = Gguf(
    "qwen3next",
    deltanet.gguf_names({"qkvz": "ssm_in", "ba": "ssm_ba"}),
    deltanet.GGUF_KEYS | gguf.SHARED_EXPERT_KEYS,
    optional=deltanet.GGUF_OPTIONAL,
    unread=deltanet.GGUF_UNREAD,
    settle=deltanet.settle,
    arranged=lambda file: {"deltanet": {"joined": ("ba",)}},
)
FAMILY = Family(
    "Qwen3-Next-80B-A3B, Qwen3-Coder-Next: gated DeltaNet and gated attention",
    ("qwen3_next",),
    read,
    deltanet.names({"qkvz": "in_proj_qkvz", "ba": "in_proj_ba"}),
    DEFAULTS,
    (r"mtp\..*", *common.IGNORED),
    (GGUF,),
    mtp=deltanet.MTP,
)
