"""Files are written whole, by one process at a time, and under names that every system has."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from numoe.quant.errors import InputError
from numoe.quant.files import held, is_plain_name, locked, plain_names, write_whole

KILLED = """
import os, signal, sys
from pathlib import Path
from numoe.quant.files import write_whole
def pieces():
    yield b"half"
    sys.stdout.write("x") and sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
write_whole(Path(sys.argv[1]), pieces())
"""


def test_a_writer_that_was_killed_leaves_nothing_for_long(tmp_path: Path) -> None:
    path = tmp_path / "chat"
    path.write_bytes(b"old")
    subprocess.run([sys.executable, "-P", "-c", KILLED, path], stdout=subprocess.PIPE, check=False)
    assert path.read_bytes() == b"old"
    (tmp_path / ".chat.4711.part").write_text("as earlier versions named it")
    (tmp_path / ".chat.mine.part").write_text("not ours")
    (tmp_path / ".chat2.4711.part").write_text("another's")
    assert len(list(tmp_path.iterdir())) == 5
    write_whole(path, b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".chat.mine.part", ".chat2.4711.part", "chat"]
    assert path.read_bytes() == b"new"


def test_one_that_is_writing_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "chat"

    def pieces() -> Iterator[bytes]:
        yield b"x" * (1 << 16)
        write_whole(path, b"meanwhile")
        assert len(list(tmp_path.iterdir())) == 2
        yield b"y"

    write_whole(path, pieces())
    assert path.read_bytes() == b"x" * (1 << 16) + b"y"
    assert [path.name for path in tmp_path.iterdir()] == ["chat"]


def test_what_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "chat"
    path.write_bytes(b"old")

    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, pieces())
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("chat", b"old")]


def test_what_is_private_is_nobody_elses(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        for path in (tmp_path / "new", tmp_path / "old"):
            (tmp_path / "old").touch(0o666)
            write_whole(path, b"x", private=True)
            assert path.stat().st_mode & 0o777 == 0o600
        (tmp_path / "new").chmod(0o640)
        write_whole(tmp_path / "new", b"y")  # what the user has decided stays
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_only_files_are_replaced(make: object, tmp_path: Path) -> None:
    assert callable(make)
    make(tmp_path / "pipe")
    with pytest.raises(OSError, match="not an ordinary file"):
        write_whole(tmp_path / "pipe", b"x")
    assert not (tmp_path / "pipe").is_file()


def test_a_lock_leaves_no_file_and_outlives_whoever_had_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chat"
    (tmp_path / ".chat.lock").touch()  # of one that was killed
    with locked(path, "the chat"), held(path) as free:
        assert not free
    assert list(tmp_path.iterdir()) == []
    flock = fcntl.flock

    def late(*arguments: object) -> None:
        """The lock that was opened is removed by its holder before it can be taken."""
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / ".chat.lock").unlink()
        flock(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", late)
    with held(path) as free:
        assert free and (tmp_path / ".chat.lock").exists()

    def none(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    write_whole(path, b"x")
    with locked(path, "the chat"):
        write_whole(path, b"y")
    assert [path.name for path in tmp_path.iterdir()] == ["chat"]


def test_plain_names() -> None:
    for name in (
        "a",
        "a b.json",
        "模型.txt",
        "model-00001-of-00002.safetensors",
        ".hidden",
        "console.txt",
        "nul-1",
        "x" * 255,
    ):
        assert is_plain_name(name), name
    for other in (
        None,
        1,
        "x" * 256,
        "a\u2028b",
        "a\u202eb",
        "\x7f",
        "\x9b",
        "aux",
        "Com1.json",
        "con .txt",
        "..",
        "~/..",
        "a:b",
    ):
        assert not is_plain_name(other), other
    with pytest.raises(InputError, match="index names both 'é' and 'É'"):
        plain_names(["a", "é", "É"], "the index")
    with pytest.raises(InputError, match=r"^x names the file '\.\./a+\.\.\., which is none beside it: do not use it$"):
        plain_names(["../" + "a" * 9999], "x")
