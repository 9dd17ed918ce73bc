"""How near are products of few tokens to what NumPy and the processor allow? Bare loops beside the product itself.

    python tests/bench/limits.py [--tokens 1 2 4 8 16] [--shape 1024 2048] [--processes N] [--rounds 7]

Microseconds for 2^20 weights of int4 in a byte each, groups of 32, from memory, on each of N processes at once: all
usable cores by default. The least of the rounds counts.

    cast       the codes made float32, a block at a time: what no product of codes by NumPy can do without
    sgemm      those blocks multiplied, already float32; in brackets GFLOP/s, and the share of what large products reach
    sums       the groups' sums scaled and added up
    product    what numoe does
    cast+sgemm over product: 1.00 would be a product without calls, scales and waiting
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier

import numpy as np

from numoe.quant.compute.activations import Activations
from numoe.quant.compute.kernels import block_elements
from numoe.quant.compute.memory import aligned
from numoe.quant.compute.threads import usable_cores, use
from numoe.quant.formats.columns import laid_out, widened
from numoe.quant.formats.pack import pack_int4

GROUP = 32
WORKING_SET = 48 << 20  # bytes of codes: more than caches hold
LARGE = 1024  # rows and columns of a product that reaches the processor's speed

Times = dict[str, float]


def empty(*shape: int) -> np.ndarray:
    return aligned(4 * int(np.prod(shape))).view(np.float32).reshape(shape)


def least(rounds: int, barrier: Barrier, work: Callable[[], object]) -> float:
    """Seconds that it takes, at the same time as the other processes'."""
    times = []
    for _ in range(rounds + 1):
        barrier.wait()
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def measured(shape: tuple[int, int], tokens: int, rounds: int, barrier: Barrier) -> Times:
    """Seconds of 2^20 weights by part, and of a large product."""
    use(1)
    random = np.random.default_rng(0)
    rows, columns = shape
    count = max(2, WORKING_SET // (rows * columns))
    packed = pack_int4(random.standard_normal(shape, np.float32), group=GROUP, symmetric=True)
    matrices = [widened(laid_out(packed)) for _ in range(count)]
    codes = [random.integers(0, 16, (columns // GROUP, GROUP, rows), np.int8) for _ in range(count)]
    scales = empty(columns // GROUP, rows)
    scales[:] = 1
    x = random.standard_normal((tokens, columns), np.float32)
    grouped = x.reshape(tokens, -1, GROUP).transpose(1, 0, 2)  # (G, T, g)
    step = max(1, block_elements() // (GROUP * rows))
    block = empty(step, GROUP, rows + 16)[..., :rows]  # columns a line further apart than a power of two
    block[:] = 1
    sums = np.zeros((len(grouped), tokens, rows), np.float32)
    out, left, right, square = empty(tokens, rows), *(np.ones((LARGE, LARGE), np.float32) for _ in range(3))
    spans = [(start, min(start + step, len(grouped))) for start in range(0, len(grouped), step)]

    def cast() -> None:
        for one in codes:
            for start, stop in spans:
                np.copyto(block[: stop - start], one[start:stop])

    def sgemm() -> None:
        for _ in codes:
            for start, stop in spans:
                np.matmul(grouped[start:stop], block[: stop - start], out=sums[start:stop])

    def add() -> None:
        for _ in codes:
            np.einsum("gtr,gr->tr", sums, scales, out=out)

    def product() -> None:
        for matrix in matrices:
            matrix.matmul(Activations(x), out)

    share = 2**20 / (count * rows * columns)
    parts = {"cast": cast, "sgemm": sgemm, "sums": add, "product": product}
    taken = {name: share * least(rounds, barrier, work) for name, work in parts.items()}
    return taken | {"large": least(rounds, barrier, lambda: np.matmul(left, right, out=square))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--shape", type=int, nargs=2, default=[1024, 2048], metavar=("OUT", "IN"))
    parser.add_argument("--processes", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    print(f"{given.processes} processes at once, {given.shape[0]}x{given.shape[1]}, us for 2^20 weights each\n")
    print("| tokens | cast | sgemm (GFLOP/s, of a large product's) | sums | product | cast+sgemm over product |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for tokens in given.tokens:
        with multiprocessing.get_context("fork").Manager() as manager:
            barrier = manager.Barrier(given.processes)
            work = [(tuple(given.shape), tokens, given.rounds, barrier)] * given.processes
            with multiprocessing.get_context("fork").Pool(given.processes) as pool:
                each = pool.starmap(measured, work, chunksize=1)
        slowest = {name: max(one[name] for one in each) for name in each[0]}
        speed, most = 2 * tokens * 2**20 / slowest["sgemm"], 2 * LARGE**3 / slowest["large"]
        cast, sgemm, sums, product = (1e6 * slowest[name] for name in ("cast", "sgemm", "sums", "product"))
        print(
            f"| {tokens} | {cast:.0f} | {sgemm:.0f} ({speed / 1e9:.0f}, {speed / most:.0%}) | {sums:.0f} "
            f"| {product:.0f} | {(cast + sgemm) / product:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
