"""Answers of a given form: every one is what was asked for, with tokenizers of every kind."""

import json
import os
import re
from functools import reduce
from typing import Any

import jsonschema
import numpy as np
import pytest
from helpers import MARKS
from tiny import write_model
from vocabularies import BACKEND, plain, sentencepiece_folder

from numoe.engine import Model, load
from numoe.engine.chat.thinking import with_thinking
from numoe.engine.text.grammar import Matcher, choice_grammar, json_grammar, regex_grammar
from numoe.engine.text.library import library
from numoe.engine.text.tokenizer import Tokenizer
from numoe.quant.errors import InputError


def objects(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


WORD = {"type": "string", "maxLength": 6}
SCHEMAS: list[Any] = [
    objects(name=WORD, age={"type": "integer", "minimum": 0, "maximum": 120}),
    {"type": "array", "items": {"enum": ["red", "green", 7, None, True]}, "minItems": 1, "maxItems": 4},
    {"type": "string", "pattern": "^[a-z]{2,5}-[0-9]{1,3}$"},
    {"type": "integer", "minimum": -20, "exclusiveMaximum": 2000},
    {"anyOf": [objects(kind={"const": "a"}, x={"type": "boolean"}), objects(kind={"const": "b"}, y={"type": "null"})]},
    objects(point={"$ref": "#/$defs/point"}) | {"$defs": {"point": objects(x={"enum": [0, 1]}, y={"enum": [-1.5, 2]})}},
    {"type": "array", "prefixItems": [WORD, {"type": "boolean"}], "items": False, "minItems": 2},
    {"type": "string", "format": "date"},
    {"type": "object", "properties": {"a": WORD, "b": {"type": "boolean"}}, "additionalProperties": False},
    {"type": ["number", "null"], "minimum": 0.5, "maximum": 1.25},
]


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write_model("llama_a", tmp_path_factory.mktemp("llama"), marks=MARKS, eos=True))


def answer(model: Model, grammar: str, seed: int, temperature: float = 1.0, **options: Any) -> tuple[str, str | None]:
    session = model.session(512)
    generation = session.generate("answer: ", grammar=grammar, temperature=temperature, seed=seed, **options)
    return "".join(generation).removesuffix("</s>"), generation.finish_reason


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_every_answer_is_valid(random_model: Model, schema: Any) -> None:
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    grammar = json_grammar(schema)
    texts = []
    for seed in range(16):
        text, finish_reason = answer(random_model, grammar, seed)
        assert finish_reason == "stop"
        validator.validate(json.loads(text))
        texts.append(text)
    assert len(set(texts)) > 2, "it is the model that chooses"


def test_one_of_several_choices(random_model: Model) -> None:
    choices = ["yes", "yes, but", "no", 'a "b" {c}']
    answers = [answer(random_model, choice_grammar(choices), seed, temperature=3.0) for seed in range(30)]
    assert {text for text, _ in answers} == set(choices), "where one begins another, both can come"
    assert {finish_reason for _, finish_reason in answers} == {"stop"}


@pytest.mark.parametrize("pattern", ["[A-C]{3}/[0-9]+x", "^(ab|a)b?$", r"\d{2}\.\d"])
def test_regular_expressions_match_as_a_whole(random_model: Model, pattern: str) -> None:
    for seed in range(10):
        text, finish_reason = answer(random_model, regex_grammar(pattern), seed)
        assert re.fullmatch(pattern, text), text
        assert finish_reason == "stop"


@pytest.mark.parametrize(
    ("opened", "pattern"),
    [(True, r"(?s:.*)</think>\n{0,2}(moo|baa)"), (False, r"(<think>(?s:.*)</think>\n{0,2})?(moo|baa)")],
)
def test_the_form_begins_after_the_reasoning(random_model: Model, opened: bool, pattern: str) -> None:
    grammar = with_thinking(choice_grammar(["moo", "baa"]), opened)
    reasoned = 0
    for seed in range(8):
        session = random_model.session(1000)
        generation = session.generate("a", grammar=grammar, temperature=1.0, seed=seed)
        text = ""
        for piece in generation:
            text += piece
            if len(generation.tokens) == 30 and "<think>" in "<think>" * opened + text and "</think>" not in text:
                generation.force("</think>")
        assert re.fullmatch(pattern, text.removesuffix("</s>")), text
        reasoned += "</think>" in text
    assert reasoned


def test_an_answer_that_is_cut_says_so(random_model: Model) -> None:
    text, finish_reason = answer(random_model, regex_grammar("a{20}"), 0, max_tokens=7)
    assert (text, finish_reason) == ("aaaaaaa", "length")


def test_log_probabilities_are_those_of_the_model(random_model: Model) -> None:
    ids = random_model.tokenizer.encode("abc")
    generation = random_model.session(64).generate(ids, grammar=regex_grammar("z"), logprobs=3)
    assert "".join(generation) == "z"
    free = random_model.session(64).generate(ids, max_tokens=1, logprobs=90)
    list(free)
    assert generation.tokens[0].alternatives == free.tokens[0].alternatives[:3]
    assert dict(free.tokens[0].alternatives)[generation.tokens[0].id] == generation.tokens[0].logprob


# ------------------------------------------------------------------------------------------------ tokenizers


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {
        "byte_level": plain(BACKEND),
        "unigram": sentencepiece_folder(tmp_path_factory.mktemp("unigram"), "unigram"),
        "bpe": sentencepiece_folder(tmp_path_factory.mktemp("bpe"), "bpe"),
    }


def drawn(tokenizer: Tokenizer, grammar: str, seed: int, padding: int = 5) -> str:
    """A text by tokens at random, with a few rows of logits that are no tokens."""
    random = np.random.default_rng(seed)
    vocab = tokenizer.vocab_size + padding
    matcher, stream = Matcher(grammar, tokenizer, vocab), tokenizer.stream(keep_space=True)
    text = ""
    for _ in range(200):
        logits = random.standard_normal(vocab, np.float32)
        before = logits.copy()
        masked = matcher.mask(logits)
        assert masked.dtype == np.float32 and (logits == before).all()
        assert set(masked[masked != logits].tolist()) <= {-np.inf}
        token_id = int(masked.argmax())
        if token_id in tokenizer.eos_ids:
            break
        text += stream.push(token_id)
        if matcher.accept(token_id):
            break
    return text + stream.flush()


@pytest.mark.parametrize("kind", ["byte_level", "unigram", "bpe"])
@pytest.mark.parametrize("pattern", ["the (quick|lazy) [a-z]{1,9}", " ?fox  jumps", "12 o[^x]{3}clock"])
def test_every_kind_of_tokenizer(tokenizers: dict[str, Tokenizer], kind: str, pattern: str) -> None:
    for seed in range(10):
        text = drawn(tokenizers[kind], regex_grammar(pattern), seed)
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize("kind", ["byte_level", "bpe"])
def test_any_bytes_can_be_forced(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    """Also those that no token spells but byte by byte."""
    text = drawn(tokenizers[kind], choice_grammar(["  {žluťoučký}\n<s>🎉"]), 0)
    assert text == "  {žluťoučký}\n<s>🎉"


def test_ends_that_are_no_tokens_are_left_out() -> None:
    ends = [10**30, BACKEND.token_to_id("</s>")]
    kept = Tokenizer(BACKEND, bos_id=None, eos_ids=ends, add_bos=False, special_tokens={}, chat_template=None)
    assert re.fullmatch("fox [a-z]{3}", drawn(kept, regex_grammar("fox [a-z]{3}"), 0))


def test_a_vocabulary_that_lacks_a_character_is_refused(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(InputError, match=r"vocabulary|form"):
        drawn(tokenizers["unigram"], json_grammar({"type": "object"}), 0)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "Unsatisfiable"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"$ref": "#"}, "$ref '#' leads to itself without an end"),
        ({"$id": "http://a.example/b", "$ref": "http://a.example/b"}, "leads to itself without an end"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "without an end"),
        ({"$ref": "#/$defs/a%20b", "$defs": {"a b": {"allOf": [{"$ref": "#/$defs/a%20b"}, {}]}}}, "without an end"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "without an end"),
        (objects(next={"$ref": "#"}), "without an end"),
        ({"anyOf": [{"$ref": "#/anyOf/1"}, {"$ref": "#/anyOf/0"}]}, "without an end"),
        ({"$ref": "http://a.example/b.json"}, "$ref 'http://a.example/b.json' leads out of it; put that into $defs"),
        ({"anyOf": [{"$ref": f"#/$defs/{i}"} for i in range(1001)]}, "it refers to 1001 places; give up to 1000"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf has schemas that one value may fit together"),
        ({"not": {"type": "null"}}, 'it has keywords that cannot be guaranteed: ["not"]'),
        (False, "schema is false"),
        ({"const": -(1 << 63)}, "const has -9223372036854775808, and only numbers up to 2**53"),
        ({"properties": {"a": {"enum": [1, {"b": [1 << 64]}]}}}, "enum has 18446744073709551616"),
        ({"type": "integer", "minimum": -(1 << 63), "maximum": -(1 << 63)}, "maximum has -9223372036854775808, and"),
        ({"allOf": [{"type": "integer", "exclusiveMinimum": 1e30}]}, "exclusiveMinimum has 1e+30"),
        ({"const": 10**400}, "const has 1000"),
        ({"multipleOf": 2147483647}, "multipleOf is 2147483647, which takes too long"),
        (reduce(lambda inner, _: {"items": inner}, range(3000), {}), "it is nested too deeply"),
        ({"enum": ["word" * 10] * 20_000}, "it has 8"),
        ({"const": "\ud800"}, "hex escape"),
        ({"items": {"multipleOf": 997, "allOf": [{"multipleOf": 991}]}}, "multipleOf is 997 with 991"),
    ],
)
def test_schemas_that_cannot_be_guaranteed(schema: Any, words: str) -> None:
    with pytest.raises(InputError, match="the JSON schema cannot be used: .*" + re.escape(words)) as refused:
        json_grammar(schema)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        {"type": "array", "items": {"$ref": "#"}},
        {"type": "object", "properties": {"next": {"$ref": "#"}, "last": {"$ref": "#/properties/last"}}},
        {"type": "object", "properties": {"next": {"$ref": "#/$defs/end"}}, "required": ["next"],
         "$defs": {"end": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
        {"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(50)} | {"50": True}},
        {"$ref": "#a", "$defs": {"a": {"$anchor": "a", "type": "integer"}}},
        {"type": "object", "properties": {"$ref": {"type": "integer"}}, "required": ["$ref"]},
        {"const": {"$ref": "#"}},
    ],
)  # fmt: skip
def test_schemas_that_refer_to_themselves_and_end(schema: Any, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["bpe"]
    Matcher(json_grammar(schema), tokenizer, tokenizer.vocab_size)


def test_large_numbers_where_they_do_no_harm() -> None:
    json_grammar({"type": "integer", "maximum": (1 << 63) - 1, "default": 1 << 64, "multipleOf": 0.01})
    json_grammar({"properties": {"const": {"type": "integer", "maximum": 1 << 60}, "enum": {"multipleOf": 50000}}})


def test_other_forms_that_are_none() -> None:
    with pytest.raises(InputError, match=r"the regular expression cannot be used: .* unclosed group"):
        regex_grammar("a(")
    with pytest.raises(InputError, match="look-around"):
        regex_grammar("a(?=b)")
    with pytest.raises(InputError, match="surrogates"):
        regex_grammar("\ud800")
    with pytest.raises(InputError, match=r"it has [0-9]+ characters; shorten"):
        regex_grammar("ab" * 300_000)
    with pytest.raises(InputError, match=r"it has 16386 characters; shorten that to 16384"):
        regex_grammar("a?" * 8193)
    several = {"items": [{"pattern": "a?" * 5000}, {"patternProperties": {"b?" * 5000: True}}]}
    with pytest.raises(InputError, match=r"its patterns have 20000 characters; shorten that"):
        json_grammar(several)
    with pytest.raises(InputError, match="there are 100000 choices"):
        choice_grammar(["a"] * 100_000)
    with pytest.raises(InputError, match="the list of choices cannot be used"):
        choice_grammar(["\ud800"])
    with pytest.raises(InputError, match="choice is empty"):
        choice_grammar(["a", ""])
    with pytest.raises(InputError, match="choice is empty"):
        choice_grammar([])


def test_standard_error_comes_back_when_the_last_thread_has_left_the_library(capfd: pytest.CaptureFixture[str]) -> None:
    first, second = library("a", "b"), library("c", "d")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    os.write(2, b"a panic of the other\n")
    second.__exit__(None, None, None)
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"
