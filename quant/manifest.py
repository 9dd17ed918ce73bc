"""numoe.json: what a converted folder is, where it came from, and the size and sha256 of each of its files."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from numoe.quant.errors import InputError
from numoe.quant.files import write_whole

MANIFEST_NAME = "numoe.json"
FORMAT_VERSION = 4


@dataclass(frozen=True)
class FileRecord:
    """One file of the folder: bytes, and their SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`source` names what was converted, `recipe` how (a key of `recipe.RECIPES`); `files` are by name.

    `revision` tells states of one source apart: a commit on the hub, or the `Folder.revision` of a local one.
    `calibration` is the hash of the text by which the weights were rounded; None: without one.
    """

    source: str
    recipe: str
    files: dict[str, FileRecord]
    revision: str | None = None
    calibration: str | None = None

    @property
    def format(self) -> str:
        """The recipe, and whether and by which text it was calibrated."""
        return self.recipe if self.calibration is None else f"{self.recipe} (calibrated by text {self.calibration})"

    def write(self, folder: Path) -> None:
        """Writes numoe.json into `folder`, in one step and safe on disk."""
        document = {"format": FORMAT_VERSION, **asdict(self), "files": dict(sorted(asdict(self)["files"].items()))}
        write_whole(folder / MANIFEST_NAME, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None for a folder that numoe did not write.

    Raises InputError when it is damaged or of a later format than this version reads.
    """
    path = folder / MANIFEST_NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version = document["format"]
        if version == FORMAT_VERSION:
            files = {str(name): FileRecord(int(e["size"]), str(e["sha256"])) for name, e in document["files"].items()}
            known = (None if document.get(k) is None else str(document[k]) for k in ("revision", "calibration"))
            return Manifest(str(document["source"]), str(document["recipe"]), files, *known)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged; convert or download the model again") from error
    remedy = "convert or download the model again" if version in range(FORMAT_VERSION) else "update numoe"
    raise InputError(f"{path} has format {version!r}, and this numoe reads format {FORMAT_VERSION}; {remedy}")
