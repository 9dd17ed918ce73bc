"""The kept chats, as they are listed, shown and written out."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numoe.cli.arguments import meant
from numoe.cli.output import as_json
from numoe.cli.reply import calls
from numoe.cli.settings import spelled
from numoe.engine.home import TINY, expanded
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from numoe.engine.chat.answer import Turn
    from numoe.engine.chat.files import Chat

_TITLE = 40  # characters of a first question that stand for it


@dataclass(frozen=True)
class Kept:
    """A chat in its file. wrong: why it cannot be read; the rest is empty then."""

    name: str
    used: float
    title: str = ""
    model: str = ""
    turns: int = 0
    wrong: str = ""

    @property
    def age(self) -> str:
        """How long ago it was gone on with: 5 min, 3 h, 2 d."""
        seconds = max(0.0, time.time() - self.used)
        for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
            if seconds >= size:
                return f"{seconds / size:.0f} {unit}"
        return "now"

    def document(self) -> dict[str, Any]:
        """As JSON."""
        used = datetime.fromtimestamp(self.used, UTC).isoformat(timespec="seconds")
        return asdict(self) | {"used": used}


def kept(search: str = "") -> Iterator[Kept]:
    """The chats, the last used first; with `search` those that say it anywhere, in any case."""
    from numoe.engine.chat.files import Chat, chats

    for path in chats():
        try:
            used = path.stat().st_mtime
            chat = Chat.read(path)
        except (InputError, OSError) as error:  # damaged, or removed meanwhile
            if not search and path.exists():
                yield Kept(path.stem, path.stat().st_mtime, wrong=spelled(str(error)))
            continue
        if search.lower() in f"{path.stem}\n{said(chat.turns)}".lower():
            yield Kept(path.stem, used, title(chat), chat.model, len(chat.turns))


def title(chat: Chat) -> str:
    """The first words that were said."""
    text = " ".join(chat.turns[0].question.split()) if chat.turns else ""
    return text if len(text) <= _TITLE else f"{text[: _TITLE - 1]}…"


def table(chats: Sequence[Kept]) -> list[tuple[str, str, str, str, str]]:
    """Rows with a heading."""
    rows = [
        (
            one.name,
            "(cannot be read)" if one.wrong else one.title,
            one.model,
            "" if one.wrong else str(one.turns),
            one.age,
        )
        for one in chats
    ]
    return [("name", "title", "model", "turns", "age"), *rows]


def said(turns: Sequence[Turn]) -> str:
    """What was said, as it stood on the screen. Answers that go on behind calls of tools have no question."""
    parts = ((f"> {turn.question}\n" if turn.question else "", _answered(turn)) for turn in turns)
    return "\n".join("".join(part).rstrip() for part in parts)


def _answered(turn: Turn) -> str:
    """The text of an answer, and the calls of tools behind it."""
    return "\n".join(filter(None, (turn.trimmed().text, *map(as_json, calls(turn)))))


def markdown(chat: Chat) -> str:
    """A chat as a document to read."""
    system = [f"> {line}" for line in (chat.settings.system or "").splitlines()]
    turns = (
        (f"## {_heading(turn.question)}\n\n" if turn.question else "") + f"{_answered(turn).strip()}\n"
        for turn in chat.turns
    )
    return "\n".join([f"# A chat with {chat.model}\n", *system, *[""] * bool(system), *turns])


def _heading(question: str) -> str:
    """The first line of a question as a heading, and the others below it."""
    first, _, rest = question.partition("\n")
    return f"{re.sub(r'^#+ *', '', first)}\n\n{rest}" if rest.strip() else re.sub(r"^#+ *", "", first)


def write(chat: Chat, path: Path) -> None:
    """Write what was said to a new file: Markdown or, with all settings, JSON, by its ending.

    Raises:
        InputError: there is a file already, or none can be written there.
    """
    try:
        with path.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(markdown(chat) if path.suffix == ".md" else chat.text())
    except FileExistsError:
        raise InputError(f"{path} is there already; give another name, or remove it first") from None
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); give another file") from None


def model_name(model: str) -> str:
    """A model's name as a chat keeps it: one that means the same in every folder."""
    model = meant(model) or model
    path = expanded(model, "there is no folder or file")
    return str(path.absolute()) if model != TINY and os.path.lexists(path) else model
