"""How a model's authors recommend to sample: generation_config.json, or a GGUF file's general.sampling.*."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numoe.engine.text.sample import Sampling
from numoe.quant.documents import is_there, read_object
from numoe.quant.errors import InputError, shown

# Field of `Sampling` -> its type, and its key in a GGUF file; generation_config.json has our names.
_FIELDS: Mapping[str, tuple[type, str]] = {
    "temperature": (float, "temp"),
    "top_k": (int, "top_k"),
    "top_p": (float, "top_p"),
    "min_p": (float, "min_p"),
    "repetition_penalty": (float, "penalty_repeat"),
    "repeat_last_n": (int, "penalty_last_n"),
}


_BEYOND = 1e9  # no setting means anything there, and NaN is not below it


def from_folder(folder: Path) -> dict[str, Any]:
    """What generation_config.json recommends; `do_sample: false` is the likeliest token."""
    path = folder / "generation_config.json"
    config = read_object(path) if is_there(path) else {}
    found = _checked({name: config.get(name) for name in _FIELDS if name != "repeat_last_n"}, str(path))
    if config.get("do_sample") is False:
        return {"temperature": 0.0}
    if config.get("do_sample") and "temperature" not in found:
        found["temperature"] = 1.0
    return found


def from_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the metadata of a GGUF file recommend."""
    prefix = "general.sampling."
    return _checked({name: metadata.get(prefix + key) for name, (_, key) in _FIELDS.items()}, prefix[:-1])


def _checked(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values that are given, as our types. transformers' and llama.cpp's "off" is ours: None, and top_k below 1.

    float32 of a GGUF file: 0.9499999880790710 is 0.95.
    """
    made: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        kind = _FIELDS[name][0]
        number = not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < _BEYOND
        if not number or (kind is int and value % 1):
            raise InputError(f"{where}: {name} is {shown(value)}, which is no number for it; correct or remove it")
        made[name] = max(0, int(value)) if kind is int else float(f"{value:.6g}")
    try:
        Sampling(**made)
    except InputError as error:
        raise InputError(f"{where}: {error} Correct or remove it") from None
    return made
