"""`numoe search`: which repositories of the hub there are for a text, and whether they run here."""

from __future__ import annotations

import shutil
import time
from typing import Annotated

import typer

from numoe.cli.output import Output
from numoe.cli.settings import Options, takes
from numoe.quant.errors import WrongUsage

_NARROW = 60  # columns that a table has no room in
Text = Annotated[str, typer.Argument(help="Part of a repository's name.", show_default=False)]


@takes("ram", "results", "json")
def search(text: Text, options: Options) -> None:
    """List repositories of the hub that numoe runs, what they take, and whether that is here.

    Examples:
    numoe search qwen3
    numoe search "deepseek v4" --ram 64GB
    """
    if not text.strip():
        raise WrongUsage("TEXT is empty; give a part of a repository's name")
    with Output() as output:
        from numoe.engine.hub.search import search as find
        from numoe.engine.plan import format_bytes

        def wait(seconds: float, trouble: str) -> None:
            output.trouble(trouble)
            time.sleep(seconds)

        memory = options.memory
        output.status(f'searching the hub for "{text}"')
        found, others = find(text, limit=options["results"], wait=wait)
        rows = []
        for one in found:
            output.status(f"reckoning what {one.repo_id} takes")
            rows.append((one, one.best(memory.total)))
        if options["json"]:
            names = "model", "downloads", "gated", "download_bytes", "quant", "disk_bytes", "verdict"
            listed = [
                (one.repo_id, one.downloads, one.gated, one.nbytes, best.quant, best.disk_bytes, best.verdict)
                for one, best in rows
            ]
            models = [dict(zip(names, row, strict=True)) for row in listed]
            output.document({"text": text, "ram_bytes": memory.allowed, "others": others, "models": models})
            return
        if rows:
            table = [
                (one.repo_id, format_bytes(one.nbytes), best.quant, format_bytes(best.disk_bytes), best.verdict or "?")
                for one, best in rows
            ]
            if shutil.get_terminal_size().columns < _NARROW:
                for name, download, quant, disk, verdict in table:
                    output.table([(name,)])
                    output.table([(f"  {download} to download, {disk} as {quant}: {verdict}",)])
            else:
                output.table([("model", "download", "as", "on disk", "verdict"), *table], numbers=(1, 3))
        left = f"{others} more {'was' if others == 1 else 'were'} found that numoe does not run. " if others else ""
        if not rows:
            output.note(f'The hub has nothing for "{text}" that numoe runs. {left}'.strip())
            return
        first = next((one for one, best in rows if best.runs), found[0])
        given = f"{format_bytes(memory.allowed)} of memory {'allowed' if memory.given else 'that can be taken now'}"
        open_ = any(best.verdict is None for _, best in rows)
        untold = "?: it is larger than that, and runs from the disk if it has experts. " if open_ else ""
        output.note(f"{left}{untold}About, for {given}; exactly: numoe fit {first.repo_id}")
