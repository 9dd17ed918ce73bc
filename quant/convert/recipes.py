"""Ways to quantize, as they are written: native, int8, int4, or a format for each role. Needs no NumPy.

The many weights of experts, feed-forward blocks and attention are rounded; the few that decide where tokens go or
what a word is (embedding, head, norms, router, indexer, residual mixing) stay as they are stored. int4 keeps eight
bits for what every token passes through, which is a small share of a mixture of experts.

A text such as "experts=int4,attention=int8" names roles and their formats; what it does not name stays as stored, or is
as the way that it begins with says: "int4,attention=native".
"""

from collections.abc import Mapping
from functools import cache
from typing import Literal, get_args

from numoe.quant.errors import InputError, word

Kind = Literal["bf16", "int8", "int4"]

# float32 tables of words hold no more than bf16 does in any released model.
_WORDS: dict[str, Kind] = {"embedding": "bf16", "head": "bf16"}
_RECIPES: dict[str, dict[str, Kind]] = {
    "native": {},
    "int8": _WORDS
    | {
        "attention": "int8",
        "compressor": "int8",
        "dense ffn": "int8",
        "shared experts": "int8",
        "experts": "int8",
    },
    "int4": _WORDS
    | {
        "attention": "int8",
        "compressor": "int8",
        "dense ffn": "int4",
        "shared experts": "int8",
        "experts": "int4",
    },
}
RECIPES: Mapping[str, Mapping[str, Kind]] = _RECIPES
"""Those that have a name: role -> format; a role that is not listed stays as stored."""
ROLES = tuple(_RECIPES["int4"])
"""What a format can be named for; - stands for the spaces."""
_SPELLED = ", ".join(role.replace(" ", "-") for role in ROLES)
_FORMATS = ("native", *get_args(Kind))


@cache
def roles(quant: str) -> Mapping[str, Kind]:
    """Role -> format, of a way to quantize; a role that is not listed stays as stored.

    Raises:
        InputError: it is none.
    """
    chosen: dict[str, Kind] = {}
    for number, item in enumerate(quant.split(",")):
        name, named, format = item.partition("=")
        role = name.strip().lower().replace("-", " ").replace("_", " ")
        if not named and not number and item in RECIPES:
            chosen |= RECIPES[item]
        elif not named or role not in ROLES or format not in _FORMATS:
            raise InputError(
                f'"{word(quant)}" is not a way to quantize; choose one of {", ".join(RECIPES)}, or formats by role, '
                f"such as experts=int4,attention=int8 (roles: {_SPELLED}; formats: {', '.join(_FORMATS)})"
            )
        elif role in chosen and number and quant.partition(",")[0] not in RECIPES:
            raise InputError(f'"{word(quant)}" names {role} twice')
        elif format == "native":
            chosen.pop(role, None)
        else:
            chosen[role] = next(kind for kind in get_args(Kind) if kind == format)
    return chosen


def group(quant: str, kind: Kind) -> int:
    """How many weights share a scale and a minimum, where rows divide so."""
    if kind == "bf16":
        return 1
    return 64 if kind == "int4" or quant.partition(",")[0] == "int4" else 32
