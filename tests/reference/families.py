"""Print each family's lines, and what it shares: the kinds its layers are made of and the families it builds on.

Run: python tests/reference/families.py
     python tests/reference/families.py --table     the table of engine/families/README.md
"""

import ast
import inspect
import statistics
import sys
from pathlib import Path

from numoe.engine.families import found
from numoe.engine.families.names import Family


def families() -> list[Family]:
    return list({family.model_types: family for family in found().values()}.values())


def lines() -> str:
    """A line a family, and the median of their lengths."""
    lengths, rows = [], []
    for family in families():
        source = Path(inspect.getfile(sys.modules[family.reader.__module__])).read_text(encoding="utf-8")
        lengths.append(len(source.splitlines()))
        rows.append(f"{lengths[-1]:4}  {', '.join(family.model_types):55} {', '.join(sorted(_shared(source)))}")
    return "\n".join([*rows, f"{statistics.median(lengths):4.0f}  median"])


def table() -> str:
    """Families, what config.json and GGUF files call them."""
    rows = ["| family | `model_type` | GGUF architecture |", "| --- | --- | --- |"]
    for family in families():
        types = [f"`{one}`" for one in family.model_types if not one.endswith("_text")]
        architectures = [f"`{one.architecture}`" for one in family.gguf]
        rows.append(f"| {family.title} | {', '.join(types)} | {', '.join(architectures)} |".replace("|  |", "| |"))
    return "\n".join(rows) + "\n"


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
    print(table() if "--table" in sys.argv else lines())
