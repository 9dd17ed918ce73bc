"""Matrices of every kind, to measure with how fast they are multiplied."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numoe.quant.dtypes import Float32
from numoe.quant.formats.fp8 import FP8
from numoe.quant.formats.ggml import GGML
from numoe.quant.formats.ggml_types import TYPES
from numoe.quant.formats.integer import INT4, INT8
from numoe.quant.formats.mxfp4 import MX_GROUP, MXFP4
from numoe.quant.formats.nf4 import NF4
from numoe.quant.formats.nvfp4 import NVFP4
from numoe.quant.formats.pack import pack_bf16, pack_fp8, pack_int4, pack_int8, pack_mxfp4
from numoe.quant.formats.plain import BF16, F16, F32
from numoe.quant.formats.qtensor import QTensor

PACKS: tuple[Callable[[Float32], QTensor], ...] = (
    F32,
    pack_bf16,
    pack_fp8,
    pack_mxfp4,
    pack_int8,
    *(partial(pack_int4, group=group) for group in (32, 64, 128)),
)
"""From float32 weights (out, in) to each format that people choose between."""


BLOCK_KINDS = tuple(TYPES)
"""By `Format.kind`, ggml's block types that are computed with as they are: what of them people have is in files."""


def blocks(kind: str, shape: tuple[int, int]) -> GGML:
    """A matrix of a shape in one of ggml's block types, by its `Format.kind`. The numbers that scale are near 1."""
    rows, columns = shape
    one = TYPES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (rows, columns // one.weights, one.nbytes), np.uint8)
    highest = [place + 1 for place in one.places]
    raw[..., highest] = raw[..., highest] & 0x8F | 0x30
    return GGML(raw.reshape(rows, -1), one)


def samples(shape: tuple[int, int], nbytes: int) -> dict[str, list[QTensor]]:
    """By `Format.kind` as many matrices of a shape as take `nbytes`, a multiple of 4 MiB, without their scales.

    Their values do not matter, but denormals would.
    """
    rows, columns = shape
    normal = np.tile(np.random.default_rng(0).standard_normal(1 << 20, np.float32), nbytes >> 22)
    raw = normal.view(np.uint8)
    f16 = np.tile(normal.astype(np.float16), 2)
    bf16 = np.tile((normal.view(np.uint32) >> np.uint32(16)).astype(np.uint16), 2)
    groups, blocks = (rows, columns // MX_GROUP), (rows // 128, columns // 128)
    ones, ones32 = np.ones(groups, np.float16), np.ones((rows, 1), np.float32)

    def cut(values: NDArray[Any], width: int = columns) -> NDArray[Any]:
        return values.reshape(-1, rows, width)

    return {
        "f32": [F32(values) for values in cut(normal)],
        "f16": [F16(values) for values in cut(f16)],
        "bf16": [BF16(codes) for codes in cut(bf16)],
        "fp8": [FP8(codes, np.full(blocks, 127, np.uint8)) for codes in cut(raw | np.uint8(0x40))],
        "mxfp4": [MXFP4(codes, np.full(groups, 127, np.uint8)) for codes in cut(raw, columns // 2)],
        "nvfp4": [
            NVFP4(codes, np.full((rows, columns // 16), 56, np.uint8), ones32) for codes in cut(raw, columns // 2)
        ],
        "nf4": [NF4(codes, np.ones((rows, columns // 64), np.float32)) for codes in cut(raw, columns // 2)],
        "int8": [INT8(codes, ones) for codes in cut(raw.view(np.int8))],
        "int4": [INT4(codes, ones) for codes in cut(raw, columns // 2)],
    }
