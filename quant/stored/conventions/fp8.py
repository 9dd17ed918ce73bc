"""fp8 e4m3 with float scales: of a tensor, a row or a block, under each of the names that they have.

    X.weight (F8_E4M3) + X.weight_scale_inv | X.weight_scale | X.scale

value = code * scale, whatever it is called.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial

from numoe.quant.errors import word
from numoe.quant.files import Files, TensorInfo
from numoe.quant.formats.fp8 import fp8_format
from numoe.quant.stored.conventions.announced import Announced
from numoe.quant.stored.conventions.native import BlockScaled
from numoe.quant.stored.conventions.spelling import FLOATS, Convention, Parts, Spelling, check, misfit
from numoe.quant.stored.handle import Stored

_E4M3 = ("e4m3", "e4m3fn", "float8_e4m3", "float8_e4m3fn")
_EXPONENTS = "F8_E8M0", "U8"
DROPPED = (
    ".input_scale", ".activation_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale", ".kv_scale",
    ".prob_scale", ".input_scale_ub",
)  # fmt: skip
"""How scales of quantized activations and caches are called."""


FORMS = "tensor", "row", "block"
"""What has one scale."""


def spellings(
    blocks: tuple[tuple[int, int], ...], first: str = "{weight}_scale_inv", forms: Collection[str] = FORMS
) -> tuple[Spelling, ...]:
    """fp8 with scales under each of their names, which are one a tensor, a row or such a block.

    first: the name that is told where there is none.
    forms: those of `FORMS` that the config leaves open.
    """

    def spelling(name: str) -> Spelling:
        return Spelling("{weight}", ("F8_E4M3",), (name,), partial(_stored, blocks, forms, name))

    names = dict.fromkeys((first, "{weight}_scale_inv", "{weight}_scale", "{beside}scale"))
    return tuple(map(spelling, names))


def _stored(
    blocks: tuple[tuple[int, int], ...], forms: Collection[str], name: str, files: Files, weight: str, parts: Parts
) -> Stored:
    codes = parts["{weight}"]
    if not codes.shape:
        raise misfit(codes, "it is no matrix")
    *stack, rows, width = codes.shape if len(codes.shape) > 1 else (1, *codes.shape)
    lead = tuple(stack)
    # The shape of the scales -> that as blocks of rows and columns, and how large a block is.
    known: dict[tuple[int, ...], tuple[tuple[int, int], tuple[int, int]]] = {}
    for height, breadth in blocks if "block" in forms else ():
        count = (-(-rows // height), -(-width // breadth))
        known.setdefault((*lead, *count), (count, (height, breadth)))
        known.setdefault((*lead, count[0], 1, count[1], 1), (count, (height, breadth)))
    exponents = parts[name].dtype in _EXPONENTS  # which are of blocks alone
    for shape in ((*lead, 1, 1), (*lead, 1), lead) if "tensor" in forms and not exponents else ():
        known.setdefault(shape, ((1, 1), (rows, width)))
    for shape in ((*lead, rows, 1), (*lead, rows)) if "row" in forms and not exponents else ():
        known.setdefault(shape, ((rows, 1), (1, width)))
    dtypes = (*FLOATS, *(_EXPONENTS if "block" in forms else ()))
    scales = check(parts, name, codes, dtypes, list(known))
    count, block = known[scales.shape]
    block = (min(block[0], rows), min(block[1], width)) if math.prod(count) == 1 else block
    scales = TensorInfo(scales.name, scales.dtype, (*lead, *count), scales.path, scales.offset, scales.nbytes)
    format = fp8_format(block, 8 if exponents else 32)
    return BlockScaled(files, weight, (codes, scales), codes.shape, format, block=block)


def read_fp8(config: Announced) -> Convention:
    """The `fp8` and `fbgemm_fp8` of transformers and others. Raises InputError for what is not computed."""
    if config.values.get("fmt") not in (None, *_E4M3):
        raise config.unsupported(f"FP8 {word(config.values['fmt'])}")
    scheme = config.values.get("activation_scheme")
    if scheme not in (None, "dynamic", "static"):
        raise config.unsupported(f"FP8 with {word(scheme)} scales for activations")
    block = config.values.get("weight_block_size", [128, 128])
    if block is None:
        block = [128, 128]
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n < 1 << 20 for n in block)):
        raise config.error(f'"weight_block_size" must be two positive integers, not {block!r:.60}')
    config.only(
        "quant_method", "fmt", "activation_scheme", "weight_block_size", "dequantize", "expert_dtype", "ignored_layers",
        "kv_cache_*", "modules_to_convert", "modules_to_not_convert", "scale_fmt", "activation_scale_ub",
    )  # fmt: skip
    blocks = ((block[0], block[1]),)
    forms = ("block",) if config.values.get("weight_block_size") else FORMS
    if config.values.get("quant_method") == "fbgemm_fp8":
        forms = ("row",)
    return Convention("FP8", spellings(blocks, forms=forms), DROPPED)
