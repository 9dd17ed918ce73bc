"""GLM-4.5V and 4.6V with experts: the text part is GLM-4.5's."""

from __future__ import annotations

from dataclasses import replace

from numoe.engine.families import common, glm4_moe
from numoe.engine.families.names import Family

DEFAULTS = glm4_moe.DEFAULTS | {"max_position_embeddings": 65536, "attention_bias": True}
FAMILY: Family = replace(
    glm4_moe.FAMILY,
    title="GLM-4.5V, 4.6V (text)",
    model_types=("glm4v_moe", "glm4v_moe_text"),
    names=common.also_below(glm4_moe.NAMES, "model.", "model.language_model."),
    defaults=DEFAULTS,
    ignored=(r"(model\.)?visual\..*", *common.IGNORED),
    gguf=(),
)
