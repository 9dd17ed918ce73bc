"""A model that is asked for and is not here yet: whether it runs, and then the download of it."""

from __future__ import annotations

import inspect

from numoe.cli.config import options_of
from numoe.cli.output import Output
from numoe.cli.pull import pull
from numoe.cli.settings import Options
from numoe.quant.errors import DoesNotFit


def fetch_missing(model: str, options: Options, output: Output) -> None:
    """Pull a model that is not here, in the most precise format that it runs best in.

    Raises:
        DoesNotFit: it runs in none.
        InputError: see `numoe.engine.pull.pull`.
    """
    from numoe.engine import home
    from numoe.engine.hub.gguf import chosen
    from numoe.engine.hub.hub_id import parted
    from numoe.engine.hub.repository import repository
    from numoe.engine.plan import Verdict, format_bytes
    from numoe.engine.pull import describe_runnable
    from numoe.quant.convert.recipes import RECIPES

    if home.lookup(model) is not None:
        return
    where = parted(model)
    if where is None:
        raise home.unknown(model)
    output.status(f"asking the hub for {model}")
    remote = repository(where[0])
    gguf = chosen(remote, where[1])
    description = describe_runnable(remote, gguf)
    room = options.memory.total
    quants = ["native"] if gguf else sorted(RECIPES, key=["native", "int8", "int4"].index)
    plans = {quant: description.plan(options["ctx"], quant) for quant in quants}
    order = list(Verdict)
    best = min(plans, key=lambda quant: order.index(plans[quant].verdict(room)))
    verdict = plans[best].verdict(room)
    if verdict is Verdict.TOO_LARGE:
        least = format_bytes(min(plan.least_bytes for plan in plans.values()))
        raise DoesNotFit(
            f"{model} needs {least} of memory and {format_bytes(room)} are there; `numoe fit {model}` tells more"
        )
    download = format_bytes(plans["native"].disk_bytes)
    output.note(f"{model} as {best}: {verdict}; {download} to download.")
    taken = options_of("pull", options)
    taken["quant"] = best
    inspect.unwrap(pull)(model, options=taken)
