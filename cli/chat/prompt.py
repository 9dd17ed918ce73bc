"""What is typed at the chat's prompt: editing, history, completion, and keys that come while an answer streams."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter, WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.shortcuts import CompleteStyle

from numoe.engine.home import make
from numoe.quant.errors import InputError

try:
    import termios
except ImportError:  # Windows shows only what is read
    termios = None  # type: ignore[assignment]

Commands = Callable[[], Mapping[str, tuple[Iterable[str], bool]]]
"""The names of commands; the words that may follow each, and whether a file may."""

_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_QUOTES = '"""'


class Prompt:
    """Reads turns from a terminal.

    While entered, keys that are typed in between are not shown but kept for the next turn, a paste as a whole.
    """

    def __init__(self, history: Path | None, commands: Commands, keeps: Callable[[], bool] = lambda: True) -> None:
        """
        Args:
            history: a file that keeps what was typed, made if need be; None: nothing does.
            commands: what is completed.
            keeps: whether what is typed goes into the file, asked each time.
        """
        if history:
            _make_private(history)
        self._session: PromptSession[str] = PromptSession(
            "> ",
            output=create_output(stdout=sys.stderr),
            history=_History(str(history), keeps) if history else InMemoryHistory(),
            completer=_Commands(commands),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            reserve_space_for_menu=0,
            multiline=True,
            prompt_continuation=lambda width, line, wraps: "  " if wraps else ". ",
            key_bindings=_keys(),
            enable_suspend=True,
            tempfile_suffix=".md",
        )

    def __enter__(self) -> Prompt:
        if termios:
            self._before: list[Any] = termios.tcgetattr(sys.stdin)
            silent = termios.tcgetattr(sys.stdin)
            silent[0] &= ~termios.ICRNL
            silent[3] &= ~(termios.ECHO | termios.ICANON)
            silent[3] |= termios.NOFLSH  # Ctrl-C forgets nothing
            termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if termios:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, self._before)
        self._session.output.disable_bracketed_paste()
        self._session.output.flush()

    def read(self, draft: str = "") -> str:
        """One turn, stripped; `draft` stands there to be edited.

        Raises:
            KeyboardInterrupt: Ctrl-C, and nothing had been typed.
            EOFError: Ctrl-D.
        """
        # An exception out of a signal's handler can get lost in the editor's event loop: the editor ends first.
        self._ended_by: int | None = None
        handlers = {number: signal.signal(number, self._end) for number in _ENDING}
        try:
            text = self._session.prompt(default=draft, pre_run=self._end_editing).strip()
        except KeyboardInterrupt:
            if self._session.default_buffer.text:
                return ""
            raise
        finally:
            self._session.output.enable_bracketed_paste()
            self._session.output.flush()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if self._ended_by is not None:
                signal.raise_signal(self._ended_by)
        return text.removeprefix(_QUOTES).removesuffix(_QUOTES).strip() if _quoted(text) else text

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._ended_by = number
        loop = self._session.app.loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._end_editing)

    def _end_editing(self) -> None:
        app = self._session.app
        if self._ended_by is not None and app.future is not None and not app.future.done():
            app.exit(exception=EOFError)


class _History(FileHistory):
    """A history whose file can be left out for a while."""

    def __init__(self, file: str, keeps: Callable[[], bool]) -> None:
        super().__init__(file)
        self._keeps = keeps

    def store_string(self, string: str) -> None:
        if self._keeps():
            super().store_string(string)


def _make_private(file: Path) -> None:
    """Make a file, if there is none, and let nobody but the user read it."""
    try:
        make(file.parent)
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600))
        if file.stat().st_mode & 0o077:  # older versions made it so
            file.chmod(0o600)
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror}); check it and its folder") from None


def _quoted(text: str) -> bool:
    return len(text) >= 2 * len(_QUOTES) and text.startswith(_QUOTES) and text.endswith(_QUOTES)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        text = event.current_buffer.text.strip()
        if text.startswith(_QUOTES) and not _quoted(text):
            event.current_buffer.newline()
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-g")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor()

    return keys


class _Commands(Completer):
    """Completes commands at the start of the line, and after a command what may follow it."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        commands = self._commands()
        name, space, rest = document.text_before_cursor.partition(" ")
        words: Iterable[str] = [f"/{command}" for command in commands]
        files = False
        if space:
            words, files = commands.get(name.removeprefix("/"), ((), False)) if name[:1] == "/" else ((), False)
        part = Document(rest.lstrip() if space else name)
        yield from WordCompleter(list(words), sentence=True).get_completions(part, complete_event)
        if files:
            yield from self._paths.get_completions(part, complete_event)
