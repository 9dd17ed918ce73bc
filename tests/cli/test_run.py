"""`numoe run`: what goes in by arguments, files and pipes, what comes out, batches, and the settings beneath it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import MARKS, refused
from tiny import write_model

from numoe.cli.request import Request
from numoe.cli.text import whole_prompt
from numoe.engine import Model, describe
from numoe.engine.budget import Budget
from numoe.engine.layers.decoder import Decoder
from numoe.quant.errors import DoesNotFit
from numoe.quant.files import locked
from numoe.quant.stored.handle import Stored

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model("llama_a", tmp_path_factory.mktemp("llama"), marks=MARKS, eos=True))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose caches cannot go back far; no token ends its answers."""
    return str(write_model("v4_a", tmp_path_factory.mktemp("v4")))


def document(command: Run, *arguments: str, stdin: str | None = None) -> dict[str, Any]:
    code, out, err = command("run", *arguments, "--json", stdin=stdin)
    assert code == 0, err
    answer: dict[str, Any] = json.loads(out)
    return answer


# ------------------------------------------------------------------------------------------- prompts and answers


def test_stdout_is_the_answer_alone(command: Run, model: str) -> None:
    code, out, err = command("run", model, "hello", "-n", "6")
    assert code == 0
    assert out.endswith("\n") and len(out.rstrip("\n")) >= 1
    assert out.count("\n") <= 6
    assert "6 tokens" in err
    assert command("run", model, "-p", "hello", "-n", "6", "-q") == (0, out, "")


def test_what_had_to_be_guessed_is_told(command: Run, tmp_path: Path) -> None:
    folder = write_model("llama_a", tmp_path, marks=MARKS, eos=True)
    asked = ("hello", "-n", "6")
    code, out, err = command("run", str(folder), *asked)
    assert code == 0 and "GPT-2" not in err
    spec = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert command("run", str(folder), *asked, "-q") == (0, out, "")
    for arguments, stdin in ((("run", str(folder), *asked), None), (("chat", str(folder)), "hello\n")):
        code, _, err = command(*arguments, stdin=stdin)
        assert code == 0 and "is taken to be GPT-2's way" in err


def test_the_same_prompt_by_every_way(command: Run, model: str, tmp_path: Path) -> None:
    options = ("-n", "8", "-q")
    (tmp_path / "question").write_text("sum up:\n")
    (tmp_path / "all").write_bytes(b"\xef\xbb\xbfsome text\n\nsum up:")
    both = command("run", model, "-p", "some text\n\nsum up:", *options)
    assert command("run", model, "sum up:", *options, stdin="some text\n") == both
    assert command("run", model, "--prompt-file", str(tmp_path / "question"), *options, stdin="some text\n\n") == both
    assert command("run", model, *options, stdin="some text\n\nsum up:\n") == both
    assert command("run", model, "-", *options, stdin="some text\n\nsum up:\n") == both
    assert command("run", model, "--prompt-file", "-", *options, stdin="some text\n\nsum up:") == both
    assert command("run", model, "--prompt-file", str(tmp_path / "all"), *options) == both
    assert command("run", model, "sum up:", *options) != both


def test_a_closed_standard_input(command: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert command("run", model, "hi", "-n", "1")[0] == 0
    refused(command("run", model, "-"), "standard input is closed", code=2)


def test_files_come_before_the_prompt_with_their_names(command: Run, model: str, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"in {name}\n")
    a, b = (str(tmp_path / name) for name in ("a.txt", "b.txt"))
    given = document(command, model, "-f", a, "--file", b, "which?", "-n", "9", stdin="piped\n")
    assert (
        given["text"]
        == document(command, model, "-f", a, "-f", b, "-f", "-", "which?", "-n", "9", stdin="piped")["text"]
    )
    told = f"File {a}:\n\nin a.txt\n\nFile {b}:\n\nin b.txt\n\npiped\n\nwhich?"
    plain = document(command, model, told, "-n", "9")
    assert (given["text"], given["prompt_tokens"]) == (plain["text"], plain["prompt_tokens"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-f", "none.txt", "x"], ["none.txt", "No such file"]),
        (["--prompt-file", "bad.txt"], ["bad.txt", "not UTF-8"]),
        (["-f", "/dev/zero", "x"], ["/dev/zero", "MiB"]),
        (["--schema", "bad.json", "x"], ["bad.json", "not valid JSON"]),
        (["--schema", '{"type": ', "x"], ["--schema is not valid JSON"]),
        (["--schema", '{"a":' * 99_999, "x"], ["--schema is nested too deeply"]),
        (["x\udcff"], ["UTF-8"]),
        (["--system", "x\udcff", "x"], ["UTF-8"]),
        (["--stop", "x\udcff", "x"], ["UTF-8"]),
        (["--choices", "x\udcff", "x"], ["UTF-8"]),
        (["--regex", "x\udcff", "x"], ["UTF-8"]),
        (["--session", "x\udcff", "x"], ["cannot be the name of a chat"]),
        (["--session", "x" * 300, "x"], ["cannot be the name of a chat"]),
        (["-f", "x\udcff", "x"], ["No such file"]),
        (["--repeat-penalty", "1e-45", "x"], ["--repeat-penalty takes a number from 0.001 to 1000"]),
        (["--repeat-penalty", "inf", "x"], ["--repeat-penalty"]),
        (["--temp", "1e308", "x"], ["--temp"]),
        (["--seed", "1" * 21, "x"], ["seed"]),
        (["--ctx", "1" * 21, "x"], ["--ctx"]),
        (["--schema", '{"type": "objekt"}', "x"], ["JSON schema", "objekt"]),
        (["--regex", "a(", "x"], ["regular expression", "unclosed group"]),
        (["--choices", "a,,b", "x"], ["choice is empty"]),
        (["--session", "../x", "x"], ["../x"]),
    ],
)
def test_what_cannot_be_asked(
    command: Run, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("numoe.engine.load", None)  # it is known before the weights are read
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    (tmp_path / "bad.json").write_text("{")
    wrong = {"bad.txt", "bad.json", "/dev/zero"} & set(arguments) or arguments == ["x\udcff"]  # what a text holds
    refused(command("run", model, *arguments), *words, code=1 if wrong else 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["x", "--prompt-file", "y"],
        ["-", "-f", "-"],
        ["x", "--json", "--jsonl"],
        ["x", "--choices", "a,b", "--regex", "c"],
        ["x", "--raw", "--session", "y"],
        ["x", "--batch", "y"],
        ["x", "--out", "y"],
        ["x", "--threads", "100000"],
        ["x", "--temp", "nan"],
        ["x", "--top-p", "nan"],
        ["x", "--min-p", "inf"],
    ],
)
def test_options_that_exclude_each_other(command: Run, model: str, arguments: list[str]) -> None:
    code, out, err = command("run", model, *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ")


@pytest.mark.parametrize("ask", [("run", "-n", "1", "hi"), ("chat",), ("bench", "--prompt-tokens", "900")])
def test_a_context_without_room_is_refused_before_weights_are_read(
    ask: tuple[str, ...], command: Run, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stored, "matrix", lambda *_: pytest.fail("read"))
    ram = describe(model).plan(64).total_bytes
    name, *options = ask
    code, out, err = command(name, model, *options, "--ram", f"{ram}B", stdin="hi")
    assert (code, out) == (2, "") and "raise --ram to" in err


def test_json_document(command: Run, model: str) -> None:
    told = document(command, model, "hi", "-n", "5", "--seed", "7", "--logprobs", "2")
    text = command("run", model, "hi", "-n", "5")[1]
    assert told["text"].rstrip("\n") + "\n" == text
    assert told["model"] == model
    assert told["finish_reason"] == "length"
    assert told["prompt_tokens"] == 1 + len("user: hi\nassistant: ")
    assert (told["reused_tokens"], told["completion_tokens"], told["seed"]) == (0, 5, 7)
    assert told["thinking"] == ""
    assert told["experts"] == {}
    assert set(told["timings"]) == {"load_s", "prompt_s", "first_token_s", "decode_s", "drafts"}
    assert [len(token["top"]) for token in told["logprobs"]] == [2] * 5
    for token in told["logprobs"]:  # greedy: the chosen token is the likeliest
        assert token["top"][0] == {key: token[key] for key in ("id", "token", "logprob")}
    assert "".join(token["token"] for token in told["logprobs"]) == told["text"]


def test_json_lines_are_the_pieces_and_the_document(command: Run, tmp_path: Path) -> None:
    model = str(write_model("llama_a", tmp_path, ending="<think>"))
    options = ("run", model, "hi", "-n", "12", "--logprobs", "1", "--seed", "1")
    code, out, _ = command(*options, "--jsonl", "--temp", "0")
    *pieces, last = map(json.loads, out.splitlines())
    assert code == 0 and len(pieces) > 3
    assert "".join(piece["thinking"] for piece in pieces).rstrip("\n") == last["thinking"]
    whole = document(command, *options[1:])
    assert {**last, "timings": 0} == {**whole, "timings": 0}


def test_raw_skips_the_template(command: Run, model: str) -> None:
    assert document(command, model, "--raw", "-p", "abc", "-n", "3")["prompt_tokens"] == len("abc")


def test_system_comes_first(command: Run, model: str) -> None:
    told = document(command, model, "hi", "-s", "be brief", "-n", "0")
    assert told["prompt_tokens"] == 1 + len("system: be brief\nuser: hi\nassistant: ")


def test_same_seed_same_text(command: Run, model: str) -> None:
    options = ("hi", "-n", "24", "-q", "--temp", "1.5")
    first = command("run", model, *options, "--seed", "3")
    assert command("run", model, *options, "--seed", "3") == first
    assert command("run", model, *options, "--seed", "4") != first


def test_stop_strings_end_the_text(command: Run, model: str) -> None:
    text = document(command, model, "hi", "-n", "12")["text"]
    stop = text[4:7]
    told = document(command, model, "hi", "-n", "12", "--stop", "zzzz", "--stop", stop)
    assert told["text"] == text[: text.index(stop)]
    assert told["finish_reason"] == "stop"


def test_reasoning_reaches_stdout_only_when_asked_for(command: Run, tmp_path: Path) -> None:
    model = str(write_model("llama_a", tmp_path, ending="<think>"))
    told = document(command, model, "hi", "-n", "9")
    assert told["text"] == "" and told["thinking"]
    code, out, err = command("run", model, "hi", "-n", "9")
    assert (code, out) == (0, "\n")
    assert told["thinking"] in err and "no switch for reasoning" in err and "--think-budget 0" in err
    other = str(write_model("llama_a", tmp_path / "other", ending="{% if not enable_thinking %}<think>{% endif %}"))
    assert "no switch" not in command("run", other, "hi", "-n", "9")[2]
    assert command("run", model, "hi", "-n", "9", "-q") == (0, "\n", "")
    assert command("run", model, "hi", "-n", "9", "-q", "--show-thinking") == (0, f"<think>\n{told['thinking']}\n", "")
    closed = ("run", model, "hi", "-q", "--think-budget", "4", "--choices", "moo,baa")
    code, out, _ = command(*closed, "--show-thinking")
    assert code == 0
    assert out in [f"<think>\n{told['thinking'][:4]}\n</think>\n\n{choice}\n" for choice in ("moo", "baa")]
    assert command(*closed) == (0, out[-4:], "")


def test_answers_of_a_given_form(command: Run, model: str, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": [1, 2]}, "minItems": 3, "maxItems": 3}')
    for given in (str(schema), schema.read_text().replace("array", '"x"').replace('"x"', "array")):
        code, out, _ = command("run", model, "hi", "--schema", given, "--temp", "1")
        assert code == 0 and len(json.loads(out)) == 3 and set(json.loads(out)) <= {1, 2}
    assert command("run", model, "hi", "--choices", "moo, baa", "-q")[1] in ("moo\n", "baa\n")
    assert command("run", model, "hi", "--regex", "x{5}", "-q") == (0, "xxxxx\n", "")


def test_a_form_that_is_cut_off_has_its_own_exit_code(command: Run, model: str) -> None:
    assert command("run", model, "hi", "--regex", "x{5}", "-n", "3", "-q") == (3, "xxx\n", "")
    code, out, _ = command("run", model, "hi", "--regex", "x{5}", "-n", "3", "--json")
    assert code == 3 and json.loads(out)["finish_reason"] == "length"


def test_a_session_goes_on(command: Run, model: str, numoe_home: Path) -> None:
    options = ("--session", "talk", "--json")
    first = json.loads(command("run", model, "hi", "-n", "6", "--stop", "zzz", *options)[1])
    second = json.loads(command("run", model, "and", *options)[1])
    told = f"<s>user: hi\nassistant: {first['text']}\nuser: and\nassistant: "
    alone = document(command, model, "--raw", told, "-n", "6")
    assert second["text"] == alone["text"], "with the settings of the first"
    assert second["prompt_tokens"] == alone["prompt_tokens"]
    assert second["reused_tokens"] >= first["prompt_tokens"]
    kept = json.loads((numoe_home / "chats" / "talk.json").read_text())
    assert [turn["question"] for turn in kept["turns"]] == ["hi", "and"]


def test_a_session_is_answered_by_one_at_a_time(
    command: Run, model: str, numoe_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = [process("run", model, text, "-n", "2", "--session", "shared") for text in ("a", "b", "c")]
    for one in running:
        assert one.communicate()[0] and one.returncode == 0
    path = numoe_home / "chats" / "shared.json"
    assert sorted(turn["question"] for turn in json.loads(path.read_text())["turns"]) == ["a", "b", "c"]
    assert path.stat().st_mode & 0o077 == path.parent.stat().st_mode & 0o077 == 0
    monkeypatch.setattr("numoe.cli.asking._PATIENCE", 0)
    before = path.read_bytes()
    with locked(path, "it"):
        refused(command("run", model, "d", "--session", "shared"), 'the chat "shared" is in use by another process')
    assert path.read_bytes() == before


# -------------------------------------------------------------------------------------------------------- batches


def write_lines(path: Path, *lines: Any) -> str:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return str(path)


def without_times(out: str) -> list[dict[str, Any]]:
    return [{**json.loads(line), "timings": 0} for line in out.splitlines()]


@pytest.mark.parametrize("kind", ["model", "windowed"])
def test_a_batch_answers_each_as_if_alone(
    command: Run, request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    model = request.getfixturevalue(kind)
    long = "in a long text that all of them tell, " * 3
    file = write_lines(
        tmp_path / "batch",
        {"prompt": f"{long}who?", "max_tokens": 80},
        {"prompt": f"{long}what?", "id": "b"},
        {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}], "system": "not this"},
        {"prompt": f"{long}what?", "system": "be", "temp": 1, "seed": 4, "logprobs": 1},
        {"prompt": f"{long}why?", "choices": ["b", "c"]},
    )
    code, out, err = command("run", model, "--batch", file, "-n", "6", "--parallel", "1")
    assert code == 0 and "5 answers" in err
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["id"] for answer in answers] == [1, "b", 3, 4, 5]
    alone = [
        document(command, model, f"{long}who?", "-n", "80"),
        document(command, model, f"{long}what?", "-n", "6"),
        document(command, model, "hi", "-s", "be", "-n", "6"),
        document(
            command, model, f"{long}what?", "-s", "be", "--temp", "1", "--seed", "4", "-n", "6", "--logprobs", "1"
        ),
        document(command, model, f"{long}why?", "--choices", "b,c"),
    ]
    for answer, other in zip(answers, alone, strict=True):
        for key in ("text", "prompt_tokens", "completion_tokens", "finish_reason"):
            assert answer[key] == other[key]
    assert ("logprobs" in answers[3]) and "logprobs" not in answers[2]
    shared = len(f"<s>user: {long}wh") - 2
    assert [answer["reused_tokens"] for answer in answers] == [0, shared, 1, len("<s>system: be\nuser: ") - 2, 1]


def test_prompts_that_are_answered_together_are_answered_as_one_by_one(
    command: Run, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, each with an error of its own, in fewer passes."""
    prompts: list[dict[str, Any]] = [{"prompt": f"say {n} " * (n % 4 + 1), "max_tokens": 3 + n % 3} for n in range(9)]
    prompts[4] |= {"prompt": "long " * 300}
    file = write_lines(tmp_path / "batch", *prompts)
    widths: list[int] = []
    original = Decoder.forward_all

    def counted(decoder: Decoder, parts: Any, wanted: Any = "last") -> Any:
        widths.append(len(parts))
        return original(decoder, parts, wanted)

    monkeypatch.setattr(Decoder, "forward_all", counted)
    alone = command("run", model, "--batch", file, "-q", "--ctx", "256", "--seed", "1", "--parallel", "1")
    passes = len(widths)
    assert set(widths) == {1}
    widths.clear()
    together = command("run", model, "--batch", file, "-q", "--ctx", "256", "--seed", "1", "--parallel", "4")
    assert alone[0] == together[0] == 1
    for one, other in zip(without_times(alone[1]), without_times(together[1]), strict=True):
        assert one | {"reused_tokens": 0} == other | {"reused_tokens": 0} and ("error" in one) == (one["id"] == 5)
    assert max(widths) == 4 and len(widths) < passes / 2


def test_a_beginning_that_all_prompts_share_is_read_once(
    command: Run, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every prompt is cut into tokens once."""
    long = "a long story " * 9
    file = write_lines(tmp_path / "batch", *({"prompt": f"{long}{n}"} for n in range(6)))
    read: list[int] = []
    original = Decoder.forward_all

    def counted(decoder: Decoder, parts: Any, wanted: Any = "last") -> Any:
        read.append(sum(len(ids) for ids, _ in parts))
        return original(decoder, parts, wanted)

    monkeypatch.setattr(Decoder, "forward_all", counted)
    cut: list[Request] = []
    encoded = Request._encoded
    monkeypatch.setattr(Request, "_encoded", lambda self, *given: (cut.append(self), encoded(self, *given))[1])
    alone = command("run", model, "--batch", file, "-q", "-n", "4", "--ctx", "256", "--parallel", "1")
    assert sum(read) < 2 * len(long) and len(cut) == 6
    read.clear()
    together = command("run", model, "--batch", file, "-q", "-n", "4", "--ctx", "256")
    assert sum(read) < 2 * len(long) and len(cut) == 12
    texts = [[line["text"] for line in without_times(out)] for _, out, _ in (alone, together)]
    assert texts[0] == texts[1]
    reused = [line["reused_tokens"] for line in without_times(together[1])]
    assert min(reused) == max(reused) > len(long)


@pytest.mark.parametrize(("full", "sessions"), [(False, 4), (True, 2)])
def test_a_batch_has_more_sessions_where_no_expert_makes_room(
    command: Run, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool, sessions: int
) -> None:
    file = write_lines(tmp_path / "batch", *({"prompt": f"say {n}"} for n in range(6)))
    made: list[Model] = []
    original = Model.session

    def counted(self: Model, *given: Any, **options: Any) -> Any:
        made.append(self)
        return original(self, *given, **options)

    monkeypatch.setattr(Model, "session", counted)
    monkeypatch.setattr("numoe.cli.batch.PARALLEL", 2)
    monkeypatch.setattr("numoe.cli.batch.MANY", 4)
    if full:  # as where experts have all that nobody else does
        monkeypatch.setattr(Budget, "reserved", property(lambda budget: budget.total))
    assert command("run", model, "--batch", file, "-q", "-n", "3")[0] == 0
    assert len(made) == sessions


def test_there_are_as_many_sessions_as_there_is_memory_for(
    command: Run, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_lines(tmp_path / "batch", *({"prompt": f"say {n}"} for n in range(6)))
    made: list[int] = []
    original = Model.session

    def limited(self: Model, *given: Any, **options: Any) -> Any:
        if len(made) == 2:
            raise DoesNotFit("a context takes more than there is")
        made.append(1)
        return original(self, *given, **options)

    monkeypatch.setattr(Model, "session", limited)
    code, out, _ = command("run", model, "--batch", file, "-q", "-n", "3", "--parallel", "5")
    assert code == 0 and [json.loads(line)["id"] for line in out.splitlines()] == [1, 2, 3, 4, 5, 6]


def test_a_batch_goes_on_where_it_was(command: Run, model: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "batch", *({"prompt": f"say {n}"} for n in range(4)))
    out = tmp_path / "out"
    options = ("run", model, "--batch", file, "-n", "5", "--seed", "1", "--out", str(out), "-q")
    assert command(*options) == (0, "", "")
    whole = out.read_text()
    lines = whole.splitlines(keepends=True)
    for begun in (lines[0] + lines[1][:-1], lines[0] + lines[1][:9], lines[0][:60], lines[0][:3]):
        out.write_text(begun)
        assert command(*options) == (0, "", "")
        assert out.read_text().startswith(begun[: begun.rfind("\n") + 1])
        again = without_times(out.read_text())
        assert [a["text"] for a in again] == [a["text"] for a in without_times(whole)]
    finished = out.read_text()
    assert command(*options)[0] == 0
    assert out.read_text() == finished


class Batch:
    """`numoe run --batch` on a file of prompts; `out` is the file of answers."""

    def __init__(self, command: Run, model: str, folder: Path):
        self.command, self.model, self.folder, self.out = command, model, folder, folder / "out"

    def __call__(self, *lines: Any, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
        file = write_lines(self.folder / "batch", *lines)
        return self.command("run", self.model, "--batch", file, "-n", "3", "--out", str(self.out), *options)

    def answers(self) -> list[tuple[Any, str]]:
        """(id, text) of each."""
        lines = map(json.loads, self.out.read_text().splitlines())
        return [(line["id"], line.get("text", "failed")) for line in lines]


@pytest.fixture
def batch(command: Run, model: str, tmp_path: Path) -> Batch:
    return Batch(command, model, tmp_path)


def test_answers_belong_to_their_prompts_wherever_these_stand(batch: Batch) -> None:
    first, second, third = ({"prompt": f"say {n}"} for n in "abc")
    assert batch(third, first, options=("-q",)) == (0, "", "")
    (_, c), (_, a) = batch.answers()
    batch.out.chmod(0o640)
    code, out, err = batch(first, second, {**third, "id": "c"}, first)
    assert (code, out) == (0, "") and "has 2 of 4 answers" in err and "2 answers, of which 0 failed" in err
    (one, two, three, four) = batch.answers()
    assert (one, three, four) == ((1, a), ("c", c), (4, a)) and two[0] == 2
    assert batch.out.stat().st_mode & 0o777 == 0o640
    assert not list(batch.folder.glob("*.part"))


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ({"prompt": "say z"}, ()),
        ({"prompt": "say a", "temp": 0.5}, ()),
        ({"prompt": "say a", "stop": ["x"]}, ()),
        ({"prompt": "say a", "choices": ["x", "y"]}, ()),
        ({"prompt": "say a"}, ("--temp", "0.5")),
        ({"prompt": "say a"}, ("-s", "be")),
        ({"prompt": "say a"}, ("--raw",)),
    ],
)
def test_answers_to_what_is_asked_no_more_are_left_alone(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, line: dict[str, Any], options: tuple[str, ...]
) -> None:
    assert batch({"prompt": "say b"}, {"prompt": "say a"}, options=("-q",))[0] == 0
    before = batch.out.read_bytes()
    monkeypatch.setattr("numoe.engine.load", None)  # known before the weights are read
    result = batch({"prompt": "say b"}, line, options=options)
    refused(result, f"line {1 if options else 2}", "was another", "--out")
    assert batch.out.read_bytes() == before


def test_answers_of_another_model_are_left_alone(batch: Batch, windowed: str) -> None:
    """Also where other weights or another template took its place; one that was moved is the same."""
    moved = Path(shutil.copytree(batch.model, batch.folder / "moved"))
    assert batch({"prompt": "a"}, options=("-q",))[0] == 0
    before, batch.model = batch.out.read_bytes(), str(moved)
    assert batch({"prompt": "a"}, options=("-q",))[0] == 0 and batch.out.read_bytes() == before
    for name, old, new in (("tokenizer_config.json", b"\\n", b"\\n\\n"), ("model.safetensors", None, None)):
        data = (moved / name).read_bytes()
        (moved / name).write_bytes(data.replace(old, new) if old and new else data[:-4] + b"\0\0\0\0")
        refused(batch({"prompt": "a"}), "the model was another")
        (moved / name).write_bytes(data)
    batch.model = windowed
    refused(batch({"prompt": "a"}), "the model was another")
    assert batch.out.read_bytes() == before


def test_what_failed_is_asked_again(batch: Batch) -> None:
    lines = [{"prompt": "a" * 99}, {"prompt": "hi"}, {"prompt": "x", "regex": "x{9}"}]
    for _ in range(2):
        code, out, err = batch(*lines, options=("--ctx", "64"))
        assert (code, out) == (1, "") and "of which 1 failed" in err
        assert [text for _, text in batch.answers()][::2] == ["failed", "xxx"]
    assert batch(*lines)[0] == 3  # more context is no other setting, and the third answer is cut short still
    assert "failed" not in [text for _, text in batch.answers()]
    assert batch(*lines)[0] == 3 and [id_ for id_, _ in batch.answers()] == [1, 2, 3]
    lines[0] = {"prompt": "a"}
    batch.out.write_text(batch.out.read_text().replace('"text":', '"error": "x", "was":', 1))
    assert batch(*lines)[0] == 3  # a failure is no answer that could be lost


@pytest.mark.parametrize(
    "text", ["notes", "notes\n", '{"a": 1}', '{"key": "x"}', '{"key": "x", "id": 1}\n', "\n", "{}"]
)
def test_files_of_others_are_left_alone(batch: Batch, text: str) -> None:
    batch.out.write_text(text)
    refused(batch({"prompt": "a"}), "line 1 is not an answer", "--out")
    assert batch.out.read_text() == text
    batch.out.unlink()
    assert batch({"prompt": "a"}, options=("-q",))[0] == 0
    with batch.out.open("a") as file:
        file.write(text + "!")
    before = batch.out.read_text()
    refused(batch({"prompt": "a"}), "line 2 is not an answer", "--out")
    assert batch.out.read_text() == before


@pytest.mark.skipif(os.name == "nt", reason="devices, links and pipes as files")
def test_answers_go_to_a_file_of_their_own(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numoe.engine.load", None)
    os.mkfifo(batch.folder / "pipe")
    for name in ("/dev/full", "/dev/zero", "/dev/null", str(batch.folder / "pipe"), str(batch.folder)):
        batch.out = Path(name)
        refused(batch({"prompt": "a"}), "--out", "not an ordinary file", code=2)
    (batch.folder / "link").symlink_to(batch.folder / "batch")
    write_lines(batch.folder / "batch", {"prompt": "a"})
    (batch.folder / "twin").hardlink_to(batch.folder / "batch")
    for name in ("batch", "link", "twin", "../" + batch.folder.name + "/batch"):
        batch.out = batch.folder / name
        refused(batch({"prompt": "a"}), "the file of the prompts itself", code=2)
    batch.out = batch.folder / "nowhere" / "out"
    refused(batch({"prompt": "a"}), "nowhere", "make it first", code=2)
    with locked(batch.folder / "out", "it"):
        batch.out = batch.folder / "out"
        refused(batch({"prompt": "a"}), "the file of answers", "in use by another process")


@pytest.mark.skipif(os.name == "nt", reason="names are bytes")
def test_a_file_of_answers_may_have_any_name_and_ids_any_text(batch: Batch) -> None:
    batch.out = batch.folder / os.fsdecode(b"caf\xe9")
    lines = [{"prompt": "a", "id": "\ud800"}, {"prompt": "b", "id": 10**4000}, {"prompt": "c", "id": None}]
    assert batch(*lines, options=("-q",)) == (0, "", "")
    before = batch.out.read_bytes()
    assert before.isascii() and [id_ for id_, _ in batch.answers()] == ["\ud800", 10**4000, None]
    assert batch(*lines, options=("-q",)) == (0, "", "") and batch.out.read_bytes() == before
    assert batch({"prompt": "\ud800"}, options=("-q",))[0] == 1  # which is no text


def test_a_prompt_that_fails_does_not_end_a_batch(command: Run, model: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "batch", {"prompt": "a" * 99}, {"prompt": "hi", "regex": "x{9}", "max_tokens": 2})
    code, out, err = command("run", model, "--batch", file, "--ctx", "64")
    first, second = map(json.loads, out.splitlines())
    assert (code, set(first)) == (1, {"key", "id", "model", "error"})
    assert first["model"] == second["model"] == model
    assert "64" in first["error"] and second["text"] == "xx"
    assert "2 answers, of which 1 failed" in err
    file = write_lines(tmp_path / "batch", {"prompt": "hi", "regex": "x{9}", "max_tokens": 2})
    assert command("run", model, "--batch", file)[0] == 3


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["not valid JSON"]),
        ("[" * 100_000, ["nested too deeply"]),
        ('{"prompt": "x", "id": ' + "1" * 5000 + "}", ["not valid JSON"]),
        ('{"prompt": "x", "id": NaN}', ["NaN"]),
        ('{"prompt": "x", "temp": -Infinity}', ["Infinity"]),
        ('{"prompt": null}', ['"prompt" must be a text']),
        ('{"messages": null}', ['"messages"']),
        ('{"prompt": "x", "seed": 100000000000000000000}', ["seed"]),
        ('{"prompt": "x", "temp": 1' + "0" * 400 + "}", ["temp"]),
        ('{"prompt": "x", "stop": ["\\ud800"]}', ["not UTF-8"]),
        ("[]", ['"prompt" or "messages"']),
        ('{"prompt": "x", "messages": []}', ['"prompt" or "messages"']),
        ('{"prompt": " "}', ['"prompt"']),
        ('{"messages": []}', ['"messages"']),
        ('{"messages": [{"role": "user"}]}', ["content"]),
        ('{"prompt": "x", "tmep": 1}', ["tmep", "temp"]),
        ('{"prompt": "x", "temp": "hot"}', ["temp", '"hot"']),
        ('{"prompt": "x", "top_k": true}', ["top_k", "true"]),
        ('{"prompt": "x", "max_tokens": -1}', ["max_tokens", "-1"]),
        ('{"prompt": "x", "top_p": 2}', ["top_p"]),
        ('{"prompt": "x", "choices": ["a", 1]}', ["choices"]),
        ('{"prompt": "x", "schema": {"type": "y"}}', ["schema"]),
    ],
)
def test_lines_that_are_no_prompts(
    command: Run, model: str, monkeypatch: pytest.MonkeyPatch, line: str, words: list[str]
) -> None:
    monkeypatch.setattr("numoe.engine.load", None)
    refused(command("run", model, "--batch", "-", stdin=f'\ufeff{{"prompt": "x"}}\n{line}\n'), "line 2", *words)


def test_an_empty_batch(command: Run, model: str) -> None:
    refused(command("run", model, "--batch", "-", stdin="\n"), "standard input is empty")


# ------------------------------------------------------------------------------------------------------- settings


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the settings, in a NUMOE_HOME of its own."""
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path))
    return tmp_path / "config.toml"


def test_flags_go_before_variables_and_these_before_the_file(
    command: Run, model: str, settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.write_text("max_tokens = 2  # few\nquiet = true\n")
    assert document(command, model, "hi")["completion_tokens"] == 2
    assert command("run", model, "hi")[2] == ""
    monkeypatch.setenv("NUMOE_MAX_TOKENS", "3")
    assert document(command, model, "hi")["completion_tokens"] == 3
    assert document(command, model, "hi", "-n", "4")["completion_tokens"] == 4


def test_settings_are_set_shown_and_unset(command: Run, settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.write_text("# mine\nquiet = true\n")
    monkeypatch.setenv("COLUMNS", "200")
    assert command("config", "set", "max-tokens", "7") == (0, "", "max_tokens is 7\n")
    assert command("config", "set", "temp", "0.5") == (0, "", "temp is 0.5\n")
    assert settings.read_text() == "# mine\nquiet = true\nmax_tokens = 7\ntemp = 0.5\n"
    monkeypatch.setenv("NUMOE_TEMP", "1.5")
    code, out, err = command("config")
    shown = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert code == 0 and str(settings) in err
    assert shown["max_tokens"] == ["7", str(settings)]
    assert shown["temp"] == ["1.5", "NUMOE_TEMP"]
    assert shown["quiet"] == ["true", str(settings)]
    assert shown["top_p"] == ["1", "(run", "serve),", "0.95", "(chat)"]
    assert shown["seed"] == ["-"]
    assert command("config", "unset", "max-tokens") == (0, "", "max_tokens is not set any more\n")
    assert settings.read_text() == "# mine\nquiet = true\ntemp = 0.5\n"
    refused(command("config", "unset", "max_tokens"), "max_tokens", code=2)


def test_keys_are_not_shown(command: Run, settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*arguments: str) -> str:
        code, out, err = command("config", *arguments)
        assert "s3cret" not in out + err and code in (0, 2)
        return out + err

    assert "api_key is (set, and not shown)" in told("set", "api-key", "s3cret")
    assert 'api_key = "s3cret"' in settings.read_text() and settings.stat().st_mode & 0o77 == 0
    assert told("get", "api_key") == "(set, and not shown)\n"
    assert re.search(r"api_key +\(set, and not shown\) +/", told())
    monkeypatch.setenv("NUMOE_API_KEY", "s3cret-too")
    assert re.search(r"api_key +\(set, and not shown\) +NUMOE_API_KEY", told())
    for value in ("s3cret\udcff", "s3cret"):
        monkeypatch.delenv("NUMOE_API_KEY", raising=False)
        told("set", "api_key", value)
    assert told("set", "api_key", "@/run/key").endswith("api_key is @/run/key\n")  # the key is not in the name
    settings.write_text('api_key = ["s3cret"]')
    assert "api_key takes a text, not what is given" in command("config")[2]
    assert "s3cret" not in command("config")[2] + command("serve", "tiny")[2]


def test_the_first_setting_makes_the_file(command: Run, settings: Path) -> None:
    assert command("config", "set", "system", 'say "hi"') == (0, "", 'system is say "hi"\n')
    assert settings.read_text() == 'system = "say \\"hi\\""\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tmep = 1", ["tmep", "temp"]),
        ('temp = "hot"', ["temp", "a number"]),
        ("think = 1", ["think", "true or false"]),
        ("max_tokens = 1.5", ["max_tokens", "whole number"]),
        ("temp 1", ["not valid TOML"]),
    ],
)
def test_settings_that_are_wrong_are_named(
    command: Run, model: str, settings: Path, text: str, words: list[str]
) -> None:
    settings.write_text(text + "\n")
    refused(command("run", model, "hi"), "config.toml", *words, code=1 if "TOML" in words[0] else 2)
    code, out, err = command("config")  # shows the others all the same
    assert code == 1 and "\nseed" in out and "config.toml" in err and all(word in err for word in words)
    assert command("run", "--help")[0] == 0
    assert command("list")[0] == 0
    assert command("config", "--help")[0] == 0


@pytest.mark.skipif(os.name == "nt", reason="devices and links as files")
@pytest.mark.parametrize("text", ["[" * 9999, b"\xff", "temp = " + "1" * 5000, "/dev/zero"], ids=lambda text: text[:5])
def test_settings_that_cannot_be_read(command: Run, model: str, settings: Path, text: str | bytes) -> None:
    if text == "/dev/zero":
        settings.symlink_to(text)
    else:
        settings.write_bytes(text if isinstance(text, bytes) else text.encode())
    for arguments in (("run", model, "hi"), ("config", "set", "temp", "1")):
        refused(command(*arguments), "config.toml", "remove it")
    assert command("config")[0] == 1 and command("list")[0] == 0
    assert not list(settings.parent.glob("*.part"))


def test_settings_of_editors_that_mark_the_text(command: Run, settings: Path) -> None:
    settings.write_bytes(b"\xef\xbb\xbf# mine\nquiet = true\n")
    assert command("config", "set", "temp", "1") == (0, "", "temp is 1\n")
    assert settings.read_text() == "# mine\nquiet = true\ntemp = 1.0\n"
    refused(command("config", "set", "system", "\udcff"), "not UTF-8", code=2)


def test_settings_that_are_set_at_once_are_all_kept(settings: Path) -> None:
    names = ["temp", "top_p", "min_p", "repeat_penalty"]
    for running in [process("config", "set", name, "1") for name in names]:
        assert running.wait() == 0
        assert running.communicate()[0] == b""
    assert sorted(settings.read_text().splitlines()) == sorted(f"{name} = 1.0" for name in names)


def test_values_that_settings_cannot_have(
    command: Run, model: str, settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(command("config", "set", "tmep", "1"), "tmep", code=2)
    refused(command("config", "set", "think", "perhaps"), "true or false", code=2)
    settings.write_text("tmep = 1\n")
    assert command("config", "unset", "tmep")[:2] == (0, "")
    monkeypatch.setenv("NUMOE_TOP_K", "many")
    refused(command("run", model, "hi"), "NUMOE_TOP_K", "whole number", code=2)


def test_shells_complete_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: Run) -> None:
    from numoe.cli.arguments import models_here

    monkeypatch.setenv("NUMOE_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "models" / "some--tiny-moe-int8").mkdir(parents=True)
    (tmp_path / "home" / "models" / "some--other-int8.part").mkdir()
    (tmp_path / "some").mkdir()
    (tmp_path / "some.gguf").touch()
    (tmp_path / "some.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert models_here("") == ["tiny", "some/tiny-moe"]
    assert models_here("ti") == ["tiny"]
    assert sorted(models_here("so")) == ["some.gguf", "some/", "some/tiny-moe"]
    assert models_here("./some.g") == ["./some.gguf"]
    assert "--install-completion" in command("--help")[1]


# ------------------------------------------------------------------------------------------------------ processes


def process(*arguments: str, **options: Any) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "numoe.cli", *arguments]
    pipes: dict[str, Any] = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, **{"stdin": subprocess.DEVNULL, **pipes, **options})


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_an_answer(windowed: str, number: int, code: int) -> None:
    with process("run", windowed, "--raw", "-p", "hi") as numoe:
        assert numoe.stdout and numoe.stderr
        begun = numoe.stdout.read(1)
        numoe.send_signal(number)
        rest, err = numoe.communicate()
        assert numoe.returncode == code
        assert begun and rest.endswith(b"\n")  # what came is there, and the line is ended
        assert b"Traceback" not in err


def test_a_batch_that_is_ended_keeps_what_it_has(windowed: str, tmp_path: Path) -> None:
    file, out = write_lines(tmp_path / "batch", {"prompt": "a", "max_tokens": 2}, {"prompt": "b"}), tmp_path / "out"
    with process("run", windowed, "--batch", file, "--out", str(out), "--raw") as numoe:
        while numoe.poll() is None and not (out.exists() and out.read_bytes()):
            pass
        numoe.send_signal(signal.SIGINT)
        assert numoe.wait() == 130
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == [1]


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
@pytest.mark.parametrize(
    ("how", "code", "out", "err"),
    [
        ('"$@" <&-', 0, True, " tok/s"),
        ('"$@" >&-', 1, False, "error: standard output cannot be written (it is closed); send it to another place\n"),
        pytest.param('"$@" 2>&-', 0, True, "", marks=pytest.mark.slow),
        pytest.param('"$@" >&- 2>&- <&-', 1, False, "", marks=pytest.mark.slow),
        ('"$@" --json > /dev/full', 1, False, "error: standard output cannot be written (No space left on device)"),
        pytest.param(
            '"$@" --help > /dev/full',
            1,
            False,
            "error: standard output cannot be written (No space left on device)",
            marks=pytest.mark.slow,
        ),
        pytest.param('"$@" 2> /dev/full', 0, True, "", marks=pytest.mark.slow),
        ('"$@" > /dev/full 2>&1', 1, False, ""),
    ],
)
def test_streams_that_are_closed_or_full(model: str, how: str, code: int, out: bool, err: str) -> None:
    command = [sys.executable, "-m", "numoe.cli", "run", model, "hi", "-n", "5"]
    done = subprocess.run(["sh", "-c", how, "sh", *command], capture_output=True, text=True, check=False)
    assert (done.returncode, bool(done.stdout)) == (code, out)
    assert err in done.stderr and done.stderr.count("\n") == bool(err)


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
def test_nobody_to_ask_or_to_talk_with(model: str) -> None:
    for arguments, code in ((["chat", model], 0), (["rm", "x"], 2), (["run", model, "-"], 2)):
        command = [sys.executable, "-m", "numoe.cli", *arguments]
        done = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *command], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (code, "") and done.stderr.count("error: ") == bool(code)


def test_narrow_encodings_do_not_stop_an_answer(model: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with process("run", model, "--raw", "-p", "hi", "--temp", "3", "-n", "80", "--seed", "1", env=environment) as numoe:
        out, err = numoe.communicate()
        assert (numoe.returncode, out.isascii()) == (0, True), err
    with process("run", model, "hi", "--temp", "3", "-n", "80", "--seed", "1", "--json", env=environment) as numoe:
        text = json.loads(numoe.communicate()[0])["text"]
        assert not text.isascii()


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
def test_in_a_shell(model: str, windowed: str, tmp_path: Path) -> None:
    """Pipes, files and /dev/null, as a script writes them."""
    script = """
    numoe() { "$PYTHON" -m numoe.cli "$@"; }
    numoe run "$MODEL" hi -n 5 -q < /dev/null > answer || exit 1
    echo hi | numoe run "$MODEL" -n 5 -q > piped || exit 2
    printf 'caf\\351' | numoe run "$MODEL" -q 2> refused; [ $? = 1 ] || exit 3
    numoe run "$MODEL" -q < /dev/null 2> empty; [ $? = 2 ] || exit 4
    numoe run "$ENDLESS" hi --raw < /dev/null | head -c 10 > begun
    [ "${PIPESTATUS[*]}" = "141 0" ] || exit 5
    """
    environment = {**os.environ, "PYTHON": sys.executable, "MODEL": model, "ENDLESS": windowed}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    answer = (tmp_path / "answer").read_text()
    assert answer and (tmp_path / "piped").read_text() == answer
    assert len((tmp_path / "begun").read_bytes()) == 10
    assert (tmp_path / "refused").read_text() == "error: standard input is not UTF-8 (byte 3); convert it first\n"
    assert "prompt is empty" in (tmp_path / "empty").read_text()


@pytest.mark.skipif(os.name == "nt", reason="pipes that can be asked")
def test_a_pipe_that_is_idle_is_told_of_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    end, other = os.pipe()
    notes = []

    def note(text: str) -> None:
        notes.append(text)
        os.write(other, b"some text\n")
        os.close(other)

    monkeypatch.setattr("numoe.cli.text._PATIENCE", 0.01)
    with os.fdopen(end) as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        assert whole_prompt("sum up", None, None, (), note) == "some text\n\nsum up"
    assert len(notes) == 1 and "/dev/null" in notes[0]


# --------------------------------------------------------------------------------------------------------- a million


MILLION = "a" * (1 << 20)


def test_a_prompt_of_a_million_bytes_is_refused_before_the_weights_are_read(
    command: Run, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("numoe.engine.load", None)
    refused(command("run", model, "sum up", stdin=MILLION), "tokens do not fit into the context of 1024", "--ctx")


def test_a_prompt_of_a_million_bytes_is_read_where_it_fits(command: Run, tmp_path: Path) -> None:
    """With a vocabulary that has 2048 of these bytes in one token."""
    model = write_model("llama_a", tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    doubles = ["a" * (1 << n) for n in range(1, 12)]
    spec["model"]["vocab"] = dict(
        zip([*list(spec["model"]["vocab"])[: -len(doubles)], *doubles], range(90), strict=True)
    )
    spec["model"]["merges"] = [f"{piece[: len(piece) // 2]} {piece[: len(piece) // 2]}" for piece in doubles]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    told = document(command, str(model), "-n", "2", stdin=MILLION)
    assert told["prompt_tokens"] == 1 + len("user: ") + 512 + len("\nassistant: ")


def test_the_models_own_sampling_is_the_default(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model("llama_a", tmp_path / "model")
    (model / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7, "top_p": 0.8}')
    asked = ("run", str(model), "hi", "--raw", "-n", "1", "--verbose")
    _, _, err = command(*asked, "--seed", "3")
    assert "temp 0.7 (the model's own), top_p 0.8 (the model's own), top_k 0, " in err
    assert "seed 3 (as given)" in err
    _, _, err = command(*asked, "--temp", "0")
    assert "temp 0.0 (as given), top_p 0.8 (the model's own)" in err
    monkeypatch.setenv("NUMOE_TOP_P", "0.5")
    assert "top_p 0.5 (as given)" in command(*asked)[2]


def test_an_answer_that_is_cut_is_told(command: Run) -> None:
    code, _, err = command("run", "tiny", "What sound does a sheep make?", "-n", "2")
    assert code == 0 and err.endswith(", cut off at --max-tokens\n")
    assert "cut off" not in command("run", "tiny", "What sound does a sheep make?")[2]


def test_an_endless_repetition_ends(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    word = describe("tiny").tokenizer.encode(" on")[0]
    monkeypatch.setattr("numoe.engine.text.sample.Sampler.choose", lambda *_: word)
    code, out, err = command("run", "tiny", "hi", "--json")
    assert code == 0 and json.loads(out)["finish_reason"] == "repetition"
    assert err.endswith(", stopped, for the answer repeats itself without end\n")


@pytest.mark.slow
def test_an_endless_repetition_is_no_whole_form(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    word = describe("tiny").tokenizer.encode(" on")[0]
    monkeypatch.setattr("numoe.engine.text.sample.Sampler.choose", lambda *_: word)
    file = write_lines(tmp_path / "batch", {"prompt": "hi", "regex": "( on)*"})
    assert command("run", "tiny", "--batch", file, "-q")[0] == 3, "what was asked for is not whole"


def test_a_prompt_that_was_read_is_read_from_its_file(command: Run, tmp_path: Path) -> None:
    kept, documents = str(tmp_path / "kept"), []
    for more in ("", ""):
        code, out, _ = command("run", "tiny", f"Who has a hat?{more}", "-n", "5", "--prompt-cache", kept, "--json")
        documents.append(json.loads(out))
        assert code == 0
    assert documents[0]["text"] == documents[1]["text"]
    assert [one["reused_tokens"] for one in documents] == [0, documents[0]["prompt_tokens"] - 1]
    refused(command("run", "tiny", "hi", "--prompt-cache", kept, "--kv", "int8"), "float32 rows; give --kv float32")
    code, _, err = command("run", "tiny", "--batch", "x", "--prompt-cache", kept)
    assert code == 2 and "--prompt-cache is for one prompt" in err


@pytest.mark.parametrize("given", [("--draft", "none"), ("--kv", "int8"), ("--kv", "bf16"), ("--ctx", "1k"), ()])
def test_how_tokens_are_held_and_guessed(given: tuple[str, ...], command: Run) -> None:
    code, out, _ = command("run", "tiny", "Tell me a story about a fox and a lamp.", "-n", "8", "--json", *given)
    made = json.loads(out)
    assert code == 0 and made["completion_tokens"] == 8
    assert (made["timings"]["drafts"]["proposed"] > 0) <= ("none" not in given)
