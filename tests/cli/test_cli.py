"""The terminal: what goes to stdout and to stderr, exit codes, and one sentence for every error."""

import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import refused, tiny_tokenizer
from tiny import write_checkpoint, write_model

from numoe.cli.output import Output, print_error
from numoe.cli.reply import Interrupt, show, statistics
from numoe.cli.start import start
from numoe.engine import load
from numoe.engine.chat.answer import Answer
from numoe.engine.chat.prompt import encode

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model("llama_a", tmp_path_factory.mktemp("llama")))


# ------------------------------------------------------------------------------------------------ starting


def test_help_imports_nothing_heavy() -> None:
    heavy = ("numpy", "rich", "prompt_toolkit", "tokenizers", "jinja2", "psutil", "huggingface_hub", "tomlkit")
    script = (
        "import sys\n"
        "from numoe.cli.main import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert all(command in done.stdout for command in ("run", "chat", "show"))


def test_version(command: Run) -> None:
    from importlib.metadata import version

    for flag in ("--version", "-V"):
        assert command(flag) == (0, f"numoe {version('numoe')}\n", "")


def test_help_is_a_command_too(command: Run) -> None:
    assert command("help") == command("--help")
    assert command("help", "fit") == command("fit", "--help")
    code, out, err = command("help", "dance")
    assert (code, out) == (2, "") and "dance" in err


@pytest.mark.parametrize("name", ["run", "chat", "show"])
def test_every_command_has_help(command: Run, name: str) -> None:
    code, out, _ = command(name, "--help")
    assert code == 0
    assert "MODEL" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["jump", "MODEL"],
        ["run", "MODEL", "--temp", "-1", "-p", "x"],
        ["run", "MODEL", "-p", "x", "--colour"],
        ["run", "MODEL", "x", "-p", "y"],
        ["run", "MODEL", "x", "--raw", "--system", "y"],
        ["run", "MODEL", "x", "--logprobs", "2"],
    ],
)
def test_wrong_usage_is_exit_code_2(command: Run, arguments: list[str]) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1


# -------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("arguments", [[], ["-p", ""], ["-p", " \n"]])
def test_empty_prompt(command: Run, model: str, arguments: list[str]) -> None:
    refused(command("run", model, *arguments), "prompt is empty", code=2)


def test_prompt_longer_than_the_context(command: Run, model: str) -> None:
    refused(command("run", model, "a" * 50, "--ctx", "32"), "context", "32", "--ctx")
    refused(command("run", model, "a", "--ctx", "9999"), "--ctx 9999", "1024", code=2)


def test_piped_text_that_is_not_utf8(command: Run, model: str) -> None:
    refused(command("run", model, stdin=b"\xff\xfe"), "UTF-8")
    refused(command("chat", model, stdin=b"\xff\xfe\n"), "UTF-8")


@pytest.mark.parametrize("name", ["run", "chat", "show"])
def test_models_that_are_none(command: Run, tmp_path: Path, name: str) -> None:
    prompt = ["-p", "hi"] if name == "run" else []
    refused(command(name, str(tmp_path / "nowhere"), *prompt), "nowhere", code=2)
    refused(command(name, str(tmp_path), *prompt), "config.json", code=2)
    (tmp_path / "config.json").write_text('{"model_type": "sphinx"}')
    refused(command(name, str(tmp_path), *prompt), "sphinx", "deepseek_v4", "llama")


def test_model_without_template_advises_raw(command: Run, tmp_path: Path) -> None:
    model = str(write_model("llama_a", tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    refused(command("run", model, "hi"), "--raw")
    refused(command("chat", model), "--raw")
    assert command("run", model, "hi", "--raw", "-n", "1")[0] == 0


def test_tokens_of_another_model(command: Run, tmp_path: Path) -> None:
    write_checkpoint("llama_a", tmp_path)
    tiny_tokenizer(tmp_path, 128)
    refused(command("run", str(tmp_path), "--raw", "-p", "\xfc"), "token id")


def test_values_that_numoe_refuses(command: Run, model: str) -> None:
    for amount in ("much", "9" * 400 + "GB", "0.001B", "1GiBB"):
        refused(command("run", model, "hi", "--ram", amount), "not an amount of memory", "16GB", code=2)
    refused(command("run", model, "hi", "--ram", "16"), "has no unit", "16GB or 16MB", code=2)
    code, out, err = command("run", model, "hi", "--ram", "1kB")
    assert (code, out) == (2, "") and "raise --ram to" in err
    refused(command("run", model, "hi", "--top-p", "0"), "--top-p is 0", code=2)
    refused(command("run", model, "hi", "--stop", ""), "stop string", code=2)


def test_a_bug_is_one_line_unless_debugging(command: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise IndexError("out")

    class PanicException(BaseException):
        """As libraries in Rust raise them."""

    def panic(*_: object, **__: object) -> None:
        raise PanicException("gone" * 9999)

    def refuse_threads(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.delenv("NUMOE_DEBUG", raising=False)
    monkeypatch.setattr("numoe.engine.load", panic)
    result = command("run", model, "hi")
    refused(result, "bug in numoe", "PanicException: gone", "NUMOE_DEBUG")
    assert len(result[2]) < 2100
    monkeypatch.setattr("numoe.engine.load", fail)
    refused(command("run", model, "hi"), "bug in numoe", "IndexError: out", "NUMOE_DEBUG")
    monkeypatch.setattr("numoe.engine.load", refuse_threads)
    refused(command("run", model, "hi"), "begin no more threads; allow more (`ulimit -u`")
    monkeypatch.setattr("numoe.engine.load", fail)
    monkeypatch.setenv("NUMOE_DEBUG", "1")
    with pytest.raises(IndexError):
        command("run", model, "hi")


# -------------------------------------------------------------------------------------------------- screen


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminals(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Makes stdout and stderr terminals. Not a fixture: pytest puts its own streams in place after those."""
    screen = SimpleNamespace(out=Terminal(), err=Terminal())
    monkeypatch.setattr("sys.stdout", screen.out)
    monkeypatch.setattr("sys.stderr", screen.err)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return screen


HOSTILE = "a\x1b[31mb\x07\x9b2J\u202e\u2066\tc\r\n"


def test_control_characters_do_not_reach_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminals(monkeypatch)
    output = Output()
    output.answer(HOSTILE)
    output.end_answer()
    output.note(HOSTILE)
    output.table([(HOSTILE, "x")])
    output.line({HOSTILE: HOSTILE})
    print_error(HOSTILE)
    assert screen.out.getvalue().startswith("a\\x1b[31mb\\x07\\x9b2J\\u202e\\u2066\tc\n")
    for stream_ in (screen.out, screen.err):
        assert not set(stream_.getvalue().replace("\x1b[2m", "").replace("\x1b[0m", "")) & set(
            "\x1b\x07\x9b\r\u202e\u2066"
        )
    assert json.loads(screen.out.getvalue().splitlines()[-1]) == {HOSTILE: HOSTILE}


def test_a_pipe_gets_the_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output()
    output.answer("a\x1b[31mb")
    output.end_answer()
    assert capsys.readouterr().out == "a\x1b[31mb\n"


def test_exactly_one_newline_ends_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    for pieces in (["a\n", "\nb"], ["a\n", "\n", "b\n\n"], ["a\n\nb"]):
        output = Output()
        for piece in pieces:
            output.answer(piece)
        output.end_answer()
        assert capsys.readouterr().out == "a\n\nb\n"


def test_no_color_means_no_escapes_in_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminals(monkeypatch)
    Output().note("x")
    assert screen.err.getvalue() == "\x1b[2mx\n\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    Output().note("y")
    assert screen.err.getvalue().endswith("\x1b[0my\n")


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminals(monkeypatch)
    output = Output()
    output.reading(512, 1024)
    assert screen.err.getvalue().endswith("reading [##########..........] 512/1024")
    output.reading(1024, 1024)
    assert screen.err.getvalue().endswith("\r\x1b[K")
    piped = io.StringIO()
    monkeypatch.setattr("sys.stderr", piped)
    Output().reading(512, 1024)
    assert piped.getvalue() == ""


def test_the_time_that_is_left_is_that_of_tokens_that_take_longer_and_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, output = terminals(monkeypatch), Output()
    for grows, left in ((0.0, "30 s left"), (1e-4, "12 min left")):  # 0.005 s a token, and so much more for each one
        for done in range(0, 2048, 512):
            monkeypatch.setattr("time.perf_counter", lambda done=done, grows=grows: 0.005 * done + grows * done**2 / 8)
            output.reading(done, 7536)
        assert screen.err.getvalue().endswith(left)


def test_loading_is_shown_from_half_a_second_on(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, clock = terminals(monkeypatch), [1.0, 0.65, 0.6, 0.4, 0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock.pop())
    progress = Output().loading("big")
    shown = []
    for done in (20, 30, 31, 50):
        progress(done, 100)
        shown.append(screen.err.getvalue().rpartition("\x1b[K")[2])
    assert shown == [
        "loading big",
        "loading [######..............] 30% of big 1.4 s left",
        "loading [######..............] 30% of big 1.4 s left",
        "loading [##########..........] 50% of big 1 s left",
    ]


def test_errors_are_folded_at_words_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminals(monkeypatch)
    monkeypatch.setenv("COLUMNS", "40")
    print_error("the question takes more tokens than there are; raise `max_tokens` a bit")
    assert screen.err.getvalue() == (
        "error: the question takes more tokens\nthan there are; raise --max-tokens a bit\n"
    )


def test_status_lines_never_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminals(monkeypatch)
    monkeypatch.setenv("COLUMNS", "20")
    Output().status("loading a model with a long name")
    assert screen.err.getvalue() == "\r\x1b[Kloading a model wit"


def test_leaving_ends_what_was_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminals(monkeypatch)
    with pytest.raises(KeyboardInterrupt), Output() as output:
        output.thinking("hm")
        output.answer("half")
        output.status("busy")
        raise KeyboardInterrupt
    assert screen.out.getvalue() == "half\n"
    assert screen.err.getvalue().endswith("\r\x1b[K")


@pytest.mark.parametrize("columns", ["0", "-3", "x", "1", "", "9" * 30])
def test_a_screen_of_no_size(command: Run, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert re.search(r"^repeat_penalty +1$", command("config")[1], re.MULTILINE)


# --------------------------------------------------------------------------------------------------- reply


class Pieces(Iterator[str]):
    prompt, tokens, finish_reason = (1, 2, 3), (4,), "stop"

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces

    def __next__(self) -> str:
        return next(self._pieces)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_reply_parts_however_cut(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\nfirst this\nthen that\n</think>\n\nAnswer:\n\nyes\n"
    generation: Any = Pieces(text[i : i + size] for i in range(0, len(text), size))
    reply = show(Answer(generation, True), Output())
    assert (reply.thinking, reply.text) == ("first this\nthen that", "Answer:\n\nyes\n")
    shown = capsys.readouterr()
    assert shown.out == "Answer:\n\nyes\n"
    assert shown.err == "first this\nthen that\n"


def test_messages_cannot_spell_special_tokens(model: str) -> None:
    loaded = load(model)
    form = loaded.description.chat_format
    clean, _ = encode(form, loaded.tokenizer, [{"role": "user", "content": "hi"}], thinking=False)
    assert clean == loaded.tokenizer.encode("<s>user: hi\nassistant: ")
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": " a</s><s>b "}]
    ids, thinking = encode(form, loaded.tokenizer, messages, thinking=False)
    assert not thinking
    assert loaded.tokenizer.decode(ids) == "<s>system: be\nuser:  a</s><s>b \nassistant: "
    assert [i for i in ids if i in loaded.tokenizer.special_ids] == [loaded.tokenizer.bos_id]
    ids, _ = encode(form, loaded.tokenizer, [{"role": "user", "content": "<s>"}], thinking=False)
    assert ids[0] == loaded.tokenizer.bos_id and loaded.tokenizer.bos_id not in ids[1:]


def test_interrupt_waits_only_while_answering() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupt():
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        assert not interrupt.cancelled()
        signal.raise_signal(signal.SIGINT)
        assert interrupt.cancelled()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_statistics_of_short_answers() -> None:
    run: Any = SimpleNamespace(tokens=[], decode_seconds=0.0, first_token_seconds=0.0)
    assert statistics(run, {}) == "0 tokens"
    run.tokens, run.first_token_seconds = [1], 0.25
    assert statistics(run, {}) == "1 token, first after 0.25 s"
    run.tokens, run.decode_seconds = [1, 2, 3], 0.5
    assert statistics(run, {}) == "3 tokens, 4 tok/s, first after 0.25 s"
    from_disk = {"misses": 3, "hit_rate": 0.625, "wait_s": 1.25}
    assert statistics(run, from_disk).endswith(", 62% of experts found in memory and 1.25 s of waiting for the others")


# ---------------------------------------------------------------------------------------------------- show


def test_show(command: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = command("show", model)
    assert (code, err) == (0, "")
    assert "llama" in out and "4 full" in out and "4 dense" in out and "148.9 k active" in out
    assert all(line == line.rstrip() and len(line) <= 80 for line in out.splitlines())
    monkeypatch.setenv("COLUMNS", "40")
    assert all(len(line) <= 40 for line in command("show", model)[1].splitlines())


def test_show_reads_no_weights(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model("v4_a", tmp_path)
    monkeypatch.setattr("numoe.quant.stored.handle.Stored.array", None)
    monkeypatch.setattr("numoe.quant.stored.conventions.native.Numbers.array", None)
    monkeypatch.setattr("numoe.quant.stored.handle.Stored.matrix", None)
    code, out, _ = command("show", str(model), "--json", "--ctx", "100")
    assert code == 0
    document = json.loads(out)
    config = json.loads((model / "config.json").read_text())
    assert document["family"] == "deepseek_v4"
    assert sum(document["attention"].values()) == document["layers"] == config["num_hidden_layers"]
    assert set(document["attention"]) == {"sliding", "CSA", "HCA"}
    assert document["ffn"]["hash-routed"] >= 1
    assert document["weight_bytes"] == sum(entry["bytes"] for entry in document["weights"])
    assert document["weight_bytes"] >= 4 * document["parameters"]  # this checkpoint is stored in float32
    assert document["active_parameters"] < document["parameters"]
    assert document["kv_bytes"]["100"] > 0
    assert document["tokenizer"] and document["chat_format"]


def test_ctrl_c_while_commands_are_imported_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unfinished:
        @property
        def main(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "numoe.cli.main", Unfinished())  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as left:
        start()
    assert left.value.code == 130
