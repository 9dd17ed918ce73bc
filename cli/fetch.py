"""A model that is asked for and is not here yet: whether it runs, and then the download of it."""

from __future__ import annotations

import inspect

from numoe.cli.config import options_of
from numoe.cli.output import Output
from numoe.cli.pull import pull
from numoe.cli.settings import Options, Recipe
from numoe.quant.errors import DoesNotFit


def fetch_missing(model: str, options: Options, output: Output) -> None:
    """Pull a model that is not here, in the most precise format that it runs best in.

    Raises:
        DoesNotFit: it runs in none.
        InputError: see `numoe.engine.pull.pull`.
    """
    from numoe.engine import home
    from numoe.engine.budget import Budget
    from numoe.engine.hub.hub_id import is_hub_id
    from numoe.engine.hub.repository import repository
    from numoe.engine.plan import Verdict, format_bytes
    from numoe.engine.pull import describe_runnable

    if home.lookup(model) is not None:
        return
    if not is_hub_id(model):
        raise home.unknown(model)
    output.status(f"asking the hub for {model}")
    description = describe_runnable(repository(model))
    room = Budget(options["ram"]).total
    plans = {
        quant: description.plan(options["ctx"], quant.value) for quant in (Recipe.NATIVE, Recipe.INT8, Recipe.INT4)
    }
    order = list(Verdict)
    best = min(plans, key=lambda quant: order.index(plans[quant].verdict(room)))
    verdict = plans[best].verdict(room)
    if verdict is Verdict.TOO_LARGE:
        least = format_bytes(min(plan.least_bytes for plan in plans.values()))
        raise DoesNotFit(
            f"{model} needs {least} of memory and {format_bytes(room)} are there; `numoe fit {model}` tells more"
        )
    download = format_bytes(plans[Recipe.NATIVE].disk_bytes)
    output.note(f"{model} as {best}: {verdict}; {download} to download.")
    chosen = options_of("pull", options)
    chosen["quant"] = best
    inspect.unwrap(pull)(model, options=chosen)
