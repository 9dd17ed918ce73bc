"""One answer, made on a thread of its own and told as it comes."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from numoe.cli.request import Request
from numoe.cli.serve.fields import Refused
from numoe.cli.serve.places import Left, Place, Places
from numoe.cli.serve.post import Told
from numoe.cli.serve.question import Begun, Made, Piece, refused_by, sentence
from numoe.quant.errors import DoesNotFit, InputError

if TYPE_CHECKING:
    from numoe.engine import Model
    from numoe.engine.chat.answer import Answer
    from numoe.engine.generation import Token


class Work:
    """An answer that is being made. `leave` ends it wherever it is."""

    def __init__(
        self, request: Request, tell: Callable[[Told], None], send: Callable[[], None], seconds: float
    ) -> None:
        """
        Args:
            tell: called on the answer's thread with all that comes of it: Begun, pieces and Made, or Refused at any
                time. send: called when it was told for the last time.
            seconds: the answer is cut off after so many.
        """
        self._request, self._tell, self._send = request, tell, send
        self._left = threading.Event()
        self._ends = time.monotonic() + seconds
        self._late = False

    def leave(self) -> None:
        """Nobody waits for the answer any more."""
        self._left.set()

    def run(self, model: Model, places: Places) -> None:
        """Make the answer; what goes wrong is told, and never raised."""
        try:
            self._answer(model, places)
        except Left:
            pass
        except Refused as refused:
            self._tell(refused)
        except DoesNotFit as error:
            self._tell(Refused(503, sentence(error)))
        except InputError as error:
            self._tell(refused_by(error))
        except BaseException as error:  # whoever asks is told, and the others are answered
            if os.environ.get("NUMOE_DEBUG"):
                traceback.print_exc()
            what = "there is not enough memory" if isinstance(error, MemoryError) else f"{type(error).__name__}"
            self._tell(Refused(500, f"the answer failed in numoe ({what}); NUMOE_DEBUG=1 shows where, in its log"))
        self._send()

    def _gone(self) -> bool:
        self._late = self._late or time.monotonic() > self._ends
        return self._late or self._left.is_set()

    def _answer(self, model: Model, places: Places) -> None:
        if self._left.is_set():
            raise Left
        request = self._request
        ids, opened = request.encode(model.description, model.plan(places.context).context)
        with places.taken(ids, self._left.is_set) as place:
            unread = place.align(ids)
            reused = len(ids) - len(unread)
            hooks = {"cancelled": self._gone, "progress": self._reading(place), "drafter": places.drafter}
            answer = request.ask(place.session, unread, opened, **hooks)
            self._tell(Begun(len(ids), reused))
            with places.passes.member():
                try:
                    pieces = list(self._told(answer, _ids(model, request)))
                finally:
                    answer.close()
        if self._left.is_set():
            raise Left
        self._tell(self._made(answer, pieces, len(ids), reused))

    def _reading(self, place: Place) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            if self._left.is_set():
                raise Left
            place.read(done, total)

        return progress

    def _told(self, answer: Answer, ids: Iterator[Callable[[str], str]]) -> Iterator[Piece]:
        done = 0
        for kind, text in answer:
            tokens = answer.generation.tokens[done:]
            done += len(tokens)
            piece = Piece(kind, text, tokens, next(ids)(text) if kind == "call" else "")
            self._tell(piece)
            yield piece

    def _made(self, answer: Answer, pieces: list[Piece], prompt: int, reused: int) -> Made:
        turn = answer.turn.trimmed()
        if turn.finish_reason == "cancelled":  # its time was up
            turn = type(turn)(turn.question, turn.thinking, turn.text, "length", turn.calls)
        tokens: list[Token] = answer.generation.tokens
        thinking = sum(len(piece.tokens) for piece in pieces if piece.kind == "thinking")
        begun: list[str] = []
        ids: list[str] = []
        for piece in pieces:
            if piece.kind == "call":
                begun.append(piece.call_id)
            elif piece.kind in ("called", "broken"):
                ids += begun if piece.kind == "called" else []
                begun = []
        return Made(turn, prompt, reused, tokens, thinking, pieces, ids, answer.stop)


def _ids(model: Model, request: Request) -> Iterator[Callable[[str], str]]:
    """Makes an id of the name of each call that comes."""
    from numoe.engine.chat.tools.call import Usual

    earlier: Any = request.prompt if request.settings.use else ()
    number = sum(len(message.get("tool_calls", ())) for message in earlier)
    syntax = model.description.chat_format.syntax if request.settings.use else None
    while True:
        yield lambda name, number=number: (syntax or Usual()).call_id(name, number)  # type: ignore[misc]
        number += 1
