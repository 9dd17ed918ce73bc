"""The model families by `model_type`: one file each, found by itself. A new family is a new file here."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

from numoe.engine.families.config import word
from numoe.engine.families.names import Family
from numoe.quant.errors import InputError


def found() -> dict[str, Family]:
    """What the files of this folder call FAMILY, by each `model_type` that it is for."""
    table: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        one = getattr(import_module(module.name), "FAMILY", None)
        if one is not None:
            table |= dict.fromkeys(one.model_types, one)
    return dict(sorted(table.items()))


FAMILIES = found()


def family(model_type: Any) -> Family:
    """The family of a config's `model_type`.

    Raises:
        InputError: unknown; the message lists the known ones.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise InputError(f'config.json: model_type "{word(model_type)}" is not supported yet; known are {known}')
    return FAMILIES[model_type]
