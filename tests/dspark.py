"""Tiny DSpark heads, drawn by `tiny` from their tensors' names, beside the golden cases of V4."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from helpers import Listing, RawTensor, released_v4_listing, write_safetensors

from numoe.quant.stored.safetensors import read_header

STAGES = 3
SAYS = {
    "dspark_block_size": 5,
    "dspark_noise_token_id": 95,
    "dspark_target_layer_ids": [1, 4, 6],
    "dspark_markov_rank": 12,
}


def config_of(case: str, **says: Any) -> dict[str, Any]:
    """The config of a golden case with a head, in which `says` is said of it."""
    config = tiny.load_golden(case).config
    if "compress_ratios" in config:
        config["compress_ratios"][config["num_hidden_layers"] :] = [0] * STAGES
    return config | SAYS | says


def head(config: dict[str, Any], form: str = "F32") -> dict[str, RawTensor]:
    """The tensors of a head, in float32 or as they are released."""
    listing: Listing = {}
    others = {"num_hash_layers": 0, "compress_ratios": [0] * (config["num_hidden_layers"] + STAGES)}
    for name, (dtype, shape) in released_v4_listing(config | others).items():
        if name.startswith("mtp."):
            if form == "released":
                listing[name] = dtype, shape
            elif not name.endswith(".scale"):
                listing[name] = "F32", (*shape[:-1], shape[-1] * (2 if dtype == "I8" else 1))
    return {name: tiny._tensor("dspark", name, listing, config) for name in listing}


def write(source: Path, folder: Path, config: dict[str, Any], tensors: dict[str, RawTensor]) -> Path:
    """A folder of the model of `source` with this head."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model: dict[str, RawTensor] = {}
    for path in source.glob("*.safetensors"):
        data = path.read_bytes()
        for name, info in read_header(path)[0].items():
            if not name.startswith("mtp."):
                model[name] = info.dtype, info.shape, data[info.offset : info.offset + info.nbytes]
    write_safetensors(folder / "model.safetensors", model | tensors)
    return folder


def values(tensors: dict[str, RawTensor]) -> dict[str, np.ndarray]:
    """Those in float32 as arrays."""
    return {name: np.frombuffer(data, "<f4").reshape(shape) for name, (_, shape, data) in tensors.items()}
