"""Calls of tools: every syntax at every split, what is broken, and grammars that calls are held to."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_tokenizer
from tiny import write_checkpoint

from numoe.engine import Model, load
from numoe.engine.chat.answer import Settings, answer
from numoe.engine.chat.formats.harmony import HarmonySplitter
from numoe.engine.chat.formats.jinja import JinjaChat
from numoe.engine.chat.prompt import encode
from numoe.engine.chat.tools.call import Call, Syntax, Tool, Use
from numoe.engine.chat.tools.reader import CallList, CallReader
from numoe.engine.chat.tools.syntaxes import SYNTAXES, syntax_of
from numoe.engine.text.grammar import Matcher
from numoe.engine.text.sample import Sampling
from numoe.engine.text.tags import DSML
from numoe.quant.errors import InputError

WEATHER = Tool(
    "get_weather",
    "The weather.",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "more": {"type": "object"},
            "unit": {"type": "string", "enum": ["C", "F"]},
        },
        "required": ["city"],
    },
)
TOOLS = {"get_weather": WEATHER, "ping": Tool("ping")}
ARGUMENTS = {"city": 'Rome\'s "x"\n < y', "days": 3, "more": {"a": [1, True, None, {"b": "c"}]}, "unit": "C"}
ROME = {"city": "Rome", "days": 3}


def told(syntax: Syntax, pieces: Iterable[str]) -> tuple[str, list[tuple[str, Any]], int]:
    """What is said, the calls that are whole, and in how many pieces arguments came."""
    reader = CallReader(syntax, TOOLS)
    return gathered([part for piece in pieces for part in reader.push(piece)] + reader.flush())


def gathered(parts: Iterable[tuple[str, str]]) -> tuple[str, list[tuple[str, Any]], int]:
    said, calls, pieces = "", CallList(), 0
    for kind, text in parts:
        if kind == "text":
            said += text
        elif kind in ("call", "arguments", "called", "broken"):
            pieces += kind == "arguments"
            calls.take(kind, text)
    return said, [(call.name, json.loads(call.arguments)) for call in calls.whole], pieces


# A template's own words -> what a model writes that calls get_weather with ROME.
WRITTEN = [
    (f"<{DSML}tool_calls>", f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="get_weather">\n<{DSML}parameter name="city" '
     f'string="true">Rome</{DSML}parameter>\n<{DSML}parameter name="days" string="false">3</{DSML}parameter>\n'
     f"</{DSML}invoke>\n</{DSML}tool_calls>"),
    ("<tool_call>", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>'),
    ("<tool_call>", '<tool_call>{"arguments": "{\\"city\\": \\"Rome\\", \\"days\\": 3}", "name": "get_weather"}'
     "</tool_call>"),
    ("<tool_call><function=", "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n"
     "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"),
    ("<tool_call><arg_key>", "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n"
     "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"),
    ("<tool_call><arg_key>", "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Rome</arg_value>"
     "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>"),
    ("<arg_key{}><tool_sep{}>", "<tool_calls:opensource>\n<tool_call:opensource>get_weather<tool_sep:opensource>\n"
     "<arg_key:opensource>city</arg_key:opensource>\n<arg_value:opensource>Rome</arg_value:opensource>\n"
     "<arg_key:opensource>days</arg_key:opensource>\n<arg_value:opensource>3</arg_value:opensource>\n"
     "</tool_call:opensource>\n</tool_calls:opensource>"),
    ("<minimax:tool_call>", '\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Rome'
     '</parameter>\n<parameter name="days">3</parameter>\n</invoke>\n</minimax:tool_call>'),
    ("<|tool_calls_section_begin|>", "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
     '<|tool_call_argument_begin|>{"city": "Rome", "days": 3}<|tool_call_end|><|tool_calls_section_end|>'),
    ("<|tool_call>", '<|tool_call>call:get_weather{city:<|"|>Rome<|"|>,days:3}<tool_call|>'),
    ("[func_name1(", "[get_weather(city='Rome', days=3)]"),
    ("<|tool_call_start|>", '<|tool_call_start|>[get_weather(city="Rome", days=3)]<|tool_call_end|>'),
    ("<|tool_call|>", '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Rome", "days": 3}}]'),
    ("[TOOL_CALLS][ARGS]", '[TOOL_CALLS]get_weather[ARGS]{"city": "Rome", "days": 3}'),
    ("[TOOL_CALLS][ARGS]", '[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Rome", "days": 3}'),
    ("[TOOL_CALLS]", '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Rome", "days": 3}, "id": "123456789"'
     "}]"),
    ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
     '{"city": "Rome", "days": 3}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'),
    ("<｜tool▁calls▁begin｜>```json", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
     '```json\n{"city": "Rome", "days": 3}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'),
    ("<tool_calls>```json", '<tool_calls><tool_call>get_weather\n```json\n{"city": "Rome", "days": 3}\n```</tool_call>'
     "</tool_calls>"),
    ('{"name": <tool-name>, "arguments": <args-json-object>}\n...\n</tool_calls>',
     '<tool_calls>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_calls>'),
    ("在调用上述函数时，请使用 Json 格式表示调用的参数。", 'get_weather\n{"city": "Rome", "days": 3}'),
    ("]<]minimax[>[", ']<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name="get_weather">]<]minimax[>[<city>Rome]<]'
     "minimax[>[</city>]<]minimax[>[<days>3]<]minimax[>[</days>]<]minimax[>[</invoke>\n]<]minimax[>[</tool_call>"),
    ("<function_calls>", '<function_calls>get_weather(city="Rome", days=3)</function_calls>'),
    ("<|open|><|sep|>argument", '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|><|open|>argument '
     'key="city" type="string"<|sep|>Rome<|close|>argument<|sep|><|open|>argument key="days" type="number"<|sep|>3'
     "<|close|>argument<|sep|><|close|>call<|sep|><|close|>tools<|sep|>"),
    ('"parameters": dictionary of argument', '{"name": "get_weather", "parameters": {"city": "Rome", "days": 3}}'),
]  # fmt: skip


@pytest.mark.parametrize(("template", "completion"), WRITTEN)
def test_what_models_write_is_read_at_every_split(template: str, completion: str) -> None:
    syntax = syntax_of(template, ())
    assert syntax
    right = "", [("get_weather", ROME)]
    assert told(syntax, completion)[:2] == right
    for cut in range(len(completion)):
        assert told(syntax, (completion[:cut], completion[cut:]))[:2] == right


def test_values_are_of_the_kinds_that_the_schema_has() -> None:
    """Where marks do not tell texts from other values; some templates write those as Python does."""
    syntax = syntax_of("<tool_call><function=", ())
    assert syntax
    given = [("city", "5"), ("days", "5"), ("more", "{'a': [True, None]}"), ("undeclared", "true"), ("unit", "None")]
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in given)
    _, calls, _ = told(syntax, f"<tool_call>\n<function=get_weather>\n{parameters}</function>\n</tool_call>")
    values = {"city": "5", "days": 5, "more": {"a": [True, None]}, "undeclared": True, "unit": "None"}
    assert calls == [("get_weather", values)]


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: f"{type(syntax).__name__}{syntax.signs}")
def test_what_a_syntax_writes_it_reads_and_what_is_broken_is_text(syntax: Syntax) -> None:
    anywhere = bool(syntax.openings(TOOLS)[0])
    calls = [("get_weather", ARGUMENTS), ("ping", {})][: 2 if anywhere or syntax.write([]) else 1]
    written = syntax.write([Call(name, json.dumps(arguments)) for name, arguments in calls])
    completion = "Let me look.\n\n" * anywhere + written
    said, found, pieces = told(syntax, completion)
    assert (said, found) == ("Let me look." * anywhere, calls)
    assert pieces > 4  # arguments come as they are written
    for cut in range(len(completion)):
        assert told(syntax, (completion[:cut], completion[cut:]))[:2] == (said, calls)
        text, whole, _ = told(syntax, (completion[:cut],))
        if cut % 29 == 0:
            assert told(syntax, completion[:cut])[:2] == (text, whole)
        if not whole:  # half of a call is no call
            assert text.strip() == completion[:cut].strip()


@pytest.mark.parametrize(
    ("template", "completion"),
    [
        ("<tool_call>", '<tool_call>\n{"name": "nobody", "arguments": {}}\n</tool_call>'),
        ("<tool_call>", '<tool_call>\n{"name": "ping", "arguments": [1]}\n</tool_call>'),
        ("<tool_call>", '<tool_call>\n{"name": "ping", "arguments": {"a": nan}}\n</tool_call> said'),
        ("<tool_call>", "<tool_call> is a tag"),
        ("<tool_call><arg_key>", "<tool_call>ping\n<arg_key>a</arg_key>\nx</tool_call>"),
        ("<tool_call><function=", "<tool_call>\n<function=ping>\n<parameter=a>\n1\n</parameter>\n<parameter=a>\n1\n"
         "</parameter>\n</function>\n</tool_call>"),
        ("[func_name1(", "[ping(a=print())]"),
        ("[func_name1(", "[1, 2] is a list"),
        ("<|tool_call>", "<|tool_call>call:ping{a:[1}<tool_call|>"),
    ],
)  # fmt: skip
def test_what_is_no_call_is_text(template: str, completion: str) -> None:
    syntax = syntax_of(template, ())
    assert syntax
    for pieces in ([completion], completion):
        assert told(syntax, pieces)[:2] == (completion, [])


@pytest.mark.parametrize(
    ("completion", "said", "calls"),
    [
        (' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Rome", "days": 3}', "", 1),
        ('<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Rome", "days": 3}'
         '<|call|><|start|>assistant<|channel|>commentary to=functions.get_weather<|message|>'
         '{"city": "Rome", "days": 3}', "", 2),
        ("<|channel|>commentary to=functions.get_weather<|message|>{broken", "{broken", 0),
        ("<|channel|>commentary to=functions.nobody<|message|>{}", "{}", 0),
    ],
)  # fmt: skip
def test_harmony_tells_calls_at_every_split(completion: str, said: str, calls: int) -> None:
    for cut in range(len(completion)):
        splitter = HarmonySplitter(False, TOOLS)
        parts = [*splitter.push(completion[:cut]), *splitter.push(completion[cut:]), *splitter.flush()]
        assert gathered(parts)[:2] == (said, [("get_weather", ROME)] * calls)


CITY = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}}, "required": ["city"]}
STRICT = Tool("get_weather", "", CITY, strict=True)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: f"{type(syntax).__name__}{syntax.signs}")
def test_a_grammar_accepts_what_its_syntax_writes(syntax: Syntax) -> None:
    tokenizer, vocab = TINY.tokenizer, TINY.spec.vocab
    matcher = Matcher(f"start: calls\n{syntax.grammar(Use([WEATHER], 'required'))}", tokenizer, vocab)
    written = syntax.write([Call("get_weather", json.dumps({"city": "Rome", "days": 3, "unit": "C"}))])
    for token in tokenizer.encode(written, special=False):
        matcher.accept(token)


TINY = load("tiny")
QUESTION = [{"role": "user", "content": "What is the weather?"}]


def ask(use: Use, messages: Any = QUESTION, *, think: bool = False, begun: str = "") -> Any:
    """An answer of `tiny` and its parts; begun: what it is made to begin with."""
    session = TINY.session(1024)
    ids, opened = encode(TINY.description.chat_format, TINY.tokenizer, messages, thinking=think, use=use)
    settings = Settings(max_tokens=160, use=use, think=think, think_budget=4)
    made = answer(session, ids, opened, settings)
    if begun:
        made.generation.force(begun)
    return made, list(made)


@pytest.mark.parametrize("choice", ["required", "get_weather"])
def test_a_model_calls_what_it_has_to_with_arguments_of_the_schema(choice: str) -> None:
    made, parts = ask(Use([STRICT], choice))
    assert made.turn.text == "" and made.turn.calls
    assert all(call.values["city"] in ("Rome", "Oslo") for call in made.turn.calls)
    assert "".join(text for kind, text in parts if kind == "arguments") == "".join(c.arguments for c in made.turn.calls)


def test_what_is_forced_is_read_in_few_passes() -> None:
    made, _ = ask(Use([Tool("ping", "", {"type": "object", "properties": {}})], "ping", several=False))
    assert made.turn.calls == (Call("ping", "{}"),)
    assert made.generation.passes < len(made.generation.tokens) / 3


def test_an_answer_goes_on_behind_a_call_and_its_result() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    messages = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "a", "content": "sunny"}]  # fmt: skip
    made, _ = ask(Use([WEATHER]), messages)
    assert made.turn.text and made.turn.calls == ()


def test_a_template_that_leaves_calls_or_tools_out() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "ping", "arguments": {"a": 1}}}
    messages = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
    silent = "{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}{# <tool_call> #}"
    assert '{"name": "ping", "arguments": {"a": 1}}' in JinjaChat(silent, {}).render(messages)
    texts = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ '' + c.function.arguments }}" + (
        "{% endfor %}{% endfor %}"
    )
    assert '{"a": 1}' in JinjaChat(texts, {}).render(messages)
    fails = "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}{{ [].append(1) }}{% endif %}{% endfor %}"
    assert '"arguments": {"a": 1}' in JinjaChat(fails + "{# <tool_call> #}", {}).render(messages)
    # A template that fails without calls, and one that reads them of messages without a text alone.
    needs = "{% for m in messages %}{% if m.role == 'tool' and not loop.previtem.tool_calls %}{{ raise_exception('') }}"
    needs += "{% endif %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    result = {"role": "tool", "tool_call_id": "a", "content": "pong"}
    assert JinjaChat(needs + "{# <tool_call> #}", {}).render([*messages, result]) == '{"a": 1}'
    alone = "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}{% for c in m.tool_calls %}"
    alone += "<{{ c.function.name }}>{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}{# <tool_call> #}"
    assert JinjaChat(alone, {}).render([*QUESTION, {**messages[-1], "content": None}]).endswith("<ping>")
    with pytest.raises(InputError, match="`tools` are not possible"):
        encode(JinjaChat(texts, {}), TINY.tokenizer, QUESTION, thinking=False, use=Use([WEATHER]))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Tool("a b"), "the name 'a b'"),
        (lambda: Use([Tool("f"), Tool("f")]), "two tools have the name f"),
        (lambda: Use([Tool("f")], "g"), "no tool 'g'"),
        (lambda: Tool("f", "", {"required": [["a"]]}), r"required takes a list of names, not \[\['a'\]\]"),
        (lambda: Tool("f", "", {"required": 5}), "of the tool f: required takes a list of names"),
        (lambda: Tool("f", "", {"properties": ["a"]}), "properties takes an object of schemas"),
        (lambda: Tool("f", "", {"properties": {"a": {"enum": 5}}}), "enum takes a list"),
        (lambda: Tool("f", "", {"properties": {"a": {"items": {"type": {}, "required": 1}}}}), "required takes"),
        (lambda: Tool("f", "", {"$defs": {"a": {"type": 3}}}), "type takes a name or a list of names, not 3"),
        (lambda: Tool("f", "", json.loads('{"items": ' * 400 + "true" + "}" * 400)), "nested too deeply"),
    ],
)
def test_tools_that_cannot_be(make: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make()


def test_schemas_with_nothing_in_them() -> None:
    """As some clients write what they have none of."""
    tool = Tool("f", "", {"type": "object", "properties": [], "required": None, "items": None})
    assert not tool.properties and not tool.required


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: f"{type(syntax).__name__}{syntax.signs}")
def test_a_strict_schema_is_followed_or_refused(syntax: Syntax) -> None:
    """Never left out: what a syntax cannot be held to is named."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "not": {"const": "x"}}}}
    with pytest.raises(InputError, match="not"):
        syntax.grammar(Use([Tool("f", "", schema, strict=True)], "f"))
    syntax.grammar(Use([Tool("f", "", schema)], "f"))


NOTES = {"$schema": "http://json-schema.org/draft-07/schema#", "$id": "a", "$comment": "a", "title": "a", "default": {}}
NOTES |= {"description": "a", "examples": [], "deprecated": False, "readOnly": True, "writeOnly": True}


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: f"{type(syntax).__name__}{syntax.signs}")
def test_a_strict_schema_may_have_annotations_and_one_value(syntax: Syntax) -> None:
    """As Zod and Pydantic write schemas: with $schema, and const for a literal."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "const": "Rome", **NOTES}}, "required": ["a"]}
    rules = f"start: calls\n{syntax.grammar(Use([Tool('f', '', schema | NOTES | {'$id': 'b'}, strict=True)], 'f'))}"

    def read(city: str) -> None:
        matcher = Matcher(rules, TINY.tokenizer, TINY.spec.vocab)
        for token in TINY.tokenizer.encode(syntax.write([Call("f", json.dumps({"a": city}))]), special=False):
            matcher.accept(token)

    read("Rome")
    with pytest.raises(InputError):
        read("Oslo")


def test_reasoning_comes_before_calls_that_are_held_to_a_grammar() -> None:
    made, _ = ask(Use([STRICT], "required"), think=True)
    assert made.turn.thinking and made.turn.text == "" and made.turn.calls


def test_what_is_called_freely_is_held_to_a_strict_schema() -> None:
    """An answer may be text, which no grammar changes; what begins like a call has to become one."""
    free, _ = ask(Use([STRICT]))
    assert free.turn.text and not free.turn.calls
    assert free.turn.text == ask(Use([Tool("get_weather", "", CITY)]))[0].turn.text
    made, _ = ask(Use([STRICT]), begun=f"<{DSML}tool_calls>")
    assert made.turn.calls and made.turn.calls[0].values["city"] in ("Rome", "Oslo")


@pytest.fixture
def marked(tmp_path: Path) -> Model:
    """A random Qwen3 whose vocabulary has the marks of calls as special tokens."""
    write_checkpoint("qwen3_a", tmp_path)
    tiny_tokenizer(tmp_path, 76, marks='.,:?!</>|{}"_-')
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    names = dict(zip((74, 75), ("<tool_call>", "</tool_call>"), strict=True))
    spec["model"]["vocab"] = {text: i for text, i in spec["model"]["vocab"].items() if i not in names}
    flags = dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
    spec["added_tokens"] += [{"id": i, "content": text, "special": True, **flags} for i, text in names.items()]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    template = "{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}{# <tool_call> #}"
    (tmp_path / "chat_template.jinja").write_text(template)
    return load(tmp_path)


def test_marks_that_are_special_tokens_are_written_as_such_and_shown_to_nobody(marked: Model) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["b", "c"]}}, "required": ["a"]}
    use = Use([Tool("f", "", schema, strict=True)], "required", several=False)
    chat, tokenizer = marked.description.chat_format, marked.tokenizer
    ids, opened = encode(chat, tokenizer, [{"role": "user", "content": "hi"}], thinking=False, use=use)
    # JSON may have white space without end, which these weights like more or less by how sums are rounded.
    blank = Sampling(logit_bias=tuple((one, -100.0) for one in tokenizer.encode("\n ")))
    made = answer(marked.session(512), ids, opened, Settings(sampling=blank, max_tokens=200, use=use))
    said = "".join(text for kind, text in made if kind == "text")
    assert said == "" and made.turn.calls[0].values["a"] in ("b", "c")
    assert made.generation.tokens[0].id == 74 and made.generation.tokens[-1].id == 75
