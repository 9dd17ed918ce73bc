"""Do reading and computing overlap? Decode time a token against the larger of its read time and its compute time.

    python tests/bench/overlap.py MODEL --ram 8GB [--tokens 32] [--threads N]

Every token is fed twice: once as it comes, with the reads that it needs, and once more after going back one token,
when its experts are in memory: the second time is its compute time. Its read time is the bytes that were read divided
by the speed at which the store reads experts of this size when nothing is computed. A ratio of 1 is perfect overlap.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np

from numoe.engine import Session, load
from numoe.engine.experts.store import ExpertStore


def reading_speed(store: ExpertStore, experts: dict[int, int], seconds: float = 5.0) -> float:
    """Bytes a second of reading experts that are not in memory, picked at random; `experts` a layer."""
    random = np.random.default_rng(0)
    layers = list(experts)
    store.ahead = False
    before, begun = store.stats()["bytes_read"], time.perf_counter()
    while time.perf_counter() - begun < seconds:
        layer = layers[random.integers(len(layers))]
        with store.stream(layer, random.permutation(experts[layer])[:16]) as units:
            for _ in units:
                pass
    speed = (store.stats()["bytes_read"] - before) / (time.perf_counter() - begun)
    store.ahead = True
    return speed


def timed(session: Session, token: int) -> float:
    begun = time.perf_counter()
    session.feed([token], last=True)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--ram", required=True)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    model = load(arguments.model, ram=arguments.ram, threads=arguments.threads)
    store = model.experts
    if store is None or store.complete:
        parser.error("all of this model is in memory; lower --ram")
    speed = reading_speed(store, {layer: experts for layer, (experts, _) in model.spec.routed.items()})
    session = model.session()
    ids = (np.random.PCG64(0).random_raw(arguments.tokens) % np.uint64(model.spec.vocab)).tolist()
    taken, bounds, computed = [], [], []
    total_read = 0
    for token in ids:
        before = store.stats()["bytes_read"]
        taken.append(timed(session, token))
        read = store.stats()["bytes_read"] - before
        total_read += read
        session.rewind(1)
        again = store.stats()
        computed.append(timed(session, token))
        if store.stats()["misses"] > again["misses"]:
            parser.error("one token's experts do not stay in memory; raise --ram")
        bounds.append(max(read / speed, computed[-1]))
    needed = sum(top_k for _, top_k in model.spec.routed.values()) / model.spec.routed_experts
    needed *= len(ids) * model.plan().expert_bytes
    print(f"reading      {speed / 1e9:.2f} GB/s")
    print(f"hit rate     {1 - total_read / needed:.1%} of the bytes of experts that tokens took")
    print(f"compute time {median(computed):.3f} s a token")
    print(f"decode time  {median(taken):.3f} s a token")
    print(f"ratio        {sum(taken) / sum(bounds):.3f} of max(read time, compute time)")


if __name__ == "__main__":
    main()
