"""How fast several machines are: by the forecast against local nodes, and simulated up to 64.

    python tests/bench/cluster.py check [MODEL] [--most 4] [--tokens 32]
    python tests/bench/cluster.py table MODEL [--ram 64GB] [--links 1Gbit 10Gbit 40Gbit]

`check` starts clusters of 1 to --most nodes, which are processes of this machine on one core each, runs MODEL (tiny) on
them, and prints tokens a second as they were predicted from this machine's figures and as they are. Nodes share the
machine's cores and no wire is between them, which is what the forecast is given too. `table` prints the table of
`engine/measure/README.md` for what `numoe fit` can read, here or on the hub, and this machine's figures.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from reference.cluster_table import rows

from numoe.engine import Description, describe, load
from numoe.engine.experts.heat import kept
from numoe.engine.measure.cluster import Cluster, linked
from numoe.engine.measure.machine import calibrate

MOST_BYTES = 1 << 50


def check(model: str, most: int, tokens: int) -> None:
    from ray_nodes import started

    description = describe(model)
    plan = description.plan(256)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # what one core does is not half of what two do
    machine = calibrate([plan.largest_expert], kinds={stored.kind for _, stored in plan.sizes}, calls=True)
    os.sched_setaffinity(0, cores)
    link = replace(linked(machine, "1Tbit"), wire_s=0.0)
    print("| nodes | predicted, tokens/s | measured | within |")
    print("| ---: | ---: | ---: | --- |")
    for count in range(1, most + 1):
        # This process has experts too: it is the first node. All compute on one core, as far as there are so many at a
        # time, which they are not always.
        part = min(1.0, len(cores) / (count + 1))
        shared = replace(machine, weights_per_s={kind: part * rate for kind, rate in machine.weights_per_s.items()})
        (low, _), (_, high) = (
            Cluster(one, (MOST_BYTES,) * (count + 1), link).forecast(description.spec, plan).decode
            for one in (shared, machine)
        )
        nodes = started(count)
        try:
            import ray

            rate = measured(model, str(nodes.address), tokens)
        finally:
            ray.shutdown()
            nodes.shutdown()
        print(f"| {count} | {low:.3g}-{high:.3g} | {rate:.3g} | {'yes' if low <= rate <= high else 'no'} |")


def measured(model: str, address: str, tokens: int) -> float:
    """Tokens a second, the median's, when all experts are in memory."""
    from ray_nodes import warmed

    loaded = load(model, threads=1, ctx=256, ray=address)
    warmed(loaded)
    times = []
    with loaded.session(ctx=256) as session:
        session.feed([1, 2, 3], last=True)
        for token in range(tokens):
            begun = time.perf_counter()
            session.feed([4 + token], last=True)
            times.append(time.perf_counter() - begun)
    return 1 / median(times)


def table(model: str, ram: str, links: list[str]) -> None:
    description = described(model)
    plan = description.plan()
    machine = calibrate([plan.largest_expert], kinds={stored.kind for _, stored in plan.sizes})
    hottest = kept(description.identity) if description.path.exists() else []
    for row in rows(description, machine, ram, links, hottest=hottest):
        print(row, flush=True)


def described(model: str) -> Description:
    """A model that is here, or on the hub."""
    from numoe.engine import home
    from numoe.engine.hub.repository import repository
    from numoe.engine.pull import describe_runnable

    path = home.lookup(model)
    return describe(path) if path is not None else describe_runnable(repository(model, None, lambda s, why: None), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "table"])
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--most", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--ram", default="64GB")
    parser.add_argument("--links", nargs="+", default=["1Gbit", "10Gbit", "40Gbit"])
    given = parser.parse_args()
    if given.what == "check":
        check(given.model, given.most, given.tokens)
    else:
        table(given.model, given.ram, given.links)


if __name__ == "__main__":
    main()
