"""Conversations: what is read again and what is not, going back, overflow, thinking budgets, files."""

import json
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import write_checkpoint

from numoe.engine import InputError, Model, Sampling, load
from numoe.engine.chat import conversation as conversations
from numoe.engine.chat.answer import Answer, Settings, Turn
from numoe.engine.chat.conversation import Conversation
from numoe.engine.chat.files import Chat, cache_path, chat_path, chats, new_path
from numoe.engine.text.grammar import choice_grammar

VOCAB = {"llama_a": 90, "v4_a": 96}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path))
    return tmp_path


Talker = Callable[..., Model]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Talker:
    """talker(case, ending=...): a random model with one character a token, which never ends an answer by itself."""
    made: dict[tuple[str, str], Model] = {}

    def make(case: str = "v4_a", ending: str = "assistant: ") -> Model:
        if (case, ending) not in made:
            folder = tmp_path_factory.mktemp(case)
            write_checkpoint(case, folder)
            tiny_tokenizer(folder, VOCAB[case], ending=ending)
            made[case, ending] = load(folder)
        return made[case, ending]

    return make


@pytest.fixture(scope="module")
def shipped() -> Model:
    return load("tiny")


def told(answer: Answer) -> str:
    return "".join(text for _, text in answer)


def fresh(conversation: Conversation) -> str:
    """The last answer, as a session that has read nothing yet gives it."""
    chat = conversation.chat
    again = Conversation(conversation.model, replace(chat, turns=chat.turns[:-1]))
    return told(again.ask(chat.turns[-1].question))


@pytest.mark.parametrize("case", VOCAB)
def test_a_turn_reads_only_what_is_new(talker: Talker, case: str) -> None:
    conversation = Conversation(talker(case), Chat("", Settings(max_tokens=5)))
    first = conversation.ask("hi")
    told(first)
    second = conversation.ask("and")
    told(second)
    assert len(first.generation.prompt) == len("user: hi\nassistant: ") + 1
    # Four of the five answered tokens were fed; the fifth comes with what follows.
    assert len(second.generation.prompt) == 1 + len("\nuser: and\nassistant: ")
    assert [turn.question for turn in conversation.chat.turns] == ["hi", "and"]
    assert conversation.chat.turns[-1].text == fresh(conversation)


def test_retry_edit_and_undo_go_back_without_reading_all_again(shipped: Model) -> None:
    """Further back than the caches of sliding windows reach by themselves."""
    conversation = Conversation(shipped, Chat("tiny", Settings(max_tokens=80)))
    told(conversation.ask("Tell me a story about a fox and a lamp."))
    told(conversation.ask("What sound does a sheep make? " * 20))
    again = conversation.retry()
    told(again)
    assert len(again.generation.prompt) == 1
    edited = conversation.edit("Where does a bee live?")
    told(edited)
    assert len(edited.generation.prompt) < 30
    assert conversation.chat.turns[-1].text == fresh(conversation)
    assert conversation.undo().question == "Where does a bee live?"
    asked = conversation.ask("Where does a frog live?")
    told(asked)
    assert len(asked.generation.prompt) < 30
    assert [turn.question for turn in conversation.chat.turns][1:] == ["Where does a frog live?"]
    assert conversation.chat.turns[-1].text == fresh(conversation)


@pytest.mark.parametrize("case", VOCAB)
def test_reasoning_is_not_told_again(talker: Talker, case: str) -> None:
    """The next turn goes back to before the reasoning, further than the caches of sliding windows reach."""
    conversation = Conversation(talker(case, "<think>"), Chat("", Settings(max_tokens=70, think=True)))
    first = conversation.ask("a long beginning " * 5)
    told(first)
    assert first.turn.thinking and not first.turn.text
    second = conversation.ask("and")
    told(second)
    assert len(second.generation.prompt) < len("assistant: \nuser: and\n") + 30
    assert first.turn.thinking not in conversation.model.tokenizer.decode(conversation.session.tokens)
    assert conversation.chat.turns[-1].thinking.strip("\n") == fresh(conversation)


def test_more_goes_on_as_if_the_answer_had_not_been_cut(shipped: Model) -> None:
    question = "Tell me a story about a fox and a lamp."
    whole = Conversation(shipped, Chat("tiny", Settings(max_tokens=40)))
    told(whole.ask(question))
    cut = Conversation(shipped, Chat("tiny", Settings(max_tokens=20)))
    told(cut.ask(question))
    assert cut.chat.turns[0].finish_reason == "length"
    more = cut.more()
    told(more)
    assert cut.chat.turns == whole.chat.turns
    assert len(more.generation.prompt) <= 2
    told(Conversation(shipped, cut.chat).more())  # also of a chat that was not read yet
    cut.chat = replace(cut.chat, settings=Settings(), turns=(Turn("hi", text="yes", finish_reason="stop"),))
    with pytest.raises(InputError, match="is whole"):
        cut.more()


def test_nothing_to_go_back_to(shipped: Model) -> None:
    conversation = Conversation(shipped, Chat("tiny"))
    for act in (conversation.retry, conversation.more, conversation.undo, lambda: conversation.edit("x")):
        with pytest.raises(InputError, match="nothing was asked yet"):
            act()


def test_a_question_that_is_interrupted_before_its_answer_is_forgotten(talker: Talker) -> None:
    def press(done: int, total: int) -> None:
        raise KeyboardInterrupt

    conversation = Conversation(talker(), Chat("", Settings(max_tokens=3)))
    told(conversation.ask("hi"))
    with pytest.raises(KeyboardInterrupt):
        told(conversation.ask("never", progress=press))
    assert told(conversation.ask("never", cancelled=lambda: True)) == ""
    assert [turn.question for turn in conversation.chat.turns] == ["hi"]
    told(conversation.ask("and"))
    assert conversation.chat.turns[-1].text == fresh(conversation)


def test_an_answer_that_is_left_is_kept_as_far_as_it_came(talker: Talker) -> None:
    conversation = Conversation(talker(), Chat(""))
    answer = conversation.ask("hi")
    pieces = [next(answer)[1] for _ in range(4)]
    answer.close()
    assert conversation.chat.turns == (Turn("hi", text="".join(pieces), finish_reason="cancelled"),)


# ------------------------------------------------------------------------------------------ a full context


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 60), min_size=6, max_size=12), answer=st.integers(1, 30))
def test_the_oldest_turns_are_dropped_whole_and_never_in_silence(
    talker: Talker, lengths: list[int], answer: int
) -> None:
    conversation = Conversation(talker("llama_a"), Chat("", Settings(max_tokens=answer, context=200)))
    dropped = 0
    for n, length in enumerate(lengths):
        asked = conversation.ask(chr(ord("a") + n) * length)
        dropped += asked.dropped
        told(asked)
        assert len(asked.generation.tokens) == answer  # there is always room for it
        read = conversation.model.tokenizer.decode(conversation.session.tokens)
        questions = [turn.question for turn in conversation.chat.turns]
        assert read.count("user: ") == len(questions) - dropped
        for question in questions[dropped:]:
            assert f"user: {question}\n" in read
    assert conversation.chat.forgotten == dropped
    assert len(conversation.chat.turns) == len(lengths)


def test_a_question_longer_than_the_context(talker: Talker) -> None:
    conversation = Conversation(talker(), Chat("", Settings(max_tokens=3, context=64)))
    told(conversation.ask("hi"))
    with pytest.raises(InputError, match=r"the question takes .* room for 64; shorten it or raise `ctx`"):
        conversation.ask("long" * 20)
    assert len(conversation.chat.turns) == 1
    assert conversation.ask("and").dropped == 0


# ------------------------------------------------------------------------------------------------ thinking


def test_a_thinking_budget_ends_the_block(talker: Talker) -> None:
    for budget in (0, 7):
        settings_ = Settings(think=True, think_budget=budget, max_tokens=40)
        answer = Conversation(talker(ending="<think>"), Chat("", settings_)).ask("hi")
        parts = list(answer)
        assert len(answer.turn.thinking) == budget
        assert len(answer.generation.tokens) == 40
        # One character a token: the budget, eight for </think>, and the rest is the answer.
        assert len(answer.turn.text) == 40 - budget - len("</think>")
        assert {kind for kind, _ in parts} == {"thinking", "text"} - ({"thinking"} if budget == 0 else set())


class Pieces(list[str]):
    """A completion as a model would make it, so many characters a token."""

    def __init__(self, text: str, size: int) -> None:
        super().__init__(text[i : i + size] for i in range(0, len(text), size))

    tokens, finish_reason = [1], "length"
    __next__: Any = None


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_reasoning_is_kept_apart_without_the_breaks_around_it(size: int) -> None:
    text = "\nfirst this\nthen that\n</think>\n\nAnswer:\n\nyes\n"
    answer = Answer(Pieces(text, size), True)  # type: ignore[arg-type]
    shown: dict[str, str] = {"thinking": "", "text": ""}
    for kind, piece in answer:
        shown[kind] += piece
    assert shown == {"thinking": "first this\nthen that\n", "text": "Answer:\n\nyes\n"}
    turn = answer.turn.trimmed()
    assert (turn.thinking, turn.text) == ("first this\nthen that", "Answer:\n\nyes\n")
    assert answer.turn.completion(opened=True) == text
    assert answer.turn.completion(opened=False) == "<think>" + text
    assert answer.turn.completion(False, ("[THINK]", "[/THINK]")).startswith("[THINK]\nfirst")


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("completion", "opened", "thinking", "text", "shown"),
    [
        ("plan\n</think>\n\nyes", False, "plan", "yes", "plan\n\n\nyes"),
        ("a\n</think>\nb\n</think>\nyes", True, "a\n\nb", "yes", "b\n\n\nyes"),
        ("plan. Stop</think>\nyes. Stop it", True, "plan. Stop", "yes. ", "yes. "),
        ("<think>plan. Stop</think>\nyes. Sto", False, "plan. Stop", "yes. Sto", "yes. Sto"),
        ("yes. Stop</think>no", False, "", "yes. ", "yes. "),
        ("</think>\n\nyes", True, "", "yes", "yes"),
        ("<think></think>\n\nyes", False, "", "yes", "yes"),
        ("\n</think>\n\nyes", False, "", "yes", "\n\n\nyes"),
        ("plan</think>", False, "plan", "", "plan\n\n"),
        ("\n\nplain </think>. Stop", None, "", "\n\nplain </think>. ", "\n\nplain </think>. "),
    ],
)
def test_what_is_reasoning_and_where_an_answer_stops(
    size: int, completion: str, opened: bool | None, thinking: str, text: str, shown: str
) -> None:
    """What a closing tag makes reasoning afterwards is shown already; it is in the turn that it counts."""
    answer = Answer(Pieces(completion, size), opened, stop=("Stop",))  # type: ignore[arg-type]
    assert "".join(piece for kind, piece in answer if kind == "text") == shown
    turn = answer.turn if opened is None else answer.turn.trimmed()
    assert (turn.thinking, turn.text) == (thinking, text)
    assert turn.finish_reason == ("stop" if text == "yes. " or opened is None else "length")


@pytest.mark.parametrize("ending", ["assistant: ", "<think>"])
def test_conversations_stop_in_the_answer_alone(talker: Talker, ending: str) -> None:
    conversation = Conversation(talker(ending=ending), Chat("", Settings(max_tokens=60, stop=(".",), think=True)))
    answer = conversation.ask("hi")
    answer.generation.force("<think>a.b</think>c.d"[0 if ending == "assistant: " else len("<think>") :])
    told(answer)
    assert conversation.chat.turns == (Turn("hi", "a.b", "c", "stop"),)


def test_reasoning_that_was_cut_goes_on_as_reasoning(talker: Talker) -> None:
    cut = Turn("hi", thinking="so", finish_reason="length")
    conversation = Conversation(talker(), Chat("", Settings(max_tokens=17), (cut,)))
    more = conversation.more()
    more.generation.force(" it is</think>yes")
    assert "".join(text for kind, text in more if kind == "text") == "yes"
    assert conversation.chat.turns == (Turn("hi", "so it is", "yes", "length"),)


def test_tags_in_an_answer_of_a_given_form_belong_to_it(talker: Talker) -> None:
    for think, completion in ((False, "a</think>b"), (True, "a</think>b"), (True, "<think>r</think>a</think>b")):
        conversation = Conversation(talker(), Chat("", Settings(max_tokens=40, think=think)))
        answer = conversation.ask("hi", grammar=choice_grammar(["a</think>b"]))
        answer.generation.force(completion)
        assert "".join(text for kind, text in answer if kind == "text") == "a</think>b"
        assert answer.turn == Turn("hi", "r" if completion.startswith("<") else "", "a</think>b", "stop")


def test_special_tokens_are_no_text_but_tags_are_seen(tmp_path: Path) -> None:
    write_checkpoint("llama_a", tmp_path)
    tiny_tokenizer(tmp_path, VOCAB["llama_a"])
    spec = tmp_path / "tokenizer.json"
    spec.write_text(spec.read_text().replace("<pad>", "</think>"))
    model = load(tmp_path)
    answer = Conversation(model, Chat("", Settings(max_tokens=5))).ask("hi", logprobs=1)
    answer.generation.force("a</think><s>b<s>")
    assert told(answer) == "a\n\nb" and answer.turn == Turn("hi", "a", "b", "length")
    assert [token.id for token in answer.generation.tokens] == model.tokenizer.encode("a</think><s>b<s>")
    assert model.tokenizer.decode([0, 1, 2]) == "</think><s></s>"
    raw = model.session(16).generate("x", max_tokens=3)
    raw.force("<s>a</think>")
    assert "".join(raw) == "a</think>"


def test_a_chat_goes_on_after_answers_that_are_empty(tmp_path: Path) -> None:
    """Templates may insist on answers that are not, and on roles in turn."""
    write_checkpoint("llama_a", tmp_path)
    tiny_tokenizer(tmp_path, VOCAB["llama_a"])
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    wrong = "loop.index0 % 2 != (m.role == 'assistant') or not m.content.strip()"
    strict = "{% if " + wrong + " %}{{ raise_exception('no') }}{% endif %}"
    config["chat_template"] = "{% for m in messages %}" + strict + "{{ m.role }}: {{ m.content }}|{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    turns = (Turn("one", "hm"), Turn("two", text="\n"), Turn("three", text="yes"), Turn("four", finish_reason="length"))
    conversation = Conversation(load(tmp_path), Chat("", Settings(max_tokens=1), turns))
    told(conversation.ask("five"))
    read = conversation.model.tokenizer.decode(conversation.session.tokens)
    assert read == "user: one\n\ntwo\n\nthree|assistant: yes|user: four\n\nfive|"


# --------------------------------------------------------------------------------------------------- files


def test_a_chat_is_what_it_was_when_read_again(home: Path) -> None:
    turns = (Turn('grüß\n"Gott"', "hm", "\n\nyes", "stop"), Turn("and", text="no", finish_reason="cancelled"))
    sampling = Sampling(temperature=0.5, top_p=0.9, seed=3)
    made = Chat("owner/name", Settings("be", True, 10, 20, ("x",), 4096, sampling), turns, 1)
    path = chat_path("a chat")
    made.write(path)
    assert Chat.read(path) == made
    assert path == home / "chats" / "a chat.json"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a chat of numoe"),
        ("{", "is not a chat of numoe"),
        ("[" * 100_000, "is not a chat of numoe"),
        ('{"numoe": ' + "1" * 5000 + "}", "is not a chat of numoe"),
        ("[]", "is not a chat of numoe"),
        ('{"name": "numoe", "version": "1"}', "is not a chat of numoe"),
        ('{"numoe": "session 1"}', "is not a chat of numoe"),
        ('{"numoe": "chat 2"}', "is a chat of another version"),
        ('{"numoe": "chat 1"}', "is a damaged chat"),
    ],
)
def test_files_that_are_no_chats(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.json"
    for make in (lambda: None, path.mkdir):
        make()
        with pytest.raises(InputError, match=r"there is no chat .*x.*; `numoe chat list=true`"):
            Chat.read(path)
    path.rmdir()
    path.write_text(text)
    with pytest.raises(InputError, match=rf"x\.json {words}"):
        Chat.read(path)


_PARTS = (
    [("model",), ("settings",), ("turns",), ("forgotten",), ("turns", 0), ("settings", "sampling")]
    + [("settings", f.name) for f in fields(Settings)]
    + [("settings", "sampling", f.name) for f in fields(Sampling)]
    + [("turns", 0, f.name) for f in fields(Turn)]
)


@pytest.mark.parametrize("part", _PARTS, ids=lambda part: ".".join(map(str, part)))
@pytest.mark.parametrize(
    "value",
    [{"colour": "red"}, [["x"]], True, 10**400, -(10**400), float("nan"), "\ud800"],
    ids=lambda value: ascii(value)[:9],
)
def test_chats_with_a_value_of_another_kind(tmp_path: Path, part: tuple[Any, ...], value: Any) -> None:
    """Each is refused as damaged, or is a value that the setting can have."""
    path = tmp_path / "x.json"
    Chat("tiny", turns=(Turn("hi"),)).write(path)
    document: Any = json.loads(path.read_text())
    place = document
    for key in part[:-1]:
        place = place[key]
    place[part[-1]] = value
    path.write_text(json.dumps(document))
    if (part[-1], value) in [("think", True), ("model", "\ud800")] or (
        part[-1] in ("max_tokens", "think_budget", "context", "top_k", "repeat_last_n") and value == 10**400
    ):
        assert json.loads(path.read_text()) == document
        Chat.read(path).write(path)
        assert json.loads(path.read_text()) == document
    else:
        with pytest.raises(InputError, match=r"x\.json is a damaged chat"):
            Chat.read(path)


def test_names(home: Path) -> None:
    for name in ("", ".", "../x", "a/b", "-c", "a\nb"):
        with pytest.raises(InputError, match="cannot be the name of a chat"):
            chat_path(name)
    first = new_path('Why is the sky "blue", and not green? ' * 9)
    assert first.name.endswith("-why-is-the-sky-blue.json")
    Chat("tiny").write(first)
    os.utime(first, (0, 0))
    assert new_path("...").parent == first.parent
    Chat("tiny").write(chat_path("later"))
    assert [path.stem for path in chats()] == ["later", first.stem]


@pytest.mark.parametrize("think", [False, True])
def test_a_chat_goes_on_from_its_cache(talker: Talker, shipped: Model, think: bool) -> None:
    """Where a thinking block is forgotten afterwards, from before it: the answer alone is read again."""
    model = talker("v4_a", "<think>") if think else shipped
    conversation = Conversation(model, Chat("", Settings(max_tokens=70, think=think)))
    for question in ("a long beginning " * 18, "Tell me a story about a fox and a lamp."):
        told(conversation.ask(question))
    path = chat_path("kept")
    conversation.chat.write(path)
    conversation.save_cache(cache_path(path))
    expected = conversation.ask("third")
    text = told(expected)

    resumed = Conversation(model, Chat.read(path), cache_path(path))
    assert (resumed.reason, resumed.restored) == ("", resumed.session.position)
    asked = resumed.ask("third")
    assert len(asked.generation.prompt) < 40 < resumed.restored
    assert told(asked) == text
    assert resumed.session.tokens == conversation.session.tokens


def test_a_cache_that_does_not_fit_is_told(talker: Talker, home: Path) -> None:
    model = talker()
    conversation = Conversation(model, Chat("", Settings(max_tokens=5, context=256)))
    told(conversation.ask("hi"))
    chat, cache = conversation.chat, home / "x.kv"
    assert "nothing was kept" in Conversation(model, chat, cache).reason
    conversation.save_cache(cache)
    assert Conversation(model, chat, cache).reason == ""
    larger = replace(chat, settings=replace(chat.settings, context=512))
    assert "for a context of 256 tokens" in Conversation(model, larger, cache).reason
    assert "another model" in Conversation(talker("llama_a"), chat, cache).reason
    instructed = replace(chat, settings=replace(chat.settings, system="be"))
    conversation = Conversation(model, instructed, cache)
    assert conversation.restored <= 1
    cache.write_bytes(b"torn")
    assert "damaged" in Conversation(model, chat, cache).reason


def test_only_the_latest_caches_are_kept(talker: Talker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "KEPT_CACHES", 2)
    conversation = Conversation(talker("llama_a"), Chat("", Settings(max_tokens=2, context=64)))
    told(conversation.ask("hi"))
    for name in ("a", "b", "c"):
        conversation.chat.write(chat_path(name))
        conversation.save_cache(cache_path(chat_path(name)))
    assert sorted(path.name for path in chat_path("a").parent.iterdir()) == [
        "a.json",
        "b.json",
        "b.kv",
        "c.json",
        "c.kv",
    ]
