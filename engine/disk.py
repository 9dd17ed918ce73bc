"""What a model's files hold beside the weights that it computes with, and under which license it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from numoe.engine.description import Description
from numoe.engine.home import TINY, lookup
from numoe.quant.documents import read_document
from numoe.quant.errors import InputError

_FRONT = re.compile(r"\A---\s*\n(.*?)\n---", re.DOTALL)
_LARGEST_README = 1 << 20


@dataclass(frozen=True)
class Disk:
    """Bytes on the disk; together they are those of the files.

    weights: those that the model computes with. aside: other tensors, as drafting heads and eyes are. headers: names
    and shapes of tensors, and what files are filled up with. others: vocabulary, configuration, texts.
    """

    weights: int
    aside: int
    headers: int
    others: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.aside + self.headers + self.others


def disk(description: Description) -> Disk:
    """What a model's files hold. Raises OSError when one is gone."""
    tensors = description.checkpoint.tensors
    used = {info.name for place in description.places.values() for info in place.stored.parts}
    of_weights = {info.path for info in tensors.values()}
    path = description.path
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    resolved = {one.resolve() for one in of_weights}
    weights = sum(info.nbytes for name, info in tensors.items() if name in used)
    aside = sum(info.nbytes for name, info in tensors.items() if name not in used)
    in_files = sum(one.stat().st_size for one in of_weights)
    others = sum(one.stat().st_size for one in files if one.resolve() not in resolved)
    return Disk(weights, aside, in_files - weights - aside, others)


def license_of(description: Description) -> str:
    """What a model's files say of its license, "" if they say nothing."""
    path = description.path
    if path == lookup(TINY):
        return "MIT, as numoe itself"
    if description.metadata is not None:
        named = [description.metadata.get(f"general.license{more}") for more in (".name", "")]
        return next((one for one in named if isinstance(one, str) and one), "")
    return _front_matter(path / "README.md") or _first_line(path)


def _front_matter(readme: Path) -> str:
    """The license in the block of settings at the start of a README, as the hub reads it."""
    text = _text(readme)
    front = _FRONT.match(text)
    said = dict(re.findall(r"^(license(?:_name)?):[ \t]*[\"']?([\w .+-]+)", front[1], re.MULTILINE)) if front else {}
    return str(said.get("license_name") or said.get("license", "")).strip()


def _first_line(folder: Path) -> str:
    """The heading of the license itself."""
    found = sorted(one for one in folder.iterdir() if re.match(r"(?i)(licen[cs]e|copying)\b", one.name))
    lines = (line.strip(" #*\t") for path in found[:1] for line in _text(path).splitlines())
    return next((line[:80] for line in lines if line), "")


def _text(path: Path) -> str:
    """The text of a small file, "" where it is none."""
    try:
        data = read_document(path) if path.is_file() and path.stat().st_size <= _LARGEST_README else b""
    except InputError:
        return ""
    return data.decode("utf-8", "replace")
