"""Functions fit on a screen: at most 60 lines and 8 parameters."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINES, PARAMETERS = 60, 8


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Those of a module with their qualified names, inner ones too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{child.name}", child
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from functions(child, f"{prefix}{child.name}." if named else prefix)


def too_large() -> dict[str, tuple[int, int]]:
    """File:function -> (lines, parameters); self and cls do not count."""
    found = {}
    for part in ("quant", "engine", "cli"):
        for file in sorted((ROOT / part).rglob("*.py")):
            for name, function in functions(ast.parse(file.read_text(encoding="utf-8"))):
                given = function.args
                every = (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg)
                lines = (function.end_lineno or 0) - function.lineno + 1
                size = lines, len([each for each in every if each and each.arg not in ("self", "cls")])
                if size[0] > LINES or size[1] > PARAMETERS:
                    found[f"{file.relative_to(ROOT)}:{name}"] = size
    return found


def test_functions_fit_on_a_screen() -> None:
    assert too_large() == {}
