"""Where models live on this machine, and from a name to a folder or file.

    NUMOE_HOME/models/OWNER--NAME-QUANT         a pulled model
    NUMOE_HOME/models/OWNER--NAME-QUANT.part    one whose pull has not finished
    NUMOE_HOME/models/OWNER--NAME--QUANT        the same, where QUANT has more than letters and digits in it

A hub id holds no "--" and a way to quantize no "-", so the folder's name tells what it is.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from numoe.engine.hub.hub_id import named, parted
from numoe.quant.convert.folder import PART_SUFFIX
from numoe.quant.convert.recipes import roles
from numoe.quant.errors import InputError, WrongUsage
from numoe.quant.files import held
from numoe.quant.stored.gguf_sets import gguf_sets

TINY = "tiny"
"""The name of the trained model that ships inside the package."""

_PLAIN = re.compile(r"[\w=,]+")  # of a way to quantize
_FOLDER = re.compile(rf"([\w.-]+?)--(?:([\w.-]+?)--(.+)|([\w.-]+)-({_PLAIN.pattern}))")


@dataclass(frozen=True)
class Pulled:
    """A model in `models_folder`, finished or not."""

    repo_id: str
    quant: str
    """native, int8, int4, another recipe; of a GGUF file what tells it from others of its repository: Q4_K_M; of what
    was made of one both: BF16+int4."""
    path: Path

    @property
    def name(self) -> str:
        """What tells it from all others, as `locate` takes it: OWNER/NAME:QUANT."""
        return f"{self.repo_id}:{self.quant}"

    @property
    def command(self) -> str:
        """What pulls it."""
        of, recipe = self._parts
        return f"numoe pull {self.repo_id}{f':{of}' if of else ''}" + (f" quant={recipe}" if recipe else "")

    @property
    def _parts(self) -> tuple[str, str]:
        """What tells the GGUF file, and the recipe; "" where there is none."""
        of, _, recipe = self.quant.rpartition("+")
        try:
            roles(recipe)
        except InputError:  # a GGUF file's
            return self.quant, ""
        return of, recipe

    @property
    def complete(self) -> bool:
        """Whether the pull has finished."""
        return self.path.suffix != PART_SUFFIX

    def means(self, quant: str) -> bool:
        """Whether a text means this one of its repository: what it says, or a file of it."""
        if quant.lower() in ("", self.quant.lower(), *(part.lower() for part in self._parts)):
            return True
        ggufs = gguf_sets(path.name for path in self.path.iterdir()) if self.path.is_dir() else ()
        name = quant.lower().rstrip("/").rpartition("/")[2]  # here there are no folders in a model's
        return any(is_it(name) for one in ggufs for is_it in one.ranks())

    @property
    def finished_path(self) -> Path:
        """Where it is when the pull has finished."""
        return self.path.with_name(self.path.name.removesuffix(PART_SUFFIX))

    @property
    def unfinished_path(self) -> Path:
        """Where a pull writes it until then."""
        return self.path.with_name(self.finished_path.name + PART_SUFFIX)

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        total = 0
        for path in self.path.rglob("*"):
            with suppress(FileNotFoundError):  # a pull that goes on has renamed or removed it
                total += path.lstat().st_size if path.is_file() else 0
        return total


def home() -> Path:
    """The folder of all that numoe keeps: NUMOE_HOME, or where the platform keeps a user's data.

    Raises InputError when NUMOE_HOME begins with the name of no user, or it is not set and the user has no home.
    """
    chosen = os.environ.get("NUMOE_HOME")
    if chosen:
        return expanded(chosen, "NUMOE_HOME is").absolute()
    from platformdirs import user_data_path

    try:
        return user_data_path("numoe", appauthor=False)
    except RuntimeError:  # HOME is not set, and the system knows no user of this number
        raise InputError(
            "there is no place for what numoe keeps, as this user has no home; set NUMOE_HOME to a folder"
        ) from None


def make(folder: Path) -> None:
    """Make a folder in `home`, or that itself, which nobody else may look into where it is new.

    One that was there keeps its permissions: the models in it may be for others too.

    Raises OSError.
    """
    home().mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def models_folder() -> Path:
    """Where pulled models are."""
    return home() / "models"


def called(gguf: str, quant: str) -> str:
    """`Pulled.quant` of what is made of a GGUF file ("": of safetensors) by a recipe."""
    return f"{gguf}+{quant}" if gguf and quant != "native" else gguf or quant


def folder_for(repo_id: str, quant: str) -> Path:
    """Where the pulled model of a hub id is or will be."""
    between = "-" if _PLAIN.fullmatch(quant) else "--"
    return models_folder() / f"{repo_id.replace('/', '--')}{between}{quant}"


def models() -> list[Pulled]:
    """All pulled models, by name. Folders that are named otherwise are not numoe's own and are left out."""
    folder = models_folder()
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _FOLDER.fullmatch(path.name.removesuffix(PART_SUFFIX))
        if match and path.is_dir():
            owner, *parts = match.groups()
            name, quant = filter(None, parts)
            found.append(Pulled(f"{owner}/{name}", quant, path))
    return found


def find(model: str) -> list[Pulled]:
    """The pulled models that a name can mean: OWNER/NAME or NAME in any case, and perhaps a colon and the quant.

    Where ids differ in case alone, the one that is spelled just so; of GGUF files, rather the one that is called so
    than one of whose name that is a part.
    """
    name, _, quant = named(model)[0].partition(":")
    found = [one for one in models() if name.lower() in map(str.lower, _names(one)) and one.means(quant)]
    found = [one for one in found if one.quant.lower() == quant.lower()] or found
    return [one for one in found if one.repo_id == name] or found


def shortest_name(path: Path) -> str:
    """What a finished pulled model in this folder is called where one asks for it: with its quant only if need be."""
    one = next(one for one in models() if one.path == path)
    alone = sum(other.complete for other in find(one.repo_id)) == 1
    return one.repo_id if alone else one.name


def _names(one: Pulled) -> tuple[str, str]:
    return one.repo_id, one.repo_id.partition("/")[2]


def only(model: str, among: list[Pulled]) -> Pulled:
    """The only one of several pulled models that a name can mean.

    Raises:
        InputError: there are more; the message says how to tell them apart.
    """
    if len(among) > 1:
        raise WrongUsage(f'"{model}" can be {" or ".join(one.name for one in among)}; say which')
    return among[0]


def remove(one: Pulled) -> None:
    """Remove a pulled model from the disk. If that is interrupted, what is left counts as unfinished.

    Raises:
        InputError: it is being pulled just now.
        OSError: it cannot be removed.
    """
    path = one.path
    if path.is_symlink():  # to a folder that somebody keeps elsewhere
        path.unlink()
        return
    with held(one.unfinished_path) as free:
        if not free:
            raise InputError(f"{one.name} is being pulled just now; stop that first")
        if one.complete:
            path = path.rename(one.unfinished_path)
        shutil.rmtree(path)


def lookup(model: str | Path) -> Path | None:
    """The folder or .gguf file that a name means, None if there is none here.

    Args:
        model: `tiny`, the model inside the package; a folder or file; the name of a pulled model; a hub id whose
            files are in the Hugging Face cache, with :QUANT for one in GGUF. The first of these that fits is taken.

    Raises:
        InputError: the name fits several pulled models, or is a path that cannot be looked at.
    """
    if model == TINY:
        return Path(__file__).parent / TINY
    name, _ = named(str(model))
    path = expanded(name, "there is no folder or file")
    try:
        if path.is_dir() or path.is_file():
            return path
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise InputError(f"{path} cannot be looked at ({error.strerror}); check its permissions") from error
    if finished := [one for one in find(name) if one.complete]:
        return only(name, finished).path
    if where := parted(name):
        from numoe.engine.hub.gguf import cached_gguf
        from numoe.engine.hub.repository import cached_snapshot

        return (None if where[1] else cached_snapshot(name)) or cached_gguf(*where)
    return None


def expanded(path: str, what: str) -> Path:
    """A path with a user's folder in place of ~; `what` begins the error.

    Raises:
        InputError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise WrongUsage(f'{what} "{path}", which begins with the name of no user; write the path in full') from None


def locate(model: str | Path) -> Path:
    """As `lookup`.

    Raises:
        InputError: nothing is there, or the name fits several pulled models; the message says what to do.
    """
    path = lookup(model)
    if path is not None:
        return path
    name, _ = named(str(model))
    if unfinished := find(name):
        one = only(name, unfinished)
        raise InputError(f"{one.name} is not here as a whole; `{one.command}` goes on where it was")
    raise unknown(name)


def unknown(name: str) -> WrongUsage:
    """What to say of a name that means nothing here."""
    known = {spelled.lower(): spelled for one in models() for spelled in _names(one)}
    close = get_close_matches(name.lower()[:200], [*known, TINY], n=1, cutoff=0.7)
    hint = f' (did you mean "{known.get(close[0], close[0])}"?)' if close else ""
    if where := parted(name):
        from numoe.engine.hub.repository import cached_snapshot

        if not where[1] and cached_snapshot(name, whole=False):
            return WrongUsage(
                f"the Hugging Face cache holds {name} in part; `numoe pull {name}` gets the rest, `numoe fit {name}` "
                "tells what it takes"
            )
        return WrongUsage(
            f'"{name}" is neither a folder here nor a pulled model{hint}; `numoe fit {name}` tells what it takes, '
            f"`numoe pull {name}` gets it, `numoe run pull=true` does both"
        )
    shown = name if len(name) <= 200 else f"{name[:200]}..."
    return WrongUsage(
        f'there is no folder or file "{shown}" and no pulled model of that name{hint}; give a model folder, a .gguf '
        "file, a hub id, a name that `numoe list` shows, or tiny"
    )
