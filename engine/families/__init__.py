"""The model families by `model_type`. A new family is a new file here and a line in the table."""

from __future__ import annotations

from typing import Any

from numoe.engine.config import word
from numoe.engine.families import deepseek_v2, deepseek_v3, deepseek_v4, llama, mixtral, qwen3, qwen3_moe
from numoe.engine.spec import Family
from numoe.quant.errors import InputError

FAMILIES: dict[str, Family] = {
    "deepseek_v2": deepseek_v2.FAMILY,
    "deepseek_v3": deepseek_v3.FAMILY,
    "deepseek_v4": deepseek_v4.FAMILY,
    "llama": llama.FAMILY,
    "mixtral": mixtral.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
}


def family(model_type: Any) -> Family:
    """The family of a config's `model_type`.

    Raises:
        InputError: unknown; the message lists the known ones.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f'config.json: model_type "{word(model_type)}" is not supported yet; known are {known}')
    return FAMILIES[model_type]
