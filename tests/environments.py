"""The tests where other people run them: `python tests/environments.py [--quick] [NAME ...] [PYTEST ARGUMENT ...]`.

Without names in all environments of `ENVIRONMENTS`, one after the other. --quick: only tests of what differs between
them. The exit code is 0 when all passed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
NEWEST = 14  # of Python 3 that is looked for
NOBODY = "65534"
QUICK = ("cli/test_cli.py", "engine/test_tiny_model.py", "engine/test_tokenizer.py", "quant/test_gguf.py")
WARNINGS = ("-W", "error", "-W", "ignore::RuntimeWarning:numoe")  # as `numoe.engine` does: results are looked at


@dataclass(frozen=True)
class Environment:
    """Where tests run.

    python: makes the interpreter that runs them, in a folder that is its own. before: what its command begins with.
    arguments: of pytest. variables: of the system.
    """

    python: Callable[[Path], str] = lambda folder: sys.executable
    before: Callable[[Path], list[str]] = lambda folder: []
    arguments: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


def _installed(base: str, folder: Path, *wanted: str, checkout: Path = ROOT) -> str:
    """The interpreter of a new environment with a checkout and what else is wanted."""
    python = str(folder / "venv" / "bin" / "python")
    subprocess.run([base, "-m", "venv", folder / "venv"], check=True)
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *wanted]
    subprocess.run([*pip, "-e", f"{checkout}[dev]"], check=True)
    return python


def _oldest(folder: Path) -> str:
    """Python 3.11 with the lowest versions that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return _installed(_python(range(11, 12)), folder, *(one.replace(">=", "==") for one in project["dependencies"]))


def _newest(folder: Path) -> str:
    """The newest Python that is there with the newest versions."""
    return _installed(_python(range(NEWEST, 10, -1)), folder, "--upgrade")


def _python(minors: range) -> str:
    """The first of these Pythons that is there: on the PATH, or of pyenv, whose names there need not run."""
    for minor in minors:
        kept = sorted((Path.home() / ".pyenv" / "versions").glob(f"3.{minor}.*/bin/python"))
        for found in (shutil.which(f"python3.{minor}"), *reversed(kept)):
            if found and not subprocess.run([found, "-c", ""], capture_output=True).returncode:
                return str(found)
    raise SystemExit(f"there is no Python 3.{minors[0]}; install it")


def _for_nobody(folder: Path) -> str:
    """An interpreter and a checkout that everybody can read, as those in root's home are not."""
    folder.chmod(0o755)
    (folder / "home").mkdir(mode=0o555)
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o777)
    shutil.copytree(ROOT, folder / "checkout", ignore=shutil.ignore_patterns(".*", "__pycache__"))
    (folder / "checkout" / ".pytest_cache").mkdir()
    (folder / "checkout" / ".pytest_cache").chmod(0o777)
    reachable = ("/usr/bin/python3", "/usr/local/bin/python3", sys.executable)
    base = next(one for one in reachable if Path(one).exists())
    return _installed(base, folder, checkout=folder / "checkout")


def _as_nobody(folder: Path) -> list[str]:
    """Somebody who is not root, and whose home cannot be written."""
    user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if os.getuid() == 0 else []
    return [*user, "env", f"HOME={folder / 'home'}", f"TMPDIR={folder / 'tmp'}"]


ENVIRONMENTS = {
    "oldest": Environment(_oldest),
    "newest": Environment(_newest, arguments=WARNINGS),
    # As on macOS and Windows. The tests of workers ask for some.
    "threads": Environment(arguments=("-p", "without_fork", "--ignore=tests/quant/test_workers.py")),
    "haswell": Environment(variables={"OPENBLAS_CORETYPE": "Haswell"}),
    "user": Environment(_for_nobody, _as_nobody),
}


def main(*arguments: str) -> int:
    """Run, and return the exit code."""
    quick = "--quick" in arguments
    names = [one for one in arguments if one in ENVIRONMENTS] or list(ENVIRONMENTS)
    rest = [one for one in arguments if one not in (*ENVIRONMENTS, "--quick")]
    if quick:
        rest += [f"tests/{file}" for file in QUICK]
    failed = []
    for name in names:
        one = ENVIRONMENTS[name]
        with tempfile.TemporaryDirectory() as folder:
            python = one.python(Path(folder))
            command = [*one.before(Path(folder)), python, "-m", "pytest", *one.arguments, *rest]
            said = subprocess.run([python, "-VV"], capture_output=True, text=True).stdout.strip()
            print(f"== {name}: {re.sub(' .main.*', '', said)}", flush=True)
            copy = Path(folder) / "checkout"
            place = copy if copy.exists() else ROOT
            variables = {"PYTHONPATH": str(place / "tests"), **one.variables}
            if subprocess.run(command, cwd=place, env={**os.environ, **variables}).returncode:
                failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else f"passed in {', '.join(names)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
