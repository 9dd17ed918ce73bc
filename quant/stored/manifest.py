"""numoe.json: what a converted folder is, where it came from, and the size and sha256 of each of its files."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numoe.quant.documents import parse_json, read_document
from numoe.quant.errors import InputError
from numoe.quant.files import plain_names, shortened, write_whole

MANIFEST_NAME = "numoe.json"
FORMAT_VERSION = 5
_READ = (4, FORMAT_VERSION)  # 4 has the names of the source, and its manifest says the same


@dataclass(frozen=True)
class FileRecord:
    """One file of the folder: bytes, and their SHA-256 in hexadecimal."""

    size: int
    sha256: str


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
        write_whole(folder / MANIFEST_NAME, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None for a folder that numoe did not write.

    Raises InputError when it is damaged, names files that are not beside it, or is of a later format than this version
    reads.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    text = read_document(path)
    damaged = InputError(f"{path} is damaged; convert or download the model again")
    try:
        document = parse_json(text, path)
    except InputError as error:
        raise damaged from error
    version = document.get("format") if isinstance(document, dict) else None
    if type(version) is not int:
        raise damaged
    if version not in _READ:
        remedy = "convert or download the model again" if version in range(FORMAT_VERSION) else "update numoe"
        formats = " and ".join(map(str, _READ))
        raise InputError(f"{path} has format {shortened(version)}, and this numoe reads formats {formats}; {remedy}")
    source, recipe, revision, calibration, files = (
        document.get(key) for key in ("source", "recipe", "revision", "calibration", "files")
    )
    if (
        not (isinstance(source, str) and isinstance(recipe, str) and isinstance(files, dict))
        or not all(value is None or isinstance(value, str) for value in (revision, calibration))
        or not all(map(_is_record, files.values()))
    ):
        raise damaged
    records = {name: FileRecord(files[name]["size"], files[name]["sha256"]) for name in plain_names(files, path)}
    return Manifest(source, recipe, records, revision, calibration, version)


def _is_record(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and type(value.get("size")) is int
        and 0 <= value["size"] < 1 << 63
        and isinstance(value.get("sha256"), str)
        and re.fullmatch(r"[0-9a-f]{64}", value["sha256"]) is not None
    )
