"""`numoe verify`: whether every byte of a model is as it was made."""

from __future__ import annotations

import typer

from numoe.cli import arguments
from numoe.cli.output import Output
from numoe.cli.settings import Options, takes


@takes("repair", "json")
def verify(model: arguments.Model, options: Options) -> None:
    """Compare every byte of a model with its hashes."""
    with Output() as output:
        from numoe.engine import home
        from numoe.engine.plan import format_bytes
        from numoe.engine.verify import reopen
        from numoe.engine.verify import verify as check

        folder = home.locate(model)
        pulled = next((one for one in home.models() if one.path == folder), None)
        read = f"reading {folder.name}: {{}} of {{}}"
        found = check(folder, lambda done, total: output.status(read.format(format_bytes(done), format_bytes(total))))
        wrong = {"damaged": found.damaged, "missing": found.missing, "extra": found.extra}
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
                output.text(f"Get what is missing: numoe pull {pulled.repo_id} --quant {pulled.quant}")
            elif pulled and (found.damaged or found.missing):
                output.text(f"Get these anew: numoe verify {pulled.name} --repair")
        if not found.whole:
            raise typer.Exit(1)
