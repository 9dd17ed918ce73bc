"""Kept chats listed, searched, shown and written; what a chat says of settings; how a question begins with a slash."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import refused

from numoe.cli.chat.kept import Kept, markdown
from numoe.engine.chat.answer import Settings, Turn
from numoe.engine.chat.files import Chat, chat_path
from numoe.engine.chat.tools.call import Call

Run = Callable[..., tuple[int, str, str]]
LONG = "What is the largest animal that lives in the sea, and what does it eat?"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path))
    monkeypatch.delenv("COLUMNS")
    turns = (Turn("What is\nthis?", text="A sheep."), Turn("And?", text="No."))
    for when, (name, chat) in enumerate(
        {
            "old": Chat("tiny", turns=turns),
            "2026-01-02-030405-what-is-the-largest-animal-that-lives": Chat("acme/" + "m" * 60, turns=(Turn(LONG),)),
            "empty": Chat("tiny"),
        }.items()
    ):
        chat.write(chat_path(name))
        os.utime(chat_path(name), (when, when))
    chat_path("torn").write_text("{")
    return tmp_path


def test_chats_are_a_table_that_a_pipe_does_not_fold(command: Run) -> None:
    code, out, err = command("chat", "--list")
    rows = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert rows[0] == ["name", "title", "model", "turns", "age"]
    assert [row[0] for row in rows[1:3]] == ["torn", "empty"] and rows[1][1] == "(cannot be read)"
    assert rows[3][1:4] == ["What is the largest animal that lives i…", "acme/" + "m" * 60, "1"]
    assert rows[4][:4] == ["old", "What is this?", "tiny", "2"] and rows[4][4].endswith(" d")
    document = json.loads(command("chat", "--list", "--json")[1])["chats"]
    assert [one["name"] for one in document] == [row[0] for row in rows[1:]]
    assert document[-1] == {
        "name": "old", "used": "1970-01-01T00:00:00+00:00", "title": "What is this?", "model": "tiny", "turns": 2,
        "wrong": "",
    }  # fmt: skip
    assert "is not a chat of numoe; `numoe chat --list` shows" in document[0]["wrong"]


@pytest.mark.parametrize(("search", "found"), [("SHEEP", ["old"]), ("largest", ["2026"]), ("zebra", [])])
def test_chats_are_found_by_what_is_said(command: Run, search: str, found: list[str]) -> None:
    code, out, err = command("chat", "--search", search)
    assert code == 0 and [line[:4].strip() for line in out.splitlines()[1:]] == found
    assert ("No kept chat says" in err) == (not found)
    told = re.sub(r"\s+", "", command("chat", "tiny", stdin=f"/list {search}\n")[2])
    assert bool(re.search(r"\dturns?,", told)) == bool(found)


def test_a_chat_is_shown(command: Run) -> None:
    assert command("chat", "--show", "old") == (0, "> What is\nthis?\nA sheep.\n> And?\nNo.\n", "")
    assert command("chat", "--show", "empty") == (0, "Nothing was said yet.\n", "")
    shown = json.loads(command("chat", "--show", "old", "--json")[1])
    assert [turn["question"] for turn in shown["turns"]] == ["What is\nthis?", "And?"]
    refused(command("chat", "--show", "torn"), "is not a chat of numoe")
    refused(command("chat", "--show", "nobody"), "there is no chat", code=2)


def test_a_document_has_its_own_headings() -> None:
    chat = Chat("tiny", Settings(system="Be\nkind."), (Turn("# Why?", text="\n# So.\n"), Turn("One\ntwo", text="x")))
    assert markdown(chat) == ("# A chat with tiny\n\n> Be\n> kind.\n\n## Why?\n\n# So.\n\n## One\n\ntwo\n\nx\n")


def test_calls_of_tools_are_part_of_what_was_said(command: Run) -> None:
    turns = (Turn("Rain?", calls=(Call("weather", '{"city": "Rome"}'),), results=("no",)), Turn("", text="It is dry."))
    called = '{"name": "weather", "arguments": {"city": "Rome"}}'
    Chat("tiny", turns=turns).write(chat_path("called"))
    assert command("chat", "--show", "called") == (0, f"> Rain?\n{called}\nIt is dry.\n", "")
    assert markdown(Chat("tiny", turns=turns)) == f"# A chat with tiny\n\n## Rain?\n\n{called}\n\nIt is dry.\n"


@pytest.mark.parametrize(
    ("seconds", "age"), [(5, "now"), (-9, "now"), (61, "1 min"), (3600 * 5, "5 h"), (86400 * 400, "400 d")]
)
def test_ages(monkeypatch: pytest.MonkeyPatch, seconds: float, age: str) -> None:
    monkeypatch.setattr("time.time", lambda: 1e9)
    assert Kept("x", 1e9 - seconds).age == age


@pytest.mark.parametrize(
    ("line", "asked"), [("//etc/passwd?", "/etc/passwd?"), ("//", "/"), ("///", "//"), ("//help", "/help")]
)
def test_two_slashes_begin_a_question_with_one(command: Run, home: Path, line: str, asked: str) -> None:
    assert command("chat", "tiny", "--session", "new", "-n", "1", stdin=f"{line}\n")[0] == 0
    (turn,) = Chat.read(chat_path("new")).turns
    assert turn.question == asked


@pytest.mark.parametrize(
    ("line", "told", "code"),
    [
        ("/set ctx 99999", "/set ctx 99999 is not possible", 2),
        ("/load nobody", "; /list shows those that are kept", 2),
        ("/set top_p 0", "/set top_p is 0.0; give a value above 0", 2),
        ("word " * 900, "shorten it or raise /set ctx", 1),
        ("/export x.txt", "/export takes a file that ends with .md or .json", 2),
    ],
)
def test_a_chat_speaks_of_its_own_commands(command: Run, line: str, told: str, code: int) -> None:
    refused(command("chat", "tiny", "--ctx", "512", stdin=f"{line}\n"), told, code=code)


def test_a_chat_that_is_read_again_says_why_in_plain_words(command: Run) -> None:
    err = command("chat", "--session", "old", stdin="")[2]
    assert "2 turns, " in err and "which are read again with the next question: nothing was kept that spares it" in err
    chat_path("old").with_suffix(".kv").write_bytes(b"torn")
    assert "is damaged, or of another model" in command("chat", "--session", "old", stdin="")[2]


def test_history_is_switched_within_a_chat(command: Run) -> None:
    lines = "one\n/set history off\ntwo\n/set history on\n/set history no\n"
    code, _, err = command("chat", "tiny", "--session", "new", "-n", "1", stdin=lines)
    assert code == 2 and "history takes on or off" in err and "from here on is not kept" in err
    assert [turn.question for turn in Chat.read(chat_path("new")).turns] == ["one", "two"]
    command("chat", "tiny", "--session", "other", "-n", "1", stdin="one\n/set history off\ntwo\n")
    assert [turn.question for turn in Chat.read(chat_path("other")).turns] == ["one"]
