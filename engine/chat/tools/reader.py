"""Calls told from text in an answer that comes in pieces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from numoe.engine.chat.thinking import Splitter
from numoe.engine.chat.tools.call import Begun, Broken, Call, Syntax, Tool
from numoe.engine.text.sample import partial_match

Part = tuple[str, str]
CALLING = ("call", "arguments", "called", "broken")
"""The kinds of parts that are no text."""


class CallReader:
    """Splits the text of an answer, without reasoning, into what is said and calls, never showing half of a mark.

    ("text", TEXT); ("call", NAME) begins a call, and ("arguments", JSON) adds to its arguments; ("called", "") says
    that the calls begun since are whole, and ("broken", "") that they are none: what they were made of follows as text.
    The text joined, and the calls that are whole, are the same however the answer is cut into pieces.
    """

    def __init__(self, syntax: Syntax, tools: Mapping[str, Tool]) -> None:
        self._syntax, self._tools = syntax, tools
        self._anywhere, self._first = syntax.openings(tools)
        self._at_start = True  # nothing but whitespace so far
        self._after_calls = False
        self._space = ""  # in front of what is held: it goes where calls follow, or came before
        self._held = ""
        self._in_block = False
        self._begun: list[Begun] = []

    def push(self, piece: str) -> list[Part]:
        """What this piece settles, in order."""
        return self._split(self._held + piece, ended=False)

    def flush(self) -> list[Part]:
        """What is still held back, once the answer has ended."""
        parts = self._split(self._held, ended=True)
        if self._space and not self._after_calls:
            parts.append(("text", self._space))
        self._space = ""
        return parts

    def _split(self, text: str, ended: bool) -> list[Part]:
        parts: list[Part] = []
        while True:
            if self._in_block:
                rest = self._block(text, ended, parts)
                if rest is None:
                    self._held = text
                    return parts
                text = rest
                continue
            at = self._opening(text)
            if at is None:
                cut = len(text) if ended else self._shown(text)
                self._say(text[:cut], parts)
                self._held = text[cut:]
                return parts
            self._say(text[:at], parts)
            self._keep_lead(parts)
            text, self._in_block = text[at:], True

    def _opening(self, text: str) -> int | None:
        """Where a block begins."""
        places = [at for opening in self._anywhere if (at := text.find(opening)) >= 0]
        if self._at_start:
            lead = len(text) - len(text.lstrip())
            places += [lead for opening in self._first if text.startswith(opening, lead)]
        return min(places, default=None)

    def _shown(self, text: str) -> int:
        """How much of a text without a block is no beginning of one."""
        cut = len(text) - partial_match(text, self._anywhere)
        begun = text.lstrip()
        if self._at_start and any(opening.startswith(begun) for opening in self._first):
            cut = min(cut, len(text) - len(begun))
        return cut

    def _say(self, text: str, parts: list[Part]) -> None:
        """Text that is no part of a block; whitespace at its end waits for what follows."""
        text = self._space + text
        if self._after_calls:
            text = text.lstrip()
        body = text.rstrip()
        self._space = text[len(body) :]
        if body:
            self._at_start = self._after_calls = False
            parts.append(("text", body))

    def _keep_lead(self, parts: list[Part]) -> None:
        """Of the whitespace in front of a block, what is no part of it is text."""
        lead = self._syntax.lead
        if lead is not None and self._space:
            kept = lead if self._space.endswith(lead) else ""
            if said := self._space[: len(self._space) - len(kept)]:
                parts.append(("text", said))
            self._space = kept

    def _block(self, text: str, ended: bool, parts: list[Part]) -> str | None:
        """Take what has come of a block, and return what follows it; None: it goes on."""
        try:
            block = self._syntax.read(text, self._tools, ended)
            if ended and block.length is None:
                raise Broken
        except Broken:
            return self._broken(text, parts)
        for number, call in enumerate(block.calls):
            if number == len(self._begun):
                self._begun.append(Begun(call.name))
                parts.append(("call", call.name))
            begun = self._begun[number]
            if more := call.arguments[len(begun.arguments) :]:
                begun.arguments = call.arguments
                parts.append(("arguments", more))
        if block.length is None:
            return None
        parts.append(("called", ""))
        self._in_block, self._begun = False, []
        self._at_start, self._after_calls, self._space = False, True, ""
        return text[block.length :]

    def _broken(self, text: str, parts: list[Part]) -> str:
        """What begins like a block and is none: its opening is text, and what follows is looked at anew."""
        if self._begun:
            parts.append(("broken", ""))
        self._in_block, self._begun = False, []
        found = [one for one in (*self._anywhere, *(self._first if self._at_start else ())) if text.startswith(one)]
        length = min(map(len, found))
        self._after_calls = False
        parts.append(("text", self._space + text[:length]))
        self._at_start, self._space = False, ""
        return text[length:]


class CallSplitter:
    """A splitter of reasoning and answer that also tells calls from the answer."""

    def __init__(self, splitter: Splitter, reader: CallReader) -> None:
        self._splitter, self._reader = splitter, reader

    @property
    def thinking(self) -> bool:
        """As that of the splitter."""
        return self._splitter.thinking

    def push(self, piece: str) -> list[Part]:
        """What this piece settles, in order."""
        return self._told(self._splitter.push(piece))

    def flush(self) -> list[Part]:
        """What is still held back, once the completion has ended."""
        return self._told(self._splitter.flush()) + self._reader.flush()

    def _told(self, parts: list[Part]) -> list[Part]:
        return [one for kind, text in parts for one in (self._reader.push(text) if kind == "text" else [(kind, text)])]


class CallList:
    """The calls of an answer, gathered from the parts of it. whole: those that are, in order."""

    def __init__(self) -> None:
        self.whole: list[Call] = []
        self._begun: list[Call] = []

    def take(self, kind: str, text: str) -> None:
        """Take a part that is no text, as `CallReader` gives them."""
        if kind == "call":
            self._begun.append(Call(text, ""))
        elif kind == "arguments":
            self._begun[-1] = replace(self._begun[-1], arguments=self._begun[-1].arguments + text)
        else:
            self.whole += self._begun if kind == "called" else []
            self._begun = []


def read_calls(text: str, syntax: Syntax, tools: Mapping[str, Tool]) -> tuple[str, list[Call]]:
    """What is said in a whole answer, and its calls."""
    reader, calls, said = CallReader(syntax, tools), CallList(), ""
    for kind, part in reader.push(text) + reader.flush():
        if kind == "text":
            said += part
        else:
            calls.take(kind, part)
    return said, calls.whole
