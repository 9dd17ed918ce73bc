"""Documents of strangers: what is read, and what is refused in one sentence."""

import codecs
import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from numoe.quant.documents import parse_json, parse_toml, read_document, read_object
from numoe.quant.errors import InputError
from numoe.quant.files import locked


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_editors_encodings_are_read(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes('{"name": "Zoë"}'.encode(encoding))
    assert read_object(path) == {"name": "Zoë"}


def test_toml_with_a_byte_order_mark_is_read() -> None:
    assert parse_toml(codecs.BOM_UTF8 + b"temp = 0.5", "config.toml") == {"temp": 0.5}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe{", "not valid JSON"),
        (b'{"a": "\xe9"}', "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    ],
)
def test_what_is_no_document_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=f"^config.json .*{reason}"):
        parse_json(data, "config.json")


def test_deep_toml_is_refused() -> None:
    with pytest.raises(InputError, match="nested too deeply"):
        parse_toml(b"a = " + b"[" * 10_000, "config.toml")


def test_only_objects_count(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(InputError, match=r"x\.json does not hold a JSON object"):
        read_object(tmp_path / "x.json")


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "large").write_bytes(b"12345")
    for name, reason in (("pipe", "ordinary"), ("device", "ordinary"), ("large", "more than"), ("none", "no file")):
        with pytest.raises(InputError, match=reason):
            read_document(tmp_path / name, largest=4)


def test_a_locked_file_is_not_written_by_another_process(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    script = "import sys; from pathlib import Path; from numoe.quant.files import locked\n"
    script += "with locked(Path(sys.argv[1]), 'the chat'): print('taken')"
    with locked(path, "the chat"):
        other = subprocess.run([sys.executable, "-P", "-c", script, path], capture_output=True, text=True)
        assert other.returncode and "InputError: the chat is in use" in other.stderr
    other = subprocess.run([sys.executable, "-P", "-c", script, path], capture_output=True, text=True)
    assert other.stdout == "taken\n"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_written_all_the_same(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "chat.json", "the chat"):
        pass


def test_what_an_error_quotes_is_cut() -> None:
    said = str(InputError("config.json: " + "x" * 10**6 + "; fetch it again"))
    assert len(said) < 1500 and said.startswith("config.json: x") and said.endswith("x; fetch it again")
