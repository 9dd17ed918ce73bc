"""`numoe chat` on a terminal: what a person types, and what the screen shows."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import tiny_tokenizer
from tiny import write_checkpoint

pexpect = pytest.importorskip("pexpect", exc_type=ImportError)
if not hasattr(pexpect, "spawn"):
    pytest.skip("pexpect has no pseudo-terminals here", allow_module_level=True)

PROMPT = r">[^\n]*?\x1b\[\?25h"  # drawn, and the cursor shown again


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that answers on and on, until its context of 4096 tokens is full."""
    folder = write_checkpoint("v4_a", tmp_path_factory.mktemp("v4"))
    tiny_tokenizer(folder, 96)
    return str(folder)


@pytest.fixture
def chat(model: str) -> Iterator["pexpect.spawn"]:
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", "PROMPT_TOOLKIT_NO_CPR": "1"}
    arguments = ["-m", "numoe.cli", "chat", model, "--temp", "0"]
    child = pexpect.spawn(sys.executable, arguments, env=environment, timeout=15, encoding="utf-8", dimensions=(24, 80))
    child.expect("/help lists the commands")
    child.expect(PROMPT)
    yield child
    child.close(force=True)


def left_with(chat: "pexpect.spawn") -> int:
    chat.expect(pexpect.EOF)
    chat.close()
    return chat.exitstatus


def interrupted(chat: "pexpect.spawn", question: str) -> None:
    """Ask, and press Ctrl-C when the answer has begun."""
    chat.send(question + "\r")
    chat.expect(r"\] 0/\d+\r\x1b\[K")  # the status line comes and goes
    chat.expect(r"[^\x1b\n]{12}")
    chat.sendintr()
    chat.expect(r"\d+ tokens?, ")
    chat.expect(PROMPT)


def test_two_turns_and_bye(chat: "pexpect.spawn") -> None:
    interrupted(chat, "hello")
    interrupted(chat, "and more")
    chat.send("/bye\r")
    assert left_with(chat) == 0


def test_ctrl_c_at_the_prompt_clears_the_line(chat: "pexpect.spawn") -> None:
    chat.send("never mind")
    chat.expect("never mind")
    chat.send("\x03")
    chat.expect(PROMPT)
    chat.send("\x03")
    chat.expect("Ctrl-D or /bye leaves.")
    chat.expect(PROMPT)
    chat.send("/jump\r")
    chat.expect("error: there is no command /jump; /help lists them")
    chat.expect(PROMPT)
    chat.send("\x04")
    assert left_with(chat) == 0


@pytest.mark.skipif(not hasattr(signal, "SIGTERM") or os.name == "nt", reason="POSIX signals")
def test_the_terminal_is_left_as_it_was(model: str, tmp_path: Path) -> None:
    """Ended by a signal at the prompt, where the terminal reads single keys, chat puts it back."""
    script = (
        "import os, subprocess, sys, termios\n"
        "before = termios.tcgetattr(0)\n"
        f"child = subprocess.Popen([sys.executable, '-m', 'numoe.cli', 'chat', {model!r}])\n"
        "print('pid', child.pid, flush=True)\n"
        "code = child.wait()\n"
        "print('code', code, 'same', termios.tcgetattr(0) == before, flush=True)\n"
    )
    environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    terminal = pexpect.spawn(sys.executable, ["-c", script], env=environment, timeout=15, encoding="utf-8")
    terminal.expect(r"pid (\d+)")
    child = int(terminal.match[1])
    terminal.expect("/help lists the commands")
    terminal.expect(PROMPT)
    os.kill(child, signal.SIGTERM)
    terminal.expect(r"code (-?\d+) same (\w+)")
    assert terminal.match.groups() == ("143", "True")
    assert "Traceback" not in (terminal.before or "")
    terminal.close(force=True)
