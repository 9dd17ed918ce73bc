"""`numoe chat`: on a terminal of fixed size, what a person types and what the screen shows; and of piped lines."""

import base64
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_tokenizer
from rich.cells import cell_len
from terminal import SCRIPTED, Terminal, end
from tiny import write_checkpoint, write_model

from numoe.engine import load
from numoe.engine.chat.answer import Settings, Turn
from numoe.engine.chat.conversation import Conversation
from numoe.engine.chat.files import Chat, chat_path
from numoe.quant.files import locked

pexpect = pytest.importorskip("pexpect", exc_type=ImportError)
pyte = pytest.importorskip("pyte", exc_type=ImportError)
if not hasattr(pexpect, "spawn"):
    pytest.skip("pexpect has no pseudo-terminals here", allow_module_level=True)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests have kept is none of these tests' chats."""
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path / "own"))


Start = Callable[..., Terminal]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    begun: list[Terminal] = []

    def run(*arguments: str, **options: Any) -> Terminal:
        begun.append(Terminal(tmp_path, *arguments, **options))
        return begun[-1]

    yield run
    for terminal in begun:
        end(terminal.process)


def kept(home: Path) -> dict[str, Any]:
    """The only chat's document."""
    (path,) = (home / "chats").glob("*.json")
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def questions(home: Path) -> list[str]:
    return [turn["question"] for turn in kept(home)["turns"]]


MARKDOWN = """The user wants
a table.
</think>

# Animals

A **sheep** says *baa*
and `tiny` keeps line breaks.

| animal | legs |
|---|---|
| sheep | 4 |

```python
print("four")
```

1. one <b>
2. two"""


def test_a_chat_from_its_start_to_its_second_start(start: Start, tmp_path: Path) -> None:
    answers = [MARKDOWN, "no</think>Counting: one two three...", "a</think>b", "c</think>d"]
    chat = start("tiny", "--think", answers=answers)
    shown = chat.ask("Animals?")
    lines = [line for line in shown.splitlines() if line]
    assert lines[0] == "> Animals?"
    assert re.fullmatch(r"Thought for [\d.]+ s\. /think show unfolds it\.", lines[1])
    assert [line.strip() for line in lines[2:]][:-2] == [
        "Animals",
        "A sheep says baa",
        "and tiny keeps line breaks.",
        "animal  legs",
        "─" * 12,
        "sheep   4",
        'print("four")',
        "1 one <b>",
        "2 two",
    ]
    assert re.fullmatch(r"\d+ tokens, [\d.e+]+ tok/s, first after [\d.e-]+ s, context \d+/4096", lines[-2])
    assert "\n\n\n" not in shown
    assert "The user wants" not in shown
    assert "\x1b[1m" in chat.raw  # bold

    # Ctrl-C stops an answer and keeps what came; what is typed meanwhile is not shown, but there afterwards.
    chat.clear()
    chat.send("Count!\r").wait("Counting: one two three on and on")
    chat.send("typed ahead")
    chat.wait(r"(on and\s+on\s+){9}")
    assert "typed" not in chat.raw
    chat.process.sendintr()
    chat.wait(r"context \d+/4096\n> typed ahead$")
    last = kept(tmp_path)["turns"][-1]
    assert last["finish_reason"] == "cancelled" and last["text"].startswith("Counting: one two three on and on")

    # A paste of several lines is one turn; so are lines between quotes, and those ended with Alt-Enter.
    chat.send("\x03").wait(r"\n>$")
    chat.paste("first\nsecond\n\nlast").wait("last$")
    chat.send("\r").wait(r"b\n.*context \d+/4096\n>$")
    chat.send('"""in\rquotes\x1b\rhere"""\r').wait(r"d\n.*context \d+/4096\n>$")
    assert questions(tmp_path) == ["Animals?", "Count!", "first\nsecond\n\nlast", "in\nquotes\nhere"]
    assert chat.send("\x04").left() == 0

    # The second start goes on where the first ended, and remembers what was typed.
    tokens = len(Conversation(load("tiny"), Chat.read(next((tmp_path / "chats").glob("*.json")))).history())
    chat = start("-c", answers=["e</think>f"])
    restored = re.search(r"4 turns, (\d+) tokens, of which (\d+) are restored\.", chat.screen)
    assert restored and int(restored[1]) == tokens
    assert tokens - int(restored[2]) < 10
    assert "quotes" in chat.send("\x1b[A").wait("quotes").screen
    chat.send("\x1b[A\x1b[A\x1b[A\x1b[A\x1b[A\x1b[A").wait("first")
    chat.send("\x03")
    chat.ask("Five?")
    (reading,) = re.findall(r"reading \[\.+\] 0/(\d+)", chat.raw)
    assert int(reading) < 30 < tokens
    # Ctrl-C twice at an empty prompt leaves.
    chat.clear()
    chat.send("\x03").wait(r"Once more, Ctrl-D or /bye leaves\.\n>$")
    assert chat.send("\x03").left() == 0
    assert len(questions(tmp_path)) == 5


def test_every_command(start: Start, tmp_path: Path) -> None:
    answers = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf " and Z" >> "$1"\n')
    editor.chmod(0o755)
    chat = start("tiny", "--temp", "0", answers=answers, VISUAL=str(editor))
    chat.ask("/help", r"Tab .*\n>$")  # longer than the screen
    assert "/system TEXT     set the instructions" in chat.raw
    assert "error: there is no command /jump; /help lists them" in chat.ask("/jump", r"error.*\n>$")
    assert "error: nothing was asked yet" in chat.ask("/retry", r"error.*\n>$")
    assert "The instructions are set." in chat.ask("/system Be kind.", r"set\.\n>$")
    assert "one" in chat.ask("A")
    assert "two" in chat.ask("/retry")
    assert [turn["text"] for turn in kept(tmp_path)["turns"]] == ["two"]
    assert "three" in chat.ask("/edit B")
    assert questions(tmp_path) == ["B"]
    for keys in ("\x03", "\x15\r"):  # Ctrl-C; Ctrl-U, which clears the line
        chat.ask("/edit", r"> B$")  # back at the prompt, and not forgotten yet
        chat.clear()
        chat.send(keys).wait(r">$")
        assert "B" in chat.ask("/show", r"ctx .*\n>$") and questions(tmp_path) == ["B"]
    chat.ask("/edit", r"> B$")
    assert "four" in chat.send("\x07").wait("> B and Z").ask("C")  # Ctrl-G
    assert questions(tmp_path) == ["B and ZC"]
    assert "error: the last answer is whole" in chat.ask("/more", r"error.*\n>$")

    assert "error: top_p takes a number from 0 to 1, not" in chat.ask("/set top_p 3", r"error[\s\S]*\n>$")
    assert "error: there is no setting colour" in chat.ask("/set colour 3", r"error[\s\S]*\n>$")
    assert "error: top_k takes a whole number" in chat.ask("/set top_k x", r"error.*\n>$")
    assert "error: /set ctx 99999 is not possible" in chat.ask("/set ctx 99999", r"error.*\n>$")
    chat.ask("/set max_tokens 1", r"\n>$")
    assert "Cut off at max_tokens. /more goes on." in chat.ask("five?")
    chat.ask("/set max_tokens none", r"\n>$")
    before = kept(tmp_path)["turns"][-1]["text"]
    chat.ask("/more")
    assert kept(tmp_path)["turns"][-1]["text"] == before + "six"
    settings = kept(tmp_path)["settings"]
    assert (settings["system"], settings["max_tokens"], settings["sampling"]["temperature"]) == ("Be kind.", None, 0)
    assert "are read again with the next question" in chat.ask("/set ctx 300", r"question[\s\S]*\n>$")
    shown = chat.ask("/show", r"ctx .*\n>$")
    for row in (r"model +tiny", r"turns +2", r"context +0 of 300 tokens", r"system +Be kind\.", r"ctx +300"):
        assert re.search(row, shown)

    notes = tmp_path / "notes.txt"
    notes.write_text("Bees dance.\n")
    chat.clear()
    chat.send(f"/file {tmp_path}/no").send("\t").wait("notes.txt")
    chat.send("\r").wait(r"go with the next question\.\n>$")
    assert "seven" in chat.ask("What do they do?")
    assert "Bees dance." in questions(tmp_path)[-1] and questions(tmp_path)[-1].endswith("\n\nWhat do they do?")
    assert "error" in chat.ask("/file nowhere.txt", r"error[\s\S]*\n>$")
    (tmp_path / "huge.txt").write_text("word " * 10**6)
    refused = chat.ask(f"/file {tmp_path}/huge.txt", r"error[\s\S]*\n>$")
    assert "takes more than the 300 tokens" in refused.replace("\n", " ")
    chat.ask(f"/file {tmp_path}/notes.txt", r"go with the next question\.\n>$")
    assert re.search(r"files\S+notes\.txt", re.sub(r"\s+", "", chat.ask("/show", r"ctx .*\n>$")))  # it may be folded
    assert "/file off leaves out the files" in chat.ask("word " * 400, r"error[\s\S]*\n>$").replace("\n", " ")
    assert "No file goes with the next question." in chat.ask("/file off", r"No file.*\n>$")
    chat.ask("/copy", r"copied.*\n>$")
    copied = re.search(r"\x1b\]52;c;([\w+/=]*)\x07", chat.raw)
    assert copied and base64.b64decode(copied[1]) == b"seven"
    assert "Forgotten: File" in chat.ask("/undo", r"Forgotten[\s\S]*\n>$")  # the path may be folded
    assert len(questions(tmp_path)) == 2
    for row in (r"context +\d+ of 300", r"weights +[\d.]+ MB", r"peak memory", r"experts +\d+ of \d+ were in memory"):
        assert re.search(row, chat.ask("/stats", r"waiting.*\n>$"))

    chat.ask("/think show", r"shown.*\n>$")
    chat.ask("/think hide", r"folded.*\n>$")
    assert "error: /think takes" in chat.ask("/think", r"error.*\n>$")
    chat.ask("/save mine", r"is kept (as|in)[\s\S]*\n>$")
    chat.ask("/clear", r"new chat.*\n>$")
    assert "eight" in chat.ask("Another")
    listed = chat.ask("/list", r"\n>$")
    assert re.search(r"mine +B and ZC, 2 turns, tiny, (now|1 min)", listed)
    assert re.search(r"another +Another, 1 turn, tiny, now", listed)
    chat.clear()
    chat.send("/lo").send("\t").wait("/load$").send(" mi\t").wait("mine$").send("\r")
    chat.wait(r"2 turns, \d+ tokens, of which \d+ are restored\.[\s\S]*\n>$")
    assert "nine" in chat.ask("Go on")
    assert json.loads((tmp_path / "chats" / "mine.json").read_text())["turns"][-1]["question"] == "Go on"
    assert "error: there is no folder or file" in chat.ask("/model nowhere", r"error[\s\S]*\n>$")
    assert "The model is tiny." in chat.ask("/model", r"tiny\.\n>$")
    assert "error: " in chat.ask("/load nothing", r"error[\s\S]*\n>$")
    assert "is there already" in chat.ask(
        "/save " + next((tmp_path / "chats").glob("*another.json")).stem, r"error[\s\S]*\n>$"
    ).replace("\n", " ")
    chat.ask("/save mine", r"is kept (as|in)[\s\S]*\n>$")  # its own name
    assert (tmp_path / "history").stat().st_mode & 0o777 == 0o600
    assert chat.send("/exit\r").left() == 0


def test_forty_columns_without_colour(start: Start) -> None:
    """A long prompt, an answer longer than the screen, and a context that overflows."""
    rows = "\n".join(f"| row {i} | a cell with many words that must be folded |" for i in range(9))
    text = "Words in **bold** and a line that is much longer than forty columns."
    long = f"{text}\n\n| a | b |\n|---|---|\n{rows}\n\nThe end."
    chat = start("tiny", "--ctx", "1200", answers=[long, "yes", "yes"], columns=40, NO_COLOR="1")
    chat.ask("Table!")
    assert "row 8" in chat.screen and "The end." in chat.screen
    assert not re.search(r"\x1b\[([349]|10)\d(;\d+)*m", chat.raw)  # no colours
    assert all(len(line) <= 40 for line in chat.screen.splitlines())
    chat.ask("What sound does a sheep make? " * 80)
    assert re.search(r"reading 512/\d{3} [\d.]+ tok/s, [\d.]+ s", chat.raw)
    shown = chat.ask("And what sound does a duck make? " * 30)
    assert "The context is full: the oldest 2 turns\nare no longer told to the model.\nyes\n" in shown
    assert "/bye             leave, as /exit and\n                 Ctrl-D do" in chat.ask("/help", r"Tab [\s\S]*\n>$")


def test_what_the_model_says(start: Start, tmp_path: Path) -> None:
    """The whole way with the shipped model itself, raw."""
    conversation = Conversation(load("tiny"), Chat("tiny", Settings()))
    for question in ("What sound does a sheep make?", "Where does a bee live?"):
        list(conversation.ask(question))
    chat = start("--plain", "--temp", "0")  # no chat is kept yet, so the model is tiny
    for turn in conversation.chat.turns:
        assert chat.ask(turn.question).splitlines()[1] == turn.text
    assert [turn["text"] for turn in kept(tmp_path)["turns"]] == [turn.text for turn in conversation.chat.turns]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("number", "answer"), [(signal.SIGTERM, "Word"), (signal.SIGHUP, "Word...")])
def test_ended_by_a_signal(tmp_path: Path, number: int, answer: str) -> None:
    """At the prompt, and in the middle of an answer: what came is kept, and the terminal is as it was."""
    arguments = ["-c", SCRIPTED, json.dumps([answer]), "chat", "tiny", "--plain"]
    script = (
        "import subprocess, sys, termios\n"
        "before = termios.tcgetattr(0)\n"
        f"child = subprocess.Popen([sys.executable, *{arguments!r}])\n"
        "print('pid', child.pid, flush=True)\n"
        "code = child.wait()\n"
        "print('code', code, 'same', termios.tcgetattr(0) == before, flush=True)\n"
    )
    environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "NUMOE_HOME": str(tmp_path)}
    terminal = pexpect.spawn(sys.executable, ["-c", script], env=environment, timeout=60, encoding="utf-8")
    terminal.expect(r"pid (\d+)")
    child = int(terminal.match[1])
    prompt = r">[^\n]*?\x1b\[\?25h"  # drawn, and the cursor shown again
    terminal.expect("/help lists the commands")
    terminal.expect(prompt)
    terminal.send("Speak!\r")
    terminal.expect("Word on and on" if answer.endswith("...") else r"context [\s\S]*?" + prompt)
    os.kill(child, number)
    terminal.expect(r"code (-?\d+) same (\w+)")
    assert terminal.match.groups() == (str(128 + number), "True")
    assert "Traceback" not in (terminal.before or "")
    end(terminal)
    assert kept(tmp_path)["turns"][0]["text"].startswith(answer.removesuffix("..."))
    assert len(list((tmp_path / "chats").glob("*.kv"))) == 1


def test_a_new_chat_begins_whatever_the_kept_ones_are(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "chats"
    folder.mkdir()
    for name, model in (("old", "tiny"), ("gone", "acme/gone-model"), ("damaged", "tiny")):
        Chat(model).write(folder / f"{name}.json")
    (folder / "damaged.json").write_text("[" * 100_000)
    (folder / "link.json").symlink_to("nowhere")
    (folder / "folder.json").mkdir()
    chat = start(answers=["one"])
    assert "The model is not that of the last chat, damaged:" in chat.screen
    assert "one" in chat.ask("A")
    assert chat.send("/bye\r").left() == 0


# --------------------------------------------------------------------------------------- without a terminal

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model that never ends an answer by itself, of at most 1024 tokens."""
    folder = write_checkpoint("llama_a", tmp_path_factory.mktemp("llama"))
    tiny_tokenizer(folder, 90)
    return str(folder)


def test_piped_lines_are_one_turn_each(command: Run, model: str) -> None:
    options = ("-n", "4", "--temp", "0")
    code, out, err = command("chat", model, *options, "-q", stdin="hi\n\nand\n")
    assert (code, err) == (0, "")
    first = json.loads(command("run", model, "hi", "-n", "4", "--json")[1])["text"]
    told = f"<s>user: hi\nassistant: {first}\nuser: and\nassistant: "
    second = json.loads(command("run", model, "--raw", told, "-n", "4", "--json")[1])["text"]
    assert out == first.rstrip("\n") + "\n" + second.rstrip("\n") + "\n"
    assert command("chat", "--list") == (0, "", "No chats are kept yet.\n")


def test_piped_commands(command: Run, model: str) -> None:
    lines = "/help\nhi\n/clear\nhi\n/system\n/system be\nhi\n/bye\nnever\n"
    code, out, err = command("chat", model, "-n", "3", "--temp", "0", stdin=lines)
    answer = command("run", model, "hi", "-n", "3", "-q")[1]
    # /system be leaves the turn before it in place, so only the first two answers are those of a new chat.
    assert code == 0 and out.startswith(answer + answer)
    assert "/clear" in err and err.count("3 tokens") == 3
    code, out, _ = command("chat", model, "-n", "3", "--temp", "0", stdin="/system be\nhi")
    assert (code, out) == (0, command("run", model, "hi", "-s", "be", "-n", "3", "-q")[1])
    code, out, err = command("chat", model, stdin="/dance\n")
    assert (code, out) == (2, "") and err.endswith("error: there is no command /dance; /help lists them\n")


def test_a_named_chat_keeps_its_settings(
    command: Run, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path))
    assert command("chat", "-c") == (2, "", "error: no chat is kept yet; `numoe chat` begins one\n")
    options = ("--session", "mine", "-q")
    assert command("chat", model, *options, "-n", "5", "--temp", "0", "-s", "be", stdin="hi\n")[0] == 0
    assert command("chat", *options, "--temp", "0.5", "--seed", "1", stdin="and\n")[0] == 0  # model and -n as before
    assert command("chat", "-c", "-q", stdin="/set max_tokens 2\nlast\n")[0] == 0
    document = kept(tmp_path)
    assert (document["model"], document["settings"]["system"]) == (model, "be")
    assert [len(turn["text"]) for turn in document["turns"]] == [5, 5, 2]
    assert document["settings"]["sampling"]["temperature"] == 0.5
    code, out, _ = command("chat", "--list")
    assert code == 0 and re.search(r"^mine +hi .* 3 +(now|1 min)$", out, re.MULTILINE)
    assert command("chat", "-c", "--session", "mine")[0] == 2
    assert "cannot be the name of a chat" in command("chat", "--session", "../x")[2]


def test_saving_and_loading_leave_files_of_others_alone(
    command: Run, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    Chat(model, turns=(Turn("kept"),)).write(chat_path("kept"))
    Chat(model, turns=(Turn("kept"),)).write(tmp_path / "chat.json")
    for name, text in (("package.json", '{"name": "x"}'), ("chat.kv", "mine"), ("empty.json", "")):
        (tmp_path / name).write_text(text)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def told(*lines: str) -> str:
        code, _, err = command("chat", model, "-n", "2", "--temp", "0", stdin="\n".join(lines))
        assert code in (1, 2) and err.splitlines()[-1].startswith("error: ")
        assert {path: path.read_bytes() for path in before} == before
        return err.splitlines()[-1]

    for name in ("package.json", "empty.json", "chat.json", "kept", "home/chats/kept.json"):
        assert "is there already" in told("hi", f"/save {name}")
    for name in ("package.json", "empty.json"):
        assert "is not a chat of numoe" in told(f"/load {name}")
    assert "there is no chat" in told("/load nothing.json")
    assert "cannot be written" in told("hi", "/save nowhere/x.json") and not (tmp_path / "nowhere").exists()
    assert "cannot be written" in told("hi", "/save " + "x" * 250 + ".json")
    for line in ("/file ~nosuchuser/x", "/save ~nosuchuser/x.json", "/model ~nosuchuser"):
        assert "~nosuchuser" in told("hi", line) and "name of no user" in told("hi", line)
    assert not [path for path in tmp_path.iterdir() if "lock" in path.name and "nothing" not in path.name]
    assert command("chat", model, "-n", "2", stdin="/load chat.json\nhi\n/bye\n")[0] == 0
    assert (tmp_path / "chat.kv").read_text() == "mine"
    assert len(Chat.read(tmp_path / "chat.json").turns) == 2


@pytest.mark.skipif(os.name == "nt", reason="names are bytes")
def test_a_model_whose_name_is_not_utf8(command: Run, model: str, tmp_path: Path) -> None:
    link = tmp_path / os.fsdecode(b"caf\xe9")
    link.symlink_to(model)
    for _ in range(2):
        code, out, _ = command("run", str(link), "hi", "-n", "2", "--session", "bytes", "--json")
        assert code == 0 and json.loads(out)["model"] == str(link)
    assert Chat.read(chat_path("bytes")).model == str(link)
    assert "bytes" in command("chat", "--list")[1]


def test_what_is_chosen_of_kept_chats_may_be_gone(
    command: Run, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path))
    Chat("acme/gone").write(chat_path("gone"))
    for arguments in (("-c",), ("--session", "gone")):
        assert "acme/gone, which is not here any more; give another MODEL" in command("chat", *arguments, stdin="")[2]
    assert command("chat", model, "-c", "-q", stdin="")[0] == 0
    chat_path("torn").write_text("{")
    os.utime(chat_path("torn"), (0, 0))
    code, out, _ = command("chat", "--list")
    assert code == 0 and re.search(r"^gone .* 0 ", out, re.MULTILINE) and "torn" in out
    with locked(chat_path("gone"), "it"):
        assert 'the chat "gone" is in use by another process' in command("chat", model, "-c", stdin="")[2]


def test_a_full_context_ends_an_answer(command: Run, model: str) -> None:
    code, out, err = command("chat", model, "--ctx", "60", "--temp", "0", stdin="hi\nmore of it\n" + "x" * 60)
    assert code == 1 and out.count("\n") >= 2
    assert err.count("The context is full. /more goes on.") == 2
    assert "The context is full: the oldest turn is no longer told to the model." in err
    assert "has room for 60; shorten it or raise /set ctx" in err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        *(
            (f"{line} 5", f"there is no command {line}; /help lists them")
            for line in ("/", "/jump", "/etc/passwd?", "/<x>")
        ),
        ("/think_budge 5", "there is no command /think_budge; did you mean /think_budget?"),
        ("/modle x", "there is no command /modle; did you mean /model?"),
        ("/undo all", '/undo stands alone, and "all" is left over'),
        ("/q x", '/bye stands alone, and "x" is left over'),
        ("/help jump", "there is no command /jump; /help lists them"),
    ],
)
def test_what_begins_with_a_slash_is_never_asked(command: Run, line: str, told: str) -> None:
    code, out, err = command("chat", "tiny", stdin=f"{line}\n")
    assert (code, out) == (2, "") and f"error: {told}" in err


@pytest.mark.parametrize("line", ["/q", "/quit", "/BYE", "/exit"])
def test_ways_to_leave(command: Run, line: str) -> None:
    assert command("chat", "tiny", stdin=f"{line}\n/jump\n") == (0, "", "")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/set temperature 0.5", "temp is 0.5."),
        ("/set\ttemp=0.5", "temp is 0.5."),
        ("/set --top-p 0.5", "top_p is 0.5."),
        ("/think_budget 5", "think_budget is 5."),
        ("/set stop END", "stop is END."),
        ("/set stop none", "stop is none."),
        ("/set temp = 0.5", "temp is 0.5."),
        ("/set system Be brief.", "The instructions are set."),
        ("/set system none", "There are no instructions now."),
        ("/set think on", "Reasoning is asked for."),
        ("/history off", "is not kept."),
        ("/set", "temp 0.6"),
        ("/set temp", "temp 0.6  Randomness; 0 takes the likeliest token. From 0 to 1000000."),
        ("/seed", "seed none  The same seed"),
        ("/set system", "system none  Instructions"),
        ("/help /undo", "/undo  forget the last question"),
        ("/new", "A new chat."),
        ("/?", "/help"),
        ("/Help", "/help"),
    ],
)
def test_commands_that_are_meant(command: Run, line: str, told: str) -> None:
    code, out, err = command("chat", "tiny", stdin=f"{line}\n")
    assert (code, out) == (0, "")
    assert told in err


def test_where_reasoning_has_no_switch_that_is_told(command: Run, tmp_path: Path) -> None:
    always = str(write_model("llama_a", tmp_path, ending="<think>"))
    for line in ("/think off", "/think on"):
        assert "no switch for reasoning" in command("chat", always, stdin=f"{line}\n")[2]
        assert "no switch" not in command("chat", "tiny", stdin=f"{line}\n")[2]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/set temp -1", 'temp takes a number from 0 to 1000000, not "-1"'),
        ("/set top_p 2", 'top_p takes a number from 0 to 1, not "2"'),
        ("/set colour=3", "there is no setting colour; there are system, think, history, "),
        ("/set ram 4GB", "--ram is given where a chat begins; leave, and go on with numoe chat -c and that"),
        ("/set model tiny", "another model is chosen with /model NAME"),
        ("/set history maybe", 'history takes on or off, not "maybe"'),
    ],
)
def test_settings_that_are_refused_say_what_is_allowed(command: Run, line: str, told: str) -> None:
    code, _, err = command("chat", "tiny", stdin=f"{line}\n")
    assert code == 2 and told in err


def test_chats_are_shown_exported_renamed_and_removed(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path))
    turns = (Turn("What is\nthis?", text="\n```py\n  x = 1\n```", finish_reason="stop"), Turn("And?", text="No."))
    for name in ("one", "two"):
        Chat("tiny", turns=turns).write(chat_path(name))
    lines = f"/transcript\n/export {tmp_path}/a.md\n/export {tmp_path}/a.json\n/rename three\n/delete two\n"
    code, out, err = command("chat", "--session", "one", stdin=lines)
    assert code == 0, err
    assert out == "> What is\nthis?\n\n```py\n  x = 1\n```\n> And?\nNo.\n"
    assert (
        (tmp_path / "a.md").read_text().startswith("# A chat with tiny\n\n## What is\n\nthis?\n\n```py\n  x = 1\n```\n")
    )
    assert Chat.read(tmp_path / "a.json").turns == turns
    assert [path.stem for path in (tmp_path / "chats").glob("*.json")] == ["three"]
    code, _, err = command("chat", "--session", "three", stdin=f"/export {tmp_path}/a.md\n")
    assert code == 1 and "is there already" in err
    code, _, err = command("chat", "--session", "three", stdin="/delete three\n")
    assert code == 1 and "/clear begins another" in err


def test_a_chat_that_goes_on_shows_its_last_exchange(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path))
    Chat("tiny", turns=(Turn("First?", text="One."), Turn("Last?", text="Two."))).write(chat_path("a"))
    screen = start("-c", answers=[]).screen
    assert "> Last?\nTwo.\n" in screen and "First?" not in screen


def test_a_chat_that_is_not_kept(start: Start, tmp_path: Path) -> None:
    chat = start("--no-save", answers=["Yes."])
    assert "Yes." in chat.ask("Really?")
    assert chat.send("/bye\r").left() == 0
    assert not (tmp_path / "history").exists() and not list(tmp_path.glob("chats/*"))


def test_a_chat_that_is_not_kept_from_here_on(start: Start, tmp_path: Path) -> None:
    chat = start("tiny", answers=["One.", "Two.", "Three."])
    chat.ask("first")
    assert "not kept" in chat.ask("/set history off", r"not kept.*\n>$")
    chat.ask("secret")
    assert questions(tmp_path) == ["first"]
    assert chat.send("/bye\r").left() == 0
    assert questions(tmp_path) == ["first"] and "secret" not in (tmp_path / "history").read_text()


def test_models_are_completed_and_wide_characters_kept_whole(start: Start, tmp_path: Path) -> None:
    (tmp_path / "models" / "some--tiny-moe-int8").mkdir(parents=True)
    (tmp_path / "羊の森").mkdir()
    table, text = "| 動物 | 脚 |\n|---|---|\n| 羊 | 四本 |\n| duck | 2 |", "羊は草を食べる" * 8
    chat = start("tiny", answers=[f"{table}\n\n{text}"], columns=40)
    for typed, shown in (("ti", "tiny"), ("so", "some/tiny-moe"), ("羊", "羊の森")):
        chat.clear()
        chat.send(f"/model {typed}").send("\t").wait(rf"/model {re.escape(shown)}$")
        chat.send("\x15")  # Ctrl-U
    lines = chat.ask("羊は？").splitlines()
    rows = [next(line for line in lines if line.split()[:1] == [first]) for first in ("動物", "羊", "duck")]
    assert [row.split()[1] for row in rows] == ["脚", "四本", "2"]
    assert len({cell_len(row.rpartition(" ")[0]) for row in rows}) == 1  # the second column stands below itself
    assert text in "".join(lines) and max(map(cell_len, lines)) <= 40
    chat.ask("/rename 羊", r"is kept as 羊\.\n>$")
    assert (tmp_path / "chats" / "羊.json").exists()
