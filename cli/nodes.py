"""What `numoe fit --nodes` says: what each machine holds of a model, how fast they are together, and what decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

import typer

from numoe.cli.charts import Chart, Line, draw
from numoe.cli.output import Output
from numoe.cli.settings import Options
from numoe.cli.verdict import about_speed, alike, called, ranked, speed
from numoe.quant.errors import WrongUsage

if TYPE_CHECKING:
    from numoe.engine import Description, Plan
    from numoe.engine.hub.repository import Repository
    from numoe.engine.measure.cluster import Cluster, ClusterForecast, Share
    from numoe.engine.measure.forecast import Machine


def nodes_asked(options: Options) -> tuple[int, ...]:
    """The memory of each machine that is asked about; () where it is only about this one.

    Raises:
        WrongUsage: they, or the network between them, are written in another way, or contradict other options.
    """
    from numoe.engine.measure.cluster import parse_nodes
    from numoe.engine.plan import parse_rate

    if options["nodes"] is None:
        if "link" in options.stated:
            raise WrongUsage("--link is between machines; say which with --nodes, such as 4x64GB")
        return ()
    if "ram" in options.stated:
        raise WrongUsage("--nodes says what memory each machine has; leave out --ram")
    parse_rate(options["link"])
    return parse_nodes(options["nodes"])


@dataclass(frozen=True)
class Nodes:
    """A model, the machines that it is to run on together, and what was found for each format."""

    model: str
    description: Description
    remote: Repository | None
    plans: Mapping[str, Plan]
    cluster: Cluster
    forecasts: Mapping[str, ClusterForecast]

    @classmethod
    def asked(
        cls,
        model: str,
        description: Description,
        remote: Repository | None,
        plans: Mapping[str, Plan],
        machine: Machine,
        rams: tuple[int, ...],
        link: str,
    ) -> Nodes:
        """link: as it was given."""
        from numoe.engine.experts.heat import kept
        from numoe.engine.measure.cluster import Cluster, linked

        cluster = Cluster(machine, rams, linked(machine, link))
        hottest = () if remote else kept(description.identity)
        forecasts = {quant: cluster.forecast(description.spec, plan, hottest) for quant, plan in plans.items()}
        return cls(model, description, remote, plans, cluster, forecasts)

    def with_machines(self, count: int) -> Cluster:
        """The same with so many machines in all, those that are added as large as the last one."""
        rams = self.cluster.rams
        return replace(self.cluster, rams=(*rams, *rams[-1:] * count)[:count])

    def enough(self, quant: str) -> int | None:
        """How many machines have all experts in memory, those that are added as large as the last one; None: no number
        does."""
        plan = self.plans[quant]
        *_, more = self.with_machines(len(self.cluster.rams) + 1).rooms(plan)
        if more <= 0:
            return None
        room, count = 0, 0
        for room in accumulate(max(0, one) for one in self.cluster.rooms(plan)):
            count += 1
            if room >= plan.expert_bytes:
                return count
        return count - (room - plan.expert_bytes) // more


def tell_nodes(output: Output, asked: Nodes, options: Options) -> None:
    """All of it, on stdout, as text or as one JSON document.

    Raises:
        typer.Exit: it runs in no format.
    """
    from numoe.engine.plan import Verdict

    output.clear_status()
    if options["json"]:
        output.document(_document(asked))
    else:
        _tell(output, asked)
    if all(one.verdict is Verdict.TOO_LARGE for one in asked.forecasts.values()):
        raise typer.Exit(2)
    if options["chart"] is not None:
        draw(output, [_chart(asked)], options["chart"])


def _tell(output: Output, asked: Nodes) -> None:
    from numoe.engine.plan import format_bytes

    verdicts = {quant: one.verdict for quant, one in asked.forecasts.items()}
    groups = alike(asked.plans, verdicts)
    best = ranked(verdicts, asked.plans)[0]
    output.text(f"{asked.model}, {asked.description.spec.family}")
    if asked.remote:
        download = asked.plans["native"].disk_bytes
        output.text(f"{download:,} bytes to download ({format_bytes(download)})")
    for names in groups:
        output.text()
        output.table([(f"{called(names)}: {_verdict(asked, names[0])}",)])
        output.text()
        heads = "", "memory", "for every token", "experts", "of", "of choices"
        output.table([heads, *_node_rows(asked.forecasts[names[0]])], range(1, len(heads)))
    output.text()
    rows = _speed_rows(asked, groups)
    output.table(rows, range(1, len(rows[0])))
    if asked.forecasts[best].seconds:
        output.text()
        output.table([(_decision(asked, best),)])
    output.text()
    output.table([(_stands_on(asked, best),)])
    output.text()
    output.text("Nothing was downloaded." if asked.remote else f"numoe run {asked.model} --ray ADDRESS")


def _verdict(asked: Nodes, quant: str) -> str:
    """Whether it runs, the number that decided it, and what would change it."""
    from numoe.engine.plan import Verdict, format_bytes

    forecast, plan, rams = asked.forecasts[quant], asked.plans[quant], asked.cluster.rams
    first, enough, machines = forecast.nodes[0], asked.enough(quant), _machines(len(rams))
    if not plan.expert_bytes:
        return (
            f"{forecast.verdict}. It has no routed experts, which are what machines share: node 1 computes all of it, "
            f"takes {format_bytes(first.always)} and has {format_bytes(first.ram)}."
        )
    if first.always > first.ram:
        return (
            f"{forecast.verdict}. Node 1, which runs numoe, takes {format_bytes(first.always)} beside experts and has "
            f"{format_bytes(first.ram)}: more machines do not help, and a larger one as the first does."
        )
    whole = format_bytes(plan.expert_bytes)
    more = f" With {_machines(enough)} all are in memory." if enough and enough > len(rams) else ""
    if forecast.verdict is Verdict.IN_MEMORY:
        fewer = f"; {_machines(enough)} would do" if enough and enough < len(rams) else ""
        return f"{forecast.verdict} of {machines}. Its {whole} of experts are in memory, each on one of them{fewer}."
    if forecast.verdict is Verdict.FROM_DISK:
        largest = max(node.experts for node in forecast.nodes)
        return (
            f"{forecast.verdict} of {machines}. Of 100 of its experts, {whole} in all, "
            f"{100 * forecast.expert_share:.0f} are in memory, each on one of them; the others are read from the disk "
            f"of the machine that they are on, which holds up to {format_bytes(largest)} of the model.{more}"
        )
    least = format_bytes(plan.least_experts)
    return f"{forecast.verdict}. A machine has no room for the experts of one token in a layer, {least}.{more}"


def _machines(count: int | None) -> str:
    return f"{count} machine{'' if count == 1 else 's'}"


def _groups(nodes: tuple[Share, ...]) -> list[tuple[str, Share]]:
    """Machines that hold about as much one after the other: what they are called, and one of them."""
    numbered = list(enumerate(nodes, 1))
    made = []
    for _, group in groupby(numbered, key=lambda one: (one[0] == 1, one[1].ram)):
        found = list(group)
        first, last = found[0][0], found[-1][0]
        name = f"node {first}" if first == last else f"nodes {first}-{last}, each"
        made.append(("node 1, runs numoe" if first == 1 else name, found[0][1]))
    return made


def _node_rows(forecast: ClusterForecast) -> list[tuple[str, ...]]:
    from numoe.engine.plan import format_bytes

    return [
        (
            name,
            format_bytes(one.ram),
            format_bytes(one.always),
            format_bytes(one.held),
            format_bytes(one.experts),
            f"{100 * one.taken:.0f} %",
        )
        for name, one in _groups(forecast.nodes)
    ]


def _speed_rows(asked: Nodes, groups: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    shown = [asked.forecasts[names[0]] for names in groups]
    parts = next((list(one.seconds) for one in shown if one.seconds), [])
    rows = [
        ("", *(", ".join(names) for names in groups)),
        ("of 100 experts in memory", *(f"{100 * one.expert_share:.0f}" for one in shown)),
        ("tokens a second, written", *(speed(one.decode) for one in shown)),
        ("tokens a second, read", *(speed(one.prefill) for one in shown)),
    ]
    return rows + [(f"of a token, {part}", *(_percent(one, part) for one in shown)) for part in parts]


def _percent(forecast: ClusterForecast, part: str) -> str:
    whole = sum(forecast.seconds.values())
    return f"{100 * forecast.seconds[part] / whole:.0f} %" if whole else "-"


def _decision(asked: Nodes, quant: str) -> str:
    """What takes most of a token's time, on which node, and what would make that less."""
    from numoe.engine.measure.cluster import CALLS, EXPERTS, HERE, MOST_NODES, READING, ROWS
    from numoe.engine.plan import format_bytes

    forecast, link, rams = asked.forecasts[quant], asked.cluster.link, asked.cluster.rams
    part, whole = forecast.decides, sum(forecast.seconds.values())
    node = f"node {forecast.slowest + 1}"
    first, median, late = (f"{1000 * link.calls.percentile(at):.2g}" for at in (0, 50, 99))
    enough = asked.enough(quant)
    told = {
        HERE: "node 1, which computes all but routed experts: more machines help no further, and more cores in it do",
        READING: f"the disk of {node}, which reads what is not in memory"
        + (f": more memory helps, up to {_machines(enough)}" if enough and enough > len(rams) else ""),
        EXPERTS: f"the cores of {node}, which computes routed experts"
        + (": more machines help" if len(rams) < MOST_NODES else ""),
        CALLS: f"calls to other machines, of {median} ms each (from {first}, one of 100 over {late} ms), one or more a "
        "layer: fewer and larger machines help",
        ROWS: f"the link of node 1, through which all rows go, {format_bytes(round(forecast.row_bytes))} a token: "
        "a faster network helps",
    }
    return f"What decides: {told[part]}. It takes {forecast.seconds[part]:.2g} of {whole:.2g} s a token."


def _stands_on(asked: Nodes, quant: str) -> str:
    """What the speeds stand on."""
    from numoe.engine.plan import Verdict

    machine, link, plan = asked.cluster.machine, asked.cluster.link, asked.plans[quant]
    reads = asked.forecasts[quant].verdict is Verdict.FROM_DISK
    calls = f"calls of {1000 * link.calls.percentile(50):.2g} ms over {link.name}"
    whose = "measured here" if machine.calls else "usual ones, for Ray is not installed to measure them"
    return (
        f"Every machine is taken for one like this. {about_speed(machine, [plan] * reads, plan)} With {calls}, {whose}."
    )


def _chart(asked: Nodes) -> Chart:
    """Speed of the best format over the number of machines."""
    from numoe.engine.measure.cluster import SIMULATED

    best = ranked({quant: one.verdict for quant, one in asked.forecasts.items()}, asked.plans)[0]
    spec, plan = asked.description.spec, asked.plans[best]
    speeds = [(count, asked.with_machines(count).forecast(spec, plan).decode) for count in SIMULATED]
    lines = [
        Line(name, [(count, both[which]) for count, both in speeds if both[1]])
        for which, name in ((1, "at best"), (0, "at worst"))
    ]
    return Chart(f"tokens a second ({best}, {asked.cluster.link.name})", "machines", lines, log=True)


def _document(asked: Nodes) -> dict[str, Any]:
    cluster, any_plan = asked.cluster, next(iter(asked.plans.values()))
    calls = cluster.link.calls
    return {
        "model": asked.model,
        "family": asked.description.spec.family,
        "download_bytes": asked.plans["native"].disk_bytes if asked.remote else 0,
        "nodes": [{"ram_bytes": ram} for ram in cluster.rams],
        "link_bytes_per_s": cluster.link.bytes_per_s,
        "call_s": {"p50": calls.percentile(50), "p99": calls.percentile(99)},
        "calls_measured": cluster.machine.calls is not None,
        "context": any_plan.context,
        "formats": {quant: _format(asked, quant) for quant in asked.plans},
    }


def _format(asked: Nodes, quant: str) -> dict[str, Any]:
    forecast = asked.forecasts[quant]
    return {
        "verdict": forecast.verdict,
        "nodes": [
            {
                "ram_bytes": node.ram,
                "always_bytes": node.always,
                "expert_bytes": node.held,
                "owned_bytes": node.experts,
                "choices_share": node.taken,
            }
            for node in forecast.nodes
        ],
        "expert_share": forecast.expert_share,
        "whole_nodes": asked.enough(quant),
        "tokens_per_s": list(forecast.decode),
        "prompt_tokens_per_s": list(forecast.prefill),
        "token_s": {part.replace(" ", "_"): seconds for part, seconds in forecast.seconds.items()},
        "row_bytes": round(forecast.row_bytes),
        "decides": forecast.decides or None,
        "slowest_node": forecast.slowest + 1 if forecast.seconds else None,
    }
