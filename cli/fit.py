"""`numoe fit`: what a model takes on this machine, before it is downloaded."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import typer

from numoe.cli import arguments
from numoe.cli.asked import Asked, Column
from numoe.cli.ggufs import tell_ggufs
from numoe.cli.output import Output
from numoe.cli.settings import Options, spelled, takes
from numoe.cli.unsupported import opened, tell_totals
from numoe.quant.errors import InputError, WrongUsage

if TYPE_CHECKING:
    from numoe.engine import Description, Plan
    from numoe.engine.hub.repository import Repository
    from numoe.engine.measure.forecast import Machine

_CONTEXTS = 8192, 32768


@takes(
    "quant", "ram", "ctx", "kv", "revision", "read_gb_s", "cores", "nodes", "link", "measure", "chart", "json",
    quant=None,
)  # fmt: skip
def fit(model: arguments.Model, options: Options) -> None:
    """Tell what a model takes before it is downloaded.

    Examples:
    numoe fit Qwen/Qwen3-30B-A3B
    numoe fit deepseek-ai/DeepSeek-V4-Flash --ram 24GB
    numoe fit deepseek-ai/DeepSeek-V4-Pro --nodes 4x64GB --link 1Gbit
    """
    with Output() as output:
        from numoe.cli.charts import check
        from numoe.cli.nodes import Nodes, nodes_asked, tell_nodes
        from numoe.engine.budget import Budget
        from numoe.engine.plan import Verdict

        check(options["chart"], options["json"])
        Budget(options["ram"])  # what is no amount is refused before the hub is asked
        rams = nodes_asked(options)
        description, remote, name = _described(model, options, output)
        quants = _quants(description, options.stated.get("quant"))
        plans = {quant: description.plan(options["ctx"], quant, options["kv"]) for quant in quants}
        machine = _machine(output, list(plans.values()), options)
        if rams:
            tell_nodes(output, Nodes.asked(name, description, remote, plans, machine, rams, options["link"]), options)
            return
        memory = Budget(options["ram"], machine.process_bytes)
        columns = {
            quant: _column(description, remote, quant, plan, options["ctx"], machine, memory.total)
            for quant, plan in plans.items()
        }
        asked = Asked(name, description, remote, memory, machine, columns)
        output.clear_status()
        if options["json"]:
            output.document(_document(asked))
        else:
            from numoe.cli.verdict import tell

            tell(output, asked)
        if options["chart"] is not None:
            from numoe.cli.charts import draw
            from numoe.cli.verdict import charts

            draw(output, charts(asked), options["chart"])
        if all(column.forecast.verdict is Verdict.TOO_LARGE for column in columns.values()):
            raise typer.Exit(2)


def _described(model: str, options: Options, output: Output) -> tuple[Description, Repository | None, str]:
    """A model that is here, or on the hub, and its name. Of others what can be said is, and the command ends."""
    from numoe.engine import describe, home
    from numoe.engine.hub.hub_id import named

    name, revision = named(model)
    revision = options["revision"] or revision
    output.status(f"reading the headers of {name}")
    path = home.lookup(name) if revision is None else None
    if path is None:
        return _distant(name, revision, options, output)
    try:
        return describe(path), None, model
    except InputError as reason:
        if (found := opened(path)) is None:
            raise
        tell_totals(output, model, *found, 0, spelled(str(reason)), options["json"])
        raise typer.Exit(2) from None


def _distant(
    name: str, revision: str | None, options: Options, output: Output
) -> tuple[Description, Repository | None, str]:
    """As `_described`, of a model on the hub."""
    from numoe.engine import home
    from numoe.engine.budget import Budget
    from numoe.engine.hub.gguf import chosen, distant_checkpoint
    from numoe.engine.hub.hub_id import parted
    from numoe.engine.hub.network import HubError
    from numoe.engine.hub.repository import repository
    from numoe.engine.measure.machine import process_bytes
    from numoe.engine.pull import describe_runnable
    from numoe.engine.totals import convention_of

    def wait(seconds: float, trouble: str) -> None:
        output.trouble(trouble)
        time.sleep(seconds)

    where = parted(name)
    if where is None and home.lookup(name) is not None:
        raise WrongUsage(f'`revision` is of a repository of the hub, and "{name}" is here; leave it out')
    if where is None:
        raise home.unknown(name)
    remote = repository(where[0], revision, wait)
    if not where[1] and not remote.in_safetensors and len(remote.ggufs) > 1:
        if options.stated.get("quant") not in (None, "native"):
            chosen(remote, "")  # says which there are
        tell_ggufs(output, remote, Budget(options["ram"], process_bytes()).total, options["ctx"], options["json"])
        raise typer.Exit
    gguf = chosen(remote, where[1])
    try:
        called = f"{remote.repo_id}:{where[1]}" if where[1] else remote.repo_id
        return describe_runnable(remote, gguf), remote, called
    except HubError:
        raise
    except InputError as reason:
        if gguf:
            checkpoint = distant_checkpoint(remote, gguf)
            config = checkpoint.metadata
        else:
            config = remote.config()
            checkpoint = remote.checkpoint(convention_of(config))
        download = sum(info.nbytes for info in checkpoint.tensors.values())
        tell_totals(output, remote.repo_id, checkpoint, config, download, spelled(str(reason)), options["json"])
        raise typer.Exit(2) from None


def _quants(description: Description, asked: str | None) -> list[str]:
    """The formats that one can have the model in: as it is, and as is asked for or, of what is released, all by name.

    Raises InputError where what is asked for cannot be made of it.
    """
    from numoe.quant.convert.recipes import RECIPES
    from numoe.quant.stored.manifest import read_manifest

    manifest = read_manifest(description.path)
    if asked or manifest or description.metadata is not None:
        return list(dict.fromkeys([manifest.recipe if manifest else "native", *([asked] if asked else [])]))
    return list(RECIPES)


def _machine(output: Output, plans: list[Plan], options: Options) -> Machine:
    """This machine, or the one that is asked about, which may read experts of these plans from its disk."""
    from numoe.engine.budget import Budget
    from numoe.engine.measure.machine import calibrate
    from numoe.engine.plan import Verdict

    read_gb_s, cores = options["read_gb_s"], options["cores"]
    kinds = {stored.kind for plan in plans for _, stored in plan.sizes}
    several = options["nodes"] is not None
    machine = calibrate(told=output.status, anew=options["measure"], kinds=kinds, calls=several)
    room = Budget(options["ram"], machine.process_bytes).total
    every = several or options["chart"] is not None
    streams = [plan for plan in plans if every or plan.verdict(room) is Verdict.FROM_DISK]
    sizes = [plan.largest_expert for plan in streams if plan.largest_expert]
    if read_gb_s is not None:
        for nbytes in sizes:
            machine = machine.with_reading(nbytes, read_gb_s * 1e9)
    elif sizes:
        machine = calibrate(sizes, output.status)
    return machine.with_cores(cores) if cores else machine


def _column(
    description: Description,
    remote: Repository | None,
    quant: str,
    plan: Plan,
    ctx: int | None,
    machine: Machine,
    room: int,
) -> Column:
    from numoe.engine.layers.rows import INT8
    from numoe.engine.plan import kv_bytes

    limit = description.spec.context
    contexts = [ctx] if ctx else [*(context for context in _CONTEXTS if context < limit), limit]
    shards = []
    if remote and (quant != "native" or description.metadata is None):  # else nothing is there but itself
        paths = {info.path for info in description.checkpoint.tensors.values()}
        shards = sorted(remote.files[path.relative_to(remote.repo_id).as_posix()].size for path in paths)
    kv = {context: kv_bytes(description.spec, context, plan.kv) for context in contexts}
    small = kv_bytes(description.spec, plan.context, INT8)
    disk = plan.disk_bytes + sum(shards[-2:])
    return Column(plan, disk, kv, small, machine.forecast(plan, room), machine.process_bytes, plan.widens(room))


def _document(asked: Asked) -> dict[str, Any]:
    from numoe.engine.budget import machine_memory

    columns = asked.columns
    return {
        "model": asked.model,
        "family": asked.description.spec.family,
        "download_bytes": columns["native"].plan.disk_bytes if asked.remote else 0,
        "ram_bytes": asked.memory.allowed,
        "machine_bytes": machine_memory()[0],
        "context": next(iter(columns.values())).plan.context,
        "formats": {
            quant: {
                "disk_bytes": column.plan.disk_bytes,
                "peak_disk_bytes": column.peak_disk_bytes,
                "resident_bytes": column.plan.resident_bytes,
                "kv_bytes": {str(context): nbytes for context, nbytes in column.kv_bytes.items()},
                "expert_bytes": column.forecast.expert_bytes,
                "expert_share": column.expert_share,
                "scratch_bytes": column.plan.scratch_bytes,
                "process_bytes": column.process_bytes,
                "peak_memory_bytes": column.forecast.peak_bytes,
                "least_ram_bytes": column.least_ram_bytes,
                "whole_ram_bytes": column.whole_ram_bytes,
                "wide_bytes": column.plan.wide_bytes,
                "tokens_per_s": list(column.forecast.decode),
                "prompt_tokens_per_s": list(column.forecast.prefill),
                "verdict": column.forecast.verdict,
            }
            for quant, column in columns.items()
        },
    }
