"""Solar-Open: GLM-4.5's layers, all with experts; heads without norms, rotated whole."""

from __future__ import annotations

from dataclasses import replace

from numoe.engine.families import common, glm4_moe
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, GgufFile
from numoe.engine.layers.spec import ModelSpec

DEFAULTS = glm4_moe.DEFAULTS | {
    "rope_theta": 1e6,
    "head_dim": 128,
    "partial_rotary_factor": 1.0,
    "moe_intermediate_size": 1280,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 0,
}


def read(config: Config) -> ModelSpec:
    # What GLM-4.5 has and says of these.
    config.expect("use_qk_norm", False)
    config.expect("first_k_dense_replace", 0)
    return glm4_moe.read(config)


def _has_no_dense_layer(file: GgufFile) -> bool:
    return "blk.0.ffn_gate_inp.weight" in file.shapes


GGUF = replace(
    glm4_moe.GGUF, optional={**glm4_moe.GGUF.optional, "feed_forward_length": None}, marks=(_has_no_dense_layer,)
)
FAMILY = Family("Solar-Open-100B", ("solar_open",), read, glm4_moe.NAMES, DEFAULTS, common.IGNORED, (GGUF,))
