"""The structure that the README promises: dependencies point one way, and the package list is whole."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from functools import cache
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

from numoe.cli.settings import SETTINGS

ROOT = Path(__file__).parent.parent
PARTS = {"quant": set(), "engine": {"quant"}, "cli": {"engine", "quant"}}
TOKENIZING = ("tokenizer", "vocabulary", "folder_vocabulary", "gguf_vocabulary")
# A library -> the modules that may import it.
HOME = {
    "gguf": {"quant/stored/gguf.py", "quant/formats/ggml_grids.py"},
    "tokenizers": {f"engine/text/{name}.py" for name in TOKENIZING},
    "jinja2": {"engine/chat/template_process.py"},
    "huggingface_hub": {"engine/hub/network.py"},
    "psutil": {"engine/budget.py", "engine/measure/busy.py"},
    "platformdirs": {"engine/home.py"},
    "llguidance": {"engine/text/grammar.py"},
    "threadpoolctl": {"quant/compute/threads.py"},
    "ray": {"engine/experts/cluster.py"},
}
READMES = [ROOT / "README.md", *(file for part in (*PARTS, "tests") for file in (ROOT / part).rglob("README.md"))]
SCRIPTS = [file for file in (ROOT / "tests").rglob("*.py") if "__main__" in file.read_text(encoding="utf-8")]
CLI_ONLY = {"typer", "rich", "prompt_toolkit", "tomlkit", "click", "markdown_it"}


def modules() -> list[Path]:
    return [file for part in PARTS for file in sorted((ROOT / part).rglob("*.py"))]


@cache
def nodes(file: Path) -> list[ast.AST]:
    """All of a module, which several tests look through."""
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def imported(file: Path) -> Iterator[str]:
    for node in nodes(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module
            yield node.module


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file: Path) -> None:
    place = file.relative_to(ROOT)
    part = place.parts[0]
    for name in imported(file):
        top, _, rest = name.partition(".")
        assert top not in PARTS, f"{place} imports {name}: write numoe.{name}"
        if top == "numoe":
            assert rest.split(".")[0] in PARTS[part] | {part}, f"{place} imports {name}"
        elif top in HOME:
            assert str(place) in HOME[top], f"{place} imports {name}, which belongs to {HOME[top]}"
        elif top in CLI_ONLY:
            assert part == "cli", f"{place} imports {name}"
        elif top in {"starlette", "uvicorn"}:  # of an extra that need not be there
            assert place.parts[:2] == ("cli", "serve"), f"{place} imports {name}"
        assert top not in {"torch", "transformers", "numba", "scipy"}, f"{place} imports {name}"


def test_imports_go_round_in_no_circle() -> None:
    """Deferred imports and those for types alone are counted too."""
    found = {f"numoe.{'.'.join(file.relative_to(ROOT).with_suffix('').parts)}".removesuffix(".__init__"): file
             for file in modules()}  # fmt: skip
    needs = {name: {other for other in named(file) if other in found} - {name} for name, file in found.items()}
    order = TopologicalSorter(needs)
    order.prepare()  # raises CycleError, which names one


def named(file: Path) -> Iterator[str]:
    """The modules that a file imports; a package only where something is imported that is none of its modules."""
    for node in nodes(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = ROOT.joinpath(*node.module.split(".")[1:])
            for alias in node.names:
                inner = (below / f"{alias.name}.py").exists() or (below / alias.name).is_dir()
                yield f"{node.module}.{alias.name}" if inner else node.module


def test_a_setting_is_declared_once() -> None:
    found = [file.name for file in (ROOT / "cli").rglob("*.py") for _ in re.findall(r"\bmin_p\b", file.read_text())]
    assert len(found) <= 2, found


def test_messages_below_the_terminal_have_no_flags() -> None:
    """They name parameters, `ctx`, of which the terminal makes flags."""
    short = "|".join(setting.short for setting in SETTINGS if setting.short)
    flag = re.compile(rf"(?<![\w-])--[a-z]|(?<!\S)({short})(?![\w-])")
    for file in modules():
        if file.relative_to(ROOT).parts[0] == "cli":
            continue
        for node in nodes(file):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not flag.search(node.value), f"{file}:{node.lineno} names a flag: {node.value}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(ROOT)))
def test_scripts_import_what_there_is(script: Path) -> None:
    """Of ours: most scripts are run by hand, and seldom."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("numoe."):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                assert hasattr(importlib.import_module(str(node.module)), alias.name) or find_spec(whole), whole


def test_families_know_only_specifications() -> None:
    for file in (ROOT / "engine" / "families").glob("*.py"):
        for name in imported(file):
            allowed = r"numoe\.engine\.(layers|families)\b.*|numoe\.quant\.errors"
            assert not name.startswith("numoe") or re.fullmatch(allowed, name), f"{file.name} imports {name}"


def test_only_quant_knows_formats() -> None:
    """How matrices of a kind are computed with, and how a file keeps them, is behind faces that all have in common."""
    faces = {
        "formats": {"format", "pack", "qtensor", "resident", "samples"},
        "stored": {"arrays", "checked", "checkpoint", "gguf_sets", "handle", "manifest", "quantization", "shards"},
    }
    for file in [file for file in modules() if "quant" not in file.relative_to(ROOT).parts]:
        for name in named(file):
            room, _, module = name.removeprefix("numoe.quant.").partition(".")
            assert not name.startswith("numoe.quant.") or room not in faces or module in faces[room], (
                f"{file.relative_to(ROOT)} imports {name}"
            )


def test_every_golden_file_has_the_script_that_made_it() -> None:
    makers = [*(ROOT / "tests" / "reference").rglob("make_*.py"), ROOT / "tests" / "first_hour.py"]
    scripts = "".join(file.read_text(encoding="utf-8") for file in makers)
    golden = {file.stem for file in (ROOT / "tests" / "golden").iterdir()}
    assert [stem for stem in sorted(golden) if not re.search(rf"\b{stem}\b", scripts)] == []


def test_every_package_is_installed() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    top = ROOT / "cli" / "numoe"  # which lies elsewhere: `python -m numoe`
    folders = {file.parent for file in modules()} - {top}
    assert set(tools["packages"]) == {"numoe", *("numoe." + ".".join(f.relative_to(ROOT).parts) for f in folders)}
    assert tools["package-dir"] == {"numoe": "cli/numoe"} | {f"numoe.{part}": part for part in PARTS}


def test_every_dependency_is_used_and_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    given = [*project["dependencies"], *project["optional-dependencies"]["ray"]]
    declared = {re.split(r"[<>=\[]", one)[0].replace("-", "_").removesuffix("_py") for one in given}
    used = {name.split(".")[0] for file in modules() for name in imported(file)}
    assert declared <= used, f"declared and never imported: {declared - used}"
    assert (used & (set(HOME) | CLI_ONLY | {"numpy"})) - {"click"} <= declared


@pytest.mark.parametrize("readme", READMES, ids=lambda file: str(file.relative_to(ROOT)))
def test_readmes_name_what_there_is(readme: Path) -> None:
    """Files beside them, links, and paths from the top; blocks of code may be about others."""
    text = re.sub(r"^```.*?^```$", "", readme.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    beside = re.findall(r"^\| ([^|]*`[^|]*) \|", text, re.MULTILINE)  # the first columns of tables of rooms
    near = [name for cell in beside for name in re.findall(r"`([\w./]+\.py|[\w./]+/)`", cell)]
    near += re.findall(r"\]\(([^):#]+)\)|`(?=\.\./)([\w./]+)`", text)
    far = re.findall(rf"(?<![\w/])(?:{'|'.join(PARTS)}|tests)/[\w./-]*\w", text)
    tests = {file.name for file in (ROOT / "tests").rglob("*.py")}
    missing = [name for name in re.findall(r"\btest_\w+\.py", text) if name not in tests]
    missing += [name for name in near if not (readme.parent / "".join(name)).exists()]
    missing += [name for name in far if not (ROOT / name).exists()]
    assert not missing


def test_the_recipes_of_the_readmes_are_complete() -> None:
    """A family and a kind of their blocks of code are all that a copy of numoe needs to run models of them."""
    subprocess.run([sys.executable, ROOT / "tests" / "reference" / "recipe.py"], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a wheel that is built in a used checkout, whose build/ holds modules that are gone."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in (*PARTS, "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, checkout / name)
    for gone in ("lib/numoe/engine/gone.py", "lib/numoe/gone/__init__.py", "lib/gone.py"):
        (checkout / "build" / gone).parent.mkdir(parents=True, exist_ok=True)
        (checkout / "build" / gone).touch()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-build-isolation", "-w", str(checkout / "dist"), str(checkout)], check=True)
    with zipfile.ZipFile(next((checkout / "dist").glob("*.whl"))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_wheel_holds_the_modules_that_there_are(wheel: dict[str, bytes]) -> None:
    held = {name for name in wheel if name.endswith(".py")}
    where = (file.relative_to(ROOT).as_posix().removeprefix("cli/numoe/") for file in modules())
    assert held == {f"numoe/{name}" for name in where}


def test_a_wheel_holds_types_and_the_model_that_ships_in_it(wheel: dict[str, bytes]) -> None:
    others = {name for name in wheel if not name.endswith(".py") and ".dist-info/" not in name}
    tiny = (f"numoe/engine/tiny/{file.name}" for file in (ROOT / "engine" / "tiny").iterdir())
    assert others == {*(f"numoe/{part}/py.typed" for part in PARTS), *tiny}


def test_a_wheel_tells_what_it_is(wheel: dict[str, bytes]) -> None:
    told = message_from_bytes(next(data for name, data in wheel.items() if name.endswith(".dist-info/METADATA")))
    assert told["Name"] == "numoe"
    assert told["License-Expression"] == "MIT"
    assert told["License-File"] == "LICENSE"
    assert told["Description-Content-Type"] == "text/markdown"
    assert told.get_payload(decode=True) == (ROOT / "README.md").read_bytes()
    classifiers = told.get_all("Classifier", [])
    assert "Typing :: Typed" in classifiers
    versions = {one.rpartition(" ")[2] for one in classifiers if re.search(r":: Python :: 3\.\d+$", one)}
    assert versions == {f"3.{minor}" for minor in range(11, 15)}
    assert told["Requires-Python"] == ">=3.11"
    entry_points = next(data for name, data in wheel.items() if name.endswith(".dist-info/entry_points.txt"))
    assert b"numoe = numoe.cli.start:start" in entry_points
