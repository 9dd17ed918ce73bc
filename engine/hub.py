"""Finding a model: a folder, a .gguf file, a hub id whose files are in the Hugging Face cache, or `tiny`."""

from __future__ import annotations

import re
from pathlib import Path

from numoe.quant.errors import InputError

TINY = "tiny"
"""The name of the trained model that ships inside the package."""


def locate(model: str | Path) -> Path:
    """The folder or .gguf file that `model` names; `tiny` is the model inside the package.

    Raises:
        InputError: nothing is there; the message says how to get it.
    """
    if model == TINY:
        return Path(__file__).parent / TINY
    path = Path(model).expanduser()
    if path.is_dir() or path.is_file():
        return path
    name = str(model)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith(".gguf"):
        cached = _cached(name)
        if cached:
            return cached
        raise InputError(f'"{name}" is neither a folder here nor downloaded; get it with: hf download {name}')
    raise InputError(f'there is no folder or file "{name}"; give a model folder, a .gguf file, a hub id or tiny')


def _cached(repo: str) -> Path | None:
    """The snapshot of a hub repository in the Hugging Face cache, if it has a config.json."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json")
    return Path(config).parent if isinstance(config, str) else None
