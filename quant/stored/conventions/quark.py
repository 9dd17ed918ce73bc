"""AMD's Quark, as its export for Hugging Face writes it: fp8 and int8 with scales of a tensor or row, and mxfp4.

X.weight (F8_E4M3) + X.weight_scale
X.weight (I8) + X.weight_scale [+ X.weight_zero_point, which is 0 where the config says symmetric]
X.weight (U8, low nibble first) + X.weight_scale (U8: e8m0)
"""

from __future__ import annotations

from numoe.quant.stored.conventions import fp8
from numoe.quant.stored.conventions.announced import Announced
from numoe.quant.stored.conventions.compressed_tensors import int8_rows
from numoe.quant.stored.conventions.mxfp4 import mxfp4
from numoe.quant.stored.conventions.spelling import Convention

_DTYPES = "fp8_e4m3", "fp4", "int8"
_SCHEMES = {"per_tensor": ("tensor",), "per_channel": ("row",)}
"""What has one scale of fp8 and int8, see `fp8.FORMS`."""


def read_quark(config: Announced) -> Convention:
    """What such a config says. Raises InputError for what is not computed."""
    config.only(
        "quant_method", "global_quant_config", "layer_quant_config", "layer_type_quant_config", "exclude", "export",
        "version", "algo_config", "quant_mode", "softmax_quant_spec", "kv_cache_*", "model_type", "quant_format",
        "min_kv_scale",
    )  # fmt: skip
    algorithms = str(config.values.get("algo_config") or "").lower()
    if "rotation" in algorithms or "quarot" in algorithms:
        raise config.unsupported("Quark with rotated weights")
    tables = [config.below("global_quant_config")]
    for key in ("layer_quant_config", "layer_type_quant_config"):
        tables += [table for _, table in config.each(key)]
    symmetric, scaled = True, dict[str, set[str]]()
    for weight in (table.below("weight") for table in tables):
        dtype, group = weight.get("dtype", str), weight.values.get("group_size")
        if dtype is None:
            continue
        e8m0 = "e8m0" in str(weight.values.get("scale_format"))
        if dtype not in _DTYPES or (dtype == "fp4" and not (group == 32 and e8m0)):
            raise weight.unsupported(f"Quark {dtype}")
        symmetric = symmetric and (dtype != "int8" or weight.get("symmetric", bool, True))
        if dtype != "fp4" and weight.values.get("qscheme") not in ("per_tensor", "per_channel", None):
            raise weight.unsupported(f"Quark {dtype} {weight.values['qscheme']}")
        scaled.setdefault(dtype, set()).update(_SCHEMES.get(str(weight.values.get("qscheme")), ("tensor", "row")))
    spellings = (
        *(fp8.spellings(((128, 128),), "{weight}_scale", scaled["fp8_e4m3"]) if "fp8_e4m3" in scaled else ()),
        *(int8_rows(centred, scaled["int8"]) for centred in (False, True)[: 1 + symmetric] if "int8" in scaled),
        mxfp4("{weight}", "U8", "{weight}_scale"),
    )
    return Convention("Quark", spellings, dropped=fp8.DROPPED)
