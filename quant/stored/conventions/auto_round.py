"""AutoRound, as Intel's auto-round writes it: the tensors of GPTQ, whose zero points are less one or as they are, or
those of AWQ; "packing_format" says which.

Source: auto-round 0.16.1, `inference.backend` and `export`.
"""

from __future__ import annotations

from dataclasses import replace

from numoe.quant.errors import word
from numoe.quant.stored.conventions.announced import Announced
from numoe.quant.stored.conventions.awq import awq
from numoe.quant.stored.conventions.gptq import Packing, gptq, overridden
from numoe.quant.stored.conventions.spelling import Convention

_ZEROS = {"auto_round:auto_gptq": 1, "auto_round": 0, "auto_round:gptqmodel": 0}
"""What is to be added to zero points; those of others are as AWQ has them."""
_AWQ = "auto_round:auto_awq"
# How it was tuned, which weights were, and what activations would be rounded to.
_UNREAD = (
    "quant_method", "autoround_version", "block_name_to_quantize", "batch_size", "iters", "nsamples", "seqlen", "lr",
    "minmax_lr", "gradient_accumulate_steps", "low_*", "enable_*", "dataset", "amp", "scale_dtype", "act_*",
    "supported_types", "to_quant_block_names", "quant_block_list", "quant_lm_head", "static_*", "not_use_best_mse",
    "momentum", "damp_percent", "desc_act", "true_sequential", "backend", "provider", "model_free", "disable_*",
)  # fmt: skip


def read_auto_round(config: Announced) -> Convention:
    """What such a config says. Raises InputError for what is not computed."""
    config.only(*_UNREAD, "bits", "group_size", "sym", "data_type", "packing_format", "extra_config")
    kind = config.get("data_type", str, "int")
    packing = config.get("packing_format", str, "no packing_format")
    if kind != "int" or packing not in (*_ZEROS, _AWQ):
        raise config.unsupported(f"AutoRound {word(kind)} with {word(packing)}")
    bits = config.size("bits", (4,) if packing == _AWQ else (2, 3, 4, 8))
    base = overridden(config, Packing(bits, None, True, False, _ZEROS.get(packing, 0)))
    packings = [replace(base, ordered=False)]
    for name, own in config.each("extra_config"):
        if own.get("bits", int, bits) >= 16:
            continue  # it stays as it is
        others = {key for key, value in own.values.items() if config.values.get(key) != value}
        if others - {"bits", "group_size", "sym"} or (others and packing == _AWQ):
            raise config.unsupported(f"AutoRound with other bits, groups or zero points for {word(name)}")
        packings.append(overridden(own, packings[0]))
    if packing == _AWQ:
        return Convention("AutoRound", (awq(base.group),))
    return Convention("AutoRound", (gptq(packings),))
