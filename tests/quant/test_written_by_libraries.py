"""Weights that other libraries pack are what these libraries unpack; `reference/make_quantized.py` wrote them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import RawTensor, write_safetensors
from numpy.typing import NDArray

from numoe.quant.files import Files
from numoe.quant.stored.checkpoint import open_checkpoint
from numoe.quant.stored.quantization import read_quantization

GOLDEN = Path(__file__).parents[1] / "golden"
STACKED = "compressed_tensors", "modelopt", "mlx", "fp8"
"""Libraries that also store the experts of a layer in one tensor."""


def cases() -> list[tuple[str, str]]:
    return [
        (file.stem.removeprefix("quantized_"), name)
        for file in sorted(GOLDEN.glob("quantized_*.npz"))
        for name in json.loads(np.load(file)["cases"].tobytes())
    ]


def golden(library: str, name: str) -> tuple[dict[str, Any], dict[str, RawTensor], NDArray[np.float32]]:
    """The quantization config, the tensors of X.weight, its values."""
    with np.load(GOLDEN / f"quantized_{library}.npz") as file:
        told = json.loads(file["cases"].tobytes())[name]
        tensors = {
            part: (dtype, tuple(shape), file[f"{name}/{part}"].tobytes())
            for part, (dtype, shape) in told["tensors"].items()
        }
        return {"quantization_config": told["config"]}, tensors, file[f"{name}/values"]


def opened(folder: Path, config: dict[str, Any], tensors: dict[str, RawTensor]) -> Any:
    return open_checkpoint(write_safetensors(folder / "a.safetensors", tensors), read_quantization(config))


def close(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * float(np.abs(wanted).max()))


@pytest.mark.parametrize(("library", "name"), cases())
def test_a_weight_has_the_values_that_its_library_gives(library: str, name: str, tmp_path: Path) -> None:
    config, tensors, wanted = golden(library, name)
    with opened(tmp_path, config, tensors) as checkpoint:
        assert list(checkpoint.names()) == ["X.weight"]
        stored = checkpoint["X.weight"].fitted(wanted.shape)
        close(stored.matrix().dequantize(), wanted)
        close(stored.rows(3, 14, 2).matrix().dequantize(), wanted[3:14:2])


@pytest.mark.parametrize(("library", "name"), [one for one in cases() if one[0] in STACKED])
def test_an_expert_of_a_stack_has_its_values(library: str, name: str, tmp_path: Path) -> None:
    config, tensors, wanted = golden(library, name)
    stacks = {
        part: (dtype, (2, *shape), (bytes(len(data)) if part == "X.weight" or "packed" in part else data) + data)
        for part, (dtype, shape, data) in tensors.items()
    }
    if (shape := tensors.get("X.weight_shape")) is not None:
        stacks["X.weight_shape"] = shape
    with opened(tmp_path, config, stacks) as checkpoint:
        expert = checkpoint["X.weight"].fitted((2, *wanted.shape)).expert(1)
        close(expert.matrix().dequantize(), wanted)
        [*extents] = expert.extents()
        files = Files()
        raw = [files.read_range(*extent) for extent in extents]  # as the store of experts reads it
        close(expert.assemble(raw).dequantize(), wanted)
        files.close()
