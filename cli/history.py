"""What `numoe run` keeps of its prompts: the last one, for -c, and all of them where the log is switched on.

NUMOE_HOME/last.json     the last prompt and its answer, as a chat
NUMOE_HOME/log.jsonl     prompts and answers, one a line

Only the user may read them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numoe.cli.output import as_json
from numoe.engine.home import home, make
from numoe.quant.errors import InputError, WrongUsage

if TYPE_CHECKING:
    from numoe.engine.chat.files import Chat


def last_path() -> Path:
    """The file of the last prompt, whether it is there or not."""
    return home() / "last.json"


def read_last() -> Chat:
    """The last prompt and its answer. Raises WrongUsage where none was kept."""
    from numoe.engine.chat.files import Chat

    if not last_path().exists():
        raise WrongUsage("there is nothing to go on with: no prompt of `numoe run` was kept; ask without -c first")
    return Chat.read(last_path())


def log_path() -> Path:
    """The file of the log, whether it is there or not."""
    return home() / "log.jsonl"


def log(entry: dict[str, Any]) -> None:
    """Add a line to the log.

    Raises:
        InputError: it cannot be written.
    """
    path = log_path()
    line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **entry}) + "\n"
    try:
        make(path.parent)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(file, "ab", buffering=0) as appended:
            if os.fstat(file).st_mode & 0o077:  # it was there before, and others could read it
                path.chmod(0o600)
            appended.write(line.encode())  # at once, so that lines of several processes do not mix
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); check it, or leave out `log`") from None


def entries(search: str = "") -> Iterator[dict[str, Any]]:
    """What was logged, the oldest first; with `search` where it is said, in any case. Lines that are cut are none.

    Raises:
        InputError: the log cannot be read.
    """
    path = log_path()
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                with suppress(ValueError, RecursionError):
                    entry = json.loads(line)
                    if isinstance(entry, dict) and search.lower() in f"{entry['prompt']}\n{answered(entry)}".lower():
                        yield entry
    except FileNotFoundError:
        return
    except (OSError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}); correct or remove it") from None


def answered(entry: dict[str, Any]) -> str:
    """The text of a logged answer, and the calls of tools behind it."""
    return "\n".join(filter(None, (entry["text"], *map(as_json, entry.get("tool_calls", ())))))
