"""Print each family's lines, and what it shares: the kinds its layers are made of and the families it builds on.

Run: python tests/reference/families.py
"""

import ast
import inspect
import statistics
import sys
from pathlib import Path

from numoe.engine.families import FAMILIES


def main() -> None:
    lines: dict[str, int] = {}
    for model_types in dict.fromkeys(family.model_types for family in FAMILIES.values()):
        module = sys.modules[FAMILIES[model_types[0]].reader.__module__]
        source = Path(inspect.getfile(module)).read_text(encoding="utf-8")
        shared = sorted(_shared(source))
        lines[model_types[0]] = len(source.splitlines())
        print(f"{lines[model_types[0]]:4}  {', '.join(model_types):55} {', '.join(shared)}")
    print(f"{statistics.median(lines.values()):4.0f}  median")


def _shared(source: str) -> set[str]:
    """The modules of layers and families that a family's file imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module.startswith("numoe.engine.layers."):
                found.add(node.module.rpartition(".")[2])
            elif node.module == "numoe.engine.families":
                found |= {alias.name for alias in node.names}
    return found


if __name__ == "__main__":
    main()
