"""What `numoe run` is asked without much typing: a default model, aliases, templates, -c, the log, --pull, a chat."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from helpers import refused
from hub_server import Hub

from numoe.cli import run as running
from numoe.cli.text import typed
from numoe.engine.chat.files import Chat

Run = Callable[..., tuple[int, str, str]]
SHEEP = "A sheep says baa.\n"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_default_model_and_aliases(command: Run, home: Path) -> None:
    question = "What sound does a sheep make?"
    refused(command("run", question, stdin="x"), "numoe run needs MODEL before a prompt", code=2)
    assert command("alias", "fast=tiny", "slow=acme/large")[0] == 0
    assert command("alias")[1].split() == ["fast", "tiny", "slow", "acme/large"]
    assert json.loads(command("alias", "--json")[1]) == {"fast": "tiny", "slow": "acme/large"}
    assert command("run", "-q", "fast", question)[1] == SHEEP
    assert command("run", "-q", "-m", "fast", question)[1] == SHEEP
    assert command("config", "set", "model", "fast")[0] == 0
    for asked in ((question,), ("-p", question), ("fast", question), ("-m", "tiny", question)):
        assert command("run", "-q", *asked)[1] == SHEEP
    assert command("run", "-q", stdin=question)[1] == SHEEP
    assert command("chat", "-q", "--temp", "0", stdin=question)[1] == SHEEP
    refused(
        command("run", "slow", "x"),
        '"acme/large" is neither',
        "numoe fit acme/large",
        "`numoe run --pull` does both",
        code=2,
    )
    refused(command("run", "acme/other"), "the prompt is empty", code=2)
    assert command("config", "get", "model") == (0, "fast\n", "")
    assert command("alias", "fast=", "slow=")[0] == 0 and "alias" not in (home / "config.toml").read_text()
    refused(command("alias", "fast="), 'there is no alias "fast"', code=2)
    refused(command("alias", "a b=c"), "NAME=VALUE", code=2)
    refused(command("alias", "fast"), "NAME=VALUE", code=2)
    refused(command("alias", "fast=\udcff"), "not UTF-8", code=2)
    (home / "config.toml").write_text("alias = 3\n")
    refused(command("run", "tiny", "x"), "alias is no table of texts")


def test_templates_take_a_text_where_they_say(command: Run) -> None:
    assert command("template", "sound=What sound does a {input} make?", "plain=What sound does a sheep make?")[0] == 0
    assert command("run", "-q", "tiny", "-t", "sound", "sheep")[1] == SHEEP
    assert command("run", "-q", "tiny", "-t", "sound", stdin="sheep")[1] == SHEEP
    assert command("run", "-q", "tiny", "-t", "plain")[1] == SHEEP
    told = [json.loads(command("run", "tiny", "--json", *asked)[1])["prompt_tokens"]
            for asked in (["-t", "plain", "And?"], ["What sound does a sheep make?\n\nAnd?"])]  # fmt: skip
    assert told[0] == told[1]
    refused(command("run", "tiny", "-t", "sound"), "prompt is empty", code=2)
    refused(command("run", "tiny", "-t", "none", "x"), 'there is no template "none"', code=2)
    refused(command("run", "tiny", "--batch", "-", "-t", "sound"), "leave out the others", code=2)


def test_the_last_prompt_goes_on(command: Run, home: Path) -> None:
    refused(command("run", "-c", "And?"), "there is nothing to go on with", code=2)
    assert command("run", "-q", "tiny", "My name is Mia.")[0] == 0
    assert command("run", "-q", "tiny", "What colour is a frog?", "--no-save")[0] == 0
    assert command("run", "-q", "tiny", "x", "--raw", "-n", "1")[0] == 0
    assert command("run", "-q", "-c", "What is my name?")[1] == "Your name is Mia.\n"
    assert command("run", "-q", "-c", "tiny", "Hello!")[0] == 0
    chat = Chat.read(home / "last.json")
    assert [turn.question for turn in chat.turns] == ["My name is Mia.", "What is my name?", "Hello!"]
    assert (home / "last.json").stat().st_mode & 0o777 == 0o600 or os.name == "nt"
    assert command("run", "-q", "-c", "Who?", "--no-save")[0] == 0
    assert Chat.read(home / "last.json") == chat
    refused(command("run", "-c", "--raw", "x"), "--raw", code=2)
    (home / "last.json").write_text("{}")
    refused(command("run", "-c", "x"), "last.json is not a chat of numoe")
    assert not list(home.glob("chats/*"))


def test_the_log_is_kept_where_it_is_switched_on(command: Run, home: Path) -> None:
    assert "`numoe config set log true`" in command("logs")[2]
    command("run", "-q", "tiny", "Hello!")
    assert not (home / "log.jsonl").exists()
    command("config", "set", "log", "true")
    command("run", "-q", "tiny", "What sound does a sheep make?")
    command("run", "-q", "tiny", "Hello!", "--no-log")
    command("run", "-q", "tiny", "What colour is a frog?", "--no-save")
    code, out, _ = command("logs")
    assert code == 0 and "> What sound does a sheep make?\nA sheep says baa.\n" in out and "Hello" not in out
    (entry,) = json.loads(command("logs", "BAA", "--json")[1])["entries"]
    assert entry["model"] == "tiny" and entry["text"] == "A sheep says baa." and entry["completion_tokens"] > 3
    assert "sheep" not in command("logs", "-n", "1")[1]
    assert (home / "log.jsonl").stat().st_mode & 0o777 == 0o600 or os.name == "nt"
    with (home / "log.jsonl").open("a") as file:
        file.write('{"prompt": "cut')
    assert command("logs")[1] == out
    refused(command("logs", "-n", "0"), "--last takes a whole number from 1 on", code=2)


@pytest.mark.parametrize("asked", [["tiny"], []])
def test_nothing_asked_at_a_terminal_opens_the_chat(
    command: Run, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    opened = []
    monkeypatch.setattr(running, "typed", lambda: True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("numoe.cli.chat.loop.converse", lambda model, options: opened.append((model, options)))
    command("config", "set", "theme", "light")
    assert command("run", *asked, "--top-k", "7", "-s", "Be kind.", stdin=None)[0] == 0
    ((model, options),) = opened
    assert model == (asked[0] if asked else None)
    assert (options["top_k"], options["system"], options["temp"], options["theme"]) == (7, "Be kind.", 0.6, "light")
    for more in (["--json"], ["--choices", "a,b"], ["-t", "x"], ["--session", "x"]):
        command("run", "tiny", *more)
    assert len(opened) == 1
    assert not typed()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.add("Org/Name", tiny.write_model("mixtral_a", tmp_path / "source"))
        yield server


def test_a_model_that_is_not_here_is_pulled_when_that_is_asked_for(command: Run, hub: Hub, home: Path) -> None:
    asked = ("Org/Name", "hi", "-n", "2")
    refused(command("run", *asked), "`numoe fit Org/Name`", "`numoe pull Org/Name`", "--pull", code=2)
    code, out, err = command("run", *asked, "--pull", "--ram", "1kB")
    assert (code, out) == (2, "") and "error: Org/Name needs " in err and not list(home.glob("models/*"))
    code, out, err = command("run", *asked, "--pull")
    assert code == 0 and out and "Org/Name as native: FITS IN RAM; " in err
    seen = len(hub.log)
    assert command("run", *asked, "--pull", "-q") == (0, out, "")
    assert command("chat", "Org/Name", "--pull", "-n", "2", "-q", "--temp", "0", stdin="hi") == (0, out, "")
    assert len(hub.log) == seen
    refused(command("run", "nowhere", "x", "--pull"), "there is no folder or file", code=2)
