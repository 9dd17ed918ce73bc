"""`numoe run --batch`: a file of prompts, and a file of answers that can be gone on with."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numoe.cli.output import Output
from numoe.cli.reply import Interrupt, show
from numoe.cli.request import FORMS, Request, document
from numoe.cli.text import read_text
from numoe.engine.session import require_room
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from numoe.engine import Session
    from numoe.engine.session import Snapshot

KEPT_POINTS = 4
"""Snapshots, longest first, of beginnings that prompts share: caches with windows cannot go back to them otherwise."""

# What a line can say for itself, named as the options are, and the types of JSON it takes.
_KEYS: Mapping[str, tuple[type, ...]] = {
    "system": (str,),
    "think": (bool,),
    "think_budget": (int,),
    "max_tokens": (int,),
    "stop": (list,),
    "temp": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
    "min_p": (int, float),
    "repeat_penalty": (int, float),
    "seed": (int,),
    "schema": (dict, bool),
    "choices": (list,),
    "regex": (str,),
    "logprobs": (int,),
}


@dataclass(frozen=True)
class Item:
    """A line of a batch. `id` is the line's own, or its number."""

    id: Any
    request: Request


def read_batch(name: str, options: Mapping[str, Any]) -> list[Item]:
    """The prompts of a file, or of standard input for "-".

    options: the values of `numoe run`'s options, where a line says nothing else.

    Raises:
        InputError: there are none, or a line is not what it should be; the message has its number.
    """
    items, file = [], "standard input" if name == "-" else name
    for number, line in enumerate(read_text(name).split("\n"), 1):
        if line.strip():
            try:
                items.append(_item(number, json.loads(line), options))
            except InputError as error:
                raise InputError(f"{file} line {number}: {error}") from None
            except ValueError as error:
                raise InputError(f"{file} line {number} is not JSON ({error}); give one object a line") from None
    if not items:
        raise InputError(f'{file} is empty; give one {{"prompt": TEXT}} a line')
    return items


def _item(number: int, line: Any, options: Mapping[str, Any]) -> Item:
    if not isinstance(line, dict) or ("prompt" in line) == ("messages" in line):
        raise InputError('it must be an object with either "prompt" or "messages"')
    settings = {key: value for key, value in line.items() if key not in ("id", "prompt", "messages")}
    for key, value in settings.items():
        if key not in _KEYS:
            raise InputError(f'there is no setting "{key}"; there are {", ".join(_KEYS)}')
        texts = not isinstance(value, list) or all(isinstance(text, str) for text in value)
        if type(value) not in _KEYS[key] or not texts or (type(value) is int and value < 0):
            raise InputError(f'"{key}" cannot be {json.dumps(value)}; give what --{key.replace("_", "-")} takes')
    if settings.keys() & set(FORMS):
        settings = dict.fromkeys(FORMS) | settings
    prompt = line.get("prompt")
    if prompt is None:
        prompt = _messages(line["messages"], options["raw"])
    elif not isinstance(prompt, str) or not prompt.strip():
        raise InputError('"prompt" must be a text that is not empty')
    elif not options["raw"]:
        prompt = [{"role": "user", "content": prompt.strip()}]
    return Item(line.get("id", number), Request.make(prompt, {**options, **settings}))


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


@dataclass(frozen=True)
class Totals:
    """What became of a batch: answers made, and among them those that failed and those cut short of their form."""

    answered: int
    failed: int
    cut: int


def answer_batch(session: Session, items: Sequence[Item], out: Path | None, output: Output) -> Totals:
    """Answer in order, one JSON line each, to a file or standard output. A prompt that fails gets an "error".

    out: a file that may have the answers to the first items already; those that it lacks are added.

    Raises:
        InputError: the file has something else.
        KeyboardInterrupt: Ctrl-C; the answers made so far are there.
    """
    done = _resume(out, items) if out else 0
    if done:
        output.note(f"{out} has {done} of {len(items)} answers already.")
    failed = cut = 0
    points: deque[Snapshot] = deque(maxlen=KEPT_POINTS)
    with out.open("ab") if out else nullcontext() as file, Interrupt() as interrupt:
        for number in range(done, len(items)):
            output.status(f"answer {number + 1} of {len(items)}")
            item, following = items[number], items[number + 1 : number + 2]
            line: dict[str, Any] = {"id": item.id}
            try:
                line |= _answer(session, item.request, [other.request for other in following], points, interrupt)
            except InputError as error:
                failed += 1
                line["error"] = str(error)
            cut += line.get("finish_reason") == "length" and item.request.grammar is not None
            if file is None:
                output.line(line)
            else:
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
    return Totals(len(items) - done, failed, cut)


def _answer(
    session: Session,
    request: Request,
    following: Sequence[Request],
    points: deque[Snapshot],
    interrupt: Interrupt,
) -> dict[str, Any]:
    ids, opened = request.encode(session.model.description)
    require_room(len(ids), session.context, session.model.spec.context)
    unread = session.align(ids, points)
    known, begun = session.position, time.perf_counter()
    while points and len(points[0].tokens) > known:
        points.popleft()
    for other in following:
        shared = _shared(ids, other, session)
        if shared > known:
            session.feed(ids[known:shared], last=True)
        if shared >= known and not (points and len(points[0].tokens) == shared):
            points.appendleft(session.snapshot())
    apart = time.perf_counter() - begun
    answer = request.ask(session, unread[session.position - known :], opened, cancelled=interrupt.cancelled)
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
    pairs = enumerate(zip(ids[:-1], theirs, strict=False))
    return next((i for i, (ours, its) in pairs if ours != its), min(len(ids) - 1, len(theirs)))


def _resume(out: Path, items: Sequence[Item]) -> int:
    """How many answers a file has, after cutting off one that is not whole; 0 where there is no file."""
    if not out.exists():
        return 0
    data = out.read_bytes()
    *lines, half = data.split(b"\n")
    for number, line in enumerate(lines):
        try:
            same = number < len(items) and json.loads(line)["id"] == items[number].id
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise InputError(
                f"{out} line {number + 1} is not the answer to prompt {number + 1} of this batch; "
                "remove the file or give another --out"
            )
    if half:
        os.truncate(out, len(data) - len(half))
    return len(lines)
