"""How near are products of few tokens to what NumPy and the processor allow? Bare loops beside the product itself.

    python tests/bench/limits.py [--format int4] [--tokens 1 2 4 8 16] [--shape 1024 2048] [--processes N] [--rounds 7]

Microseconds for 2^20 weights of a format, groups of 32, from memory, on each of N processes at once: all usable cores
by default. Formats are int4 in a byte a weight, and mxfp4 as it is stored. The least of the rounds counts.

    look-up    of mxfp4: words of four codes made indices, and these the bytes that a table has for them
    cast       the bytes made float32, a block at a time: what no product of codes by NumPy can do without
    sgemm      those blocks multiplied, already float32; also its GFLOP/s, and the share of what large products reach
    sums       the groups' sums scaled and added up
    product    what numoe does
    bare over product: look-up, cast and sgemm; 1.00 would be a product without calls, scales and waiting
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
from numoe.quant.formats.pack import pack_int4, pack_mxfp4
from numoe.quant.formats.qtensor import QTensor

GROUP = 32
WORKING_SET = 48 << 20  # bytes of codes: more than caches hold
LARGE = 1024  # rows and columns of a product that reaches the processor's speed

Times = dict[str, float]

FORMATS: dict[str, Callable[[np.ndarray], QTensor]] = {
    "int4": lambda weights: widened(laid_out(pack_int4(weights, group=GROUP, symmetric=True))),
    "mxfp4": lambda weights: laid_out(pack_mxfp4(weights)),
}


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


def measured(name: str, shape: tuple[int, int], tokens: int, rounds: int, barrier: Barrier) -> Times:
    """Seconds of 2^20 weights by part, and of a large product."""
    use(1)
    random = np.random.default_rng(0)
    rows, columns = shape
    count = max(2, WORKING_SET // (rows * columns))
    weights = random.standard_normal(shape, np.float32)
    matrices = [FORMATS[name](weights) for _ in range(count)]
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
    words_each = GROUP * rows // 4 if name == "mxfp4" else 0
    stored = [random.integers(0, 1 << 16, (len(grouped), words_each), np.uint16) for _ in range(count)]
    table = random.integers(0, 1 << 32, 1 << 16, np.uint32)
    index = np.zeros((step, words_each), np.intp)
    words = np.zeros(index.shape, np.uint32)

    def look_up() -> None:
        for one in stored:
            for start, stop in spans:
                np.copyto(index[: stop - start], one[start:stop])
                np.take(table, index[: stop - start], out=words[: stop - start], mode="wrap")

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
    parts: dict[str, Callable[[], None]] = {"look-up": look_up} if words_each else {}
    parts |= {"cast": cast, "sgemm": sgemm, "sums": add, "product": product}
    taken = {name: share * least(rounds, barrier, work) for name, work in parts.items()}
    return taken | {"large": least(rounds, barrier, lambda: np.matmul(left, right, out=square))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=FORMATS, default="int4")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--shape", type=int, nargs=2, default=[1024, 2048], metavar=("OUT", "IN"))
    parser.add_argument("--processes", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    print(f"{given.format}, {given.processes} at once, {given.shape[0]}x{given.shape[1]}, us for 2^20 weights each\n")
    parts = ["look-up"] * (given.format == "mxfp4") + ["cast", "sgemm", "sums", "product"]
    headings = ["tokens", *parts, "GFLOP/s of sgemm, of a large product's", "bare over product"]
    print("|", " | ".join(headings), "|\n|", " | ".join(["---:"] * len(headings)), "|")
    for tokens in given.tokens:
        with multiprocessing.get_context("fork").Manager() as manager:
            barrier = manager.Barrier(given.processes)
            work = [(given.format, tuple(given.shape), tokens, given.rounds, barrier)] * given.processes
            with multiprocessing.get_context("fork").Pool(given.processes) as pool:
                each = pool.starmap(measured, work, chunksize=1)
        slowest = {name: max(one[name] for one in each) for name in each[0]}
        speed, most = 2 * tokens * 2**20 / slowest["sgemm"], 2 * LARGE**3 / slowest["large"]
        bare = sum(slowest[name] for name in parts if name not in ("sums", "product"))
        figures = [f"{1e6 * slowest[name]:.0f}" for name in parts]
        told = [f"{speed / 1e9:.0f}, {speed / most:.0%}", f"{bare / slowest['product']:.2f}"]
        print("|", " | ".join([str(tokens), *figures, *told]), "|", flush=True)


if __name__ == "__main__":
    main()
