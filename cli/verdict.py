"""What `numoe fit` says to people: the table, the picture of memory, the verdict and why, and what to do next."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from numoe.cli.charts import Chart, Line
from numoe.cli.output import Output, bar

if TYPE_CHECKING:
    from numoe.cli.asked import Asked, Column
    from numoe.engine.hub.search import Best
    from numoe.engine.measure.forecast import Machine
    from numoe.engine.plan import Plan, Verdict

_AS_STORED = "native (as it is stored)"
_SAME = 0.03  # of a figure: columns whose figures differ by no more say one thing
_SHORTEST = 256  # tokens of context that are worth to be offered
_MOST_OFFERED = 3
_POINTS = 64  # of a line
_BAR = 36  # columns, which fit on the narrowest screen
# What memory goes to, in the picture: a sign, its ASCII form, and a colour.
_SIGNS = {
    "weights for every token": ("█", "#", "blue"),
    "context": ("▓", "c", "magenta"),
    "experts": ("▒", "e", "cyan"),
    "faster form of weights": ("▚", "f", "blue"),
    "work space, numoe itself": ("░", "w", "yellow"),
    "free": ("·", ".", "dim"),
    "missing": ("!", "!", "red"),
}


def tell(output: Output, asked: Asked) -> None:
    """All of it, on stdout."""
    from numoe.engine.plan import Verdict, format_bytes

    columns = asked.columns
    output.table([(f"{asked.model}, {asked.description.spec.family}",)])
    if asked.remote:
        download = columns["native"].plan.disk_bytes
        output.table([(f"{download:,} bytes to download ({format_bytes(download)})",)])
    output.text()
    plans = {name: column.plan for name, column in columns.items()}
    verdicts = {name: column.forecast.verdict for name, column in columns.items()}
    groups = [(names, columns[names[0]]) for names in alike(plans, verdicts)]
    rows = _rows(asked, groups)
    output.table(rows, numbers=range(1, len(rows[0])))
    best = ranked(verdicts, plans)[0]
    output.text()
    _picture(output, asked, next(names[0] for names, _ in groups if best in names))
    for names, column in groups:
        output.text()
        output.table([(f"{called(names)}: {_reason(column, asked)}",)])
    if same := _why_alike(groups):
        output.text()
        output.table([(same,)])
    output.text()
    streaming = [c.plan for c in columns.values() if c.forecast.verdict is Verdict.FROM_DISK]
    output.table([(about_speed(asked.machine, streaming, columns[best].plan),)])
    output.text()
    _tell_the_way(output, asked, best)


# ------------------------------------------------------------------------------------------------------- the table


def alike(plans: Mapping[str, Plan], verdicts: Mapping[str, Verdict]) -> list[list[str]]:
    """Formats in groups that come to the same."""
    groups: list[list[str]] = []
    for name in plans:
        before = groups[-1][0] if groups else name
        if groups and verdicts[before] is verdicts[name] and _same(plans[before], plans[name]):
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _same(one: Plan, other: Plan) -> bool:
    def figures(plan: Plan) -> list[int]:
        return [plan.disk_bytes, plan.resident_bytes, plan.least_bytes, plan.total_bytes]

    return all(abs(a - b) <= _SAME * a for a, b in zip(figures(one), figures(other), strict=True))


def called(names: Sequence[str]) -> str:
    """Formats by their names, as a paragraph begins."""
    return ", ".join(_AS_STORED if name == "native" else name for name in names)


def _why_alike(groups: Sequence[tuple[list[str], Column]]) -> str:
    """Why columns are one, where some are."""
    merged = next((group for group in groups if len(group[0]) > 1), None)
    if merged is None:
        return ""
    names, column = merged
    experts = [(kind, nbytes) for (role, kind), nbytes in column.plan.weights.items() if role == "experts"]
    weights = experts or [(kind, nbytes) for (_, kind), nbytes in column.plan.weights.items()]
    kind = max(weights, key=lambda one: one[1])[0]
    what = "experts" if experts else "weights"
    return (
        f"{', '.join(names[:-1])} and {names[-1]} come to the same: its {what} are stored in {kind.bits_each:.3g} bits "
        "each already, and what has no more bits than a format is not rounded again."
    )


def _rows(asked: Asked, groups: Sequence[tuple[list[str], Column]]) -> list[tuple[str, ...]]:
    from numoe.engine.plan import format_bytes

    shown = [column for _, column in groups]

    def row(name: str, cell: Callable[[Column], str]) -> tuple[str, ...]:
        return name, *map(cell, shown)

    rows = [("", *(", ".join(names) for names, _ in groups)), row("on disk", lambda c: format_bytes(c.plan.disk_bytes))]
    if asked.remote:
        rows.append(row("on disk while pulling", lambda c: format_bytes(c.peak_disk_bytes)))
    rows.append(row("", lambda c: ""))
    amounts = [_adding_up(list(c.memory.values())) for c in shown]
    for number, name in enumerate(shown[0].memory):
        if any(list(c.memory.values())[number] for c in shown):
            rows.append((name, *(cells[number] for cells in amounts)))
    rows.append(("memory in all", *(cells[-1] for cells in amounts)))
    rows.append(row("", lambda c: ""))
    rows += [
        (f"a context of {context:,}", *(format_bytes(c.kv_bytes[context]) for c in shown))
        for context in shown[0].kv_bytes
        if context != shown[0].plan.context
    ]
    if shown[0].plan.kv.is_float32:
        rows.append(row("the context with --kv int8", lambda c: format_bytes(c.int8_bytes)))
    if shown[0].plan.expert_bytes:
        rows.append(row("of 100 experts in memory", lambda c: f"{100 * c.expert_share:.0f}"))
    rows.append(row("tokens a second, written", lambda c: speed(c.forecast.decode)))
    rows.append(row("tokens a second, read", lambda c: speed(c.forecast.prefill)))
    return rows


def _adding_up(parts: Sequence[int]) -> list[str]:
    """Bytes of the parts and of all, in one unit and rounded so that what is shown adds up."""
    total = sum(parts)
    power, unit = next((p, u) for p, u in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")) if total >= 10**p or p == 3)
    cells, done, shown = [], 0, 0
    for part in parts:
        done += part
        upto = round(100 * done / 10**power)
        cells.append(f"{(upto - shown) / 100:,.2f} {unit}")
        shown = upto
    return [*cells, f"{shown / 100:,.2f} {unit}"]


def speed(speeds: tuple[float, float]) -> str:
    """(0.0312, 0.0551) -> "0.031-0.055"."""
    low, high = (f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}" for speed in speeds)
    return f"{low}-{high}" if speeds[1] else "-"


# ----------------------------------------------------------------------------------------------------- the picture


def _picture(output: Output, asked: Asked, shown: str) -> None:
    """A bar of the memory that is allowed, or of all that it would take where that is more, and what the signs mean.

    shown: the format that the table has.
    """
    from numoe.engine.plan import format_bytes

    column, allowed = asked.columns[shown], asked.memory.total + asked.columns[shown].process_bytes
    parts: dict[str, int] = dict.fromkeys(_SIGNS, 0)
    left = allowed
    for name, nbytes in column.memory.items():
        key = next((sign for sign in _SIGNS if name.startswith(sign)), "work space, numoe itself")
        parts[key] += min(nbytes, left)
        parts["missing"] += nbytes - min(nbytes, left)
        left -= min(nbytes, left)
    parts["free"] = left
    output.bar(bar([(nbytes, *_SIGNS[name]) for name, nbytes in parts.items()], _BAR))
    for name, nbytes in parts.items():
        if nbytes:
            label = f" {name} {format_bytes(nbytes)}"
            output.bar([_SIGNS[name], (label, label, "")])


def charts(asked: Asked) -> list[Chart]:
    """Memory and speed of the best format, over the memory that is allowed and over the context."""
    from numoe.engine.plan import Verdict, kv_bytes

    best = _ranked(asked.columns)[0]
    column, spec, process = asked.columns[best], asked.description.spec, asked.machine.process_bytes
    least, whole = column.least_ram_bytes, max(column.whole_ram_bytes, asked.memory.allowed)
    rams = [least + (1.1 * whole - least) * step / _POINTS for step in range(_POINTS + 1)]
    at = [(ram / 1e9, asked.machine.forecast(column.plan, int(ram) - process)) for ram in rams]
    shortest = min(_SHORTEST, spec.context)
    contexts = [round(shortest * (spec.context / shortest) ** (step / _POINTS)) for step in range(_POINTS + 1)]
    plans = [replace(column.plan, context=tokens, kv_bytes=kv_bytes(spec, tokens)) for tokens in contexts]
    speeds = [(plan.context, asked.machine.forecast(plan, asked.memory.total)) for plan in plans]
    runs = [(context, one) for context, one in speeds if one.verdict is not Verdict.TOO_LARGE]
    allowed = f"--ram {_ram(asked.memory.allowed)}"
    made = [
        Chart(
            f"memory in all, GB ({best}, {column.plan.context:,} tokens)",
            "GB that --ram allows",
            [
                Line("taken", [(ram, one.peak_bytes / 1e9) for ram, one in at]),
                Line("of it experts", [(ram, one.expert_bytes / 1e9) for ram, one in at]),
            ],
        ),
        Chart(f"tokens a second ({best})", "GB that --ram allows", _range([(ram, one.decode) for ram, one in at])),
        Chart(
            f"memory, GB ({best})",
            "tokens of context",
            [
                Line("to have all in memory", [(p.context, (p.total_bytes + process) / 1e9) for p in plans]),
                Line("at least", [(p.context, (p.least_bytes + process) / 1e9) for p in plans]),
            ],
            log=True,
        ),
    ]
    if runs:
        speed = _range([(context, one.decode) for context, one in runs])
        made.append(Chart(f"tokens a second ({best}, {allowed})", "tokens of context", speed, log=True))
    return made


def _range(speeds: Sequence[tuple[float, tuple[float, float]]]) -> list[Line]:
    high, low = ([(x, both[which]) for x, both in speeds] for which in (1, 0))
    return [Line("at best", high), Line("at worst", low)]


# ---------------------------------------------------------------------------------------------------- the verdict


def _ranked(columns: Mapping[str, Column]) -> list[str]:
    plans = {name: column.plan for name, column in columns.items()}
    return ranked({name: column.forecast.verdict for name, column in columns.items()}, plans)


def ranked(verdicts: Mapping[str, Verdict], plans: Mapping[str, Plan]) -> list[str]:
    """The formats, those that run best and are most precise first; where none runs, the smallest."""
    from numoe.engine.plan import Verdict

    order = list(Verdict)
    first = sorted(plans, key=lambda quant: order.index(verdicts[quant]))
    if verdicts[first[0]] is Verdict.TOO_LARGE:
        return sorted(plans, key=lambda quant: plans[quant].least_bytes)
    return first


def _there(asked: Asked) -> str:
    """How much memory there is, and whose limit that is."""
    from numoe.engine.budget import machine_memory
    from numoe.engine.plan import format_bytes

    total, limit = machine_memory()
    machine = f"the {format_bytes(total)} of this machine"
    if limit is not None:
        machine += f", of which its container or ulimit allows {format_bytes(limit)}"
    allowed = format_bytes(asked.memory.allowed)
    if not asked.memory.given:
        return f"{allowed} can be taken now of {machine}"
    if asked.memory.allowed > (limit or total):
        return f"{allowed} are allowed, which is more than {machine}"
    return f"{allowed} are allowed of {machine}"


def _reason(column: Column, asked: Asked) -> str:
    """The verdict, the number that decided it, and what would change it."""
    from numoe.engine.plan import Verdict, format_bytes

    plan, verdict, there = column.plan, column.forecast.verdict, _there(asked)
    least, whole = _ram(column.least_ram_bytes), _ram(column.whole_ram_bytes)
    streams = plan.least_bytes < plan.total_bytes
    if verdict is Verdict.IN_MEMORY:
        below = f"With less than --ram {whole} it runs from disk, down to --ram {least}." if streams else ""
        below = below or f"It takes --ram {least} at least."
        faster = ""
        if column.widens and plan.wide_bytes:
            faster = f" There is room to take {format_bytes(plan.wide_bytes)} more and multiply faster."
        return f"{verdict}. It takes {format_bytes(column.forecast.peak_bytes)}; {there}. {below}{faster}"
    if verdict is Verdict.FROM_DISK:
        share = 100 * column.expert_share
        return (
            f"{verdict}. All of it would take {format_bytes(column.whole_ram_bytes)}; {there}. Of every 100 experts "
            f"that a token needs, about {share:.0f} are in memory then; the others are read from disk, which takes the "
            f"time. It runs with --ram {least} already. With --ram {whole} all are in memory."
        )
    needs = f"It takes {format_bytes(column.least_ram_bytes)} at least; {there}."
    return f"{verdict}. {needs} With --ram {least} it runs{' from disk' if streams else ''}."


def _ram(nbytes: int) -> str:
    """An amount for --ram that is enough: 157_528_000_000 -> "157.6GB"."""
    if nbytes < 10**9:
        return f"{-(-nbytes // 10**6)}MB"
    return f"{-(-nbytes // 10**8) / 10:.1f}GB"


def about_speed(machine: Machine, streaming: list[Plan], plan: Plan) -> str:
    """What the speeds stand on, how old that is, and how good they have been for models of about this size."""
    text = f"Speeds are those of {machine.cores} {'core' if machine.cores == 1 else 'cores'}"
    if streaming:
        rates = sorted({machine.reading(one.largest_expert) / 1e9 for one in streaming})
        text += f" and of reading {' to '.join(f'{rate:.2g}' for rate in rates)} GB a second"
    text += f"{machine.measured_when}; --measure measures again."
    if streaming:
        text += (
            " The lower one is for experts taken at random, the higher one for tokens that take much the same as those "
            "before them, and reading that goes on beside computing."
        )
    judged = machine.about(plan).judged
    if not judged:
        return f"{text} No run has been compared with them yet, of a model of about this size."
    error = max(abs(ratio - 1) for ratio in judged)
    runs = "run was" if len(judged) == 1 else f"{len(judged)} runs were"
    return f"{text} The last {runs} within {error:.0%} of what was expected, of models of about this size."


# --------------------------------------------------------------------------------------------------- what to do


def _tell_the_way(output: Output, asked: Asked, best: str) -> None:
    """How to get the best format there is room for; where there is none, what would fit."""
    from numoe.engine.home import models_folder
    from numoe.engine.plan import Verdict, format_bytes

    columns = asked.columns
    runs = [quant for quant in _ranked(columns) if columns[quant].forecast.verdict is not Verdict.TOO_LARGE]
    folder = models_folder()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
    there = next((quant for quant in runs if columns[quant].peak_disk_bytes <= free), None)
    if not asked.remote:
        if not runs:
            _offer(output, asked, best, None)
        elif runs[0] != next(iter(columns)):
            output.text(f"numoe quantize {asked.model} FOLDER --quant {runs[0]}")
        output.text("Nothing to download: it is here.")
        return
    if there is None:
        _offer(output, asked, best, free)
    if runs and there != runs[0]:
        short = f"pulling {runs[0]} takes {format_bytes(columns[runs[0]].peak_disk_bytes)}"
        text = f"{folder}: {short} and {format_bytes(free)} are free; make room, or set NUMOE_HOME to a folder on "
        output.table([(f"{text}another disk.",)])
        output.text()
    if there is None:
        output.text("Nothing was downloaded.")
        return
    output.text("Nothing was downloaded. To do so:")
    output.text(f"numoe pull {asked.model}" + (f" --quant {there}" if len(columns) > 1 else ""))


def _offer(output: Output, asked: Asked, best: str, free: int | None) -> None:
    """What would fit instead: a shorter context, a smaller model of the family.

    free: bytes on the disk for a download, where one is asked for.
    """
    from numoe.engine.plan import Verdict, format_bytes, longest_context

    column, room = asked.columns[best], asked.memory.total
    offers = []
    if column.forecast.verdict is Verdict.TOO_LARGE:
        plan = column.plan
        tokens = longest_context(asked.description.spec, room - plan.least_bytes + plan.kv_bytes)
        if tokens >= _SHORTEST:
            offers.append((f"--ctx {tokens}", f"a shorter context, of {best}"))
    for one, best_of_it in _smaller(output, asked, free):
        size = format_bytes(best_of_it.disk_bytes)
        offers.append((f"numoe fit {one}", f"about {size} in {best_of_it.quant}, {best_of_it.verdict}"))
    if offers:
        output.text("What fits here:")
        output.table(offers)
    else:
        owner, _, name = asked.model.rpartition("/")
        output.table([(f"What fits here: `numoe search {owner or name}` lists what there is, and whether it runs.",)])
    output.text()


def _smaller(output: Output, asked: Asked, free: int | None) -> Iterable[tuple[str, Best]]:
    """Repositories of the same family, else of the same owner, that run here and have room on the disk."""
    from numoe.engine.hub.network import HubError
    from numoe.engine.hub.search import search

    owner, _, _ = asked.model.rpartition("/")
    ways = [(str(asked.description.config.get("model_type", "")), ""), ("", owner)]
    for model_type, author in ways if asked.remote else []:
        output.status("looking for a smaller one")
        try:
            found, _ = search(model_type=model_type, owner=author)
        except HubError:  # the next step is told all the same, and this was not what was asked for
            return
        ranked = [(one.repo_id, one.best(asked.memory.total)) for one in found if one.repo_id != asked.model]
        fitting = [one for one in ranked if one[1].runs and (free is None or one[1].disk_bytes <= free)]
        if fitting:
            yield from sorted(fitting, key=lambda one: -one[1].parameters)[:_MOST_OFFERED]
            return
