"""The table of `engine/measure/README.md`: DeepSeek-V4-Pro on up to 64 machines, simulated.

    python tests/reference/cluster_table.py     write it there anew

The machines are like the one of the READMEs' transcripts, with more memory; the model is its configuration with the
listing of its release. `tests/engine/test_cluster.py` makes one row again.
"""

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import ITEM_BYTES, released_v4_listing
from machines import idle_epyc

from numoe.engine import Description
from numoe.engine.description import arrange
from numoe.engine.experts.unit import Key
from numoe.engine.families import family
from numoe.engine.measure.cluster import SIMULATED, Cluster, linked
from numoe.engine.measure.machine import Machine
from numoe.engine.plan import parse_bytes
from numoe.quant.files import TensorInfo
from numoe.quant.stored.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]
README = ROOT / "engine" / "measure" / "README.md"
MODEL, RAM, LINKS = "deepseek-ai/DeepSeek-V4-Pro", "64GB", ("1Gbit", "10Gbit", "40Gbit")


def model() -> Description:
    """`MODEL`, of which there is a listing alone."""
    config = json.loads((ROOT / "tests" / "configs" / f"{MODEL.replace('/', '__')}.json").read_text())
    kind = family(config["model_type"])
    tensors, at, path = {}, 0, Path(MODEL) / "model.safetensors"
    for name, (dtype, shape) in released_v4_listing(config).items():
        tensors[name] = TensorInfo(name, dtype, shape, path, at, math.prod(shape) * ITEM_BYTES[dtype])
        at += tensors[name].nbytes
    return arrange(Path(MODEL), config, kind, kind.spec(config), Checkpoint(Path(MODEL), tensors, {}))


def machine() -> Machine:
    """Whatever this one has."""
    return replace(idle_epyc(), cores=2)


def rows(
    description: Description,
    machine: Machine,
    ram: str,
    links: Sequence[str],
    counts: Iterable[int] = SIMULATED,
    hottest: Sequence[Key] = (),
) -> Iterator[str]:
    """A table's head, and a line for each number of machines.

    hottest: see `heat`.
    """
    speeds = " | ".join(f"{link}, tokens/s" for link in links)
    yield f"| machines of {ram} | experts in memory | {speeds} | decides |"
    yield "| ---: | ---: |" + " ---: |" * len(links) + " --- |"
    plan = description.plan()
    for count in counts:
        made = [
            Cluster(machine, (parse_bytes(ram),) * count, linked(machine, link)).forecast(
                description.spec, plan, hottest
            )
            for link in links
        ]
        cells = " | ".join(f"{one.decode[0]:.2g}-{one.decode[1]:.2g}" for one in made)
        yield f"| {count} | {made[0].expert_share:.0%} | {cells} | {made[0].decides} |"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    table = "\n".join(rows(model(), machine(), RAM, LINKS))
    README.write_text(re.sub(r"(?m)^\| machines of (?:.*\n)+", lambda _: f"{table}\n", text), encoding="utf-8")


if __name__ == "__main__":
    main()
