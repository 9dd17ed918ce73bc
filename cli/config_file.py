"""config.toml in NUMOE_HOME: read, and changed with its comments as they are.

temp = 0.7                what an option is where it is not given; see `config.py`
[alias]                   names of the user's own for models
[template]                prompts with a place for a text
[tools.NAME]              commands that a model may ask for; see `chat/tools.py`
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numoe.quant.errors import InputError, WrongUsage

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

TABLES = "alias", "template"
"""The tables: texts by names."""
TOOLS = "tools"
"""The table of tables in which `numoe chat` finds commands that a model may ask for."""
_PATIENCE = 20.0  # seconds to wait while another process writes the file


def path() -> Path:
    """The file, whether it is there or not."""
    from numoe.engine.home import home

    return home() / "config.toml"


def read(file: Path) -> dict[str, Any]:
    """What is in the file, nothing if there is none.

    Raises:
        InputError: it is no file of settings.
    """
    from numoe.quant.documents import parse_toml, read_document

    if not file.exists():
        return {}
    if not file.is_file():
        raise InputError(f"{file} is not an ordinary file; remove it")
    return parse_toml(read_document(file), file)


def check_table(name: str, value: Any, file: Path) -> None:
    """Raises InputError unless it is a table of texts."""
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise InputError(f"{file}: {name} is no table of texts; correct or remove it")


def table(name: str) -> dict[str, str]:
    """One of TABLES.

    Raises:
        InputError: config.toml cannot be read, or holds something else there.
    """
    file = path()
    found: dict[str, str] = read(file).get(name, {})
    check_table(name, found, file)
    return found


def check_tools(value: Any, file: Path) -> None:
    """Raises InputError unless it is a table, in which the commands of tools are looked at when they are offered."""
    if not isinstance(value, dict):
        raise InputError(f"{file}: {TOOLS} is no table; write [{TOOLS}.NAME]")


def tool_tables() -> dict[str, Any]:
    """The tables of commands by the names of their tools.

    Raises:
        InputError: config.toml cannot be read, or holds something else there.
    """
    file = path()
    tables: dict[str, Any] = read(file).get(TOOLS, {})
    check_tools(tables, file)
    return tables


def change_table(name: str, key: str, value: str) -> None:
    """Set an entry of one of TABLES; an empty value removes it.

    Raises:
        InputError: config.toml cannot be changed.
        WrongUsage: there is none to remove.
    """
    if not value and key not in table(name):
        raise WrongUsage(f'there is no {name} "{key}"; `numoe {name}` shows those that there are')
    with changed() as document:
        entries: Any = document.setdefault(name, {})
        if value:
            entries[key] = value
        else:
            del entries[key]
        if not entries:
            del document[name]


@contextmanager
def changed() -> Iterator[TOMLDocument]:
    """The file with its comments, which stay where they are; written when it is changed, while others wait.

    Raises:
        InputError: it is no file of settings, or cannot be written.
    """
    import tomlkit

    from numoe.engine.home import home, make
    from numoe.quant.files import locked_soon, write_whole

    read(path())  # what is no file of settings is left alone, without a lock beside it
    file = path().resolve()  # a link to where somebody keeps their settings stays one
    try:
        make(home())
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked_soon(file, str(file), _PATIENCE):
            read(file)
            text = file.read_text(encoding="utf-8-sig") if file.exists() else ""
            document = tomlkit.parse(text)
            yield document
            write_whole(file, document.as_string().encode(), private=True)
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror}); check the folder") from error
