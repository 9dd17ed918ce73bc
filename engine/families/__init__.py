"""The model families by `model_type`: one file each, found by itself. A new family is a new file here."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from numoe.engine.families import gguf
from numoe.engine.families.names import Family, GgufFile
from numoe.engine.layers.spec import ModelSpec
from numoe.quant.errors import InputError, word

_LACKING = {
    "deepseek_v41": "DeepSeek-V4.1, whose Engram tables numoe cannot look up yet; DeepSeek-V4-Flash runs",
    "inkling2_loop": "Inkling 2 with looped layers, which numoe does not compute yet; take another model",
}
"""The `model_type`s that are known by name and not run, and what numoe lacks."""
_OTHER_DECODERS = (("mistral3", "mistral4"),)
"""What models of several parts are called, and their decoders that are no family of the whole's name. No set: what a
config says need not be hashable."""
_LACKING_GGUF = {"deepseek41": "deepseek_v41"}


def _family_of(file: str) -> Family | None:
    """What a file of this folder calls FAMILY."""
    one: Family | None = getattr(import_module(f"{__name__}.{file}"), "FAMILY", None)
    return one


@cache
def found() -> dict[str, Family]:
    """All families, by each `model_type` that they are for."""
    table: dict[str, Family] = {}
    for file in _files():
        if (one := _family_of(file)) is not None:
            table |= dict.fromkeys(one.model_types, one)
    return dict(sorted(table.items()))


@cache
def _files() -> list[str]:
    """Those of this folder, which takes longer to list than to read a config."""
    return [module.name for module in pkgutil.iter_modules(__path__)]


def family(model_type: Any) -> Family:
    """The family of a config's `model_type`.

    Raises:
        InputError: unknown; the message lists the known ones.
    """
    if isinstance(model_type, str):
        # A file has the name of a model_type that others go on from: one model need not wait for all files.
        for file in sorted(filter(model_type.startswith, _files()), key=len, reverse=True):
            if (one := _family_of(file)) is not None and model_type in one.model_types:
                return one
        if model_type in found():
            return found()[model_type]
        if lacking := _LACKING.get(model_type.removesuffix("_text")):
            raise InputError(f'config.json: model_type "{model_type}" is {lacking}')
    known = ", ".join(name for name in found() if name.removesuffix("_text") not in found().keys() - {name})
    raise InputError(f'config.json: model_type "{word(model_type)}" is not supported yet; known are {known}')


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json; of a model of several parts that may have one of several decoders, the decoder's.

    Raises:
        InputError: as `family`.
    """
    text = config.get("text_config")
    whole, part = config.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None
    return family(part if (whole, part) in _OTHER_DECODERS else whole)


def gguf_architectures() -> set[str]:
    """Those of the GGUF files that families read."""
    return {one.architecture for kind in found().values() for one in kind.gguf}


def from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], divisors: Sequence[float] | None, path: Path
) -> tuple[dict[str, Any], Family, ModelSpec]:
    """The config.json that a GGUF file's metadata amounts to, its family with GGUF's names, and its spec.

    Args:
        shapes: of its tensors by name.
        divisors: the values of the first of `gguf.DIVISORS` that is among them.

    Raises:
        InputError: the architecture or one of its settings is not supported, or a key is missing.
    """
    kind_of_file = metadata.get("general.type", "model")
    if kind_of_file != "model":
        raise InputError(f'{path} is GGUF of the type "{word(kind_of_file)}" and no model; give the file of the model')
    # Only what is needed is decoded: a name that is no UTF-8, or a large vocabulary, is nothing to the spec.
    architecture = metadata.get("general.architecture")
    prefix = f"{architecture}."
    keys = {key.removeprefix(prefix): metadata[key] for key in metadata if key.startswith(prefix)}
    file = GgufFile(path, keys, shapes, divisors)
    families = list({one.model_types: one for one in found().values()}.values())
    chosen = gguf.chosen(families, architecture, file)
    if chosen is None:
        if lacking := _LACKING.get(_LACKING_GGUF.get(str(architecture), "")):
            raise InputError(f'{path}: GGUF architecture "{architecture}" is {lacking}')
        known = ", ".join(sorted(gguf_architectures()))
        raise InputError(f'{path}: GGUF architecture "{word(architecture)}" is not supported yet; known are {known}')
    return gguf.read(*chosen, file)
