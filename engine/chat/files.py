"""Chats in files.

NUMOE_HOME/chats/NAME.json    settings and turns, written after every turn
NUMOE_HOME/chats/NAME.kv      what the session remembers of them, written on leaving
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from numoe.engine.home import home, make
from numoe.quant.documents import read_object
from numoe.quant.errors import InputError, WrongUsage
from numoe.quant.files import locked_soon, write_whole

if TYPE_CHECKING:
    pass

from numoe.engine.chat.answer import Settings, Turn, is_text

FILE_VERSION = 1


@dataclass(frozen=True)
class Chat:
    """What a conversation's file holds.

    model: the name that the model was loaded by. forgotten: so many of the first turns are no longer told.
    """

    model: str
    settings: Settings = field(default_factory=Settings)
    turns: tuple[Turn, ...] = ()
    forgotten: int = 0

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all; nobody else can read it.

        Raises:
            InputError: it cannot be written.
        """
        try:
            _prepare_folder(path)
            # What is not UTF-8, as the name of a model's folder can be, becomes an escape that JSON knows too.
            write_whole(path, self.text().encode("utf-8", "backslashreplace"), private=True)
        except OSError as error:
            raise _unwritable(path, error) from error

    def text(self) -> str:
        """What the file holds."""
        document = {"numoe": f"chat {FILE_VERSION}", **asdict(replace(self, settings=replace(self.settings, use=None)))}
        del document["settings"]["use"]  # tools are of whoever asks, each time anew
        return json.dumps(document, ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Chat:
        """The chat of a file.

        Raises:
            InputError: there is no such file, or it is none of this version's chats.
        """
        shown = "`numoe chat list=true` shows those that are kept"
        if not path.is_file():
            named = f'"{path.stem}"' if path.parent == chats_folder() else path
            raise WrongUsage(f"there is no chat {named}; {shown}")
        try:
            document = read_object(path)
        except InputError:
            document = {}
        form = document.pop("numoe", None)
        if not isinstance(form, str) or not re.fullmatch(r"chat \d{1,9}", form):
            raise InputError(f"{path} is not a chat of numoe; {shown}")
        if form != f"chat {FILE_VERSION}":
            raise InputError(f"{path} is a chat of another version of numoe; go on with it there, or name another")
        try:
            chat: Chat = _built(cls, document, "the chat")
            if not 0 <= chat.forgotten <= len(chat.turns):
                raise ValueError(f"forgotten is {chat.forgotten}")
            return chat
        except ValueError as error:
            raise InputError(f"{path} is a damaged chat ({error}); name another, or remove it") from None


def _built(kind: Any, value: Any, name: str) -> Any:
    """The value of a JSON document as the type that a field has. Raises ValueError if it is another."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        if type(value) is not dict or value.keys() - hints.keys():
            raise ValueError(f"{name} is something else")
        parts = {key: _built(hints[key], one, key) for key, one in value.items()}
        try:
            return kind(**parts)  # type: ignore[operator]
        except TypeError:
            raise ValueError(f"{name} is not whole") from None
    if get_origin(kind) is tuple:
        if type(value) is not list:
            raise ValueError(f"{name} is not a list")
        return tuple(_built(get_args(kind)[0], one, name) for one in value)
    kinds = get_args(kind) or (kind,)
    if type(value) not in kinds and not (float in kinds and type(value) is int):
        raise ValueError(f"{name} is of another kind")
    if type(value) is str and name != "model" and not is_text(value):
        raise ValueError(f"{name} is not UTF-8")
    return value


def chats_folder() -> Path:
    """Where chats are kept."""
    return home() / "chats"


def chats() -> list[Path]:
    """The files of all chats that are kept, the last used first."""
    found = []
    for path in chats_folder().glob("*.json"):
        with suppress(OSError):  # removed meanwhile, or a link to nothing
            if stat.S_ISREG((kept := path.stat()).st_mode):
                found.append((kept.st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


@contextmanager
def alone(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Keeps other processes from going on with a chat meanwhile, after so many seconds of waiting for one that does.

    Raises:
        InputError: another process goes on with it, or its folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            _prepare_folder(path)
            stack.enter_context(locked_soon(path, f'the chat "{path.stem}"', patience))
        except OSError as error:
            raise _unwritable(path, error) from error
        yield


def _prepare_folder(path: Path) -> None:
    """Make the folder of chats, if the file is to be there, and keep it from others."""
    folder = chats_folder()
    if path.parent == folder:
        make(folder)
        with suppress(OSError):  # a disk without permissions, or another's folder
            folder.chmod(0o700)


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"the chat cannot be written to {path} ({error.strerror}); check the folder and its disk")


def chat_path(name: str) -> Path:
    """The file of a chat.

    Raises:
        InputError: the name cannot be a file's everywhere.
    """
    if not re.fullmatch(r"\w[\w .-]*", name) or len(name.encode()) > 200:  # of 255, for it gets endings
        raise WrongUsage(
            f'"{name}" cannot be the name of a chat; begin with a letter or digit and use letters, digits, spaces, '
            '".", "-" and "_", at most 200'
        )
    return chats_folder() / f"{name}.json"


def new_path(question: str) -> Path:
    """A file for a chat that begins with a question, named by the time and its first words."""
    words = "-".join(re.findall(r"\w+", question.lower())[:5])[:40]
    stem = f"{datetime.now():%Y-%m-%d-%H%M%S}-{words}".rstrip("-")
    paths = (chat_path(stem + (f"-{n}" if n > 1 else "")) for n in range(1, 1000))
    return next(path for path in paths if not path.exists())


def cache_path(path: Path) -> Path:
    """The file beside a chat's own that keeps what the session remembers."""
    return path.with_suffix(".kv")
