"""The terminal: what goes to stdout and to stderr, exit codes, and one sentence for every error."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import tiny_tokenizer
from tiny import write_checkpoint

from numoe.cli.chat import Conversation
from numoe.cli.main import main
from numoe.cli.output import Output, print_error
from numoe.cli.reply import Interrupt, statistics, stream
from numoe.engine import load
from numoe.engine.chat import encode

VOCAB = {"llama_a": 90, "v4_a": 96}


def model_folder(folder: Path, case: str = "llama_a", **tokenizer: Any) -> str:
    write_checkpoint(case, folder)
    tiny_tokenizer(folder, VOCAB[case], **tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("llama"))


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def numoe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """numoe(*arguments, stdin=...) -> (exit code, stdout, stderr), within this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(*arguments: str, stdin: str | bytes = "") -> tuple[int, str, str]:
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        code = left.value.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 1, nothing on stdout, one line on stderr that holds the words."""
    code, out, err = result
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err


# ------------------------------------------------------------------------------------------------ starting


def test_help_imports_nothing_heavy() -> None:
    heavy = ("numpy", "rich", "prompt_toolkit", "tokenizers", "jinja2", "psutil", "huggingface_hub")
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


def test_version(numoe: Run) -> None:
    from importlib.metadata import version

    assert numoe("--version") == (0, f"numoe {version('numoe')}\n", "")


@pytest.mark.parametrize("command", ["run", "chat", "show"])
def test_every_command_has_help(numoe: Run, command: str) -> None:
    code, out, _ = numoe(command, "--help")
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
def test_wrong_usage_is_exit_code_2(numoe: Run, arguments: list[str]) -> None:
    code, out, err = numoe(*arguments)
    assert (code, out) == (2, "")
    assert "Error: " in err


# ----------------------------------------------------------------------------------------------------- run


def test_stdout_is_the_answer_alone(numoe: Run, model: str) -> None:
    code, out, err = numoe("run", model, "hello", "-n", "6")
    assert code == 0
    assert out.endswith("\n") and len(out.rstrip("\n")) >= 1
    assert out.count("\n") <= 6
    assert "6 tokens" in err
    assert numoe("run", model, "-p", "hello", "-n", "6", "-q") == (0, out, "")


def test_prompt_from_argument_option_and_pipe_are_the_same(numoe: Run, model: str) -> None:
    options = ("-n", "8", "-q")
    both = numoe("run", model, "-p", "sum up:\n\nsome text", *options)
    assert numoe("run", model, "sum up:", *options, stdin="some text\n") == both
    assert numoe("run", model, *options, stdin="sum up:\n\nsome text\n") == both
    assert numoe("run", model, "sum up:", *options) != both


def test_json_document(numoe: Run, model: str) -> None:
    code, out, _ = numoe("run", model, "hi", "-n", "5", "--json", "--seed", "7", "--logprobs", "2")
    document = json.loads(out)
    assert code == 0
    text = numoe("run", model, "hi", "-n", "5")[1]
    assert document["text"].rstrip("\n") + "\n" == text
    assert document["model"] == model
    assert document["finish_reason"] == "length"
    assert document["prompt_tokens"] == 1 + len("user: hi\nassistant: ")
    assert document["completion_tokens"] == 5
    assert document["seed"] == 7
    assert document["thinking"] == ""
    assert document["experts"] == {}
    assert set(document["timings"]) == {"load_s", "prompt_s", "first_token_s", "decode_s"}
    assert [len(token["top"]) for token in document["logprobs"]] == [2] * 5
    for token in document["logprobs"]:  # greedy: the chosen token is the likeliest
        assert token["top"][0] == {key: token[key] for key in ("id", "token", "logprob")}
    assert "".join(token["token"] for token in document["logprobs"]) == document["text"]


def test_raw_skips_the_template(numoe: Run, model: str) -> None:
    code, out, _ = numoe("run", model, "--raw", "-p", "abc", "-n", "3", "--json")
    assert code == 0
    assert json.loads(out)["prompt_tokens"] == len("abc")


def test_system_comes_first(numoe: Run, model: str) -> None:
    _, out, _ = numoe("run", model, "hi", "-s", "be brief", "-n", "0", "--json")
    assert json.loads(out)["prompt_tokens"] == 1 + len("system: be brief\nuser: hi\nassistant: ")


def test_same_seed_same_text(numoe: Run, model: str) -> None:
    options = ("hi", "-n", "24", "-q", "--temp", "1.5")
    first = numoe("run", model, *options, "--seed", "3")
    assert numoe("run", model, *options, "--seed", "3") == first
    assert numoe("run", model, *options, "--seed", "4") != first


def test_stop_strings_end_the_text(numoe: Run, model: str) -> None:
    text = json.loads(numoe("run", model, "hi", "-n", "12", "--json")[1])["text"]
    stop = text[4:7]
    document = json.loads(numoe("run", model, "hi", "-n", "12", "--json", "--stop", "zzzz", "--stop", stop)[1])
    assert document["text"] == text[: text.index(stop)]
    assert document["finish_reason"] == "stop"


def test_reasoning_goes_to_stderr(numoe: Run, tmp_path: Path) -> None:
    model = model_folder(tmp_path, ending="<think>")
    document = json.loads(numoe("run", model, "hi", "-n", "9", "--json")[1])
    assert document["text"] == "" and document["thinking"]
    code, out, err = numoe("run", model, "hi", "-n", "9")
    assert (code, out) == (0, "\n")
    assert document["thinking"] in err
    assert numoe("run", model, "hi", "-n", "9", "-q") == (0, "\n", "")


# -------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("arguments", [[], ["-p", ""], ["-p", " \n"]])
def test_empty_prompt(numoe: Run, model: str, arguments: list[str]) -> None:
    refused(numoe("run", model, *arguments), "prompt is empty")


def test_prompt_longer_than_the_context(numoe: Run, model: str) -> None:
    refused(numoe("run", model, "a" * 50, "--ctx", "32"), "context", "32", "--ctx")
    refused(numoe("run", model, "a", "--ctx", "9999"), "--ctx 9999", "1024")


def test_piped_text_that_is_not_utf8(numoe: Run, model: str) -> None:
    refused(numoe("run", model, stdin=b"\xff\xfe"), "UTF-8")
    refused(numoe("chat", model, stdin=b"\xff\xfe\n"), "UTF-8")


@pytest.mark.parametrize("command", ["run", "chat", "show"])
def test_models_that_are_none(numoe: Run, tmp_path: Path, command: str) -> None:
    prompt = ["-p", "hi"] if command == "run" else []
    refused(numoe(command, str(tmp_path / "nowhere"), *prompt), "nowhere")
    refused(numoe(command, str(tmp_path), *prompt), "config.json")
    (tmp_path / "config.json").write_text('{"model_type": "sphinx"}')
    refused(numoe(command, str(tmp_path), *prompt), "sphinx", "deepseek_v4", "llama")


def test_model_without_template_advises_raw(numoe: Run, tmp_path: Path) -> None:
    model = model_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    refused(numoe("run", model, "hi"), "--raw")
    refused(numoe("chat", model), "--raw")
    assert numoe("run", model, "hi", "--raw", "-n", "1")[0] == 0


def test_tokens_of_another_model(numoe: Run, tmp_path: Path) -> None:
    write_checkpoint("llama_a", tmp_path)
    tiny_tokenizer(tmp_path, 128)
    refused(numoe("run", str(tmp_path), "--raw", "-p", "\xfc"), "token id")


def test_values_that_numoe_refuses(numoe: Run, model: str) -> None:
    refused(numoe("run", model, "hi", "--ram", "much"), "much", "16GB")
    refused(numoe("run", model, "hi", "--top-p", "0"), "top_p")
    refused(numoe("run", model, "hi", "--stop", ""), "stop string")


def test_a_bug_is_one_line_unless_debugging(numoe: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise IndexError("out")

    monkeypatch.setattr("numoe.engine.load", fail)
    monkeypatch.delenv("NUMOE_DEBUG", raising=False)
    refused(numoe("run", model, "hi"), "bug in numoe", "IndexError: out", "NUMOE_DEBUG")
    monkeypatch.setenv("NUMOE_DEBUG", "1")
    with pytest.raises(IndexError):
        numoe("run", model, "hi")


# ----------------------------------------------------------------------------------------------- processes


def process(*arguments: str, **options: Any) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "numoe.cli", *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("v4"), "v4_a")


def test_reader_that_leaves(slow_model: str) -> None:
    with process("run", slow_model, "--raw", "-p", "hi") as numoe:
        assert numoe.stdout and numoe.stderr
        assert len(numoe.stdout.read(5)) == 5
        numoe.stdout.close()
        assert numoe.wait() == 1
        assert numoe.stderr.read() == b""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_an_answer(slow_model: str, number: int, code: int) -> None:
    with process("run", slow_model, "--raw", "-p", "hi") as numoe:
        assert numoe.stdout and numoe.stderr
        begun = numoe.stdout.read(1)
        numoe.send_signal(number)
        rest, err = numoe.communicate()
        assert numoe.returncode == code
        assert begun and rest.endswith(b"\n")  # what came is there, and the line is ended
        assert b"Traceback" not in err


def test_narrow_encodings_do_not_stop_an_answer(model: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with process("run", model, "--raw", "-p", "hi", "--temp", "3", "-n", "80", "--seed", "1", env=environment) as numoe:
        out, err = numoe.communicate()
        assert (numoe.returncode, out.isascii()) == (0, True), err


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


HOSTILE = "a\x1b[31mb\x07\x9b2J\tc\r\n"


def test_control_characters_do_not_reach_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminals(monkeypatch)
    output = Output()
    output.answer(HOSTILE)
    output.end_answer()
    output.note(HOSTILE)
    output.table([(HOSTILE, "x")])
    print_error(HOSTILE)
    assert screen.out.getvalue().startswith("a[31mb2J\tc\n")
    for stream_ in (screen.out, screen.err):
        assert not set(stream_.getvalue().replace("\x1b[2m", "").replace("\x1b[0m", "")) & set("\x1b\x07\x9b\r")


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


# --------------------------------------------------------------------------------------------------- reply


class Pieces(list[str]):
    prompt = (1, 2, 3)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_reply_parts_however_cut(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\nfirst this\nthen that\n</think>\n\nAnswer:\n\nyes\n"
    generation: Any = Pieces(text[i : i + size] for i in range(0, len(text), size))
    reply = stream(generation, Output(), True)
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


# ---------------------------------------------------------------------------------------------------- chat


def test_piped_chat_is_one_turn_a_line(numoe: Run, model: str) -> None:
    options = ("-n", "4", "--temp", "0")
    code, out, err = numoe("chat", model, *options, "-q", stdin="hi\n\nand\n")
    assert (code, err) == (0, "")
    first = json.loads(numoe("run", model, "hi", "-n", "4", "--json")[1])["text"]
    told = f"<s>user: hi\nassistant: {first}\nuser: and\nassistant: "
    second = json.loads(numoe("run", model, "--raw", told, "-n", "4", "--json")[1])["text"]
    assert out == first.rstrip("\n") + "\n" + second.rstrip("\n") + "\n"


@pytest.mark.parametrize("case", ["llama_a", "v4_a"])
def test_reasoning_is_not_told_again(numoe: Run, tmp_path: Path, case: str) -> None:
    """The next turn goes back to before the reasoning, further than the caches of sliding windows reach."""
    model = model_folder(tmp_path, case, ending="<think>")
    options = ("-n", "100", "--temp", "0")
    told = "<s>user: hi\nassistant: \nuser: and\n<think>"
    fresh = json.loads(numoe("run", model, "--raw", told, "-n", "100", "--json")[1])["text"]
    _, out, err = numoe("chat", model, *options, stdin="hi\nand\n")
    assert out == "\n\n"
    assert fresh.strip("\n") in err


def test_chat_reads_only_what_is_new(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    session = load(model).session(200)
    read = []
    feed = session.feed
    monkeypatch.setattr(session, "feed", lambda ids, **options: read.append(len(ids)) or feed(ids, **options))
    conversation = Conversation(session, Output(), None, False, 5, (), {"temperature": 0.0})
    conversation.turn("hi")
    conversation.turn("and")
    # Four of the five answered tokens were fed back; the fifth comes with what follows.
    assert read == [1 + len("user: hi\nassistant: "), 1, 1, 1, 1, 1 + len("\nuser: and\nassistant: "), 1, 1, 1, 1]


def test_chat_commands(numoe: Run, model: str) -> None:
    lines = "/help\nhi\n/clear\nhi\n/system\n/system be\nhi\n/bye\nnever\n"
    code, out, err = numoe("chat", model, "-n", "3", "--temp", "0", stdin=lines)
    answer = numoe("run", model, "hi", "-n", "3", "-q")[1]
    instructed = numoe("run", model, "hi", "-s", "be", "-n", "3", "-q")[1]
    # /system be leaves the turn before it in place, so only the first two answers are those of a new conversation
    assert code == 0 and out.startswith(answer + answer)
    assert "/clear" in err and err.count("3 tokens") == 3
    code, out, _ = numoe("chat", model, "-n", "3", "--temp", "0", stdin="/system be\nhi")
    assert (code, out) == (0, instructed)
    refused(numoe("chat", model, stdin="/dance\n"), "/dance", "/help")


def test_chat_says_when_the_context_is_full(numoe: Run, model: str) -> None:
    code, out, err = numoe("chat", model, "--ctx", "40", "-q", stdin="hi\nmore of it\n")
    assert code == 1
    assert out.count("\n") >= 1
    assert "40" in err and "/clear" in err and "--ctx" in err
    assert "The context is full" in numoe("chat", model, "--ctx", "40", stdin="hi\n")[2]


# ---------------------------------------------------------------------------------------------------- show


def test_show(numoe: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = numoe("show", model)
    assert (code, err) == (0, "")
    assert "llama" in out and "4 full" in out and "4 dense" in out and "148.9 k active" in out
    assert all(line == line.rstrip() and len(line) <= 80 for line in out.splitlines())
    monkeypatch.setenv("COLUMNS", "40")
    assert all(len(line) <= 40 for line in numoe("show", model)[1].splitlines())


def test_show_reads_no_weights(numoe: Run, slow_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numoe.quant.checkpoint.Checkpoint.array", None)
    monkeypatch.setattr("numoe.quant.checkpoint.Checkpoint.matrix", None)
    code, out, _ = numoe("show", slow_model, "--json", "--ctx", "100")
    assert code == 0
    document = json.loads(out)
    config = json.loads(Path(slow_model, "config.json").read_text())
    assert document["family"] == "deepseek_v4"
    assert sum(document["attention"].values()) == document["layers"] == config["num_hidden_layers"]
    assert set(document["attention"]) == {"sliding", "CSA", "HCA"}
    assert document["ffn"]["hash-routed"] >= 1
    assert document["weight_bytes"] == sum(entry["bytes"] for entry in document["weights"])
    assert document["weight_bytes"] >= 4 * document["parameters"]  # this checkpoint is stored in float32
    assert document["active_parameters"] < document["parameters"]
    assert document["kv_bytes"]["100"] > 0
    assert document["tokenizer"] and document["chat_format"]
