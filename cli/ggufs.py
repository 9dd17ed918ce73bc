"""What `numoe fit` tells of a repository that holds several models in GGUF: their sizes, and which run here."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import typer

from numoe.cli.output import Output
from numoe.cli.settings import spelled
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from numoe.engine import Plan
    from numoe.engine.hub.repository import Repository
    from numoe.engine.plan import Verdict
    from numoe.quant.stored.gguf_sets import GgufSet


def tell_ggufs(output: Output, remote: Repository, room: int, ctx: int | None, json: bool) -> None:
    """List the models in GGUF of a repository.

    Which run in `room` bytes follows from the header of the smallest and the sizes of the others.

    Raises:
        typer.Exit: none runs here.
    """
    from numoe.engine.hub.gguf import size_of
    from numoe.engine.plan import Verdict, format_bytes

    output.status(f"reading a header of {remote.repo_id}")
    plan, reason = _planned(remote, ctx)
    verdicts = {one.name: _verdict(remote, one, plan, room) for one in remote.ggufs}
    running = [one for verdict in (Verdict.IN_MEMORY, Verdict.FROM_DISK) for one in _from_largest(remote)
               if verdicts[one.name] is verdict]  # fmt: skip
    output.clear_status()
    if json:
        listed = [
            {
                "name": one.name,
                "bytes": size_of(remote, one),
                "files": list(one.files),
                "missing": list(one.missing),
                "verdict": verdicts[one.name],
            }
            for one in remote.ggufs
        ]
        document = {"model": remote.repo_id, "ram_bytes": room, "context": plan.context if plan else None}
        output.document(document | {"ggufs": listed} | ({"unsupported": reason} if reason else {}))
    else:
        output.text(f"{remote.repo_id}, {len(remote.ggufs)} models in GGUF")
        output.text()
        rows = [(one.name, format_bytes(size_of(remote, one)), _told(one, verdicts[one.name])) for one in remote.ggufs]
        output.table([("", "size", f"in {format_bytes(room)}"), *rows], numbers=[1])
        output.text()
        context = f"With {plan.context} tokens of context, by the smallest one's header" if plan else ""
        output.table([(f"{context} and the sizes of the others." if plan else f"Not supported yet: {reason}.",)])
        output.text()
        output.text("Nothing was downloaded." + (" More of the largest that runs best:" if running else ""))
        if running:
            output.text(f"numoe fit {remote.repo_id}:{running[0].name}")
    if not running:
        raise typer.Exit(2)


def _from_largest(remote: Repository) -> list[GgufSet]:
    from numoe.engine.hub.gguf import size_of

    return sorted(remote.ggufs, key=partial(size_of, remote), reverse=True)


def _planned(remote: Repository, ctx: int | None) -> tuple[Plan | None, str]:
    """What the smallest whole model takes; None, and why, where numoe does not run it."""
    from numoe.engine.hub.network import HubError
    from numoe.engine.pull import describe_runnable

    whole = [one for one in reversed(_from_largest(remote)) if not one.missing]
    if not whole:
        return None, "none of them is there with all its parts"
    try:
        return describe_runnable(remote, whole[0]).plan(ctx), ""
    except HubError:
        raise
    except InputError as reason:
        return None, spelled(str(reason))


def _verdict(remote: Repository, one: GgufSet, plan: Plan | None, room: int) -> Verdict | None:
    from numoe.engine.hub.gguf import size_of

    return None if plan is None or one.missing else plan.of_size(size_of(remote, one)).verdict(room)


def _told(one: GgufSet, verdict: Verdict | None) -> str:
    return f"lacks {one.missing[0]}" if one.missing else str(verdict or "")
