"""Wrong usage in words of our own, --help with examples that work, and what shells complete."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from helpers import refused

from numoe.cli.arguments import chats_here, models_here, pulled_here, templates_here
from numoe.cli.main import app
from numoe.engine.chat.files import Chat, chat_path

Run = Callable[..., tuple[int, str, str]]
GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = {name: command for name, command in GROUP.commands.items() if name != "config"} | {
    f"config {name}": command for name, command in GROUP.commands["config"].commands.items()
}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["jump"], 'numoe has no command "jump"; it has run, chat, '),
        (["rnu"], 'numoe has no command "rnu"; did you mean run?'),
        (["config", "st"], 'numoe config has no command "st"; did you mean set?'),
        (["config", "set", "temp"], "numoe config set needs VALUE; `numoe config set --help` tells what it takes"),
        (["run", "tiny", "x", "--tmp", "3"], 'there is no option "--tmp"; did you mean --temp?'),
        (["run", "tiny", "x", "--zzz"], 'there is no option "--zzz"; `numoe run --help` tells what it takes'),
        (["run", "tiny", "x", "-Z"], 'there is no option "-Z"; `numoe run --help` tells'),
        (["run", "tiny", "x", "--temp"], "--temp needs a value"),
        (["run", "tiny", "x", "-n"], "-n needs a value"),
        (["run", "tiny", "x", "--json=1"], "--json takes no value"),
        (["run", "tiny", "what", "is", "it"], 'and "is it" is left over; put a prompt into quotes'),
        (["run"], "numoe run needs MODEL; name one, or set a default"),
        (["fit"], "numoe fit needs MODEL; `numoe fit --help` tells what it takes"),
        (["list", "x"], 'numoe list takes options alone, and "x" is left over'),
        (["run", "tiny", "x", "--temp", "hot"], '--temp takes a number from 0 to 1000000, not "hot"'),
        (["run", "tiny", "x", "--temp", "inf"], '--temp takes a number from 0 to 1000000, not "inf"'),
        (["run", "tiny", "x", "--ctx", "8q"], '--ctx takes a whole number from 1 on, not "8q"'),
        (["run", "tiny", "x", "-n", "-1"], '--max-tokens takes a whole number from 0 on, not "-1"'),
        (["run", "tiny", "x", "--seed", "1" * 99], "--seed takes a whole number from 0 to 9223372036854775807, not"),
        (["run", "tiny", "x", "--ram", "16"], '--ram: "16" has no unit; write it like 16GB or 16MB'),
        (["run", "tiny", "x", "--ram", "lots"], '--ram: "lots" is not an amount of memory'),
        (["run", "tiny", "x", "--threads", "0"], '--threads takes a whole number from 1 to 1024, not "0"'),
        (["chat", "--theme", "pink"], '--theme takes auto or dark or light, not "pink"'),
        (
            ["quantize", "tiny", "x", "--quant", "int3"],
            '"int3" is not a way to quantize; choose one of native, int8, int4',
        ),
        (["quantize", "tiny", "x"], "numoe quantize needs --quant;"),
        (["config", "set", "ram", "lots"], 'ram: "lots" is not an amount of memory'),
        (["config", "get", "tmep"], 'there is no setting "tmep"'),
        (["chat", "--show", "nobody"], "there is no chat "),
        (["chat", "--json"], "--json goes with --list, --search or --show"),
        (["rm", "x"], 'no pulled model is called "x"'),
        (["run", "-c", "x", "--session", "y"], "give one of them"),
        (["run", "tiny", "x", "--out", "/dev/null"], "--out is for the answers of --batch"),
        (["run", "tiny", "x", "-f", "."], ". cannot be read (Is a directory); give a text file"),
        (["run", "tiny", "x", "--tools", "{"], "--tools is not valid JSON"),
        (["pull", "tiny"], '"tiny" is not the id of a repository; write it as OWNER/NAME'),
        (["run", "tiny", "x", "--hlep"], 'there is no option "--hlep"; did you mean --help?'),
        (["run", "tiny", "x", "--regex", ""], "--regex is empty"),
        (["run", "tiny", "x", "--tools", "[]"], "--tools lists none"),
        (["run", "tiny", "x", "--parallel", "3"], "--parallel is for the prompts of --batch"),
        (["run", "tiny", "x", "--trace", "."], "the trace . cannot be made (File exists); choose another name"),
        (["run", "tiny", "x", "--prompt-cache", "/dev/null"], "/dev/null is not a session file; give another name"),
        (["run", "/", "x"], "/ has no config.json; a model folder needs one"),
        (["chat", "tiny", "--list"], '--list, --search and --show are of all chats; leave out "tiny"'),
        (["chat", "--list", "--show", "x"], "--show prints one chat"),
        (["quantize", "tiny", "/", "--quant", "int8"], "/ is there already and is not overwritten"),
        (["verify", "/"], "/ has no numoe.json with the hashes to compare with"),
        (["search", " "], "TEXT is empty; give a part of a repository's name"),
        (["alias", "a=tiny", "b"], "`numoe alias` takes NAME=VALUE, the name in letters"),
        (["alias", "tiny=x"], "tiny is the name of a model of its own"),
        (["fit", "tiny", "--revision", "main"], '--revision is of a repository of the hub, and "tiny" is here'),
        (["fit", "tiny", "--chart", "x.txt"], "x.txt names no kind of picture that numoe draws; end it in .svg"),
        (["fit", "tiny", "--chart", "x.bmp"], "x.bmp names no kind of picture that numoe draws; end it in .svg"),
        (["fit", "tiny", "--chart", "/nowhere/x.svg"], "there is no folder /nowhere to put x.svg into; make it first"),
        (["run", "tiny", "x", "--trace", "/nowhere/t"], "there is no folder /nowhere to put t into"),
        (["run", "tiny", "x", "--prompt-cache", "/nowhere/c"], "there is no folder /nowhere to put c into"),
        (["quantize", "tiny", "/nowhere/q", "--quant", "int8"], "there is no folder /nowhere to put q into"),
        (["bench", "tiny", "--replay", "nowhere"], "nowhere cannot be read as a trace (No such file or directory)"),
        (["serve", "tiny", "--api-key", "@nowhere"], "nowhere cannot be read (No such file or directory); give a text"),
        (["--install-completion", "tcsh"], '--install-completion takes bash, zsh, fish or powershell, not "tcsh"'),
    ],
)
def test_wrong_usage_is_one_sentence_of_our_own(command: Run, arguments: list[str], told: str) -> None:
    refused(command(*arguments), told, code=2)


@pytest.mark.parametrize("name", ["", *COMMANDS, "config"])
@pytest.mark.parametrize("columns", ["80", "40"])
def test_help_is_whole_and_has_examples(command: Run, monkeypatch: pytest.MonkeyPatch, name: str, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    code, out, err = command(*name.split(), "--help")
    usage, *_ = out.split("\n\n")
    text, _, examples = out.partition("\nExamples:\n")
    assert (code, err) == (0, "") and " ".join(usage.split()).startswith(f"Usage: numoe {name}".rstrip())
    assert "..." not in text.replace("[ARGS]...", "").replace("[...]", "") and not re.search(r"<str>|[{]\w+[}]", usage)
    assert examples and all(line.startswith("  ") for line in examples.splitlines())
    assert all(len(line) <= int(columns) for line in text.splitlines())


def examples() -> Iterator[list[str]]:
    for name in COMMANDS:
        _, _, lines = (COMMANDS[name].help or "").partition("\n\nExamples:\n")
        for line in lines.splitlines():
            for part in line.split(" | "):
                if part.strip().startswith("numoe "):
                    yield shlex.split(re.sub(r" [<>] ?\S+", "", part))[1:]


@pytest.mark.parametrize("arguments", [*examples()], ids=" ".join)
def test_examples_can_be_parsed(arguments: list[str]) -> None:
    name, count = (" ".join(arguments[:2]), 2) if arguments[0] == "config" and len(arguments) > 1 else (arguments[0], 1)
    context = COMMANDS[name].make_context(name, arguments[count:], resilient_parsing=True)
    assert not context.args


def test_shells_complete_names(command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path))
    (tmp_path / "models" / "some--tiny-moe-int8").mkdir(parents=True)
    Chat("tiny").write(chat_path("trip"))
    command("alias", "fast=tiny")
    command("template", "short=Be short: {input}")
    assert models_here("f") == ["fast"] and pulled_here("so") == ["some/tiny-moe:int8"]
    assert chats_here("t") == ["trip"] and chats_here("x") == [] and templates_here("") == ["short"]


@pytest.mark.skipif(os.name == "nt", reason="shells of another kind")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["numoe", "run", "my"], ["my\\ model/"]),
        (["numoe", "chat", "--session", ""], ["trip"]),
        pytest.param(["numoe", "chat", "--show", "tr"], ["trip"], marks=pytest.mark.slow),
        pytest.param(["numoe", "quantize", "tiny", "x", "--quant", "int"], ["int8", "int4"], marks=pytest.mark.slow),
        (["numoe", "run", "--the"], []),
        pytest.param(["numoe", "chat", "--the"], ["--theme"], marks=pytest.mark.slow),
        pytest.param(["numoe", "per"], ["perplexity"], marks=pytest.mark.slow),
    ],
)
def test_bash_completes_with_quotes(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], found: list[str]
) -> None:
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path / "home"))
    Chat("tiny").write(chat_path("trip"))
    (tmp_path / "my model").mkdir()
    (tmp_path / "numoe").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m numoe.cli "$@"\n')
    (tmp_path / "numoe").chmod(0o755)
    script = command("--show-completion", "bash")[1]
    asked = f"{script}\nCOMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}; _numoe_completion ./numoe\n"
    asked += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == (found or [""])


@pytest.mark.parametrize(
    ("shell", "file"),
    [
        ("bash", ".bash_completions/numoe.sh"),
        ("zsh", ".zfunc/_numoe"),
        ("fish", ".config/fish/completions/numoe.fish"),
    ],
)
def test_completion_is_installed_for_the_shell_that_is_named(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: str, file: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    code, out, err = command("--install-completion", shell)
    assert (code, out) == (0, "") and f"{shell} completes numoe from its next start on" in err
    assert "numoe" in (tmp_path / file).read_text()
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")  # where none is named, that of the login
    assert command("--install-completion")[0] == 0
    assert command("--show-completion")[1].strip() == (tmp_path / file).read_text().strip()
