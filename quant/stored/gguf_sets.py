"""Which GGUF files of a folder or repository make up a model, told by their names alone.

A model is one file, or the parts NAME-00001-of-0000N.gguf of a split one, often in a folder of their own.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath

from numoe.quant.errors import InputError, word

HEADER = "gguf.header"
"""The file of a converted folder that has the header of the GGUF file of which it was made."""
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
# How its weights are stored, as names have it: Q4_K_M, UD-IQ2_XXS, MXFP4_MOE, BF16.
_QUANT = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:(?:IQ|TQ|Q)\d\w*|BF16|FP?16|FP?32|(?:MX|NV)FP4\w*))(?=[-.]|$)", re.IGNORECASE
)


@dataclass(frozen=True)
class GgufSet:
    """A model in GGUF."""

    files: tuple[str, ...]
    """Its file, or the parts that are there in order; paths from the folder or repository."""
    missing: tuple[str, ...] = ()
    """The parts of a split one that are not there."""
    name: str = ""
    """What tells it from the others."""

    @cached_property
    def stem(self) -> str:
        """The path without what all models and parts have at their end."""
        part = _PART.fullmatch(self.files[0])
        return part[1] if part else self.files[0].removesuffix(".gguf")

    @cached_property
    def quant(self) -> str:
        """How it is quantized, by its name or its folder's; where they don't say, its name."""
        path = PurePosixPath(self.stem)
        found = _QUANT.findall(path.name) or _QUANT.findall(path.parent.name)
        return str(found[-1]) if found else path.name

    def ranks(self) -> Sequence[Callable[[str], bool]]:
        """Whether a text in lower case means it, in ways from the most to the least certain."""
        stem, quant = self.stem.lower(), self.quant.lower()
        path = PurePosixPath(stem)
        files = {name.lower() for name in (*self.files, *self.missing)}
        exact = {stem, path.name, self.name.lower(), *files, *(PurePosixPath(name).name for name in files)}
        words = re.compile(r"[-.]")
        return (
            lambda wanted: wanted in exact,
            lambda wanted: wanted == quant,
            lambda wanted: wanted.strip("/") in ({str(path.parent), path.parent.name} - {"", "."}),
            lambda wanted: path.name.endswith(wanted) and bool(words.match(path.name[-len(wanted) - 1 :])),
            lambda wanted: re.search(rf"(^|[-.]){re.escape(wanted)}([-.]|$)", path.name) is not None,
        )


def gguf_sets(names: Iterable[str]) -> list[GgufSet]:
    """The models among files by these names, by their own; what is no model of language is left out."""
    split: dict[tuple[str, str], dict[int, str]] = {}
    found = []
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.suffix.lower() != ".gguf" or path.name.startswith(".") or _is_no_model(path):
            continue
        part = _PART.fullmatch(name)
        if part and 1 <= int(part[2]) <= int(part[3]):
            split.setdefault((part[1], part[3]), {})[int(part[2])] = name
        else:
            found.append(GgufSet((name,)))
    for (stem, count), parts in split.items():
        missing = (f"{stem}-{k:05d}-of-{count}.gguf" for k in range(1, min(int(count), 1000) + 1) if k not in parts)
        found.append(GgufSet(tuple(parts[k] for k in sorted(parts)), tuple(missing)))
    ways: list[list[str]] = [[one.quant, one.stem, one.files[0].removesuffix(".gguf")] for one in found]
    taken = Counter(name.lower() for each in ways for name in each[:2])
    told = [
        replace(one, name=next((name for name in each if taken[name.lower()] == 1), each[-1]).replace("/", "."))
        for one, each in zip(found, ways, strict=True)
    ]
    return sorted(told, key=lambda one: one.files)


def gguf_set(sets: Sequence[GgufSet], wanted: str, where: str) -> GgufSet:
    """The only one of several models that a text means: a quantization, a file, a folder; "" where there is one.

    Raises:
        InputError: it means none or several, or parts are missing; `where` names their folder or repository.
    """
    names = ", ".join(one.name for one in sets[:40]) + (", ..." if len(sets) > 40 else "")
    low = wanted.lower()
    ways = zip(*(one.ranks() for one in sets), strict=True) if wanted else ()
    meant = (
        next((hits for way in ways if (hits := [one for one, is_it in zip(sets, way, strict=True) if is_it(low)])), [])
        if wanted
        else list(sets)
    )
    if not meant:
        raise InputError(f'{where} has no "{word(wanted)}"; it has {names}')
    if len(meant) > 1:
        several = ", ".join(one.name for one in meant[:40])
        raise InputError(
            f"{where} holds {len(meant)} models in GGUF{f' that are {word(wanted)}' if wanted else ''}: {several}; say "
            f"which after a colon, such as {where}:{meant[0].name}"
        )
    (one,) = meant
    if one.missing:
        raise InputError(
            f"{where} lacks {one.missing[0]}, one of the {len(one.files) + len(one.missing)} parts of {one.name}; "
            "choose another, or wait until its authors have put it there"
        )
    return one


def _is_no_model(path: PurePosixPath) -> bool:
    """Whether it is what sees or hears for a model, or what was measured to quantize it, by its name or folder's."""
    words = re.split(r"[-._/]", str(path).lower())
    return "mmproj" in words or ("imatrix" in words and not _QUANT.search(path.stem))
