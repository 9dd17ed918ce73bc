"""Reading a config.json so that nothing in it is overlooked.

A family takes the keys it understands from a `Config`, each with the type it must have; whatever is left and could
change numbers is refused by name when the family is done, but for those of `harmless`. A key that is left out has the
default of its family in transformers, which may be another's one.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from math import inf, log, sqrt
from types import MappingProxyType
from typing import Any

from numoe.engine.families.harmless import HARMLESS
from numoe.engine.layers.rope import DividedFrequencies, LinearScaling, Llama3Scaling, Rope, Yarn
from numoe.quant.errors import InputError, shown, word

MOST_LAYERS = 10_000
MOST_EXPERTS = 1_000_000
"""Of all layers together: bounds far above any model, so that a number typed wrong is refused and not counted to."""

Arrangement = Mapping[str, Mapping[str, Any]]
"""See `Config`."""

_LARGEST = 1 << 40
# With more or less a model has no numbers or no positions left: eps beside a mean square, bases of rotations.
_SENSIBLE = (("*eps", 0, 1), ("*theta", 2, 1e15), ("*base_freq", 2, 1e15))
_MISSING = object()


# What transformers called kinds of layers before.
_EARLIER_KINDS = {
    "attention": "full_attention", "deepseek_sparse_attention": "indexed_attention", "mamba": "linear_attention",
}  # fmt: skip


@cache
def _matching(patterns: tuple[str, ...]) -> Callable[[str], re.Match[str] | None]:
    """Of a key, whether one of the patterns is that of all of it."""
    return re.compile("|".join(map(fnmatch.translate, patterns))).match


class Config:
    """A config.json, or one table in it, whose keys are taken one by one.

    Args:
        values: as they are stored.
        defaults: what keys that are left out stand for; a key without one must be there.
        where: what errors call the file.
        spelt: how errors call a key.
        arranged: in which the model's kinds differ from what the values say, because its weights are stored in
            another order: fields of "rope", "latent" and so on.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any],
        where: str = "config.json",
        spelt: Callable[[str], str] = str,
        arranged: Arrangement = MappingProxyType({}),
    ):
        self.values = values
        self.defaults = defaults
        self.where = where
        self.spelt = spelt
        self.arranged = arranged
        self._left = set(values)

    def renamed(self, spellings: Mapping[str, str]) -> Config:
        """The same, where other spellings of keys (theirs -> ours) count in their stead, as in transformers."""
        theirs = {ours: other for other, ours in spellings.items() if self.values.get(other) is not None}
        values = {key: value for key, value in self.values.items() if key not in spellings}
        values |= {ours: self.values[other] for ours, other in theirs.items()}
        return Config(values, self.defaults, self.where, lambda key: self.spelt(theirs.get(key, key)), self.arranged)

    def refusal(self, key: str, reason: str) -> InputError:
        """The error that `key` is at fault."""
        return InputError(f'{self.where}: "{self.spelt(key)}" {reason}')

    def take(self, key: str, also: str | None = None, null: Any = _MISSING) -> Any:
        """The value of a key, or the family's default.

        Args:
            also: another spelling; where both are there it counts, as in transformers (`attribute_map`).
            null: what null stands for, be it written or the default.

        Raises:
            InputError: absent without a default, or null where nothing is said of it.
        """
        self._left -= {key, also}
        if also is not None and self.values.get(also) is not None:
            key = also
        value = self.values.get(key, self.defaults.get(key, _MISSING))
        if value is _MISSING:
            raise InputError(
                f'{self.where} has no "{self.spelt(key)}", which this architecture needs; check that it is complete'
            )
        if value is not None:
            return value
        if null is _MISSING:
            raise self.refusal(key, "is null, and this architecture needs a value")
        return null

    def size(self, key: str, also: str | None = None, null: Any = _MISSING, most: int = _LARGEST) -> Any:
        """A positive integer, or what null stands for."""
        value = self.take(key, also, null)
        if value is null:
            return value
        if type(value) is not int or value < 1:
            raise self.refusal(key, f"must be a positive integer, not {shown(value)}")
        if value > most:
            raise self.refusal(key, f"is {shown(value)}, more than the {most} that any model has")
        return value

    def count(self, key: str, also: str | None = None, null: Any = _MISSING) -> int:
        """An integer from 0."""
        value = self.take(key, also, null)
        if type(value) is not int or not 0 <= value <= _LARGEST:
            raise self.refusal(key, f"must be a whole number from 0, not {shown(value)}")
        return value

    def number(self, key: str, null: Any = _MISSING) -> float:
        """A positive number that float32 can hold."""
        value = self.take(key, null=null)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-30 <= value <= 1e30:
            raise self.refusal(key, f"must be a positive number, not {shown(value)}")
        for pattern, least, most in _SENSIBLE:
            if fnmatch.fnmatchcase(key, pattern) and not least <= value <= most:
                raise self.refusal(key, f"is {shown(value)}, and only {least:g} to {most:g} makes sense")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; null is false where that is the default."""
        value = self.take(key, null=False if self.defaults.get(key) is False else _MISSING)
        if not isinstance(value, bool):
            raise self.refusal(key, f"must be true or false, not {shown(value)}")
        return value

    def table(self, key: str) -> dict[str, Any]:
        """A JSON object; {} when it is absent or null."""
        self._left.discard(key)
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.refusal(key, f"must be a table, not {shown(value)}")
        return value

    def listing(self, key: str) -> list[Any] | None:
        """A list; None when it is absent or null."""
        self._left.discard(key)
        value = self.values.get(key)
        if value is not None and not isinstance(value, list):
            raise self.refusal(key, f"must be a list, not {shown(value)}")
        return value

    def kinds(self, key: str, layers: int, known: Iterable[Any], *, longer: bool = False) -> list[Any] | None:
        """What each layer is, one of `known`; None when it is absent or null.

        longer: entries of layers that are no part of the decoder may follow.
        """
        kinds, known = self.listing(key), tuple(known)
        if kinds is None:
            return None
        kinds = [kind if kind in known else _EARLIER_KINDS.get(str(kind), kind) for kind in kinds]
        if len(kinds) < layers or (len(kinds) > layers and not longer):
            raise self.refusal(key, f"is about {len(kinds)} layers, but has to be about {layers}")
        if wrong := [kind for kind in kinds[:layers] if kind not in known]:
            raise self.refusal(key, f"has {shown(wrong[0])}, and only {', '.join(map(str, known))} are known")
        return kinds[:layers]

    def choice(self, key: str, *supported: str) -> str:
        """One of the words that are supported."""
        value = self.take(key)
        if value not in supported:
            allowed = " or ".join(map(repr, supported))
            raise self.refusal(key, f"is {shown(value)}, and only {allowed} is supported for this family")
        return str(value)

    def expect(self, key: str, supported: Any) -> None:
        """Refuse a value other than the one that the family computes; an absent key or null is fine."""
        self._left.discard(key)
        value = self.values.get(key)
        if value is not None and (type(value) is not type(supported) or value != supported):
            raise self.refusal(key, f"is {shown(value)}, and only {supported!r} is supported for this family")

    def ignore(self, patterns: Iterable[str]) -> None:
        """Accept keys matching these patterns whatever they say."""
        accepted = _matching(tuple(patterns))
        self._left = {key for key in self._left if not accepted(key)}

    def done(self) -> None:
        """Refuse the keys that nobody took, if they say something and are not known to be harmless."""
        self.ignore(HARMLESS)
        unknown = sorted(key for key in self._left if self.values[key] not in (None, False, "", [], {}))
        if unknown:
            kind = self.values.get("model_type")
            family = f' for model_type "{word(kind)}"' if kind else ""
            raise self.refusal(
                unknown[0],
                f"is not understood{family} and could change the results; numoe does not run this variant yet",
            )


def rope(config: Config, dim: int, *, interleaved: bool = False) -> Rope:
    """The rotary embedding of a config; see `rope_block`."""
    return arranged_rope(config, rope_block(config), dim, interleaved=interleaved)


def arranged_rope(config: Config, block: Config, dim: int, *, interleaved: bool = False) -> Rope:
    """The same of a table, as the weights are arranged."""
    made = scaled_rope(config, block, dim, interleaved=interleaved)
    return replace(made, **config.arranged.get("rope", {}))


def partial_rope(config: Config, head_dim: int, part: float | None = None, *, interleaved: bool = False) -> Rope:
    """Of the first channels of a head.

    part: how many of a head's they are where the config does not say it; None: as the family's defaults say.
    """
    made = _first_channels(config, rope_block(config), head_dim, part)
    return replace(made, interleaved=interleaved)


def rope_of_kind(
    config: Config, head_dim: int, tables: Mapping[str, Any], kind: str, part: float | None = None
) -> Rope:
    """Of the layers of a kind, of `rope_parameters` that hold a table for each; `part` as in `partial_rope`, or all."""
    if not isinstance(values := tables.get(kind), dict):
        raise config.refusal("rope_parameters", f"has no table {kind}, and there are such layers")
    block = nested(config, f"rope_parameters.{kind}", values)
    if part is None:
        return scaled_rope(config, block, head_dim, interleaved=False)
    return _first_channels(config, block, head_dim, part)


def _first_channels(config: Config, block: Config, head_dim: int, part: float | None) -> Rope:
    source = next((one for one in (block, config) if one.values.get("partial_rotary_factor") is not None), None)
    if source is not None or part is None:
        part = (source or config).number("partial_rotary_factor")
    dim = _turning(source or config, head_dim, part)
    return scaled_rope(config, block, dim, interleaved=False, whole=head_dim, first=True)


def _turning(source: Config, head_dim: int, part: float) -> int:
    """How many channels of a head are rotated."""
    if int(head_dim * part) > head_dim:
        raise source.refusal("partial_rotary_factor", f"is {part}, and a head has no more than its channels")
    return int(head_dim * part)


def rope_block(config: Config) -> Config:
    """The table that says how rotary embeddings are made, `rope_theta` included.

    Files of transformers 5 call it `rope_parameters`, older ones `rope_scaling` beside `rope_theta`. Where both are
    there transformers takes `rope_scaling` and forgets the other.

    Raises:
        InputError: what would be forgotten is a `rope_theta`.
    """
    scaling, parameters = config.table("rope_scaling"), config.table("rope_parameters")
    name = "rope_scaling" if scaling else "rope_parameters"
    block = dict(scaling or parameters)
    if block.get("rope_theta") is None:
        block["rope_theta"] = config.number("rope_theta")
        if scaling and parameters.get("rope_theta", block["rope_theta"]) != block["rope_theta"]:
            raise config.refusal(
                "rope_parameters",
                f'has the rope_theta {shown(parameters["rope_theta"])}, which "rope_scaling" leaves out; keep one of '
                "the two tables, with the rope_theta in it",
            )
    config.ignore(["rope_theta"])
    return nested(config, name, block)


def nested(config: Config, name: str, values: Mapping[str, Any]) -> Config:
    """A table of rope settings in a config, with their defaults."""
    defaults = {"rope_type": "default", "truncate": True}
    for parts in (config.defaults, config.values):
        if "max_position_embeddings" in parts:
            defaults["original_max_position_embeddings"] = parts["max_position_embeddings"]
    return Config(values, defaults, config.where, lambda key: config.spelt(f"{name}.{key}"))


def scaled_rope(
    config: Config, block: Config, dim: int, *, interleaved: bool, whole: int | None = None, first: bool = False
) -> Rope:
    """`Rope` of `dim` channels from a table whose kind is spelt `rope_type` or, in old files, `type`.

    whole: the channels that `partial_rotary_factor` is a fraction of; None: dim.

    Raises:
        InputError: a kind or a key that is not implemented.
    """
    if dim % 2:
        raise InputError(f"{config.where}: rotary embeddings turn pairs of channels, and heads have {dim}")
    kind = block.take("rope_type", None if "rope_type" in block.values else "type")
    # The three kinds of positions that mrope_section tells apart are one in text.
    block.ignore(["type", "finetuned", "mrope_section", "mrope_interleaved"])
    theta = block.number("rope_theta")
    if theta <= 1:
        raise block.refusal("rope_theta", f"must be above 1, not {theta}")
    for source in (config, block) if kind != "proportional" else (config,):
        _check_part(source, whole or dim, dim)
    scaling: Yarn | Llama3Scaling | LinearScaling | DividedFrequencies
    if kind in LONG:
        return Rope(dim, theta, interleaved, _long(config, block, dim), first)
    if kind in ("default", "mrope"):  # which is of positions of several kinds
        return Rope(dim, theta, interleaved, None, first)
    if kind == "linear":
        scaling = LinearScaling(block.number("factor"))
    elif kind == "proportional":
        scaling = _proportional(block, dim)
    elif kind == "llama3":
        factor, low, high = (block.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        if high < low:
            raise block.refusal("high_freq_factor", f"must not be below low_freq_factor {low}, not {high}")
        scaling = Llama3Scaling(factor, low, high, block.size("original_max_position_embeddings"))
    elif kind == "yarn":
        factor = block.number("factor")
        mscale, mscale_all_dim = _unless_zero(block, "mscale"), _unless_zero(block, "mscale_all_dim")
        if block.values.get("attention_factor") is not None:
            attention_factor = block.number("attention_factor")
        elif mscale and mscale_all_dim:
            attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
        else:
            attention_factor = yarn_mscale(factor)
        block.ignore(["attention_factor"])
        scaling = Yarn(
            factor,
            block.size("original_max_position_embeddings"),
            _unless_zero(block, "beta_fast") or 32.0,
            _unless_zero(block, "beta_slow") or 1.0,
            attention_factor,
            block.flag("truncate"),
        )
    else:
        raise block.refusal("rope_type", f"is {shown(kind)}; linear, llama3, longrope, proportional and yarn are known")
    if left := sorted(key for key in block._left if block.values[key] is not None):
        raise block.refusal(left[0], f'is not understood for rope scaling "{kind}"')
    return Rope(dim, theta, interleaved, scaling, first)


def _proportional(block: Config, dim: int) -> DividedFrequencies:
    """The first of a head's pairs turn, by the frequencies of all; the others do not (Gemma 4)."""
    factor, part = (
        1.0 if block.values.get(key) is None else block.number(key) for key in ("factor", "partial_rotary_factor")
    )
    block.ignore(["factor", "partial_rotary_factor"])
    if part > 1:
        raise block.refusal("partial_rotary_factor", f"is {part}, and a head has no more than all its channels")
    turning = int(part * dim // 2)
    return DividedFrequencies((factor,) * turning + (inf,) * (dim // 2 - turning))


def _check_part(source: Config, whole: int, dim: int) -> None:
    """Refuse another part of `whole` channels than dim."""
    if source.values.get("partial_rotary_factor") is None:
        source.ignore(["partial_rotary_factor"])
    elif int(whole * source.number("partial_rotary_factor")) != dim:
        partial = shown(source.values["partial_rotary_factor"])
        raise source.refusal("partial_rotary_factor", f"is {partial}, and only 1 is supported for this family")


LONG = "longrope", "su"
"""What tables of LongRoPE call their kind."""


def _long(config: Config, block: Config, dim: int) -> DividedFrequencies:
    """LongRoPE (arXiv 2402.13753) by its factors for short sequences."""
    factors = block.listing("short_factor") or []
    if len(factors) != dim // 2 or not all(type(one) in (int, float) and 0 < one < 1e30 for one in factors):
        raise block.refusal("short_factor", f"must be {dim // 2} positive numbers, not {shown(factors)}")
    known = short_context(config)
    if key := next((key for key in ("short_mscale", "attention_factor") if block.values.get(key) is not None), None):
        return DividedFrequencies(tuple(map(float, factors)), block.number(key))
    longer = block.values.get("factor")
    times = config.size("max_position_embeddings") / known if longer is None else block.number("factor")
    return DividedFrequencies(tuple(map(float, factors)), sqrt(1 + log(times) / log(known)) if times > 1 else 1.0)


def short_context(config: Config) -> int:
    """The longest sequence that rotations stay the same for: with LongRoPE that of the first training."""
    longest = config.size("max_position_embeddings")
    table = config.values.get("rope_scaling") or config.values.get("rope_parameters")
    kind = table.get("rope_type", table.get("type")) if isinstance(table, Mapping) else None
    if not isinstance(table, Mapping) or not isinstance(kind, str) or kind not in LONG:
        return int(longest)
    places = (nested(config, "rope_parameters", table), config)
    key = "original_max_position_embeddings"
    found = [place.size(key) for place in places if place.values.get(key) is not None]
    config.ignore([key])
    known = int(min([longest, *found]))
    if known < 2:
        raise config.refusal(key, f"is {known}, and LongRoPE needs more than one token")
    return known


def _unless_zero(block: Config, key: str) -> float:
    """A positive number; 0 when it is absent, null or 0, which all mean the default."""
    if block.values.get(key) in (None, 0):
        block.ignore([key])
        return 0.0
    return block.number(key)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention temperature 0.1 m ln(s) + 1 (arXiv 2309.00071, section 3.4), with DeepSeek's m."""
    return 0.1 * mscale * log(factor) + 1.0 if factor > 1 else 1.0
