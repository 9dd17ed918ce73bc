"""numoe.json: what a converted folder is, where it came from, and the size and sha256 of each of its files."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from numoe.quant.errors import InputError

MANIFEST_NAME = "numoe.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class FileRecord:
    """One file of the folder: bytes, and their SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`source` names what was converted, `recipe` how (a key of `recipe.RECIPES`); `files` are by name."""

    source: str
    recipe: str
    files: dict[str, FileRecord]

    def write(self, folder: Path) -> Path:
        """Writes numoe.json into `folder` and returns its path."""
        path = folder / MANIFEST_NAME
        document = {"format": FORMAT_VERSION, **asdict(self)}
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


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
            return Manifest(str(document["source"]), str(document["recipe"]), files)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged; convert or download the model again") from error
    raise InputError(f"{path} has format {version!r}, and this numoe reads format {FORMAT_VERSION}; update numoe")
