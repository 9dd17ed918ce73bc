"""`numoe run --batch`: a file of prompts, and the answers to them, several at a time."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Barrier, Event, Thread
from typing import TYPE_CHECKING, Any

from numoe.cli.answers import Answers, Item, Lines
from numoe.cli.reply import Interrupt, document, show
from numoe.cli.request import Request
from numoe.cli.setting import May
from numoe.cli.settings import SETTINGS, in_group, settings_in, spelled
from numoe.cli.text import read_text
from numoe.engine.batch import Passes
from numoe.engine.session import shared_length
from numoe.quant.documents import parse_json
from numoe.quant.errors import DoesNotFit, InputError

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


def answer_batch(
    model: Model,
    context: int | None,
    parallel: int | None,
    answers: Answers,
    name: str,
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
    asked = answers.asked
    sessions, passes = open_sessions(model, context, parallel, len(asked))
    with Interrupt() as interrupt:
        if passes:
            lines = _together(sessions, passes, asked, interrupt.cancelled)
        else:
            lines = _in_turn(sessions[0], asked, interrupt.cancelled)
        with closing(lines):
            answers.add_all(lines, name)


def open_sessions(
    model: Model, context: int | None, parallel: int | None, most: int
) -> tuple[list[Session], Passes | None]:
    """As many sessions as `answer_batch` says, `most` at most, and what lets them go on together.

    Raises:
        InputError: there is no memory for one session.
    """
    most = min(parallel or MANY, most)
    passes = Passes(model.decoder) if most > 1 else None
    sessions = [model.session(context, passes=passes)]
    if passes:
        budget, each = model.memory.sessions.budget, model.plan(context).kv_bytes
        with suppress(DoesNotFit):
            while len(sessions) < most:
                if parallel is None and len(sessions) >= PARALLEL and budget.total - budget.reserved < each:
                    break
                sessions.append(model.session(context, passes=passes))
    return sessions, passes


def _in_turn(session: Session, requests: Sequence[Request], cancelled: Callable[[], bool]) -> Lines:
    """The answer to one request after another."""
    asked = Answering(session, cancelled)
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
        asked = Answering(session, lambda: left.is_set() or cancelled())
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
            ids, _ = request.encode(session.model.description, session.context, keep=True)
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


@dataclass
class Answering:
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
        ids, opened = request.encode(session.model.description, session.context)
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
        theirs, _ = other.encode(session.model.description, session.context, keep=True)
    except InputError:  # told when its turn comes
        return 0
    return shared_length(ids[:-1], theirs)
