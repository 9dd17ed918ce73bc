"""Reading a config.json so that nothing in it is overlooked.

A family takes the keys it understands from a `Config`; whatever is left and could change numbers is refused by
name when the family is done. Keys that only describe training, files or decoding defaults are listed here once.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

from numoe.engine.layers.rope import LinearScaling, Llama3Scaling, Rope, Yarn
from numoe.quant.errors import InputError

# Keys of Hugging Face configs without influence on the logits of a decoder in inference.
HARMLESS = (
    "_name_or_path", "architectures", "attention_dropout", "auto_map", "aux_loss_alpha", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "embd_pdrop", "eos_token_id", "ep_size", "hidden_dropout", "id2label",
    "initializer_range", "is_encoder_decoder", "label2id", "model_type", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type",
    "quantization_config", "resid_pdrop", "return_dict", "router_aux_loss_coef", "router_jitter_noise", "seq_aux",
    "torch_dtype", "torchscript", "transformers_version", "transformers.js_config", "unsloth_*", "use_cache",
)  # fmt: skip

_MISSING = object()


class Config:
    """A config.json whose keys are taken one by one."""

    def __init__(self, values: dict[str, Any]):
        self.values = values
        self._left = set(values)

    def take(self, key: str, default: Any = _MISSING) -> Any:
        """The value of `key`; null counts as absent.

        Raises:
            InputError: absent without a default.
        """
        self._left.discard(key)
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise InputError(f'config.json has no "{key}", which this architecture needs; check that it is complete')
        return default

    def size(self, key: str, default: Any = _MISSING) -> Any:
        """A positive integer (or the default)."""
        value = self.take(key, default)
        if value is not default and (type(value) is not int or value < 1):
            raise InputError(f'config.json: "{key}" must be a positive integer, not {value!r}')
        return value

    def number(self, key: str, default: Any = _MISSING) -> Any:
        """A positive finite number as float (or the default)."""
        value = self.take(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise InputError(f'config.json: "{key}" must be a positive number, not {value!r}')
        return float(value)

    def expect(self, key: str, *supported: Any) -> None:
        """Refuse a value other than `supported`; an absent key is fine."""
        value = self.take(key, supported[0])
        if value not in supported:
            allowed = " or ".join(repr(s) for s in supported)
            raise InputError(f'config.json: "{key}" is {value!r}, and only {allowed} is supported for this family')

    def ignore(self, patterns: Iterable[str]) -> None:
        """Accept keys matching these patterns whatever they say."""
        for pattern in patterns:
            self._left -= set(fnmatch.filter(self._left, pattern))

    def done(self) -> None:
        """Refuse the keys that nobody took, if they are set and not known to be harmless."""
        self.ignore(HARMLESS)
        unknown = sorted(k for k in self._left if self.values[k] not in (None, False))
        if unknown:
            raise InputError(
                f'config.json: "{unknown[0]}" is not understood for model_type '
                f'"{self.values.get("model_type")}" and could change the results; numoe does not run this variant yet'
            )


def rope(config: Config, dim: int, *, interleaved: bool = False) -> Rope:
    """The rotary embedding of a config: `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling`."""
    parameters = config.take("rope_parameters", {}) or config.take("rope_scaling", {})
    config.ignore(["rope_parameters", "rope_scaling"])
    theta = config.number("rope_theta", 10000.0)
    return scaled_rope(parameters, dim, parameters.get("rope_theta", theta), config.values, interleaved=interleaved)


def scaled_rope(
    parameters: dict[str, Any], dim: int, theta: float, config: dict[str, Any], *, interleaved: bool
) -> Rope:
    """`Rope` from one block of scaling parameters, whose kind is spelt `rope_type` or, in old files, `type`.

    Raises:
        InputError: a kind or a key that is not implemented.
    """
    left = dict(parameters)
    kind = left.pop("rope_type", None) or left.pop("type", None) or "default"
    left.pop("type", None)
    left.pop("rope_theta", None)
    partial = left.pop("partial_rotary_factor", None)
    head_dim = config.get("head_dim")
    if partial not in (None, 1.0) and not (head_dim and int(head_dim * partial) == dim):
        raise InputError(f"config.json: partial_rotary_factor {partial} is not supported for this family")

    def number(key: str, default: float | None = None) -> float:
        value = left.pop(key, None)
        value = default if value is None else value
        if value is None or isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f'config.json: rope scaling "{kind}" needs a number for "{key}", not {value!r}')
        return float(value)

    scaling: Yarn | Llama3Scaling | LinearScaling | None
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = LinearScaling(number("factor"))
    elif kind == "llama3":
        scaling = Llama3Scaling(
            number("factor"),
            number("low_freq_factor"),
            number("high_freq_factor"),
            int(number("original_max_position_embeddings", config.get("max_position_embeddings"))),
        )
    elif kind == "yarn":
        factor = number("factor")
        mscale, mscale_all_dim = left.pop("mscale", None), left.pop("mscale_all_dim", None)
        if mscale and mscale_all_dim:
            default_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
        else:
            default_factor = yarn_mscale(factor)
        scaling = Yarn(
            factor,
            int(number("original_max_position_embeddings", config.get("max_position_embeddings"))),
            number("beta_fast", 32.0),
            number("beta_slow", 1.0),
            number("attention_factor", default_factor),
            bool(left.pop("truncate", True)),
        )
    else:
        raise InputError(f'config.json: rope scaling "{kind}" is not supported; known are linear, llama3 and yarn')
    if left and scaling is not None:
        raise InputError(f'config.json: rope scaling key "{min(left)}" is not understood for "{kind}"')
    return Rope(dim, float(theta), interleaved, scaling)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention temperature 0.1 m ln(s) + 1 (arXiv 2309.00071, section 3.4), with DeepSeek's m."""
    from math import log

    return 0.1 * mscale * log(factor) + 1.0 if factor > 1 else 1.0
