"""Speculation: tokens that may come next are guessed and read in one pass with the last one.

What a text is made of does not change by it: of each token the logits say what comes, and guesses save passes only
where they agree (Leviathan et al., 2023, arXiv 2211.17192; here the choice itself is what a guess must agree with).
"""

from __future__ import annotations

from array import array
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Protocol

from numoe.engine.layers.state import CHUNK


class Drafter(Protocol):
    """Guesses what comes next."""

    def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        """Up to `most` tokens that may follow all `tokens` so far, the prompt's included; none where it has no idea.

        `tokens` is not to be changed. What was accepted is told by the next call's.
        """
        ...


def usable(proposed: Iterable[int], most: int, vocab: int, ends: Container[int]) -> list[int]:
    """What of a proposal is worth reading: at most so many, up to an end or to what is no token of the model."""
    most = min(most, CHUNK - 1)  # beside the token that they follow
    return list(takewhile(lambda token: 0 <= token < vocab and token not in ends, islice(proposed, max(0, most))))


@dataclass(frozen=True)
class PromptLookup:
    """Proposes what followed when the last tokens occurred before: the longest run of them, where it was last.

    It costs nothing, and is right where a text repeats what was said: quotes, names, code that is edited (Saxena,
    2023, github.com/apoorvumang/prompt-lookup-decoding). Where experts come from disk a wrong proposal is dear, for its
    tokens take others.
    """

    shortest: int = 2
    longest: int = 8
    """Tokens of a run, from and to."""
    tokens: int = 8
    """Proposed at most."""

    def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        known = array("i", tokens)
        for length in range(min(self.longest, len(known) - 1), self.shortest - 1, -1):
            start = _last(known[-length:], known[:-1])
            if start is not None:
                follows = known[start + length :]
                # What it overlaps with goes round: after "ababa" comes "ba" and "ba" again.
                return [follows[i % len(follows)] for i in range(min(most, self.tokens))]
        return []


def _last(run: array[int], known: array[int]) -> int | None:
    """Where a run of tokens begins that occurs in others, the last time."""
    text, sought, size = known.tobytes(), run.tobytes(), run.itemsize
    found = text.rfind(sought)
    while found > 0 and found % size:  # between two tokens' bytes
        found = text.rfind(sought, 0, found + len(sought) - 1)
    return found // size if found >= 0 else None
