"""Answers of a given form: which tokens may come next under a grammar.

A grammar is llguidance's variant of Lark (github.com/guidance-ai/llguidance, docs/syntax.md). Those made here are
checked when they are made; the whole answer matches them unless it is cut short.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from itertools import takewhile
from math import isfinite, lcm
from typing import TYPE_CHECKING, Any

import numpy as np

from numoe.engine.layers.ops import Floats
from numoe.engine.text.library import library
from numoe.engine.text.references import refuse_endless
from numoe.engine.text.tags import TAGS
from numoe.quant.errors import InputError, shown

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from numoe.engine.text.tokenizer import Tokenizer

_WHITESPACE = r"( |\n[ \t]{0,32})?"  # between the tokens of JSON; a model that loses itself in spaces would never end

_LARGEST_CONSTANT = 1 << 53  # llguidance keeps numbers as float64
# A bound may be larger on the side on which it leaves smaller numbers: it says "no bound" in some languages.
_SIZES: Mapping[str, Callable[[float], float]] = {
    **dict.fromkeys(("const", "enum"), abs),
    **dict.fromkeys(("minimum", "exclusiveMinimum"), lambda number: number),
    **dict.fromkeys(("maximum", "exclusiveMaximum"), lambda number: -number),
}
_LARGEST_STEP = 100_000  # an automaton has a state a remainder
_LARGEST_GRAMMAR, _MOST_CHOICES = 1 << 19, 20_000  # more takes seconds, and gigabytes
_LONGEST_PATTERN = 1 << 14  # characters: with what may be left out in it, time grows with their square
_TABLES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # of schemas by any name


def json_grammar(schema: Mapping[str, Any] | bool) -> str:
    """JSON that a schema accepts, without whitespace around it.

    Raises:
        InputError: the schema is not valid, nothing fits it, or it has a keyword that cannot be guaranteed.
    """
    return f"start: {json_rule(schema, 'the JSON schema')}\n"


def json_rule(schema: Mapping[str, Any] | bool, what: str) -> str:
    """The same as a part of a rule; `what` begins the error."""
    if schema is True:
        schema = {}
    try:
        _refuse_numbers(schema)
        refuse_endless(schema, what)
        _refuse_long(_pattern_length(schema), f"{what} cannot be used: its patterns have")
        if isinstance(schema, Mapping):
            schema = {**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE}}
        rule = f"%json {json.dumps(schema)}"
    except RecursionError:
        raise InputError(f"{what} cannot be used: it is nested too deeply; give a flatter one") from None
    _checked(f"start: {rule}\n", what)
    return rule


def _refuse_numbers(schema: Any) -> None:
    """Raises InputError for the numbers in a schema with which llguidance makes other digits, crashes or never ends."""
    if isinstance(schema, list):
        for inner in schema:
            _refuse_numbers(inner)
    if not isinstance(schema, Mapping):
        return
    for key, value in schema.items():
        if size := _SIZES.get(key):
            if large := next((number for number in _numbers(value) if size(number) > _LARGEST_CONSTANT), None):
                raise InputError(
                    f"the JSON schema cannot be used: {key} has {shown(large)}, and only numbers up to 2**53 keep "
                    "their digits; give it as a string"
                )
        elif key in _TABLES and isinstance(value, Mapping):
            _refuse_numbers(list(value.values()))
        elif key not in ("default", "examples"):
            _refuse_numbers(value)
    together = [schema, *(part for part in _listed(schema.get("allOf")) if isinstance(part, Mapping))]
    steps = [number for part in together for number in _numbers(part.get("multipleOf"))]
    if lcm(*(int("".join(map(str, Decimal(str(step)).as_tuple().digits))) for step in steps)) > _LARGEST_STEP:
        raise InputError(
            f"the JSON schema cannot be used: multipleOf is {' with '.join(map(str, steps))}, which takes too long to "
            f"follow; give steps of up to {_LARGEST_STEP}"
        )


def _pattern_length(schema: Any) -> int:
    """Characters of all regular expressions in a schema."""
    if not isinstance(schema, Mapping):
        return sum(map(_pattern_length, _listed(schema)))
    by_name = schema.get("patternProperties")
    patterns = [schema.get("pattern"), *(by_name if isinstance(by_name, Mapping) else ())]
    own = sum(len(pattern) for pattern in patterns if isinstance(pattern, str))
    return own + sum(map(_pattern_length, schema.values()))


def _refuse_long(length: int, what: str) -> None:
    if length > _LONGEST_PATTERN:
        raise InputError(f"{what} {length} characters; shorten that to {_LONGEST_PATTERN}")


def _numbers(value: Any) -> Iterator[float]:
    """The finite numbers in a JSON value."""
    if type(value) is int or (type(value) is float and isfinite(value)):
        yield value
    for inner in value.values() if isinstance(value, Mapping) else _listed(value):
        yield from _numbers(inner)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def choice_grammar(choices: Sequence[str]) -> str:
    """One of several texts.

    Raises:
        InputError: there are none, or one is empty.
    """
    if not choices or not all(choices):
        raise InputError("a choice is empty; give texts to choose from")
    if len(choices) > _MOST_CHOICES:
        raise InputError(f"there are {len(choices)} choices; give up to {_MOST_CHOICES}")
    return _checked(
        f"start: {' | '.join(json.dumps(choice, ensure_ascii=False) for choice in choices)}\n", "the list of choices"
    )


def regex_grammar(pattern: str) -> str:
    """Text that a regular expression matches as a whole.

    The syntax is that of Rust's regex crate, without look-around; `\\d` is 0-9.

    Raises:
        InputError: the expression is not valid.
    """
    from llguidance import regex_to_lark

    _refuse_long(len(pattern), "the regular expression cannot be used: it has")
    with library("the regular expression cannot be used", "correct it"):
        grammar = f"start: /{regex_to_lark(pattern, 'd')}/\n"
    return _checked(grammar, "the regular expression")


def named(grammar: str, name: str = "answer") -> str:
    """A grammar as a rule of another one."""
    return re.sub(r"\Astart:", f"{name}:", grammar)


def outside(marks: Sequence[str], first: Sequence[str]) -> str:
    """A terminal TEXT of any text with none of the marks in it, and that does not begin with one of `first`."""
    kinds = [f"(?s:.*){_escaped(mark)}(?s:.*)" for mark in marks]
    kinds += [f"(?s:\\s*){_escaped(mark)}(?s:.*)" for mark in first]
    return " & ".join(["TEXT: /(?s:.*)/", *(f"~/{kind}/" for kind in kinds)])


def _escaped(text: str) -> str:
    return re.sub(r"([.^$*+?{}\[\]\\|()/-])", r"\\\1", text)


def _checked(grammar: str, what: str) -> str:
    from llguidance import LLMatcher

    if len(grammar) > _LARGEST_GRAMMAR:
        raise InputError(f"{what} cannot be used: it has {len(grammar)} characters; shorten it to {_LARGEST_GRAMMAR}")
    with library(f"{what} cannot be used", "correct it"):
        error = LLMatcher.validate_grammar(grammar)
    if error:
        raise InputError(f"{what} cannot be used: {_sentence(error)}")
    return grammar


def _sentence(error: str) -> str:
    """What is wrong, of a report that goes on with where it was found."""
    first, *others = error.splitlines()
    causes = [line.removeprefix("error: ") for line in others if line.startswith("error: ")]
    said = " ".join([re.sub(r"^(at )?\d+\(\d+\): ", "", first), *causes])
    for theirs, ours in _OURS.items():
        said = said.replace(theirs, ours)
    said = said if len(said) <= 300 else f"{said[:300]}..."
    return said.replace("`", "'")  # which are around parameters of ours


_OURS = {
    "failed to compile JSON schema: ": "",
    "oneOf constraints are not supported. Enable 'coerce_one_of' option to approximate oneOf with anyOf": (
        "oneOf has schemas that one value may fit together; give anyOf"
    ),
    "Unimplemented keys": "it has keywords that cannot be guaranteed",
}


class Matcher:
    """Follows one text through a grammar.

    Raises InputError when the grammar and the vocabulary do not fit together.
    """

    def __init__(self, grammar: str, tokenizer: Tokenizer, vocab: int, spelled: Collection[str] = ()) -> None:
        """
        Args:
            vocab: how many logits there are; it may be more than the tokenizer's ids.
            spelled: special tokens that the grammar spells, beside tags (`text.tags`).
        """
        from llguidance import LLMatcher

        with library("the answer cannot take the form asked for", "ask for another form"):
            self._matcher = LLMatcher(_vocabulary(tokenizer, vocab, frozenset(spelled)), grammar, log_level=0)
        self._vocab = vocab
        self._check()

    def mask(self, logits: Floats) -> Floats:
        """A copy of logits (V,) with minus infinity for every token that may not come next.

        Raises:
            InputError: no token of the vocabulary may.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=self._vocab, bitorder="little").view(bool)
        if not allowed.any():
            raise InputError("no token of this model's vocabulary can go on as the answer must; ask for another form")
        return np.where(allowed, logits, np.float32(-np.inf))

    def accept(self, token_id: int) -> bool:
        """Take a token, and say whether the text is complete: nothing can follow it.

        Raises:
            InputError: the token may not come next.
        """
        self._matcher.consume_token(token_id)
        self._check()
        return bool(self._matcher.is_stopped())

    def forced(self) -> list[int]:
        """The tokens that have to come next, as far as only one text can."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        return list(takewhile(lambda token: token < self._vocab, tokens))

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"the answer cannot take the form asked for: {_sentence(self._matcher.get_error())}")


@lru_cache(maxsize=2)  # of a model, without and with the marks of calls
def _vocabulary(tokenizer: Tokenizer, vocab: int, spelled: frozenset[str]) -> LLTokenizer:
    """llguidance's view of a vocabulary; kept, for it takes a second to build for a large one."""
    from llguidance import LLTokenizer, TokenizerWrapper

    listed = _Vocabulary(tokenizer, vocab, spelled)
    return LLTokenizer(TokenizerWrapper(listed), n_vocab=len(listed.tokens), eos_token=listed.ends)


class _Vocabulary:
    """What llguidance asks of a tokenizer: bytes of every token, and how the model itself would cut a text."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab: int, spelled: frozenset[str]) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(i) for i in range(max(vocab, tokenizer.vocab_size))]
        # The tags of thinking blocks are special tokens in some vocabularies; the grammar spells them.
        tags = {tag.encode() for tag in spelled.union(*TAGS)}
        special = {i for i in tokenizer.special_ids if self.tokens[i] not in tags}
        self._marks = {self.tokens[i]: i for i in tokenizer.special_ids - special if self.tokens[i]}
        self._mark = re.compile(b"(" + b"|".join(map(re.escape, self._marks)) + b")") if self._marks else None
        self.ends = sorted(i for i in tokenizer.eos_ids if i < len(self.tokens))  # files may name ids beyond
        if not self.ends:  # there must be one: it gets an id that has no logit
            self.ends = [len(self.tokens)]
            self.tokens.append(b"<end>")
        special.update(self.ends)
        self.eos_token_id = self.ends[0]
        self.special_token_ids = sorted(special)
        self._ids = {token: i for i, token in enumerate(self.tokens) if token and i not in special}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, data: bytes) -> list[int]:
        parts = self._mark.split(data) if self._mark else [data]
        return [i for part in parts if part for i in ([self._marks[part]] if part in self._marks else self._cut(part))]

    def _cut(self, data: bytes) -> list[int]:
        text = data.decode("utf-8", "replace")
        # SentencePiece may put a space before a text, which the line break then takes.
        for lead in ("", "\n"):
            ids = self._tokenizer.encode(lead + text, special=False)
            ids = ids[len(self._tokenizer.encode(lead, special=False)) :]
            if b"".join(self.tokens[i] for i in ids) == data:
                return ids
        return self._longest_first(data)

    def _longest_first(self, data: bytes) -> list[int]:
        """For texts that the tokenizer changes before it cuts them."""
        ids, start = [], 0
        while start < len(data):
            ends = range(min(len(data), start + self._longest), start, -1)
            end = next((end for end in ends if data[start:end] in self._ids), None)
            if end is None:
                break
            ids.append(self._ids[data[start:end]])
            start = end
        return ids
