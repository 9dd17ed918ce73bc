"""Tools at the terminal: calls that `numoe run` prints, and commands that a chat runs when it may."""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from numoe.cli.chat.commands import hear
from numoe.cli.chat.talk import Talk
from numoe.cli.chat.tools import Commands
from numoe.cli.config_file import path, tool_tables
from numoe.cli.output import Output
from numoe.engine import load
from numoe.engine.chat.answer import Settings
from numoe.engine.chat.files import Chat
from numoe.engine.chat.tools.call import Call
from numoe.engine.generation import Generation
from numoe.engine.session import Session
from numoe.quant.errors import InputError

Run = Callable[..., tuple[int, str, str]]
CITY = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Rome"]}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
CALL = {"name": "weather", "arguments": {"city": "Rome"}}


def test_calls_are_printed_as_json(command: Run, tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS))
    asked = ("run", "tiny", "hi", "--tools", str(file), "--tool-choice", "weather", "-n", "200")
    code, out, _ = command(*asked, "-q")
    assert code == 0 and json.loads(out.splitlines()[0]) == CALL
    assert json.loads(command(*asked, "--json")[1])["tool_calls"][0] == CALL
    assert json.loads(command(*asked, "--jsonl")[1].splitlines()[0]) == {"tool_call": CALL}


def test_calls_are_logged(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path))
    asked = ("run", "tiny", "hi", "--log", "-q", "--tool-choice", "weather", "--tools", json.dumps(TOOLS), "-n", "200")
    out = command(*asked)[1]
    (entry,) = json.loads(command("logs", "rome", "--json")[1])["entries"]
    assert entry["tool_calls"][0] == CALL
    assert command("logs")[1].endswith(f"> hi\n{out}\n")
    assert "does not say" in command("logs", "Paris")[2]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--tools", "nowhere.json"), 2, "nowhere.json cannot be read"),
        (("--tools", "[1]"), 2, "tool 1 is not"),
        (("--tools", "{"), 2, "--tools is not valid JSON"),
        (("--tools", json.dumps(TOOLS), "--tool-choice", "x"), 2, "no tool 'x'"),
        (("--tools", json.dumps(TOOLS), "--raw"), 2, "--tools are for one prompt"),
        (("--tool-choice", "weather"), 2, "--tool-choice is of --tools"),
    ],
)
def test_tools_that_cannot_be_are_refused(command: Run, arguments: tuple[str, ...], code: int, sentence: str) -> None:
    given, out, err = command("run", "tiny", "hi", *arguments)
    assert (given, out) == (code, "") and sentence in " ".join(err.split())


def weather(*words: str) -> dict[str, Any]:
    """A table of config.toml whose command is a program of Python."""
    return {"weather": {"command": [sys.executable, "-c", *words], "description": "d", "parameters": CITY}}


def commands(tables: dict[str, Any], yes: bool = True) -> tuple[Commands, list[str]]:
    asked: list[str] = []
    return Commands(tables, lambda question: asked.append(question) or yes, Output(True)), asked  # type: ignore[func-returns-value]


def test_a_command_gets_arguments_as_words_and_only_where_the_user_lets_it() -> None:
    call = Call("weather", json.dumps({"city": "Rome; touch {x} $(y)"}))
    tables = weather("import sys; print(sys.argv[1:], sys.stdin.read())", "in {city}")
    made, asked = commands(tables)
    assert made.run(call) == f"['in Rome; touch {{x}} $(y)'] {call.arguments}\n" and len(asked) == 1
    assert "did not let" in commands(tables, yes=False)[0].run(call)
    assert "Exit code 3." in commands(weather("import sys; sys.exit(3)"))[0].run(call)
    assert "characters more" in commands(weather("print('x' * 99999)"))[0].run(call)
    assert "cannot be run" in commands({"weather": {"command": "no-such-program"}})[0].run(call)


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        ({}, "no tools are listed"),
        ({"a": 1}, "is no table"),
        ({"a": {"command": "x", "shell": True}}, "has shell"),
        ({"a": {"command": []}}, "has no command"),
        ({"a": {"command": "x", "parameters": 1}}, "a table as parameters"),
    ],
)
def test_tables_that_cannot_be_are_refused(tables: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        commands(tables)


def test_config_lists_tools_beside_settings(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path))
    path().write_text('temp = 0.5\n[tools.weather]\ncommand = ["w", "{city}"]\n')
    assert tool_tables() == {"weather": {"command": ["w", "{city}"]}}
    assert command("config")[0] == 0


def test_a_chat_runs_what_the_model_calls_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = load("tiny"), []
    written = model.description.chat_format.syntax.write([Call("weather", '{"city": "Rome"}')])  # type: ignore[union-attr]

    def generate(session: Session, prompt: Any, **options: Any) -> Generation:
        generation = original(session, prompt, **options)
        generation.force(written if not prompts else "Sunny.")
        generation._forced.append(min(model.tokenizer.eos_ids))
        prompts.append(model.tokenizer.decode(session.tokens) + model.tokenizer.decode(prompt))
        return generation

    original = Session.generate
    monkeypatch.setattr(Session, "generate", generate)
    made, asked = commands(weather("print('sunny')", "{city}"))
    with ExitStack() as held, Output(True) as output:
        talk = Talk(output, lambda chat: model, Chat("tiny", Settings()), None, held, keeps=False)
        talk.offer(made)
        hear(talk, "What is the weather?")
    called, told = talk.conversation.chat.turns
    assert called.calls == (Call("weather", '{"city": "Rome"}'),) and called.results == ("sunny\n",)
    assert (told.question, told.text) == ("", "Sunny.") and len(asked) == 1
    assert "<tool_result>sunny\n</tool_result>" in prompts[1] and prompts[1].count("What is the weather?") == 1
    assert '"use"' not in talk.conversation.chat.text()
