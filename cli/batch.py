"""`numoe run --batch`: a file of prompts, and a file of answers that can be gone on with.

    {"key": KEY, "id": ID, "model": MODEL, "text": ...}      a line of answers
    {"key": KEY, "id": ID, "model": MODEL, "error": ...}     of a prompt that failed

The key is a hash of all that the answer comes from: an answer is found again by it wherever its prompt stands by then.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from threading import Barrier, Event, Thread
from typing import TYPE_CHECKING, Any

from numoe.cli.output import Output
from numoe.cli.reply import Interrupt, document, show
from numoe.cli.request import Request
from numoe.cli.settings import SETTINGS, May, in_group, settings_in, spelled
from numoe.cli.text import read_text
from numoe.engine.batch import Passes
from numoe.engine.session import require_room, shared_length
from numoe.quant.documents import parse_json
from numoe.quant.errors import DoesNotFit, InputError
from numoe.quant.files import locked, write_whole

if TYPE_CHECKING:
    from numoe.engine import Model, Session
    from numoe.engine.description import Description
    from numoe.engine.session import Snapshot

LARGEST_BATCH = 4 << 30
"""Bytes of a file of prompts."""
PARALLEL = 16
"""Prompts that are answered at once where nobody says how many, if there is memory: experts that are on disk as well
make room for their sessions."""
MANY = 64
"""So many where no expert has to: a token of each takes three quarters of what it takes with 16 (SmolLM2, Zen 4)."""
KEPT_POINTS = 4
"""Snapshots, longest first, of beginnings that prompts share: caches with windows cannot go back to them otherwise."""

_WORTH_SHARING = 8  # tokens; fewer are read beside the rest of a prompt at no cost
_KEYS = settings_in(May.LINE)
_FORMS = in_group("form")
# What an answer comes from, beside the prompt and the model. The context is not among them: a longer one, as for a
# prompt that had no room, leaves the other answers as they are.
_KEYED = [setting.name for setting in SETTINGS if May.LINE in setting.may or setting.name == "raw"]


@dataclass(frozen=True)
class Item:
    """A line of a batch. `id` is the line's own, or its number. `key` is a hash of the model, the prompt and all that
    an answer depends on."""

    id: Any
    key: str
    request: Request


def read_batch(name: str, options: Mapping[str, Any], model: Description) -> list[Item]:
    """The prompts of a file, or of standard input for "-".

    options: the values of `numoe run`'s settings, where a line says nothing else. model: who is asked.

    Raises:
        InputError: there are none, or a line is not what it should be; the message has its number.
    """
    items, file = [], "standard input" if name == "-" else name
    asked = [model.identity, model.tokenizer.chat_template, sorted(model.tokenizer.eos_ids)]
    for number, line in enumerate(read_text(name, LARGEST_BATCH).split("\n"), 1):
        if text := line.lstrip("\ufeff").strip():  # files with byte order marks may have been joined
            value = parse_json(text, f"{file} line {number}", "give one object a line")
            try:
                items.append(_item(number, value, options, asked))
            except InputError as error:
                raise InputError(f"{file} line {number}: {error}") from None
    if not items:
        raise InputError(f'{file} is empty; give one {{"prompt": TEXT}} a line')
    return items


def _item(number: int, line: Any, options: Mapping[str, Any], model: list[Any]) -> Item:
    if not isinstance(line, dict) or ("prompt" in line) == ("messages" in line):
        raise InputError('it must be an object with either "prompt" or "messages"')
    try:
        json.dumps(line, allow_nan=False)
    except (ValueError, RecursionError):
        raise InputError("NaN and Infinity are no numbers of JSON, and nothing nests so deeply") from None
    settings = {key: value for key, value in line.items() if key not in ("id", "prompt", "messages")}
    for key, value in settings.items():
        if key not in _KEYS:
            raise InputError(f'there is no setting "{key}"; there are {", ".join(_KEYS)}')
        _KEYS[key].check(value, f'"{key}"')
    if settings.keys() & _FORMS.keys():
        settings = dict.fromkeys(_FORMS) | settings
    prompt = line.get("prompt")
    if "messages" in line:
        prompt = _messages(line["messages"], options["raw"])
    elif not isinstance(prompt, str) or not prompt.strip():
        raise InputError('"prompt" must be a text that is not empty')
    elif not options["raw"]:
        prompt = [{"role": "user", "content": prompt.strip()}]
    given = {**options, **settings}
    source = json.dumps([model, prompt, {name: given[name] for name in _KEYED}])
    key = hashlib.blake2b(source.encode(), digest_size=16).hexdigest()
    return Item(line.get("id", number), key, Request.make(prompt, given))


def _messages(messages: Any, raw: bool) -> list[dict[str, str]]:
    if raw:
        raise InputError('--raw skips the template that "messages" need; give a "prompt"')
    if not isinstance(messages, list) or not messages:
        raise InputError('"messages" must be a list that is not empty')
    for message in messages:
        parts = message.values() if isinstance(message, dict) and message.keys() == {"role", "content"} else [None]
        if not all(isinstance(part, str) for part in parts):
            raise InputError('every message must be {"role": TEXT, "content": TEXT}')
    return messages


class Answers:
    """The answers to a batch: lines of a file, or of standard output. A context manager.

    lines: the answer to each item; None where there is none yet. What failed is not there: it is asked again.
    """

    def __init__(self, items: Sequence[Item], output: Output, out: Path | None = None, batch: str = "-") -> None:
        """
        Args:
            out: a file that may have some of the answers already; None: standard output.
            batch: the name of the file of prompts, which is not to be written over.

        Entering raises InputError when the file has something else, is none that answers can be added to, or another
        process adds its own.
        """
        self.lines: list[dict[str, Any] | None] = [None] * len(items)
        self._items, self._output, self._batch = items, output, batch
        self._out = None if out is None else Path(os.path.realpath(out))
        self._kept = 0  # bytes of whole lines that the file had
        self._ordered = True
        self._file: FileIO | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Answers:
        if self._out is not None:
            with self._writing(), ExitStack() as stack:
                self._refuse_other_files(self._out)
                stack.enter_context(locked(self._out, f"the file of answers {self._out}"))
                self._read(self._out)
                stack.callback(self._close, self._out)
                self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        with self._writing():
            self._stack.close()

    @property
    def missing(self) -> list[int]:
        """The items that have no answer."""
        return [number for number, line in enumerate(self.lines) if line is None]

    def add(self, number: int, line: dict[str, Any]) -> None:
        """Write the answer to an item, safe on disk.

        Raises:
            InputError: the file cannot be written.
        """
        self.lines[number] = line
        if self._out is None:
            self._output.line(line)
            return
        with self._writing():
            if self._file is None:
                self._file = self._out.open("ab", buffering=0)
                self._file.truncate(self._kept)
            data = _encoded(line)
            while data:  # the last of a disk takes a part
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())

    def _close(self, out: Path) -> None:
        if self._file is not None:
            self._file.close()
        if not self._ordered:
            mode = stat.S_IMODE(out.stat().st_mode)
            write_whole(out, b"".join(_encoded(line) for line in self.lines if line), private=True)
            out.chmod(mode)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self._out} cannot be written ({error.strerror}); see to that, and the same command goes on from here"
            ) from None

    def _refuse_other_files(self, out: Path) -> None:
        if not out.exists():
            return
        if not out.is_file():
            raise InputError(f"--out {out} is not an ordinary file; name another, or leave --out out and use >")
        prompts = os.fstat(0) if self._batch == "-" else Path(self._batch).stat()
        if os.path.samestat(prompts, out.stat()):
            raise InputError(f"--out {out} is the file of the prompts itself; name another")

    def _read(self, out: Path) -> None:
        """Find the answers that the file has. Raises InputError where it has something else."""
        if not out.exists():
            return
        with out.open("rb") as file:
            begin = file.read(len(_BEGIN))  # of what else it may be, and however long, no more is read
            data = begin + file.read() if begin == _BEGIN[: len(begin)] else b"\n"
        *ended, half = data.split(b"\n")
        found: dict[str, deque[tuple[int, dict[str, Any]]]] = {}
        for number, text in enumerate(ended, 1):
            line = _parsed(text)
            if line is None:
                raise self._foreign(number)
            if "error" not in line:
                found.setdefault(line["key"], deque()).append((number, line))
        # A line that was not finished is ours by its key: of any form, or where it is the only line, of a prompt.
        keys = [half[9:41].decode("latin-1")] if ended else [item.key for item in self._items]
        begun = [f'{{"key": "{key}", "id": '.encode() for key in keys if re.fullmatch("[0-9a-f]*", key)]
        if half and not any(half.startswith(text[: len(half)]) for text in begun):
            raise self._foreign(len(ended) + 1)
        for number, item in enumerate(self._items):
            if lines := found.get(item.key):
                self.lines[number] = lines.popleft()[1] | {"id": item.id}
        if strange := sorted(number for lines in found.values() for number, _ in lines):
            raise InputError(
                f"{out} line {strange[0]} answers nothing that is asked now ({len(strange)} such in all): its prompt, "
                "a setting or the model was another; name another --out, or remove what is to be answered anew"
            )
        self._kept = len(data) - len(half)
        done = [line for line in self.lines if line is not None]
        self._ordered = self.lines[: len(done)] == done and data == b"".join(map(_encoded, done)) + half
        self._ordered &= not half or bool(self.missing)

    def _foreign(self, number: int) -> InputError:
        return InputError(f"{self._out} line {number} is not an answer of numoe; name another --out")


_BEGIN = b'{"key":'


def _encoded(line: dict[str, Any]) -> bytes:
    # Half of a surrogate pair, which an id may have, becomes JSON's own escape.
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A line of answers; None: it is something else."""
    try:
        line = parse_json(text, "a line")
    except InputError:
        return None
    ours = isinstance(line, dict) and isinstance(line.get("key"), str) and ("text" in line) != ("error" in line)
    return line if ours else None


def answer_batch(
    model: Model,
    context: int | None,
    parallel: int | None,
    items: Sequence[Item],
    answers: Answers,
    name: str,
    output: Output,
) -> None:
    """Answer what has no answer yet; the answers come in order. A prompt that fails gets an "error".

    Args:
        context: tokens of a session. parallel: how many of them at most, and there are as many as memory is left for;
            None: PARALLEL, or up to MANY.
        name: the model's, for the lines.

    Raises:
        InputError: there is no memory for one session.
        KeyboardInterrupt: Ctrl-C; the answers made so far are there.
    """
    missing = answers.missing
    asked = [items[number].request for number in missing]
    most = min(parallel or MANY, len(missing))
    passes = Passes(model.decoder) if most > 1 else None
    sessions = [model.session(context, passes=passes)]
    if passes:
        budget, each = model.memory.sessions.budget, model.plan(context).kv_bytes
        with suppress(DoesNotFit):
            while len(sessions) < most:
                if parallel is None and len(sessions) >= PARALLEL and budget.total - budget.reserved < each:
                    break
                sessions.append(model.session(context, passes=passes))
    with Interrupt() as interrupt, ExitStack() as stack:
        if passes:
            lines = _together(sessions, passes, asked, interrupt.cancelled)
        else:
            lines = _in_turn(sessions[0], asked, interrupt.cancelled)
        stack.enter_context(closing(lines))
        for number in missing:
            output.status(f"answer {number + 1} of {len(items)}")
            item = items[number]
            answers.add(number, {"key": item.key, "id": item.id, "model": name} | next(lines))


Lines = Generator[dict[str, Any], None, None]


def _in_turn(session: Session, requests: Sequence[Request], cancelled: Callable[[], bool]) -> Lines:
    """The answer to one request after another."""
    asked = _Asked(session, cancelled)
    for request, following in zip(requests, [*requests[1:], None], strict=True):
        yield asked.line(request, following)


def _together(
    sessions: Sequence[Session], passes: Passes, requests: Sequence[Request], cancelled: Callable[[], bool]
) -> Lines:
    """The same in the same order, made by several sessions on threads of their own. What a thread raises is raised."""
    waiting, left, begin = deque(enumerate(requests)), Event(), Barrier(len(sessions))
    shared = _shared_by_all(requests[: len(sessions)], sessions[0])
    if shared:
        with passes.member():
            sessions[0].feed(shared, last=True)
        for session in sessions[1:]:
            session.fork(sessions[0])
    made: SimpleQueue[tuple[int, dict[str, Any] | BaseException]] = SimpleQueue()

    def work(session: Session) -> None:
        asked = _Asked(session, lambda: left.is_set() or cancelled())
        if shared:
            asked.points.append(session.snapshot())
        try:
            with passes.member():
                begin.wait()  # so that what a pass is made of does not depend on who starts first
                while (task := _taken(waiting)) is not None:
                    number, request = task
                    made.put((number, asked.line(request)))
        except BaseException as error:
            made.put((-1, error))

    threads: list[Thread] = []
    ready: dict[int, dict[str, Any]] = {}
    try:
        for session in sessions:
            thread = Thread(target=work, args=[session], name="numoe batch")
            thread.start()
            threads.append(thread)
        for number in range(len(requests)):
            while number not in ready:
                which, line = made.get()
                if isinstance(line, BaseException):
                    raise line
                ready[which] = line
            yield ready.pop(number)
    finally:
        waiting.clear()
        left.set()
        begin.abort()  # where not all have started, who has waits for no one
        for thread in threads:
            thread.join()


def _shared_by_all(requests: Sequence[Request], session: Session) -> list[int]:
    """The tokens that these prompts begin with, and that leave room for one of each; none where they are few."""
    shared: list[int] | None = None
    for request in requests:
        try:
            ids, _ = request.encode(session.model.description)
        except InputError:  # told when its turn comes
            continue
        shared = ids[:-1] if shared is None else shared[: shared_length(shared, ids[:-1])]
        if len(shared) < _WORTH_SHARING:
            return []
    return (shared or [])[: session.context - 1]


def _taken(waiting: deque[tuple[int, Request]]) -> tuple[int, Request] | None:
    try:
        return waiting.popleft()
    except IndexError:  # another thread may have taken the last one just now
        return None


def count(items: Sequence[Item], lines: Sequence[Mapping[str, Any] | None]) -> tuple[int, int]:
    """How many answers failed, and how many were cut short of their form."""
    failed = cut = 0
    for item, line in zip(items, lines, strict=True):
        failed += line is not None and "error" in line
        cut += line is not None and item.request.cut(line.get("finish_reason"))
    return failed, cut


@dataclass
class _Asked:
    """A session that is asked one request after another, and points that it can go back to."""

    session: Session
    cancelled: Callable[[], bool]
    points: deque[Snapshot] = field(default_factory=lambda: deque(maxlen=KEPT_POINTS))

    def line(self, request: Request, following: Request | None = None) -> dict[str, Any]:
        """What a line says of the answer, or why there is none.

        following: the request that this session is asked next, if that is known.
        """
        try:
            return self._answer(request, following)
        except InputError as error:
            return {"error": spelled(str(error))}

    def _answer(self, request: Request, following: Request | None) -> dict[str, Any]:
        session, points = self.session, self.points
        ids, opened = request.encode(session.model.description)
        require_room(len(ids), session.context, session.model.spec.context)
        unread = session.align(ids, points)
        known, begun = session.position, time.perf_counter()
        while points and len(points[0].tokens) > known:
            points.popleft()
        if following is not None:
            shared = _shared(ids, following, session)
            if shared > known:
                session.feed(ids[known:shared], last=True)
            if shared >= known and not (points and len(points[0].tokens) == shared):
                points.appendleft(session.snapshot())
        apart = time.perf_counter() - begun
        answer = request.ask(session, unread[session.position - known :], opened, cancelled=self.cancelled)
        show(answer, None)
        if answer.turn.finish_reason == "cancelled":
            raise KeyboardInterrupt
        made = document(answer, len(ids), known, session.model.tokenizer if request.logprobs else None)
        for span in ("prompt_s", "first_token_s"):
            made["timings"][span] += apart
        return made


def _shared(ids: Sequence[int], other: Request, session: Session) -> int:
    """How many tokens another prompt begins with as this one does; one at least is left."""
    try:
        theirs, _ = other.encode(session.model.description)
    except InputError:  # told when its turn comes
        return 0
    return shared_length(ids[:-1], theirs)
