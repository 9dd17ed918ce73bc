"""What is said of a model on several machines: who holds what, what a token takes, what decides."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import a_machine
from reference import cluster_table

from numoe.engine import Plan, describe
from numoe.engine.layers.spec import ModelSpec
from numoe.engine.measure.cluster import (
    CALLS,
    EXPERTS,
    HERE,
    READING,
    ROWS,
    Cluster,
    Link,
    linked,
    parse_nodes,
)
from numoe.engine.measure.forecast import USUAL_CALLS, Calls, Machine
from numoe.engine.plan import Verdict, parse_rate
from numoe.quant.errors import WrongUsage

QUICK = Calls((1e-6, 1e-6), 1e-6, 1e15)
NO_WIRE = Link("none", 1e15, QUICK, 0.0)
RATES = {str(1 << power): 1e6 for power in range(16, 25)}


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> tuple[ModelSpec, Plan]:
    described = describe(checkpoint("v4_a"))
    return described.spec, described.plan(16)


def machine(layer_s: float = 0.0) -> Machine:
    return replace(a_machine(layer_s=layer_s), read_bytes_per_s=RATES)


def cluster(plan: Plan, *rooms: int, link: Link = NO_WIRE, ray_bytes: int = 0) -> Cluster:
    """Machines that have so many bytes for experts."""
    own = machine()
    rams = [own.process_bytes + ray_bytes + room for room in rooms]
    return Cluster(own, (rams[0] + plan.beside_experts, *rams[1:]), link, ray_bytes)


# --------------------------------------------------------------------------------------------------------- foreign


@pytest.mark.parametrize(
    ("text", "rams"),
    [
        ("4x64GB", (64 * 10**9,) * 4),
        ("2x64GB,1x128GB", (64 * 10**9, 64 * 10**9, 128 * 10**9)),
        (" 128 GiB , 3 X 500M ", (128 << 30, *[500 * 10**6] * 3)),
        ("64GB", (64 * 10**9,)),
    ],
)
def test_machines_are_written_by_number_and_memory(text: str, rams: tuple[int, ...]) -> None:
    assert parse_nodes(text) == rams


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "says no machines"),
        ("4x", "is not an amount of memory"),
        ("4x64", "has no unit"),
        ("0x64GB", "is not from 1 to 256 machines"),
        ("257x64GB", "is not from 1 to 256 machines"),
        ("99999999999999999999x1GB", "is not from 1 to 256 machines"),
        ("200x1GB,57x1GB", "is not from 1 to 256 machines"),
        ("-1x64GB", "is not an amount of memory"),
        ("4*64GB", "is not an amount of memory"),
        ("4x64GB,", "says no machines"),
        ("4x0GB", "is not an amount of memory"),
        ("4x64Gbit", "is not an amount of memory"),
    ],
)
def test_what_is_no_machines_is_refused(text: str, said: str) -> None:
    with pytest.raises(WrongUsage, match=said):
        parse_nodes(text)


@pytest.mark.parametrize(
    ("text", "rate"), [("1Gbit", 125e6), ("2.5 gbit/s", 312.5e6), ("300Mbit", 37.5e6), ("40Gbit", 5e9)]
)
def test_networks_are_written_in_bits(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "1", "1GB", "1Gb", "0Gbit", "-1Gbit", "infGbit", "1e9bit", "1Gbit/h", "WiFi"])
def test_what_is_no_network_is_refused(text: str) -> None:
    with pytest.raises(WrongUsage, match="has no unit" if text == "1" else "is not the speed of a network"):
        parse_rate(text)


# --------------------------------------------------------------------------------------------------------- forecast


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_one_machine_is_forecast_as_without_others(model: tuple[ModelSpec, Plan], share: float) -> None:
    spec, plan = model
    room = int(share * plan.expert_bytes)
    alone = machine().forecast(plan, plan.beside_experts + room)
    made = cluster(plan, room).forecast(spec, plan)
    assert made.verdict is alone.verdict
    assert made.nodes[0].held == alone.expert_bytes
    assert made.decode[0] == pytest.approx(alone.decode[0], rel=1e-3)
    assert made.seconds[CALLS] == made.seconds[ROWS] == made.row_bytes == 0


def test_those_that_are_used_most_are_in_memory_and_taken_more(model: tuple[ModelSpec, Plan]) -> None:
    spec, plan = model
    made = cluster(plan, *[plan.expert_bytes // 4] * 2)
    hottest = [(layer, 2 * half) for layer, (experts, _) in spec.routed.items() for half in range(experts // 2)]
    plain, warm = made.forecast(spec, plan), made.forecast(spec, plan, [*hottest, (99, 0)])
    assert plain.nodes[1].missing == pytest.approx(1 - plain.nodes[1].held / plain.nodes[1].experts)
    assert sum(node.missing for node in warm.nodes) < sum(node.missing for node in plain.nodes)


@given(data=st.data())
def test_faster_links_and_shorter_calls_never_make_a_model_slower(
    model: tuple[ModelSpec, Plan], data: st.DataObject
) -> None:
    spec, plan = model
    rooms = data.draw(st.lists(st.integers(plan.least_experts, plan.expert_bytes), min_size=1, max_size=8))
    rate = data.draw(st.floats(1e3, 1e9))
    slow = cluster(plan, *rooms, link=Link("slow", rate, USUAL_CALLS)).forecast(spec, plan)
    fast = cluster(plan, *rooms, link=Link("fast", 2 * rate, USUAL_CALLS)).forecast(spec, plan)
    quick = cluster(plan, *rooms, link=Link("quick", 2 * rate, QUICK)).forecast(spec, plan)
    for one, other in ((slow, fast), (fast, quick)):
        assert all(b >= a * (1 - 1e-9) > 0 for a, b in zip(one.decode, other.decode, strict=True))
        assert all(b >= a * (1 - 1e-9) > 0 for a, b in zip(one.prefill, other.prefill, strict=True))
    assert sum(node.taken for node in slow.nodes) == pytest.approx(1)
    assert sum(node.experts for node in slow.nodes) == plan.expert_bytes
    assert all(node.held <= node.experts and node.held <= max(0, node.ram - node.always) for node in slow.nodes)


def test_what_decides_is_what_takes_most(model: tuple[ModelSpec, Plan]) -> None:
    spec, plan = model
    whole = plan.expert_bytes

    def decides(rooms: tuple[int, ...], link: Link = NO_WIRE, **changes: float) -> str:
        made = cluster(plan, *rooms, link=link)
        return replace(made, machine=replace(made.machine, **changes)).forecast(spec, plan).decides

    assert decides((whole, whole), layer_s=1.0) == HERE
    assert decides((plan.least_experts,) * 2) == READING
    assert decides((0, whole), Link("slow", 1e3, QUICK)) == ROWS
    assert decides((0, whole), Link("late", 1e15, Calls((1.0, 2.0), 0.1, 1e15))) == CALLS
    slow = replace(machine(), weights_per_s={**machine().weights_per_s, "mxfp4": 1.0, "fp8": 1.0})
    made = replace(cluster(plan, 0, whole), machine=slow).forecast(spec, plan)
    assert made.slowest == 1 and made.seconds[EXPERTS] > 0 and made.seconds[READING] == 0


def test_rows_go_there_once_a_node_and_back_once_an_expert(model: tuple[ModelSpec, Plan]) -> None:
    spec, plan = model
    made = cluster(plan, 0, plan.expert_bytes).forecast(spec, plan)
    taken = sum(k for _, k in spec.routed.values())
    assert made.row_bytes == 4 * spec.hidden * (len(spec.routed) + taken)
    assert [node.taken for node in made.nodes] == [0, 1]


def test_verdicts_say_whose_memory_it_is(model: tuple[ModelSpec, Plan]) -> None:
    spec, plan = model
    half = plan.expert_bytes // 2 + 10**5
    verdicts = {
        (half, half): Verdict.IN_MEMORY,
        (0, plan.expert_bytes): Verdict.IN_MEMORY,
        (plan.least_experts, plan.least_experts): Verdict.FROM_DISK,
        (plan.least_experts - 1, plan.least_experts): Verdict.TOO_LARGE,
        (-1, plan.expert_bytes): Verdict.TOO_LARGE,  # the first has no room for all else
        (plan.expert_bytes, -1): Verdict.TOO_LARGE,  # and this one none for numoe
    }
    for rooms, verdict in verdicts.items():
        made = cluster(plan, *rooms).forecast(spec, plan)
        assert made.verdict is verdict
        assert (made.decode > (0, 0)) == bool(made.seconds) == (verdict is not Verdict.TOO_LARGE)


def test_calls_are_those_that_were_measured() -> None:
    own = Calls((0.1, 0.2, 0.4), 0.05, 1e8)
    assert linked(replace(machine(), calls=own), "1Gbit").calls == own
    assert linked(replace(machine(), calls=None), "1Gbit").calls == USUAL_CALLS
    assert [own.percentile(at) for at in (0, 25, 50, 100)] == pytest.approx([0.1, 0.15, 0.2, 0.4])


def test_the_table_of_the_readme_is_what_is_forecast() -> None:
    """The row in the middle: all take half a minute."""
    of = cluster_table.model(), cluster_table.machine(), cluster_table.RAM, cluster_table.LINKS
    written = cluster_table.README.read_text(encoding="utf-8").splitlines()
    head, line, row = cluster_table.rows(*of, [16])
    assert written.index(head) + 1 == written.index(line) < written.index(row)
