"""Which routed experts a model used most, kept from run to run: a new start reads them first, before it is asked.

    NUMOE_HOME/heat/IDENTITY.json    [[layer, expert], ...], those that are worth most first

What is kept says something of what was talked about; the files are for their user alone, and the oldest are removed.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from numoe.engine.home import home, make
from numoe.quant.documents import parse_json, read_document
from numoe.quant.errors import InputError
from numoe.quant.files import write_whole

if TYPE_CHECKING:
    from numoe.engine.experts.unit import Key
    from numoe.engine.model import Model

MOST_FILES = 32
_LARGEST = 1 << 20
"""Bytes; the 11,008 experts of DeepSeek-V4-Flash take a seventh of it."""


def keep(model: Model) -> None:
    """Note which experts this model would keep in memory, where not all are; nothing where that cannot be written."""
    store = model.experts
    if store is None or store.complete:
        return
    text = json.dumps((model.shared or store).hottest()).encode()
    if len(text) > _LARGEST:
        return
    with suppress(OSError):
        make(_folder())
        write_whole(_folder() / f"{model.identity}.json", text, private=True)
        for file in sorted(_folder().glob("*.json"), key=lambda file: file.stat().st_mtime)[:-MOST_FILES]:
            file.unlink()


def kept(identity: str) -> list[Key]:
    """What was noted of the model with this identity; nothing where there is no such file, or a damaged one."""
    path = _folder() / f"{identity}.json"
    try:
        keys = parse_json(read_document(path, _LARGEST), path)
    except InputError:
        return []
    if not isinstance(keys, list):
        return []
    pairs = [tuple(key) for key in keys if isinstance(key, list) and len(key) == 2]
    return [(layer, expert) for layer, expert in pairs if type(layer) is int and type(expert) is int]


def _folder() -> Path:
    return home() / "heat"
