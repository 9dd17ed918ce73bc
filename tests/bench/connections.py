"""How much sooner a file is here over several connections, from a hub that gives each so many bytes a second.

    python tests/bench/connections.py [--rate 4MB] [--size 64MB] [--connections 1 2 4 8]

The hub is on loopback (tests/hub_server.py); the file is one tensor of zeros, hashed and written as a pull does it.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hub_server import Hub

from numoe.engine.hub import segments
from numoe.engine.hub.repository import repository
from numoe.engine.plan import format_bytes, parse_bytes

NAME = "model.safetensors"


def a_shard(size: int) -> bytes:
    head = b'{"x": {"dtype": "U8", "shape": [%d], "data_offsets": [0, %d]}}' % (size, size)
    return len(head).to_bytes(8, "little") + head + bytes(size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="4MB")
    parser.add_argument("--size", default="64MB")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 2, 4, 8])
    given = parser.parse_args()
    rate, size = parse_bytes(given.rate), parse_bytes(given.size)
    segments.SEGMENT = max(1 << 16, size // 32)  # as many parts as a shard of 1 GB has
    with Hub() as hub, tempfile.TemporaryDirectory() as folder:
        hub.rate = rate
        os.environ["HF_ENDPOINT"] = hub.url
        hub.add("owner/model", {NAME: a_shard(size), "config.json": b"{}"})
        found = repository("owner/model")
        found.checkpoint()
        print(f"{format_bytes(size)}, each connection {format_bytes(rate)}/s")
        first = None
        for connections in given.connections:
            begun = time.perf_counter()
            replace(found, connections=connections).fetch(NAME, Path(folder)).unlink()
            seconds = time.perf_counter() - begun
            first = first or seconds
            print(
                f"{connections} at once: {seconds:.1f} s, {format_bytes(int(size / seconds))}/s, {first / seconds:.2f}x"
            )


if __name__ == "__main__":
    main()
