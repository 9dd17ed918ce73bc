"""gpt-oss's answers, which come as messages of channels."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_checkpoint

from numoe.engine import load
from numoe.engine.chat.answer import Settings, Turn
from numoe.engine.chat.conversation import Conversation
from numoe.engine.chat.files import Chat
from numoe.engine.chat.formats import chat_format
from numoe.engine.chat.formats.harmony import MARKERS, TAGS, HarmonyChat, HarmonySplitter
from numoe.engine.generation import Generation
from numoe.engine.session import Session
from numoe.engine.text.tokenizer import load_tokenizer

Run = Callable[..., tuple[int, str, str]]

CALL = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}'
COMPLETIONS = [
    ("<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>Paris.", "why", "Paris."),
    ("<|channel|>final<|message|>at once", "", "at once"),
    ("goes on", "", "goes on"),
    ("<|channel|>analysis<|message|>cut", "cut", ""),
    ("<|channel|>analysis<|message|>a<|channel|>final<|message|>b < c <|d", "a", "b < c <|d"),
    ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b", "a\n\nb", ""),
    ("<|channel|>commentary<|message|>First.<|end|><|start|>assistant<|channel|>final<|message|>Then.", "",
     "First.\n\nThen."),
    ("<|start|>assistant<|channel|>final<|message|>told<|return|>", "", "told"),
    ("<|channel|>final", "", ""),
    ("<|chan", "", "<|chan"),
    ("<|message|>hi<|return|>", "", "hi"),
    ("<|constrain|>json<|message|>{}", "", "{}"),
    ("\n<|channel|>final<|message|>a<|message|>b<|constrain|>c", "", "abc"),
    ("<|channel|>analysis<|message|>x<|end|><|channel|>final<|message|>y", "x", "y"),
    ("<|channel|>analysis<|message|>x<|end|>\n y", "x", "\n y"),
    ("<|channel|>analysis<|message|>x<|end|>\n", "x", ""),
    ("<|channel|>analysis<|constrain|>text<|message|>x", "x", ""),
    (" to=day or not", "", " to=day or not"),
    (' to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>', "", '{"a": 1}'),
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}{# <|channel|>final<|return|><|call|> #}"
)


@given(st.sampled_from(COMPLETIONS), st.lists(st.integers(1, 9)))
def test_the_messages_of_an_answer_are_told_apart_however_it_is_cut(
    case: tuple[str, str, str], sizes: list[int]
) -> None:
    completion, thinking, answer = case
    splitter, told, at = HarmonySplitter(False), {"thinking": "", "text": ""}, 0
    for size in [*sizes, len(completion)]:
        for kind, text in splitter.push(completion[at : at + size]):
            assert not any(marker in text for marker in MARKERS)
            told[kind] += text
        at += size
    for kind, text in splitter.flush():
        told[kind] += text
    assert told == {"thinking": thinking, "text": answer}


@given(st.lists(st.sampled_from([*MARKERS, "analysis", "final", " to=f", "a", "<|", "\n"])), st.data(), st.booleans())
def test_any_markers_in_any_order_are_read_alike_however_they_are_cut(
    parts: list[str], data: st.DataObject, thinking: bool
) -> None:
    completion, told = "".join(parts), []
    cuts = sorted(data.draw(st.sets(st.integers(0, len(completion)))))
    for pieces in ([completion], [completion[a:b] for a, b in pairwise([0, *cuts, len(completion)])]):
        splitter = HarmonySplitter(thinking)
        shown = [part for piece in pieces for part in splitter.push(piece)] + splitter.flush()
        assert all(text and not any(marker in text for marker in MARKERS) for _, text in shown)
        told.append({kind: "".join(text for k, text in shown if k == kind) for kind in ("thinking", "text")})
    assert told[0] == told[1]


NEXT = "<|start|>assistant"
FINAL = "<|channel|>final<|message|>"
ROLE_CALL = ' to=functions.add<|channel|>commentary json<|message|>{"a": 1}'


@pytest.mark.parametrize(
    ("completion", "content", "reasoning", "calls"),
    [
        (f"<|channel|>analysis<|message|>x<|end|>{NEXT}{CALL}<|call|>", "", "x", 1),
        (f"<|channel|>analysis<|message|>x<|end|>{NEXT}{ROLE_CALL}<|call|>", "", "x", 1),
        (f"{ROLE_CALL}<|call|>", "", "", 1),
        (f"{CALL}<|call|>{NEXT}{CALL}<|call|>{NEXT}{ROLE_CALL}", "", "", 3),
        (f"<|channel|>commentary<|message|>a<|end|>{NEXT}{CALL}<|call|>{NEXT}{FINAL}b<|return|>", "a\n\nb", "", 1),
        (f'{FINAL}{{"a": 1}}<|end|>{NEXT}{CALL}', '{"a": 1}', "", 1),
    ],
)
def test_calls_of_tools_are_read(completion: str, content: str, reasoning: str, calls: int) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    parsed = HarmonyChat(TEMPLATE, {}).parse(completion, thinking=False)
    assert parsed == {"content": content, "reasoning_content": reasoning, "tool_calls": [call] * calls}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A random gpt-oss whose vocabulary has the markers in place of some of its characters."""
    write_checkpoint("gpt_oss_a", tmp_path)
    tiny_tokenizer(tmp_path, 80)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    names = {80 - len(MARKERS) + n: marker for n, marker in enumerate(sorted(MARKERS))}
    vocabulary = spec["model"]["vocab"]
    spec["model"]["vocab"] = {text: i for text, i in vocabulary.items() if i not in names}
    flags = dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
    spec["added_tokens"] += [{"id": i, "content": text, "special": True, **flags} for i, text in names.items()]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


def test_the_end_of_a_message_is_not_that_of_the_answer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert {tokenizer.token(i) for i in tokenizer.eos_ids} == {"<|return|>", "<|call|>"}
    chat = chat_format("gpt_oss", tokenizer)
    assert isinstance(chat, HarmonyChat) and chat.tags == TAGS


def test_a_conversation_shows_the_answer_alone(folder: Path) -> None:
    model = load(folder)
    conversation = Conversation(model, Chat("", Settings(max_tokens=32)))
    answer = conversation.ask("hi")
    answer.generation.force("<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>ok")
    shown = list(answer)
    assert "".join(text for kind, text in shown if kind == "text") == "ok"
    assert answer.turn == Turn("hi", "so", "ok", "length")
    again = conversation.more()
    read = model.tokenizer.decode(conversation.session.tokens + list(again.generation.prompt))
    assert read.endswith("<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>ok")


@pytest.mark.parametrize("budget", [None, 3])
def test_reasoning_comes_before_a_form(folder: Path, budget: int | None) -> None:
    """A random model goes on with what it is allowed: the whole follows the grammar, markers included."""
    conversation = Conversation(load(folder), Chat("", Settings(think=True, think_budget=budget, max_tokens=60)))
    answer = conversation.ask("hi", grammar='start: "ab"')
    answer.generation.force("<|channel|>analysis<|message|>so")
    if budget is None:
        answer.generation.force("<|end|>")
    list(answer)
    read = conversation.model.tokenizer.decode(conversation.session.tokens)
    assert answer.turn.thinking == "so" and answer.turn.text == "ab" and answer.turn.finish_reason == "stop"
    assert f"{NEXT}{TAGS[0]}so{TAGS[1]}a" in read


def test_an_answer_of_a_given_form_is_a_final_message(folder: Path) -> None:
    conversation = Conversation(load(folder), Chat("", Settings(max_tokens=8)))
    answer = conversation.ask("hi", grammar='start: "ab"')
    assert list(answer) and answer.turn.text == "ab"
    read = conversation.model.tokenizer.decode(conversation.session.tokens)
    assert read.removesuffix("b").endswith(f"{NEXT}{FINAL}a")


def test_reasoning_is_ended_by_its_budget(folder: Path) -> None:
    conversation = Conversation(load(folder), Chat("", Settings(max_tokens=40, think_budget=4)))
    answer = conversation.ask("hi")
    answer.generation.force("<|channel|>analysis<|message|>so")
    list(answer)
    read = conversation.model.tokenizer.decode(conversation.session.tokens)
    assert f"<|message|>so{TAGS[1]}" in read and answer.turn.thinking.strip() == "so"


@pytest.mark.parametrize(("flags", "printed"), [((), "ok\n"), (("--show-thinking",), "<think>\nso\n</think>\n\nok\n")])
def test_the_command_prints_no_channels(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: Run, flags: tuple[str, ...], printed: str
) -> None:
    def generate(session: Session, *args: Any, **options: Any) -> Generation:
        generation = original(session, *args, **options)
        generation.force(f"<|channel|>analysis<|message|>so{TAGS[1]}ok<|return|>")
        return generation

    original = Session.generate
    monkeypatch.setattr(Session, "generate", generate)
    code, out, err = command("run", str(folder), "hi", "-q", *flags)
    assert (code, out) == (0, printed), err


@pytest.mark.parametrize("flags", [(), ("--think", "--think-budget", "4")])
def test_the_command_gives_forms(folder: Path, command: Run, flags: tuple[str, ...]) -> None:
    assert command("run", str(folder), "hi", "-q", "--choices", "moo,baa", *flags)[1] in ("moo\n", "baa\n")
