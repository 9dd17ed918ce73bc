"""numoe.json: what a converted folder is, where it came from, and the size and sha256 of each of its files."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numoe.quant.documents import is_there, parse_json, read_document
from numoe.quant.errors import InputError
from numoe.quant.files import plain_names, shortened, write_whole

MANIFEST_NAME = "numoe.json"
FORMAT_VERSION = 6
_READ = (4, 5, FORMAT_VERSION)  # 4 has the names of the source; before 6 there were neither blocks nor a "sum"
BLOCK = 1 << 21
"""Bytes of a file that have a hash of their own."""
_DIGITS = 32


@dataclass(frozen=True)
class FileRecord:
    """One file of the folder: bytes, and their SHA-256 in hexadecimal.

    `blocks` are the first digits of each `BLOCK`'s, one after the other; "" in a file of one, or an old manifest.
    """

    size: int
    sha256: str
    blocks: str = ""

    @property
    def block(self) -> int:
        """Bytes that one hash is of."""
        return BLOCK if self.blocks else max(1, self.size)

    def hash_of(self, block: int) -> str:
        """The first digits of a block's SHA-256, or all of them."""
        return self.blocks[block * _DIGITS : (block + 1) * _DIGITS] if self.blocks else self.sha256


class Hashing:
    """Takes the bytes of a file in order, and makes a record of them."""

    def __init__(self) -> None:
        self._size = 0
        self._whole, self._block = hashlib.sha256(), hashlib.sha256()
        self._blocks: list[str] = []

    def update(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        self._whole.update(view)
        while view:
            piece, view = view[: BLOCK - self._size % BLOCK], view[BLOCK - self._size % BLOCK :]
            self._block.update(piece)
            self._size += len(piece)
            if self._size % BLOCK == 0:
                self._end_block()

    def _end_block(self) -> None:
        self._blocks.append(self._block.hexdigest()[:_DIGITS])
        self._block = hashlib.sha256()

    def record(self) -> FileRecord:
        """Of all bytes, after which there are no more."""
        if self._size % BLOCK:
            self._end_block()
        return FileRecord(self._size, self._whole.hexdigest(), "".join(self._blocks) if self._size > BLOCK else "")


@dataclass(frozen=True)
class Manifest:
    """`source` names what was converted, `recipe` how (see `recipes.roles`); `files` are by name.

    `revision` tells states of one source apart: a commit on the hub, or the `Folder.revision` of a local one.
    `calibration` is the hash of the text by which the weights were rounded; None: without one.
    """

    source: str
    recipe: str
    files: dict[str, FileRecord]
    revision: str | None = None
    calibration: str | None = None
    version: int = FORMAT_VERSION

    @property
    def format(self) -> str:
        """The recipe, and whether and by which text it was calibrated."""
        return self.recipe if self.calibration is None else f"{self.recipe} (calibrated by text {self.calibration})"

    def write(self, folder: Path) -> None:
        """Writes numoe.json into `folder`, in one step and safe on disk."""
        entries = asdict(self)
        document = {"format": entries.pop("version"), **entries, "files": dict(sorted(entries["files"].items()))}
        document = sealed(document) if self.version >= 6 else document
        write_whole(folder / MANIFEST_NAME, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's document with the "sum" by which damage to the rest of it is seen."""
    rest = {key: value for key, value in document.items() if key != "sum"}
    return rest | {"sum": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:_DIGITS]}


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None for a folder that numoe did not write.

    Raises InputError when it is damaged, names files that are not beside it, or is of a later format than this version
    reads.
    """
    path = folder / MANIFEST_NAME
    if not is_there(path):
        return None
    text = read_document(path)
    damaged = InputError(f"{path} is damaged; convert or download the model again")
    try:
        document = parse_json(text, path)
        whole = not isinstance(document, dict) or "sum" not in document or document == sealed(document)
    except (InputError, RecursionError) as error:
        raise damaged from error
    version = document.get("format") if isinstance(document, dict) else None
    if type(version) is not int or not whole:
        raise damaged
    if version not in _READ:
        remedy = "convert or download the model again" if version in range(FORMAT_VERSION) else "update numoe"
        formats = f"{_READ[0]} to {_READ[-1]}"
        raise InputError(f"{path} has format {shortened(version)}, and this numoe reads formats {formats}; {remedy}")
    if ("sum" in document) != (version >= 6):
        raise damaged
    source, recipe, revision, calibration, files = (
        document.get(key) for key in ("source", "recipe", "revision", "calibration", "files")
    )
    if (
        not (isinstance(source, str) and isinstance(recipe, str) and isinstance(files, dict))
        or not all(value is None or isinstance(value, str) for value in (revision, calibration))
        or not all(map(_is_record, files.values()))
    ):
        raise damaged
    records = {name: FileRecord(**files[name]) for name in plain_names(files, path)}
    return Manifest(source, recipe, records, revision, calibration, version)


def _is_record(value: Any) -> bool:
    if not isinstance(value, dict) or not {"size", "sha256"} <= value.keys() <= {"size", "sha256", "blocks"}:
        return False
    size, sha256, blocks = value["size"], value["sha256"], value.get("blocks", "")
    return (
        type(size) is int
        and 0 <= size < 1 << 63
        and isinstance(sha256, str)
        and re.fullmatch(r"[0-9a-f]{64}", sha256) is not None
        and isinstance(blocks, str)
        and re.fullmatch(r"[0-9a-f]*", blocks) is not None
        and len(blocks) == (-(-size // BLOCK) * _DIGITS if size > BLOCK and blocks else 0)
    )
