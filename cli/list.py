"""`numoe list`: the pulled models."""

from __future__ import annotations

from numoe.cli.output import Output
from numoe.cli.settings import Options, takes


@takes("json")
def list_models(options: Options) -> None:
    """List the pulled models, and pulls that have not finished.

    Examples:
    numoe list
    numoe list --json
    """
    from numoe.engine import home
    from numoe.engine.plan import format_bytes

    output = Output()
    models = home.models()
    if options["json"]:
        documents = [
            {
                "model": one.repo_id,
                "quant": one.quant,
                "bytes": one.nbytes,
                "complete": one.complete,
                "path": str(one.path),
            }
            for one in models
        ]
        output.document({"folder": str(home.models_folder()), "models": documents})
        return
    if not models:
        output.note(f"There are no models in {home.models_folder()}; `numoe pull MODEL` gets one.")
        return
    rows = [(one.repo_id, one.quant, format_bytes(one.nbytes), "" if one.complete else "unfinished") for one in models]
    output.table([("model", "quant", "size", ""), *rows], numbers=[2])
