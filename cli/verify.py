"""`numoe verify`: whether every byte of a model is as it was made."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from numoe.cli import arguments
from numoe.cli.output import Output
from numoe.cli.settings import Options, spelled, takes

if TYPE_CHECKING:
    from numoe.engine.verify import Read


@takes("repair", "json")
def verify(model: arguments.Model, options: Options) -> None:
    """Compare every byte of a model with its hashes.

    Those are what `numoe pull` and `numoe quantize` write down. A GGUF file has none but in the hub's cache: elsewhere
    it is read, and its hash printed, to be compared with the one that its page on the hub shows.

    Examples:
    numoe verify tiny
    numoe verify Qwen/Qwen3-30B-A3B --repair
    """
    with Output() as output:
        from numoe.engine import home
        from numoe.engine.plan import format_bytes
        from numoe.engine.verify import reopen, verify_file
        from numoe.engine.verify import verify as check
        from numoe.quant.stored.checkpoint import is_gguf, only_gguf
        from numoe.quant.stored.manifest import read_manifest

        folder = home.locate(model)
        read = f"reading {folder.name}: {{}} of {{}}"

        def progress(done: int, total: int) -> None:
            output.status(read.format(format_bytes(done), format_bytes(total)))

        if folder.is_dir() and read_manifest(folder) is None:
            folder = only_gguf(folder) or folder
        if folder.is_file() and is_gguf(folder):
            _tell_file(output, model, folder, verify_file(folder, progress), options["json"])
            return
        pulled = next((one for one in home.models() if one.path == folder), None)
        found = check(folder, progress)
        wrong = {"damaged": found.damaged, "missing": found.missing, "extra": found.extra}
        command = pulled.command if pulled else ""
        repaired = options["repair"] and bool(found.damaged or found.missing)
        if repaired:
            reopen(folder, found)
        if options["json"]:
            counts = {"model": model, "path": str(folder), "files": len(found.good), "bytes": found.nbytes}
            output.document(counts | wrong | {"repaired": repaired})
        else:
            for kind, names in wrong.items():
                for name in names:
                    output.text(f"{kind}: {folder / name}".replace("\n", r"\n"))
            if found.whole:
                output.text(f"{len(found.good)} files, {format_bytes(found.nbytes)}, all as they were made")
            elif repaired and pulled:
                output.text(spelled(f"Get what is missing: `{command}`").replace("`", ""))
            elif pulled and (found.damaged or found.missing):
                output.text(f"Get these anew: numoe verify {pulled.name} --repair")
        if not found.whole:
            raise typer.Exit(1)


def _tell_file(output: Output, model: str, path: Path, read: Read, json: bool) -> None:
    from numoe.engine.plan import format_bytes

    if json:
        output.document({"model": model, "path": str(path), **asdict(read), "whole": read.whole})
    elif not read.whole:
        output.text(f"damaged: {path}; its SHA-256 is {read.sha256}, and the hub says {read.expected}")
    else:
        known = "as the hub has it" if read.expected else "whole by its header; no hash to compare with is here"
        output.text(f"{read.tensors} tensors, {format_bytes(read.nbytes)}, {known}")
        output.text(f"SHA-256 {read.sha256}")
    if not read.whole:
        raise typer.Exit(1)
