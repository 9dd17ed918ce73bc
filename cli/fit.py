"""`numoe fit`: what a model takes on this machine, before it is downloaded."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from numoe.cli import arguments
from numoe.cli.output import Output
from numoe.cli.settings import Options, spelled, takes
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from numoe.engine import Description, Plan
    from numoe.engine.hub.repository import Repository
    from numoe.engine.measure.machine import Forecast, Machine
    from numoe.quant.stored.checkpoint import Checkpoint

_CONTEXTS = 8192, 32768


@dataclass(frozen=True)
class _Column:
    """What a model takes in one format."""

    plan: Plan
    peak_disk_bytes: int
    kv_bytes: dict[int, int]
    forecast: Forecast
    widens: bool

    @property
    def expert_share(self) -> float:
        return self.forecast.expert_bytes / self.plan.expert_bytes if self.plan.expert_bytes else 1.0


@takes("ram", "ctx", "read_gb_s", "cores", "json")
def fit(model: arguments.Model, options: Options) -> None:
    """Tell what a model takes before it is downloaded.

    Examples:
    numoe fit Qwen/Qwen3-30B-A3B
    numoe fit deepseek-ai/DeepSeek-V4-Flash --ram 24GB
    """
    ram, ctx, json = options["ram"], options["ctx"], options["json"]
    with Output() as output:
        from numoe.engine import describe, home
        from numoe.engine.budget import Budget
        from numoe.engine.hub.hub_id import is_hub_id
        from numoe.engine.hub.network import HubError
        from numoe.engine.hub.repository import repository
        from numoe.engine.plan import Verdict, format_bytes
        from numoe.engine.pull import describe_runnable

        def wait(seconds: float, trouble: str) -> None:
            output.status(trouble)
            time.sleep(seconds)

        room = Budget(ram).total
        output.status(f"reading the headers of {model}")
        path, remote = home.lookup(model), None
        if path is not None:
            try:
                description = describe(path)
            except InputError as reason:
                if not path.is_file() or (checkpoint := _opened(path)) is None:
                    raise
                _tell_totals(output, model, checkpoint, 0, spelled(str(reason)), json)
                raise typer.Exit(2) from None
        elif is_hub_id(model):
            remote = repository(model, wait=wait)
            try:
                description = describe_runnable(remote)
            except HubError:
                raise
            except InputError as reason:
                checkpoint = remote.checkpoint()
                download = sum(info.nbytes for info in checkpoint.tensors.values())
                _tell_totals(output, remote.repo_id, checkpoint, download, spelled(str(reason)), json)
                raise typer.Exit(2) from None
        else:
            raise home.unknown(model)
        plans = {quant: description.plan(ctx, quant) for quant in _quants(description)}
        streaming = [plan for plan in plans.values() if plan.verdict(room) is Verdict.FROM_DISK]
        machine = _machine(output, streaming, options["read_gb_s"], options["cores"])
        columns = {
            quant: _column(description, remote, quant, plan, ctx, machine, room) for quant, plan in plans.items()
        }
        output.clear_status()
        if json:
            output.document(_document(model, description, remote, room, columns))
        else:
            allowed = f"{format_bytes(room)} are {'free now' if ram is None else 'allowed'}"
            _tell(output, model, description, remote, columns, machine, allowed)
        if all(column.forecast.verdict is Verdict.TOO_LARGE for column in columns.values()):
            raise typer.Exit(2)


def _quants(description: Description) -> list[str]:
    """The formats that one can have the model in: a GGUF file and a converted folder only as they are."""
    from numoe.quant.convert.recipe import RECIPES
    from numoe.quant.stored.manifest import read_manifest

    if description.path.is_file():
        return ["native"]
    manifest = read_manifest(description.path)
    return [manifest.recipe] if manifest else list(RECIPES)


def _machine(output: Output, streaming: list[Plan], read_gb_s: float | None, cores: int | None) -> Machine:
    """This machine, or the one that is asked about; `streaming` will read from its disk."""
    from numoe.engine.measure.machine import calibrate

    sizes = [plan.largest_expert for plan in streaming]
    if read_gb_s is None:
        machine = calibrate(sizes, output.status)
    else:
        machine = calibrate(told=output.status)
        for nbytes in sizes:
            machine = machine.with_reading(nbytes, read_gb_s * 1e9)
    return machine.with_cores(cores) if cores else machine


def _column(
    description: Description,
    remote: Repository | None,
    quant: str,
    plan: Plan,
    ctx: int | None,
    machine: Machine,
    room: int,
) -> _Column:
    from numoe.engine.plan import kv_bytes

    limit = description.spec.context
    contexts = [ctx] if ctx else [*(context for context in _CONTEXTS if context < limit), limit]
    names = {info.path.name for info in description.checkpoint.tensors.values()} if remote else set()
    shards = sorted(remote.files[name].size for name in names) if remote else []
    kv = {context: kv_bytes(description.spec, context) for context in contexts}
    return _Column(plan, plan.disk_bytes + sum(shards[-2:]), kv, machine.forecast(plan, room), plan.widens(room))


def _document(
    model: str, description: Description, remote: Repository | None, room: int, columns: dict[str, _Column]
) -> dict[str, Any]:
    return {
        "model": model,
        "family": description.spec.family,
        "download_bytes": columns["native"].plan.disk_bytes if remote else 0,
        "ram_bytes": room,
        "context": next(iter(columns.values())).plan.context,
        "formats": {
            quant: {
                "disk_bytes": column.plan.disk_bytes,
                "peak_disk_bytes": column.peak_disk_bytes,
                "resident_bytes": column.plan.resident_bytes,
                "kv_bytes": {str(context): nbytes for context, nbytes in column.kv_bytes.items()},
                "expert_bytes": column.forecast.expert_bytes,
                "expert_share": column.expert_share,
                "peak_memory_bytes": column.forecast.peak_bytes,
                "least_ram_bytes": column.plan.least_bytes,
                "wide_bytes": column.plan.wide_bytes,
                "tokens_per_s": list(column.forecast.decode),
                "prompt_tokens_per_s": list(column.forecast.prefill),
                "verdict": column.forecast.verdict,
            }
            for quant, column in columns.items()
        },
    }


def _tell(
    output: Output,
    model: str,
    description: Description,
    remote: Repository | None,
    columns: dict[str, _Column],
    machine: Machine,
    allowed: str,
) -> None:
    from numoe.engine.plan import Verdict, format_bytes

    shown = list(columns.values())

    def row(name: str, cell: Callable[[_Column], str]) -> tuple[str, ...]:
        return name, *map(cell, shown)

    def sizes(name: str, count: Callable[[_Column], int]) -> tuple[str, ...]:
        return row(name, lambda column: format_bytes(count(column)))

    rows = [("", *columns), sizes("on disk", lambda c: c.plan.disk_bytes)]
    if remote:
        rows.append(sizes("while pulling", lambda c: c.peak_disk_bytes))
    rows.append(sizes("always in memory", lambda c: c.plan.resident_bytes))
    rows += [
        (f"KV, {context:,} tokens", *(format_bytes(c.kv_bytes[context]) for c in shown))
        for context in shown[0].kv_bytes
    ]
    if shown[0].plan.expert_bytes:
        rows.append(sizes("experts", lambda c: c.plan.expert_bytes))
        rows.append(sizes("memory for them", lambda c: c.forecast.expert_bytes))
        rows.append(row("holds", lambda c: f"{c.expert_share:.1%}"))
    rows.append(sizes("peak memory", lambda c: c.forecast.peak_bytes))
    rows.append(row("tokens a second", lambda c: _speed(c.forecast.decode)))
    rows.append(row("of a prompt", lambda c: _speed(c.forecast.prefill)))

    output.text(f"{model}, {description.spec.family}")
    if remote:
        download = columns["native"].plan.disk_bytes
        output.text(f"{download:,} bytes to download ({format_bytes(download)})")
    output.text()
    output.table(rows, numbers=range(1, len(rows[0])))
    reasons: dict[str, list[str]] = {}
    for quant, column in columns.items():
        reasons.setdefault(_reason(column, allowed), []).append(quant)
    for reason, quants in reasons.items():
        output.text()
        output.table([(f"{', '.join(quants)}: {reason}",)])
    output.text()
    output.table([(_about_speed(machine, [c.plan for c in shown if c.forecast.verdict is Verdict.FROM_DISK]),)])
    output.text()
    if remote:
        _tell_the_way(output, model, columns)
    else:
        output.text("Nothing to download: it is here.")


def _tell_the_way(output: Output, model: str, columns: dict[str, _Column]) -> None:
    """How to get the best format there is room for: of those that run best the one that is most precise."""
    from numoe.engine.home import models_folder
    from numoe.engine.plan import Verdict, format_bytes

    running = {quant: column for quant, column in columns.items() if column.forecast.verdict is not Verdict.TOO_LARGE}
    ranked = sorted(running, key=lambda quant: list(Verdict).index(running[quant].forecast.verdict))
    folder = models_folder()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
    best = next((quant for quant in ranked if running[quant].peak_disk_bytes <= free), None)
    if ranked and best != ranked[0]:
        needed = format_bytes(running[ranked[0]].peak_disk_bytes)
        short = f"{folder}: pulling {ranked[0]} takes {needed} and {format_bytes(free)} are free"
        output.table([(f"{short}; make room, or set NUMOE_HOME to a folder on another disk.",)])
        output.text()
    if best is None:
        output.text("Nothing was downloaded.")
        return
    output.text("Nothing was downloaded. To do so:")
    output.text(f"numoe pull {model} --quant {best}")


def _opened(path: Path) -> Checkpoint | None:
    """A file whose tensors can be listed, if it is one."""
    from numoe.quant.stored.checkpoint import open_checkpoint

    try:
        return open_checkpoint(path)
    except InputError:
        return None  # what is wrong with it has been said


def _tell_totals(output: Output, name: str, checkpoint: Checkpoint, download: int, reason: str, json: bool) -> None:
    """What can be said of a model that numoe does not run."""
    from numoe.engine.plan import format_bytes

    dtypes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        dtypes[info.dtype] += info.nbytes
    total, what = dtypes.total(), "to download and on disk" if download else "on disk"
    output.clear_status()
    if json:
        document = {"model": name, "download_bytes": download, "formats": {}, "dtypes": dict(dtypes)}
        output.document(document | {"unsupported": reason})
        return
    output.text(name)
    output.text(f"{total:,} bytes {what} ({format_bytes(total)})")
    output.text()
    output.table([(dtype, format_bytes(nbytes)) for dtype, nbytes in dtypes.most_common()], numbers=[1])
    output.text()
    output.table([(f"Not supported yet: {reason}.",)])
    output.text("Nothing was downloaded.")


def _reason(column: _Column, allowed: str) -> str:
    """The verdict, the number that decided it, and what would change it."""
    from numoe.engine.plan import Verdict, format_bytes

    plan, verdict = column.plan, column.forecast.verdict
    everything = f"Weights and {plan.context} tokens of context take {format_bytes(plan.total_bytes)}; {allowed}"
    streams = plan.least_bytes < plan.total_bytes
    if verdict is Verdict.IN_MEMORY:
        below = f"runs from disk, down to --ram {_ram(plan.least_bytes)}" if streams else "does not run"
        faster = ""
        if plan.wide_bytes and column.widens:
            faster = f" There is room to take {format_bytes(plan.wide_bytes)} more and multiply faster."
        return f"{verdict}. {everything}. With less than that it {below}.{faster}"
    if verdict is Verdict.FROM_DISK:
        return (
            f"{verdict}. {everything}, which hold {column.expert_share:.1%} of the experts: the others are read when a "
            f"token takes them. From --ram {_ram(plan.total_bytes)} on all are in memory."
        )
    if streams:
        return (
            f"{verdict}. What must be in memory takes {format_bytes(plan.least_bytes)}; {allowed}. From --ram "
            f"{_ram(plan.least_bytes)} on it runs from disk."
        )
    return f"{verdict}. {everything}. From --ram {_ram(plan.total_bytes)} on it runs."


def _ram(nbytes: int) -> str:
    """An amount for --ram that is enough: 157_528_000_000 -> "157.6GB"."""
    if nbytes < 10**9:
        return f"{-(-nbytes // 10**6)}MB"
    return f"{-(-nbytes // 10**8) / 10:.1f}GB"


def _speed(speeds: tuple[float, float]) -> str:
    """(0.0312, 0.0551) -> "0.031-0.055"."""
    low, high = (f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}" for speed in speeds)
    return f"{low}-{high}" if speeds[1] else "-"


def _about_speed(machine: Machine, streaming: list[Plan]) -> str:
    """What the speeds stand on, and how good they have been."""
    text = f"Speeds are those of {machine.cores} cores"
    if streaming:
        rates = sorted({machine.reading(plan.largest_expert) / 1e9 for plan in streaming})
        text += (
            f" and of reading {' to '.join(f'{rate:.2g}' for rate in rates)} GB a second: low if every expert is "
            "taken as often as every other, high if they repeat so that misses are squared and reading costs no time "
            "beside computing"
        )
    if not machine.judged:
        return f"{text}. No run has been compared with them yet."
    error = max(abs(ratio - 1) for ratio in machine.judged)
    runs = "run was" if len(machine.judged) == 1 else f"{len(machine.judged)} runs were"
    return f"{text}. The last {runs} within {error:.0%} of what was expected."
