"""NVIDIA's ModelOpt, as its `export` writes it: fp8 of a tensor, a row or a block, and nvfp4, also side by side.

FP8     X.weight (F8_E4M3) + X.weight_scale
MXFP8   the same, e8m0 scales of 32 neighbours in U8
NVFP4   X.weight (U8), low nibble first + X.weight_scale (F8_E4M3) + X.weight_scale_2, which multiplies
"""

from __future__ import annotations

from collections.abc import Iterator

from numoe.quant.formats.mxfp4 import MX_GROUP
from numoe.quant.stored.conventions import fp8
from numoe.quant.stored.conventions.announced import Announced
from numoe.quant.stored.conventions.mxfp4 import mxfp4
from numoe.quant.stored.conventions.nvfp4 import nvfp4
from numoe.quant.stored.conventions.spelling import Convention

_FP8 = {
    "FP8": "tensor", "FP8_PER_CHANNEL_PER_TOKEN": "row", "FP8_PB_WO": "block", "FP8_PB_REAL": "block", "MXFP8": "block",
}  # fmt: skip
"""Algorithm -> what has one scale of fp8, see `fp8.FORMS`."""
_ALGORITHMS = (*_FP8, "NVFP4", "W4A16_NVFP4", "NVFP4_FP8", "MXFP4", "W4A8_MXFP4_FP8")


def read_modelopt(config: Announced) -> Convention:
    """What `quantization_config`, or "quantization" of hf_quant_config.json, says.

    Raises InputError for what is not computed.
    """
    config.only(
        "quant_method", "quant_algo", "config_groups", "ignore", "exclude_modules", "kv_cache_*", "producer",
        "group_size", "quantized_layers", "moe_quant_algo", "weight_block_size", "has_zero_point", "pre_quant_scale",
        "block_size", "fmt", "activation_scheme", "scale_fmt", "expert_dtype",
    )  # fmt: skip
    for name in _algorithms(config):
        if name.upper() not in _ALGORITHMS:
            raise config.unsupported(f"ModelOpt {name}")
    if config.values.get("pre_quant_scale"):
        raise config.unsupported("ModelOpt with scales for what weights are multiplied with (pre_quant_scale)")
    block = config.values.get("weight_block_size") or config.values.get("block_size") or [128, 128]
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n < 1 << 20 for n in block)):
        raise config.error(f'"weight_block_size" must be two positive integers, not {block!r:.60}')
    blocks = ((block[0], block[1]), *(((1, MX_GROUP),) if "MXFP8" in map(str.upper, _algorithms(config)) else ()))
    forms = {_FP8[name.upper()] for name in _algorithms(config) if name.upper() in _FP8}
    if config.values.get("weight_block_size"):
        forms.add("block")
    spellings = (
        nvfp4("{weight}", "U8", "{weight}_scale", "{weight}_scale_2"),
        mxfp4("{weight}", "U8", "{weight}_scale"),
        *fp8.spellings(blocks, "{weight}_scale", forms or fp8.FORMS),
    )
    return Convention("ModelOpt", spellings, fp8.DROPPED)


def _algorithms(config: Announced) -> Iterator[str]:
    """All that are named; MIXED_PRECISION stands for those of the layers."""
    for key in ("quant_algo", "moe_quant_algo"):
        name = config.get(key, str)
        if name == "MIXED_PRECISION":
            for _, layer in config.each("quantized_layers"):
                yield layer.get("quant_algo", str) or "without a quant_algo"
        elif name is not None:
            yield name
