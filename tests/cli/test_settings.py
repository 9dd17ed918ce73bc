"""Settings: each is declared once, and every way to give one follows; what the engine says of them at the terminal."""

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from test_cli import refused
from tiny import write_model

from numoe.cli.chat.talk import SPELLINGS
from numoe.cli.setting import May
from numoe.cli.settings import SETTINGS, Options, filled, settings_in, spelled, takes
from numoe.engine import Sampling, Session, load
from numoe.engine.chat.answer import Settings

Run = Callable[..., tuple[int, str, str]]

MADE_UP = """
import io, json, sys
from numoe.cli import settings
settings.SETTINGS += (settings.Setting(
    "repeat_last_n", int, "So many tokens count.", "sampling", default=64, metavar="N", least=0,
    field="repeat_last_n", may=settings.May.ANYWHERE,
),)
from numoe.cli.main import main
for arguments, typed in json.loads(sys.argv[1]):
    sys.stdin = io.TextIOWrapper(io.BytesIO(typed.encode()))
    try:
        main(arguments)
    except SystemExit as left:
        print("code", left.code, *sys.argv[2:])
"""


def test_a_setting_that_is_declared_can_be_given_in_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path))
    monkeypatch.setenv("NUMOE_REPEAT_LAST_N", "7")
    line = {"prompt": "What sound does a sheep make?", "max_tokens": 1, "repeat_last_n": 3}
    asked = [
        (["run", "--help"], ""),
        (["chat", "--help"], ""),
        (["config"], ""),
        (["config", "set", "repeat-last-n", "5"], ""),
        (["run", "tiny", "--batch", "-"], json.dumps(line)),
        (["run", "tiny", "--batch", "-"], json.dumps(line | {"repeat_last_n": "few"})),
        (["run", "tiny", "x", "--repeat-last-n", "-1"], ""),
        (["chat", "tiny", "-n", "0"], "/set\n/set repeat_last_n 9\n/set\n/set repeat_last_n x\n"),
    ]
    done = subprocess.run([sys.executable, "-c", MADE_UP, json.dumps(asked)], capture_output=True, text=True)
    help_, of_chat, shown, set_, answers, *others = done.stdout.split("code ")
    assert "--repeat-last-n N" in help_ and "So many tokens count." in " ".join(help_.split())
    assert "--repeat-last-n N" in of_chat
    assert re.search("repeat_last_n +7 ", shown) and "NUMOE_REPEAT_LAST_N" in shown
    assert set_ == "0\n" and (tmp_path / "config.toml").read_text() == "repeat_last_n = 5\n"
    assert json.loads(answers.split("\n")[1])["completion_tokens"] == 1
    assert [code.strip() for code in others] == ["0", "1", "2", "2"]
    assert '"repeat_last_n" takes a whole number from 0 on, not "few"' in done.stderr
    assert 'error: --repeat-last-n takes a whole number from 0 on, not "-1"' in done.stderr
    assert [row.split()[1] for row in done.stderr.splitlines() if row.startswith("repeat_last_n ")] == [
        "is",
        "7",
        "is",
        "9",
    ]
    assert 'error: repeat_last_n takes a whole number from 0 on, not "x"' in done.stderr


def test_settings_fill_what_the_engine_has() -> None:
    parts = {field.name for part in (Settings, Sampling) for field in fields(part)}
    filling = [setting for setting in SETTINGS if setting.field]
    assert {setting.field for setting in filling} <= parts
    assert {"ctx", "ram", "threads"} <= inspect.signature(load).parameters.keys()
    assert "logprobs" in inspect.signature(Session.generate).parameters
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS)
    # Their defaults are the engine's.
    plain = {setting.name: setting.value(setting.default) for setting in filling}
    assert filled(Settings(), plain) == Settings()
    for setting in settings_in(May.TALK).values():
        assert setting.field, "in a chat there is only what its settings keep"


def test_a_command_takes_settings_that_there_are() -> None:
    def command(options: Options) -> None: ...

    with pytest.raises(KeyError, match="colour"):
        takes("sampling", "colour")(command)
    with pytest.raises(KeyError, match="colour"):
        takes("sampling", colour="red")(command)


@pytest.mark.parametrize(
    ("message", "flags", "talked"),
    [
        ("raise `ctx` a bit", "raise --ctx a bit", "raise /set ctx a bit"),
        ("`decode_tokens` is 0", "--max-tokens is 0", None),
        ("go on with `think`, `ram`", "go on with --think, --ram", None),
        ("`numoe pull a/b quant=int8` gets it", "`numoe pull a/b --quant int8` gets it", None),
        ("text by `numoe run raw=true`.", "text by `numoe run --raw`.", None),
        ("`numoe list` shows `them`, `numoe verify a=b`", "`numoe list` shows `them`, `numoe verify a=b`", None),
        ("`hf auth login seed=1` `", "`hf auth login seed=1` `", None),
    ],
)
def test_what_the_engine_names_is_spelled_as_it_is_given(message: str, flags: str, talked: str | None) -> None:
    assert spelled(message) == flags
    assert spelled(message, SPELLINGS) == talked or flags


def test_messages_of_the_engine_have_flags_at_the_terminal(
    command: Run, tmp_path: Path, numoe_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(write_model("llama_a", tmp_path / "model"))
    refused(command("show", model, "--ctx", "99999"), "error: --ctx 99999 is not possible", code=2)
    refused(command("bench", model, "--prompt-tokens", "2000"), "lower --prompt-tokens or --max-tokens")
    refused(command("bench", "--replay", str(tmp_path)), "make a trace with `numoe run --trace FILE`", code=2)
    refused(command("run", model, "hi", "--trace", str(tmp_path / "trace")), "leave out --trace", code=2)
    code, out, _ = command("run", model, "--batch", "-", "--ctx", "20", stdin=json.dumps({"prompt": "a" * 50}))
    assert code == 1 and "raise --ctx (this" in json.loads(out)["error"]
    (tmp_path / "model" / "tokenizer_config.json").write_text(
        '{"chat_template": "{{ raise_exception(\'no `seed`\') }}"}'
    )
    refused(command("chat", model, stdin="hi\n"), "no 'seed'", "continue plain text with `numoe run --raw`")
    folder = numoe_home / "models" / "some--model-int4.part"
    folder.mkdir(parents=True)
    refused(command("show", "some/model"), "`numoe pull some/model --quant int4` goes on")
    folder.rmdir()


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("temp", "-1", "a number from 0 to 1000000"),
        ("temp", "nan", "a number from 0 to 1000000"),
        ("temp", "inf", "a number from 0 to 1000000"),
        ("top_p", "2", "a number from 0 to 1"),
        ("threads", "0", "a whole number from 1 to 1024"),
        ("ctx", "1.5", "a whole number from 1 on"),
        ("quant", "int5", "native, int8, int4 or formats by role"),
        ("quiet", "perhaps", "true or false"),
    ],
)
def test_defaults_are_checked_where_they_are_given(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str, wanted: str
) -> None:
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path))
    refused(command("config", "set", "--", key, value), f"{key} takes {wanted}, not ", code=2)
    assert not (tmp_path / "config.toml").exists()
    asked = ("quantize", "tiny", str(tmp_path / "x"), "--quant", "int4")
    asked = asked if key in ("quant", "threads") else ("run", "tiny", "x")
    (tmp_path / "config.toml").write_text(f"{key} = {value if value[:1] in '-n0123456789' else json.dumps(value)}\n")
    refused(command(*asked), f"config.toml: {key} takes {wanted}, not ", code=2)
    (tmp_path / "config.toml").unlink()
    monkeypatch.setenv(f"NUMOE_{key.upper()}", value)
    refused(command(*asked), f"NUMOE_{key.upper()} takes {wanted}, not ", code=2)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"temp": -0.5}, '"temp" takes a number from 0 to 1000000, not -0.5'),
        ({"min_p": 1.5}, '"min_p" takes a number from 0 to 1, not 1.5'),
        ({"stop": "x"}, '"stop" takes a list of texts, not "x"'),
        ({"stop": [None]}, '"stop" takes a list of texts, not [null]'),
        ({"think": 1}, '"think" takes true or false, not 1'),
        ({"schema": "x"}, '"schema" takes an object, not "x"'),
        ({"logprobs": 1.0}, '"logprobs" takes a whole number from 0 on, not 1.0'),
        ({"seed": None}, '"seed" takes a whole number from 0 to 9223372036854775807, not null'),
        ({"ram": "1GB"}, 'there is no setting "ram"'),
    ],
)
def test_lines_of_a_batch_are_checked_by_the_same_bounds(
    command: Run, monkeypatch: pytest.MonkeyPatch, line: dict[str, Any], told: str
) -> None:
    monkeypatch.setattr("numoe.engine.load", None)
    refused(command("run", "tiny", "--batch", "-", stdin=json.dumps({"prompt": "x", **line})), "line 1", told)


@pytest.mark.parametrize("given", ["flag", "variable", "config"])
@pytest.mark.parametrize("name", ["run", "bench", "perplexity", "perplexity --against", "quantize"])
def test_memory_is_bounded_for_every_command_that_loads_a_model(
    name: str, given: str, command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text("It was a long day. " * 99)
    file = str(tmp_path / "text")
    asked = {
        "run": ["run", "tiny", "x", "-n", "1"],
        "bench": ["bench", "tiny"],
        "perplexity": ["perplexity", "tiny", file],
        "perplexity --against": ["perplexity", "tiny", file, "--against", "tiny"],
        "quantize": ["quantize", "tiny", str(tmp_path / "made"), "--quant", "int4", "--calibrate", file],
    }[name]
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path))
    if given == "variable":
        monkeypatch.setenv("NUMOE_RAM", "1MB")
    elif given == "config":
        (tmp_path / "config.toml").write_text('ram = "1MB"')
    code, out, err = command(*asked, *(["--ram", "1MB"] if given == "flag" else []))
    assert (code, out) == (2, "")
    assert "1 MB are allowed; raise --ram to " in err
    assert not (tmp_path / "made").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.parametrize("there", [False, True])
def test_what_is_kept_is_the_users_own(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """Whatever the umask says, and also where files were there before; a home that was there stays as it is."""
    home = tmp_path / "some" / "home"
    if there:
        (home / "chats").mkdir(parents=True)
        (home / "chats").chmod(0o755)
        (home / "config.toml").write_text("seed = 2\n")
        (home / "config.toml").chmod(0o644)
        (home / "log.jsonl").touch(0o644)
    monkeypatch.setenv("NUMOE_HOME", str(home))
    before = os.umask(0)
    try:
        assert command("config", "set", "seed", "1")[0] == 0
        assert command("run", "tiny", "x", "--session", "y", "-n", "2", "--log")[0] == 0
    finally:
        os.umask(before)
    modes = {path.relative_to(home).as_posix(): path.stat().st_mode & 0o777 for path in home.rglob("*")}
    assert modes.pop("chats") == 0o700
    assert {"config.toml", "log.jsonl", "chats/y.json", "chats/y.kv"} <= modes.keys()
    assert set(modes.values()) == {0o600}, modes
    assert there or home.stat().st_mode & 0o777 == 0o700
