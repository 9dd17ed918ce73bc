"""What `numoe fit` can say of a model that numoe does not run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numoe.cli.output import Output
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from numoe.engine.totals import Totals
    from numoe.quant.stored.checkpoint import Checkpoint


def opened(path: Path) -> tuple[Checkpoint, Mapping[str, Any]] | None:
    """A file or folder whose tensors can be listed, if it is one, and what it says of itself."""
    from numoe.engine.totals import convention_of
    from numoe.quant.documents import read_object
    from numoe.quant.stored.checkpoint import only_gguf, open_checkpoint

    try:
        path = (only_gguf(path) or path) if path.is_dir() else path
        if path.is_file():
            checkpoint = open_checkpoint(path)
            return checkpoint, checkpoint.metadata
        config = read_object(path / "config.json")
        return open_checkpoint(path, convention_of(config)), config
    except InputError:
        return None  # what is wrong with it has been said


@dataclass(frozen=True)
class Unsupported:
    """A model that numoe does not run, and why."""

    name: str
    totals: Totals
    download: int
    reason: str

    def document(self) -> dict[str, Any]:
        totals = self.totals
        return {
            "model": self.name,
            "download_bytes": self.download,
            "formats": {},
            "dtypes": totals.dtypes,
            "parameters": totals.parameters,
            "expert_bytes": totals.expert_bytes,
            "experts": totals.experts,
            "experts_per_token": totals.chosen,
            "table_bytes": totals.table_bytes,
            "aside_bytes": totals.aside_bytes,
            "resident_bytes": totals.resident_bytes,
            "unsupported": self.reason,
        }

    def tell(self, output: Output) -> None:
        from numoe.engine.plan import format_bytes, format_count

        totals, what = self.totals, "to download and on disk" if self.download else "on disk"
        output.text(self.name)
        output.table([(f"{totals.nbytes:,} bytes {what} ({format_bytes(totals.nbytes)})",)])
        output.text()
        rows = [
            (dtype, format_bytes(n), format_count(totals.parameters.get(dtype, 0)))
            for dtype, n in totals.dtypes.items()
        ]
        output.table([("", "bytes", "parameters"), *rows], numbers=[1, 2])
        output.text()
        taken = (
            f", of which a token takes {totals.chosen} of {totals.experts}" if totals.chosen and totals.experts else ""
        )
        parts = [
            (totals.expert_bytes, f"of routed experts{taken}: they could stay on disk"),
            (totals.table_bytes, "of tables of which a token takes some rows: they could stay on disk"),
            (totals.aside_bytes, "of what only drafts, sees or hears: text needs none of it"),
        ]
        for nbytes, words in parts:
            if nbytes:
                output.table([(f"{format_bytes(nbytes)} {words}.",)])
        if any(nbytes for nbytes, _ in parts):
            output.table([(f"{format_bytes(totals.resident_bytes)} of the rest would be in memory.",)])
            output.text()
        output.table([(f"Not supported yet: {self.reason}.",)])
        output.text("Nothing was downloaded.")


def tell_totals(
    output: Output, name: str, checkpoint: Checkpoint, config: Mapping[str, Any], download: int, reason: str, json: bool
) -> None:
    """What can be said of a model that numoe does not run."""
    from numoe.engine.totals import totals

    found = Unsupported(name, totals(checkpoint, config), download, reason)
    output.clear_status()
    if json:
        output.document(found.document())
    else:
        found.tell(output)
