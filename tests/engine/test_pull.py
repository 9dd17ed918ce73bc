"""Pulled models: the bytes of a local conversion, whatever happens on the way."""

import os
import random
import re
import resource
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from helpers import reshard
from hub_server import Content, Hub

from numoe.engine import describe, home, load
from numoe.engine import pull as puller
from numoe.engine.plan import format_bytes
from numoe.engine.pull import Progress, pull
from numoe.quant.convert.convert import Folder, convert
from numoe.quant.errors import InputError
from numoe.quant.stored.manifest import read_manifest

Checkpoints = Callable[[str], Path]
Run = Callable[..., tuple[int, str, str]]

ID = "owner/Model-1"
SHARDS = 6


def shard(number: int) -> str:
    return f"model-{number:05d}-of-{SHARDS:05d}.safetensors"


SHARD = shard(3)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("NUMOE_HOME", str(tmp_path / "home"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.fixture(scope="module")
def source(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V4 in shards that cut through experts."""
    folder = reshard(checkpoint("v4_released"), tmp_path_factory.mktemp("source") / "model", SHARDS)
    (folder / "LICENSE").write_text("free")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.py").write_text("code stays behind")
    return folder


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """The files of a local conversion of the source."""
    folder = tmp_path_factory.mktemp("converted")

    def convert_once(quant: str) -> dict[str, bytes]:
        if not (folder / quant).exists():
            convert_folder(source, folder / quant, quant)
        return files(folder / quant)

    return convert_once


def convert_folder(source: Path, destination: Path, quant: str) -> None:
    described = describe(source)
    convert(described.checkpoint, described.weights(), destination, quant, Folder(source, "source"))


def files(folder: Path) -> dict[str, bytes]:
    """Those of a model, without the manifest, which names the source."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "numoe.json"}


def part_of(repo_id: str) -> Path:
    """The folder of a pull that has not finished."""
    folder = home.folder_for(repo_id, "native")
    return folder.with_name(f"{folder.name}.part")


def no_wait(seconds: float) -> None:
    pass


def downloads(hub: Hub) -> list[str]:
    """The shards whose content was asked for, once for each time. (Headers are asked for in requests of their own.)"""
    sizes = {name: content.size for name, content in hub.contents(ID).items() if name.endswith(".safetensors")}
    return [r.path for r in hub.log if r.path in sizes and r.stop == sizes[r.path]]


@pytest.mark.parametrize("quant", ["native", "int8", "int4", "experts=int8,attention=int4"])
def test_a_pull_gives_the_bytes_of_a_local_conversion(
    quant: str, hub: Hub, source: Path, converted: Callable[[str], dict[str, bytes]]
) -> None:
    commit = hub.add(ID, source)
    pulled = pull(ID, quant)
    assert pulled.path == home.folder_for(ID, quant)
    assert pulled.conversion is not None
    assert files(pulled.path) == converted(quant)
    manifest = read_manifest(pulled.path)
    assert manifest is not None
    assert (manifest.source, manifest.revision, manifest.recipe) == (ID, commit, quant)
    assert manifest.files.keys() == converted(quant).keys()
    assert sorted(downloads(hub)) == sorted(path.name for path in source.glob("*.safetensors"))
    assert [path.name for path in home.models_folder().iterdir()] == [pulled.path.name]


@pytest.mark.parametrize("quant", ["native", "int4"])
def test_scales_may_be_in_other_shards_than_their_codes(
    quant: str, hub: Hub, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    far = reshard(checkpoint("v3_fp8"), tmp_path / "far", 5, key=lambda name: ("scale" in name, name))
    near = reshard(checkpoint("v3_fp8"), tmp_path / "near", 12, key=lambda name: name.replace("weight_scale_inv", "z"))
    for number, folder in enumerate((far, near)):
        (folder / "tokenizer.json").write_text("{}")
        hub.add(f"{ID}-{number}", folder)
        convert_folder(folder, tmp_path / f"{number}", quant)
        assert files(pull(f"{ID}-{number}", quant).path) == files(tmp_path / f"{number}")


def test_the_disk_never_holds_more_than_the_result_and_two_shards(
    hub: Hub, source: Path, converted: Callable[[str], dict[str, bytes]]
) -> None:
    hub.add(ID, source)
    peak = 0

    def measure(*_: Any) -> None:
        nonlocal peak
        total = 0
        for path in home.models_folder().rglob("*"):
            with suppress(FileNotFoundError):  # renamed or removed meanwhile
                total += path.stat().st_size if path.is_file() else 0
        peak = max(peak, total)

    hub.on_sent = measure
    pull(ID, "native", report=measure)
    result = sum(map(len, converted("native").values()))
    shards = sorted(path.stat().st_size for path in source.glob("*.safetensors"))
    print(f"result {result}, two shards {sum(shards[-2:])}, peak {peak}")
    assert result < peak <= result + sum(shards[-2:])


def test_the_next_shard_arrives_while_one_is_converted(hub: Hub, source: Path) -> None:
    hub.add(ID, source)
    ahead: set[int] = set()

    def watch(at: Progress) -> None:
        begun = len(downloads(hub))
        assert begun <= at.shards + 2
        if at.written and at.shards < SHARDS - 1:
            ahead.add(begun - at.shards)

    pull(ID, "int4", report=watch)
    assert 2 in ahead


def test_progress_goes_up_to_everything(hub: Hub, source: Path) -> None:
    hub.add(ID, source)
    seen: list[Progress] = []
    conversion = pull(ID, "int8", report=seen.append).conversion
    assert conversion is not None
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert seen[-1] == Progress(SHARDS, SHARDS, total, total, conversion.result_bytes, conversion.result_bytes)
    for field in ("shards", "received", "written"):
        values = [getattr(at, field) for at in seen]
        assert values == sorted(values)


# Interruptions


class Stop(Exception):
    pass


@pytest.mark.parametrize("quant", ["native", "int4"])
def test_a_pull_goes_on_wherever_it_stopped(
    quant: str, hub: Hub, source: Path, converted: Callable[[str], dict[str, bytes]]
) -> None:
    hub.add(ID, source)
    reports = 0
    for at in (1, 2, 30, 31, 60, 120, 5, 240, 400):
        calls = 0

        def stop(progress: Progress, at: int = at) -> None:
            nonlocal calls, reports
            calls += 1
            if calls == at:
                reports += 1
                raise Stop

        try:
            pull(ID, quant, report=stop)
        except Stop:
            assert not home.folder_for(ID, quant).exists()
    assert reports >= 5
    assert files(pull(ID, quant).path) == converted(quant)
    assert len(downloads(hub)) <= SHARDS + reports


def test_a_pull_goes_on_when_only_the_name_is_missing(
    hub: Hub, source: Path, converted: Callable[[str], dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, source)

    def stop(*_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(Path, "rename", stop)
        pull(ID, "int4")
    assert files(pull(ID, "int4").path) == converted("int4")
    assert len(downloads(hub)) == SHARDS


KILLED = """
import os, signal, sys
import numpy, huggingface_hub, numoe.engine.pull
from numoe.cli.main import main
left = int(sys.argv.pop(1))
def count(event, arguments):
    global left
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "socket.connect"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
main(sys.argv[1:])
"""


def run(hub: Hub, events: int, sent: int | None = None) -> int:
    """`numoe pull`, killed at its so many-th step on disk or network, or when the hub has sent so many bytes more."""
    command = [sys.executable, "-c", KILLED, str(events), "pull", ID, "--quant", "int4", "--threads", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    limit = None if sent is None else hub.sent + sent
    hub.on_sent = lambda total: process.kill() if limit is not None and total >= limit else None
    process.communicate()
    return process.returncode


def test_a_killed_pull_goes_on(hub: Hub, source: Path, converted: Callable[[str], dict[str, bytes]]) -> None:
    """One pull, killed three times; the slow form kills 50, each at a point of its own."""
    hub.add(ID, source)
    places = random.Random(6)
    kills = 0
    for round in range(3):
        sent = places.randrange(1_500_000, 4_000_000) if round % 2 else None
        code = run(hub, places.randrange(20, 90) if sent is None else 0, sent)
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
    assert kills >= 2
    assert not home.folder_for(ID, "int4").exists()
    assert run(hub, 0) == 0
    assert files(home.folder_for(ID, "int4")) == converted("int4")
    assert len(downloads(hub)) <= SHARDS + kills


@pytest.mark.slow
def test_a_pull_killed_anywhere_goes_on(
    hub: Hub,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    converted: Callable[[str], dict[str, bytes]],
) -> None:
    """`pytest -m slow tests/engine/test_pull.py -k anywhere`: about three minutes."""
    hub.add(ID, source)
    places = random.Random(50)
    kills = 0
    for round in range(50):
        monkeypatch.setenv("NUMOE_HOME", str(tmp_path / f"{round}"))
        before = len(downloads(hub))
        sent = None if round % 2 else places.randrange(1_000_000, 6_000_000)
        killed = run(hub, places.randrange(1, 260) if sent is None else 0, sent) != 0
        kills += killed
        assert run(hub, 0) == 0
        assert files(home.folder_for(ID, "int4")) == converted("int4")
        assert len(downloads(hub)) - before <= SHARDS + killed
    print(f"{kills} of 50 were killed before they had finished")
    assert kills >= 40


def test_two_pulls_at_once_are_refused(hub: Hub, source: Path) -> None:
    hub.add(ID, source)

    def again(progress: Progress) -> None:
        with pytest.raises(InputError, match="is being written by another process"):
            pull(ID, "int4")
        raise Stop

    with pytest.raises(Stop):
        pull(ID, "int4", report=again)


def test_an_interrupted_pull_stays_at_its_commit(
    hub: Hub, source: Path, tmp_path: Path, checkpoint: Checkpoints, converted: Callable[[str], dict[str, bytes]]
) -> None:
    first = hub.add(ID, source)

    def stop(progress: Progress) -> None:
        if progress.shards == 2:
            raise Stop

    with pytest.raises(Stop):
        pull(ID, "int4", report=stop)
    (tmp_path / "later").mkdir()
    for path in source.iterdir():
        (tmp_path / "later" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "later" / "LICENSE").write_text("not so free")
    second = hub.add(ID, tmp_path / "later")
    with pytest.raises(InputError, match=f"at revision {first}, and this is .* at revision {second}; repeat the"):
        pull(ID, "int4", revision="main")
    pulled = pull(ID, "int4")
    assert files(pulled.path) == converted("int4")
    assert pull(ID, "int4", revision=first).conversion is None
    with pytest.raises(InputError, match=f"holds revision {first} and not {second}; remove it with `numoe rm"):
        pull(ID, "int4", revision="main")


@pytest.fixture
def small(checkpoint: Checkpoints) -> dict[str, bytes]:
    """The files of a model of a few kilobytes."""
    folder = checkpoint("mixtral_a")
    return {path.name: path.read_bytes() for path in folder.iterdir()} | {"tokenizer.json": b"{}"}


def begin(repo_id: str) -> None:
    """A pull that does not get beyond its first report."""

    def stop(progress: Progress) -> None:
        raise Stop

    with pytest.raises(Stop):
        pull(repo_id, report=stop)


def names() -> list[str]:
    return sorted(path.name for path in home.models_folder().iterdir())


def test_a_repository_is_pulled_once_however_it_is_spelled(hub: Hub, small: dict[str, bytes]) -> None:
    hub.add("Org/Model", small)
    hub.moved = {"org/model": "Org/Model", "old/Name": "Org/Model"}
    path = pull("org/model").path
    assert path == home.folder_for("Org/Model", "native")
    for spelled in ("Org/Model", "org/model", "old/Name"):
        assert pull(spelled) == puller.Pulled(path, None)
    assert home.locate("ORG/model") == path


def test_a_pull_that_was_begun_by_another_spelling_goes_on(hub: Hub, small: dict[str, bytes]) -> None:
    hub.add("Org/Model", small)
    hub.moved = dict.fromkeys(("org/model", "ORG/MODEL", "old/Name"), "Org/Model")
    begin("org/model")
    part = part_of("Org/Model")
    assert names() == [part.name]
    assert pull("ORG/MODEL").path == home.folder_for("Org/Model", "native")
    # One of a version that named folders by what was typed, or of a time before the repository was renamed.
    pull("Org/Model").path.rename(part_of("old/Name"))
    assert pull("old/Name").path == home.folder_for("old/Name", "native")


def test_what_a_kill_left_is_swept(hub: Hub, small: dict[str, bytes]) -> None:
    hub.add(ID, small)
    begin(ID)
    part = part_of(ID)
    (part / ".numoe.json.0a1b2c3d.part").write_text("half a man")
    (part.parent / f".{part.name}.lock").write_text("")
    path = pull(ID).path
    assert names() == [path.name]
    assert {file.name for file in path.iterdir()} == {*small, "numoe.json"}


def test_a_rewritten_history_is_said(hub: Hub, small: dict[str, bytes]) -> None:
    first = hub.add(ID, small)
    begin(ID)
    hub.add(ID, {**small, "README.md": b"changed"})
    hub.forget(ID, first)
    refused(
        f"the commit {first} that this pull of {ID}:native began with is gone from the hub, .*; `numoe rm {ID}:native` "
        "removes what is here, then a pull begins anew",
        "native",
    )
    with pytest.raises(InputError, match="has no such revision"):
        pull(ID, revision="v9")
    home.remove(home.only(ID, home.find(ID)))
    assert pull(ID).conversion is not None


def test_a_history_that_is_rewritten_meanwhile_is_said(hub: Hub, small: dict[str, bytes]) -> None:
    hub.add(ID, small)
    hub.answer("config.json", b"", 404, X_Error_Code="RevisionNotFound")
    refused("was changed meanwhile, and its commit of before is gone; repeat the command", "native")
    assert pull(ID).conversion is not None


@pytest.mark.parametrize("there", [["tiktoken.bpe"], []])
def test_a_model_without_a_tokenizer_is_not_downloaded(hub: Hub, small: dict[str, bytes], there: list[str]) -> None:
    del small["tokenizer.json"]
    hub.add(ID, {**small, **dict.fromkeys(there, b"x")})
    sizes = sum(map(len, small.values()))
    refused(f"{ID} has no tokenizer that numoe reads", "native")
    assert not home.models_folder().exists() or names() == []
    assert hub.sent < sizes + 5000


def test_a_huge_text_stays_behind(hub: Hub, small: dict[str, bytes]) -> None:
    hub.add(
        ID, {**small, "README.md": Content.virtual(b"#", 6 << 30), "trainer_state.json": Content.virtual(b"{", 1 << 30)}
    )
    assert set(files(pull(ID).path)) == set(small)


def test_what_is_being_pulled_is_not_removed(hub: Hub, small: dict[str, bytes], command: Run) -> None:
    hub.add(ID, small)

    def remove(progress: Progress) -> None:
        code, _, err = command("rm", ID, "-y")
        assert (code, err) == (1, f"error: {ID}:native is being pulled just now; stop that first\n")

    path = pull(ID, report=remove).path
    assert command("rm", ID, "-y")[0] == 0
    assert not path.exists() and names() == []


def test_what_another_program_has_put_into_the_cache_stays(
    hub: Hub, source: Path, tmp_path: Path, converted: Callable[[str], dict[str, bytes]]
) -> None:
    """One of the files there is damaged: it is downloaded into the folder of the pull."""
    hub.add(ID, source)
    pull(ID, "native", keep=True)
    there = next((tmp_path / "cache").rglob(f"snapshots/*/{SHARD}"))
    damaged = bytes(there.stat().st_size)
    there.resolve().write_bytes(damaged)
    fetched = len(downloads(hub))
    assert files(pull(ID, "int4").path) == converted("int4")
    assert downloads(hub)[fetched:] == [SHARD]
    assert there.read_bytes() == damaged


def test_a_complete_model_is_left_as_it_is(hub: Hub, source: Path) -> None:
    hub.add(ID, source)
    path = pull(ID, "int4").path
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    asked = len(hub.log)
    assert (pull(ID, "int4").path, pull(ID, "int4").conversion) == (path, None)
    assert len(hub.log) == asked
    assert before == {file: file.stat().st_mtime_ns for file in path.iterdir()}


def test_kept_files_are_in_the_cache_and_not_downloaded_again(
    hub: Hub, source: Path, tmp_path: Path, converted: Callable[[str], dict[str, bytes]]
) -> None:
    hub.add(ID, source)
    assert files(pull(ID, "int4", keep=True).path) == converted("int4")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "cache").rglob("snapshots/*/*.safetensors")}
    assert kept == {path.name: path.read_bytes() for path in source.glob("*.safetensors")}
    fetched = len(downloads(hub))
    assert files(pull(ID, "native").path) == converted("native")
    assert len(downloads(hub)) == fetched
    assert len(list((tmp_path / "cache").rglob("snapshots/*/*.safetensors"))) == SHARDS


def test_a_pull_may_begin_to_keep_its_files(
    hub: Hub, source: Path, tmp_path: Path, converted: Callable[[str], dict[str, bytes]]
) -> None:
    hub.add(ID, source)

    def stop(progress: Progress) -> None:
        if progress.shards == 3:
            raise Stop

    with pytest.raises(Stop):
        pull(ID, "int4", report=stop)
    assert files(pull(ID, "int4", keep=True).path) == converted("int4")


@pytest.mark.parametrize(("lost", "needed"), [(3, [3]), (5, [4, 5])])
def test_one_lost_file_takes_its_shard_and_what_it_needs_of_others(
    lost: int, needed: list[int], hub: Hub, source: Path, converted: Callable[[str], dict[str, bytes]]
) -> None:
    """The fourth shard of the source ends within an expert."""
    hub.add(ID, source)
    folder = pull(ID, "int4").path
    before = len(downloads(hub))
    (folder / shard(lost)).unlink()
    (folder / "config.json").unlink()
    folder.rename(folder.with_name(folder.name + ".part"))
    assert files(pull(ID, "int4").path) == converted("int4")
    assert downloads(hub)[before:] == [shard(number) for number in needed]


def test_kept_files_need_room_in_the_cache(hub: Hub, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(ID, source)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(
        InputError, match=r"cache needs 0\.00 GB .* set HF_HOME to another disk, or pull without `keep`"
    ):
        pull(ID, "int4", keep=True)


# Faults


def refused(message: str, quant: str = "int4") -> None:
    """The pull fails with one sentence, and nothing that loads is left."""
    with pytest.raises(InputError, match=message) as caught:
        pull(ID, quant, wait=no_wait)
    assert "\n" not in str(caught.value)
    assert not home.folder_for(ID, quant).exists()
    for left in home.models_folder().glob("*"):
        with pytest.raises(InputError):
            load(left)


def cut_again_and_again(hub: Hub) -> None:
    for after in (0, 1, 300_000, 300_001):
        hub.cut(SHARD, after)


FAULTS: dict[str, Callable[[Hub], None]] = {
    "cut": cut_again_and_again,
    "500": lambda hub: hub.fail(SHARD, 500, times=4),
    "503 of the listing": lambda hub: hub.fail(f"/api/models/{ID}", 503, times=4),
    "429": lambda hub: hub.fail(SHARD, 429, times=4, headers={"Retry-After": "120"}),
    "wrong bytes": lambda hub: hub.corrupt(SHARD, 400_000),
    "wrong bytes of a small file": lambda hub: hub.corrupt("config.json", 4),
    "a cut small file": lambda hub: hub.cut("LICENSE", 2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_passing_faults_do_no_harm(
    fault: str, hub: Hub, source: Path, converted: Callable[[str], dict[str, bytes]]
) -> None:
    hub.add(ID, source)
    FAULTS[fault](hub)
    assert files(pull(ID, "int4", wait=no_wait).path) == converted("int4")


def test_a_hub_that_stays_broken_is_left_for_later(
    hub: Hub, source: Path, converted: Callable[[str], dict[str, bytes]]
) -> None:
    hub.add(ID, source)
    hub.fail(SHARD, 500, times=8)
    refused("answers owner/Model-1 with status 500; try again later")  # the header's request takes one of the eight
    assert files(pull(ID, "int4", wait=no_wait).path) == converted("int4")


def test_wrong_bytes_are_refused_in_the_end(
    hub: Hub, source: Path, converted: Callable[[str], dict[str, bytes]]
) -> None:
    hub.add(ID, source)
    hub.corrupt(SHARD, 400_000, times=3)
    refused(f"{SHARD} of {ID} arrived twice with other bytes")
    assert files(pull(ID, "int4", wait=no_wait).path) == converted("int4")


def test_a_damaged_header_is_refused(hub: Hub, source: Path) -> None:
    hub.add(ID, source)
    hub.corrupt(SHARD, 9)
    refused(f"{SHARD} has a damaged header")


@pytest.mark.parametrize("limit", [50_000, 300_000])
def test_a_disk_that_fills_up_is_said(
    limit: int, hub: Hub, source: Path, converted: Callable[[str], dict[str, bytes]]
) -> None:
    """The system refuses to make files larger than the limit: downloads first, or what is made of them."""
    hub.add(ID, source)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        refused("cannot be written .File too large.; what is finished is kept: put the disk right and repeat")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(pull(ID, "int4").path) == converted("int4")


def test_room_is_asked_for_first(hub: Hub, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(ID, source)
    shards = sorted(path.stat().st_size for path in source.glob("*.safetensors"))
    needed = sum(shards) + sum(shards[-2:])
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 0, 10**9 // 50 + needed * 9 // 10))
    refused("needs 0.03 GB more and its disk has 0.02 GB free; make room", "native")
    assert not downloads(hub)
    assert not list(home.models_folder().iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 0, 10**9 // 50 + needed * 11 // 10))
    pull(ID, "native")


def test_a_folder_that_cannot_be_made_is_said(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, source)
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path / "file"))
    refused("set NUMOE_HOME to a folder you may write in")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_said(hub: Hub, source: Path) -> None:
    hub.add(ID, source)
    home.models_folder().mkdir(parents=True, mode=0o555)
    refused("cannot be written .Permission denied.; choose another folder")


# The command


def test_the_command_tells_each_shard(hub: Hub, source: Path, command: Run) -> None:
    hub.add(ID, source)
    code, out, err = command("pull", ID, "--quant", "int4")
    lines = err.splitlines()
    total = format_bytes(sum(path.stat().st_size for path in source.glob("*.safetensors")))
    assert (code, out) == (0, "")
    assert len(lines) == SHARDS + 2
    for number, line in enumerate(lines[:-2], 1):
        assert re.fullmatch(rf"shard {number} of {SHARDS}: .* of {total} received, .* written", line)
    assert f": {total} of {total} received" in lines[-3]
    assert lines[-2].endswith(f"in {home.folder_for(ID, 'int4')}") and lines[-1] == f"numoe chat {ID}"
    assert command("pull", ID, "--quant", "int4") == (
        (0, "", f"{ID} is complete already, in {home.folder_for(ID, 'int4')}\nnumoe chat {ID}\n")
    )
    code, out, err = command("pull", "owner/absent")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert command("pull", ID, "--quant", "int5")[0] == 2


@pytest.mark.skipif(sys.platform == "win32", reason="pexpect needs a pseudo-terminal")
def test_a_terminal_shows_one_line_that_changes(hub: Hub, source: Path) -> None:
    import pexpect

    hub.add(ID, source)
    shown = pexpect.run(f"{sys.executable} -m numoe.cli pull {ID}", dimensions=(24, 100)).decode()
    first, *later = shown.split("\r\x1b[K")[1:]
    assert first == f"asking the hub for {ID}"
    amounts = r"[\d.]+( \w?B)? of [\d.]+ MB(, [\d.]+ \w?B/s|, all received)?(, [^,]* left)?"
    status = rf"([█░#.]+ )?shard \d/{SHARDS}, {amounts}(, converting \d)?"
    assert later[:-1]
    assert all(re.fullmatch(status, line) for line in later[:-1] if line)
    assert "of weights became" in later[-1]


class Hasty(Event):
    """One that nobody waits for."""

    def wait(self, timeout: float | None = None) -> bool:
        return False


def test_what_goes_wrong_is_told_while_it_lasts(
    hub: Hub, small: dict[str, bytes], command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(puller, "Event", Hasty)
    hub.add(ID, small)
    hub.fail("model.safetensors", 503, times=2)
    hub.cut("model.safetensors", 0)
    lines = command("pull", ID)[2].splitlines()
    status = f"{hub.url} answers {ID} with status 503; trying again in"
    assert lines[:2] == [f"{status} 1 s", f"{status} 2 s"]
    assert re.fullmatch(rf"the connection to {hub.url} fails \(.*\); trying again in 4 s", lines[2])


def test_ctrl_c_says_how_to_go_on(hub: Hub, source: Path, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(ID, source)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(puller, "convert", interrupt)
    code, _, err = command("pull", ID)
    assert (code, err) == (130, "stopped; the same command goes on from here\n")
