"""What experts on the nodes of a Ray cluster cost and promise: bits, memory, nodes that are killed, time of a call.

    python tests/bench/ray_nodes.py MODEL [--nodes 3] [--ram 2GB] [--kills 20] [--tokens 24] [--only bits kills speed]

MODEL is a folder of mixtures whose experts do not fit into one node; `flagship.write_checkpoint(folder, 144)` makes one
of 6 GB, and `speed` takes one that fits into each node twice, such as that of 36 experts. The nodes are processes of
this machine, each on one core: what they gain on a network of several is not seen here, and not more than the cores
give.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import psutil
from peers import say

from numoe.engine import Model, load
from numoe.engine.experts import cluster as numoe_cluster
from numoe.engine.measure.machine import processor
from numoe.engine.plan import parse_bytes
from numoe.quant.compute.threads import usable_cores

MEMORY = {"object_store_memory": 100 << 20}


def logits(model: Model, tokens: int) -> np.ndarray:
    """Of a prompt that is read at once, and of tokens one by one."""
    with model.session(ctx=256) as session:
        read = session.feed(list(range(1, 33)))
        return np.concatenate([read, *(session.feed([100 + 7 * n]) for n in range(tokens))])


def nodes_of(model: Model) -> list[Any]:
    assert model.shared is not None
    return [node for _, node in model.shared._there()]


def started(nodes: int) -> Any:
    """A cluster with a head that computes nothing."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **MEMORY})
    for _ in range(nodes):
        cluster.add_node(num_cpus=1, **MEMORY)
    cluster.wait_for_nodes()
    return cluster


def pinned(model: Model) -> None:
    """Each node on one core."""
    cores = sorted(os.sched_getaffinity(0))
    for number, node in enumerate(nodes_of(model)):
        for thread in psutil.Process(node.pid()).threads():
            os.sched_setaffinity(thread.id, {cores[number % len(cores)]})


def warmed(model: Model) -> None:
    """Wait until nodes read nothing more of their own accord."""
    for node in nodes_of(model):
        process, before = psutil.Process(node.pid()), -1
        while (now := process.io_counters().read_chars) != before:
            before = now
            time.sleep(2)


def bits(load_shared: Callable[[], Model], alone: np.ndarray, tokens: int, ram: int) -> dict[str, Any]:
    model = load_shared()
    same = bool(np.array_equal(logits(model, tokens), alone))
    warmed(model)
    same &= bool(np.array_equal(logits(model, tokens), alone))
    assert model.shared is not None
    peaks = [node.peak_bytes() for node in nodes_of(model)]
    return {"bit-identical": same, "peak of budget": [round(peak / ram, 3) for peak in peaks], **model.shared.stats()}


def kills(cluster: Any, load_shared: Callable[[], Model], alone: np.ndarray, tokens: int, count: int) -> dict[str, Any]:
    """The process of a node that computes, or every second time all of the node, is killed at a random moment of an
    answer; a new node joins afterwards."""
    model, chance = load_shared(), random.Random(1)
    begun = time.perf_counter()
    wrong = int(not np.array_equal(logits(model, tokens), alone))
    usual = time.perf_counter() - begun
    wait, slowest = usual, 0.0
    for number in range(count):
        while len(nodes_of(model)) < 2:  # those that are added below join by themselves
            time.sleep(0.5)
        node = chance.choice(nodes_of(model))
        of_ray = next(one for one in cluster.list_all_nodes() if one.node_id == node.id)
        kill = (
            partial(os.kill, node.pid(), signal.SIGKILL) if number % 2 else partial(cluster.remove_node, of_ray, False)
        )
        begun = time.perf_counter()
        timer = threading.Timer(moment := chance.uniform(0, wait), kill)
        timer.start()
        answers = 0
        while timer.is_alive() or not answers:
            wrong += not np.array_equal(logits(model, tokens), alone)
            answers += 1
        took = time.perf_counter() - begun
        wait, slowest = took / answers, max(slowest, took / answers)
        what = "process" if number % 2 else "node"
        say(f"{number + 1} of {count}: a {what} killed after {moment:.1f} of {took:.1f} s, {wrong} answers changed")
        if number % 2:
            cluster.remove_node(of_ray, False)
        cluster.add_node(num_cpus=1, **MEMORY)
    wrong += not np.array_equal(logits(model, tokens), alone)
    return {
        "killed": count,
        "answers lost or changed": wrong,
        "an answer, s": round(usual, 1),
        "slowest with a kill, s": round(slowest, 1),
    }


def reduced(model: Model, count: int) -> Model:
    """All experts on so many nodes and none here, when nothing more is read."""
    bank = model.shared
    assert bank is not None
    bank._nodes[count + 1 :] = [None] * (len(bank._nodes) - count - 1)
    bank._room = 1
    bank._place()
    bank._hold()
    pinned(model)
    warmed(model)
    return model


def speed(load_shared: Callable[[], Model], tokens: int, rounds: int) -> dict[str, Any]:
    """The experts' part on one node and on two, all in their memory and a core each, in turn."""
    models = {count: reduced(load_shared(), count) for count in (1, 2)}
    sessions = {count: model.session(ctx=1024) for count, model in models.items()}
    times: dict[tuple[int, str], list[float]] = defaultdict(list)
    waited: dict[int, list[tuple[float, float]]] = defaultdict(list)
    say("measuring")
    for turn in range(rounds + 1):
        for count, session in sessions.items():
            bank = models[count].shared
            assert bank is not None
            session.rewind(session.position)
            bank._times.clear()
            session.feed([n % 4000 for n in range(512)], last=True)
            read = sum(call for call, _ in bank._times)
            bank._times.clear()
            for n in range(tokens):
                session.feed([7 * n])
            if turn:  # the first one finds its way
                times[count, "512 tokens"].append(read)
                times[count, "a token"].append(sum(call for call, _ in bank._times) / tokens)
                waited[count] += bank._times
    made: dict[str, Any] = {}
    for what in ("512 tokens", "a token"):
        one, two = (np.array(times[count, what]) for count in (1, 2))
        made[f"experts of {what}, s"] = [round(float(np.median(one)), 4), round(float(np.median(two)), 4)]
        made[f"times as fast, {what}"] = [round(float(q), 2) for q in np.quantile(one / two, (0.5, 0, 1))]
    for count, calls in waited.items():
        whole, wait = np.array(calls).T
        half, most = (round(float(1000 * np.quantile(whole, q)), 2) for q in (0.5, 0.99))
        made[f"a layer on {count}"] = {
            "p50_ms": half,
            "p99_ms": most,
            "waiting": round(float(wait.sum() / whole.sum()), 2),
        }
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--ram", default="2GB", help="of a node")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=("bits", "kills", "speed"), default=("bits", "kills", "speed"))
    given = parser.parse_args()
    say(f"{processor()}, {usable_cores()} cores, load {os.getloadavg()[0]:.1f}")
    alone = np.empty(0)
    if {"bits", "kills"} & {*given.only}:
        alone = logits(load(given.model, ram=given.ram, threads=1, ctx=256), given.tokens)
    cluster = started(given.nodes)

    def load_shared() -> Model:
        return load(given.model, ram=given.ram, threads=1, ctx=256, ray=cluster.address, tell=say)

    ray = numoe_cluster.connect(cluster.address)
    if "bits" in given.only:
        report = bits(load_shared, alone, given.tokens, parse_bytes(given.ram))
        print(json.dumps(report), flush=True)
    if "speed" in given.only:
        print(json.dumps(speed(load_shared, given.tokens, given.rounds)), flush=True)
    if "kills" in given.only:
        print(json.dumps(kills(cluster, load_shared, alone, given.tokens, given.kills)), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main())
