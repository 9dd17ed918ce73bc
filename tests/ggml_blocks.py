"""Random bytes of ggml's block types, and the values of those that the gguf package does not decode."""

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

# Where the float16 fields of a block lie, which random bytes would make NaN.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "TQ1_0": [52], "TQ2_0": [64],
    "IQ1_S": [0], "IQ1_M": [], "IQ2_XXS": [0], "IQ2_XS": [0], "IQ2_S": [0], "IQ3_XXS": [0], "IQ3_S": [0],
    "MXFP4": [], "NVFP4": [], "Q1_0": [0], "Q2_0": [0],
}  # fmt: skip
NUMBERS = {"NVFP4": 40, "Q1_0": 41, "Q2_0": 42}
"""Of types that not every gguf package knows; of all others see `GGMLQuantizationType`."""
_SIZES = {"NVFP4": (64, 36), "Q1_0": (128, 18), "Q2_0": (64, 18)}


def size(dtype: str) -> tuple[int, int]:
    """Weights and bytes of a block."""
    return _SIZES.get(dtype) or GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]


def random_blocks(dtype: str, *shape: int, spread: float = 1.0, seed: int = 0) -> np.ndarray:
    """Random bytes of a tensor of `shape` in a block type, uint8 (.., bytes a row), with sensible float16 fields."""
    rng = np.random.default_rng([seed, *dtype.encode()])
    block, nbytes = size(dtype)
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, nbytes), dtype=np.uint8)
    values = (spread * rng.standard_normal((2, *raw.shape[:-1]))).astype(np.float16)
    for offset, half in zip(HALVES[dtype], values, strict=False):
        raw[..., offset : offset + 2] = half[..., None].view(np.uint8)
    if dtype == "MXFP4":
        raw[..., 0] = rng.integers(110, 130, raw.shape[:-1]) + round(np.log2(spread))
    if dtype == "NVFP4":
        raw[..., :4] &= 127
    if dtype == "IQ1_M":  # the highest four bits of each of its last words
        for part in range(4):
            at = 49 + 2 * part
            raw[..., at] = raw[..., at] & 15 | (values[0].view(np.uint16) >> 4 * part & 15).astype(np.uint8) << 4
    return raw.reshape(*shape[:-1], -1)


def reference(raw: np.ndarray, dtype: str) -> np.ndarray:
    """The values, float32; by llama.cpp's formulas where the gguf package has none."""
    if dtype not in ("Q1_0", "Q2_0"):
        return gguf.quants.dequantize(raw, GGMLQuantizationType[dtype])
    blocks = raw.reshape(-1, 18)
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").astype(np.float32)
    codes = 2 * bits - 1 if dtype == "Q1_0" else bits[:, 0::2] + 2 * bits[:, 1::2] - 1
    return (d * codes).reshape(*raw.shape[:-1], -1)


def blocks_like(values: np.ndarray, dtype: str, seed: int) -> np.ndarray:
    """Random bytes of a tensor of the shape of these, whose values are about as large."""
    spread = values.std() / reference(random_blocks(dtype, 1, 4096), dtype).std()
    return random_blocks(dtype, *values.shape, spread=float(spread), seed=seed)


def add_blocks(writer: gguf.GGUFWriter, name: str, dtype: str, data: np.ndarray) -> None:
    """Add a tensor in bytes, or in one of the plain dtypes."""
    if dtype not in NUMBERS:
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[dtype])
        return
    weights, nbytes = size(dtype)
    writer.add_tensor(name, data.view(np.int8))
    info = writer.tensors[-1][name]
    info.shape = (*data.shape[:-1], data.shape[-1] // nbytes * weights)
    info.dtype = NUMBERS[dtype]  # type: ignore[assignment]
