"""The structure that the README promises: dependencies point one way, and the package list is whole."""

import ast
import re
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = {"quant": set(), "engine": {"quant"}, "cli": {"engine", "quant"}}
TOKENIZING = ("tokenizer", "vocabulary", "folder_vocabulary", "gguf_vocabulary")
# A library -> the modules that may import it.
HOME = {
    "gguf": {"quant/stored/gguf.py", "quant/stored/gguf_blocks.py"},
    "tokenizers": {f"engine/text/{name}.py" for name in TOKENIZING},
    "jinja2": {"engine/chat/formats/jinja.py"},
    "huggingface_hub": {"engine/hub/network.py"},
    "psutil": {"engine/plan.py"},
    "platformdirs": {"engine/home.py"},
    "llguidance": {"engine/chat/constrain.py"},
    "threadpoolctl": {"quant/compute/threads.py"},
}
CLI_ONLY = {"typer", "rich", "prompt_toolkit", "tomlkit", "click"}


def modules() -> list[Path]:
    return [file for part in PARTS for file in sorted((ROOT / part).rglob("*.py"))]


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
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
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = ROOT.joinpath(*node.module.split(".")[1:])
            for alias in node.names:
                inner = (below / f"{alias.name}.py").exists() or (below / alias.name).is_dir()
                yield f"{node.module}.{alias.name}" if inner else node.module


def test_families_know_only_specifications() -> None:
    for file in (ROOT / "engine" / "families").glob("*.py"):
        for name in imported(file):
            allowed = r"numoe\.engine\.(layers|families)\b.*|numoe\.quant\.errors"
            assert not name.startswith("numoe") or re.fullmatch(allowed, name), f"{file.name} imports {name}"


def test_only_quant_knows_formats() -> None:
    """How matrices of a kind are computed with, and how a file keeps them, is behind faces that all have in common."""
    faces = {
        "formats": {"format", "pack", "qtensor", "resident", "samples"},
        "stored": {"arrays", "checkpoint", "handle", "manifest", "shards"},
    }
    for file in [file for file in modules() if "quant" not in file.relative_to(ROOT).parts]:
        for name in named(file):
            room, _, module = name.removeprefix("numoe.quant.").partition(".")
            assert not name.startswith("numoe.quant.") or room not in faces or module in faces[room], (
                f"{file.relative_to(ROOT)} imports {name}"
            )


def test_every_package_is_installed() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {file.parent for file in modules()}
    assert set(tools["packages"]) == {"numoe." + ".".join(f.relative_to(ROOT).parts) for f in folders}
    assert tools["package-dir"] == {f"numoe.{part}": part for part in PARTS}


def test_every_dependency_is_used_and_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=]", d)[0].replace("-", "_") for d in project["dependencies"]}
    used = {name.split(".")[0] for file in modules() for name in imported(file)}
    assert declared <= used, f"declared and never imported: {declared - used}"
    assert (used & (set(HOME) | CLI_ONLY | {"numpy"})) - {"click"} <= declared
