"""What is measured of a machine: products of each format, a small model as a whole, and reads from disk."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from numoe.engine.budget import free_memory
from numoe.engine.experts.store import READERS
from numoe.engine.experts.unit import read_once
from numoe.engine.layers.state import CHUNK
from numoe.engine.measure.forecast import Machine
from numoe.engine.plan import format_bytes
from numoe.engine.python import isolated
from numoe.quant.compute import threads, workers
from numoe.quant.compute.kernels import BLOCKS, use_block
from numoe.quant.compute.memory import unshared
from numoe.quant.errors import DoesNotFit
from numoe.quant.files import PAGE, Extent, Files
from numoe.quant.formats.qtensor import QTensor
from numoe.quant.formats.resident import fastest
from numoe.quant.formats.samples import blocks, samples

_SHAPE = 2048, 4096  # of an expert's matrix in DeepSeek-V4-Flash
_WORKING_SET = 1 << 26  # more than the caches hold
_MEASURING = 1_000_000_000  # bytes of memory that it takes to measure with these, at most
_LESS = 4  # times less of all where there is not so much, which takes smaller matrices for faster than they are
_SECONDS = 0.05  # for each figure
_BLOCK_TURNS = 5
_BLOCK_MATRICES = 8
_WIDE_MATRICES = 8
_CLEARLY = 0.95
_EXPERT_BATCH = 64  # tokens of a chunk that take the same expert, or so
_SCRATCH_FILE = 1 << 27
_LIBRARIES_BYTES = 24_000_000  # beside what the probe takes: of commands, of BLAS, of workers with large matrices


def sizes() -> tuple[tuple[int, int], int]:
    """The shape of matrices to measure with, and how many bytes of them in turn: as there is memory for.

    Raises:
        DoesNotFit: there is none.
    """
    rows, columns = _SHAPE
    free = free_memory()
    for less in (1, _LESS):
        if free >= _MEASURING // less:
            return (rows // less, columns), _WORKING_SET // less
    raise DoesNotFit(
        f"measuring how fast this machine computes needs {format_bytes(_MEASURING // _LESS)} of memory and "
        f"{format_bytes(max(0, free))} are free now; close other programs, or allow this one more"
    )


def measure() -> Machine:
    """A machine without a name, and without what only some models need. Raises what `sizes` raises."""
    cores = threads.usable_cores()
    matrices = samples(*sizes())
    block = _fastest_block([fastest(matrix) for matrix in matrices["int4"][:_BLOCK_MATRICES]])
    use_block(block)
    threads.use(cores)
    rates: dict[str, float] = {}
    wide_rates: dict[str, float] = {}
    for kind, stored in matrices.items():
        dense = [fastest(matrix) for matrix in stored]
        rates[kind] = one_token_weights_per_s(dense)
        wide = [fastest(matrix, wide=True) for matrix in dense]
        if wide[0] is not dense[0]:
            wide_rates[kind] = one_token_weights_per_s(wide)
    quantized = [fastest(matrix) for matrix in matrices["int4"]]
    macs, expert_macs = (_further_macs_per_s(quantized, tokens, rates["int4"]) for tokens in (CHUNK, _EXPERT_BATCH))
    probe = _probe()
    layer_s, chunk_layer_s = (
        max(0.0, taken - sum(count / rates[kind] for kind, count in weights) - further / expert_macs) / probe["layers"]
        for taken, weights, further in (
            (probe["token_s"], probe["active"], 0),
            (probe["chunk_s"], probe["chunk"], (CHUNK - 1) * probe["chunk_parameters"]),
        )
    )
    process = probe["process_bytes"] + _LIBRARIES_BYTES
    return Machine("", cores, rates, macs, expert_macs, layer_s, chunk_layer_s, process, wide_rates, block=block)


def _further_macs_per_s(matrices: list[QTensor], tokens: int, one_token: float) -> float:
    """Multiply-adds a second of all tokens of a product but the first, which has the weights decoded, where
    `one_token` is how many weights a second are multiplied with one."""
    seconds = 1 / _weights_per_s(matrices, tokens)  # for each weight
    return (tokens - 1) / max(seconds - 1 / one_token, seconds / 2)  # decoding is not most of it


def with_kinds(machine: Machine, kinds: Iterable[str]) -> Machine:
    """This machine with the speeds of some of ggml's block types."""
    threads.use(machine.cores)
    rates, wide_rates = {}, {}
    shape, working_set = sizes()
    for kind in kinds:
        dense = fastest(blocks(kind, shape))
        turns = [dense] + [deepcopy(dense) for _ in range(working_set // dense.nbytes)]
        rates[kind] = one_token_weights_per_s(turns)
        wide_rates[kind] = one_token_weights_per_s([fastest(matrix, wide=True) for matrix in turns[:_WIDE_MATRICES]])
    return replace(
        machine,
        weights_per_s={**machine.weights_per_s, **rates},
        wide_weights_per_s={**machine.wide_weights_per_s, **wide_rates},
    )


def _fastest_block(matrices: list[QTensor]) -> int:
    """Which of BLOCKS one token is multiplied fastest with, on one thread: the caches of a core are its own.

    What counts is the processor's time, which others change least, and the largest is taken where none is clearly
    faster.
    """
    threads.use(1)
    rows, columns = matrices[0].shape
    x = np.ones((1, columns), np.float32)
    out = np.empty((1, rows), np.float32)
    seconds: dict[int, list[float]] = {block: [] for block in BLOCKS}
    for _ in range(_BLOCK_TURNS):
        for block in BLOCKS:
            use_block(block)
            begun = time.process_time()
            for matrix in matrices:
                matrix.matmul(x, out)
            seconds[block].append(time.process_time() - begun)
    largest = BLOCKS[-1]
    best = min(BLOCKS, key=lambda block: median(seconds[block]))
    return best if median(seconds[best]) < _CLEARLY * median(seconds[largest]) else largest


def _probe() -> Any:
    """What a whole model takes in a process of its own."""
    made = subprocess.run(
        isolated(_PROBE), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, cwd=Path(__file__).parent
    )
    return json.loads(made.stdout)


# The model is small enough that what it takes is mostly not its weights.
_PROBE = """
import json, statistics, time
import numpy as np
from numoe.engine import load
from numoe.engine.layers.state import CHUNK
from numoe.quant.compute import workers
from numoe.quant.formats.samples import PACKS


def median_s(session, tokens, count):
    times = []
    for _ in range(count):
        session.rewind(session.position)
        begun = time.perf_counter()
        session.feed(tokens, last=True)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


model = load("tiny")
session = model.session(64)
for _ in session.generate("Hello", max_tokens=8):
    pass
token_s = median_s(session, [5], 24)
plan = model.plan(64)
large = PACKS[0](np.ones((4096, 256), np.float32))  # enough for workers to be started
workers.know([large])
large.matmul(np.ones((1, 256), np.float32))
process = model.stats()["peak_rss_bytes"] - (plan.total_bytes + model.wide_bytes - plan.scratch_bytes) - large.nbytes
chunk_s = median_s(model.session(CHUNK), list(range(CHUNK)), 7)
active, chunk = ([(stored.kind, count) for stored, count in sizes.items()] for sizes in (plan.active, plan.chunk))
figures = {"token_s": token_s, "chunk_s": chunk_s, "layers": plan.layers, "active": active, "chunk": chunk}
figures |= {"chunk_parameters": plan.chunk_parameters, "process_bytes": process}
print(json.dumps(figures))
"""


def one_token_weights_per_s(matrices: list[QTensor]) -> float:
    workers.know(matrices)
    return _weights_per_s(matrices, tokens=1)


def _weights_per_s(matrices: list[QTensor], tokens: int) -> float:
    """Weights that so many tokens are multiplied with in a second, the matrices taken in turn."""
    rows, columns = matrices[0].shape
    x = np.ones((tokens, columns), np.float32)
    out = np.empty((tokens, rows), np.float32)
    matrices[-1].matmul(x, out)
    done, begun = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < _SECONDS or done < 2:
        matrices[done % len(matrices)].matmul(x, out)
        done += 1
    return done * rows * columns / elapsed


def read_speeds(folder: Path, pieces: Iterable[int]) -> dict[int, float]:
    """Bytes a second from a new file, read so many bytes at a time by as many threads as the expert store has.

    The system's own copy of the file is dropped first where it can be (Linux); elsewhere this is too high. But on
    Windows the file has no name any more when its bytes are written, so that it never outlasts this process.
    """
    path = folder / f"scratch-{os.getpid()}"
    files = Files()
    speeds = {}
    try:
        with path.open("wb") as file:
            files.open(path)
            if os.name != "nt":
                path.unlink()
            block = np.random.default_rng(0).bytes(1 << 24)
            for _ in range(_SCRATCH_FILE >> 24):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        for piece in pieces:
            files.drop_cached(path, 0, _SCRATCH_FILE)
            starts = (np.random.default_rng(0).permutation(_SCRATCH_FILE // piece) * piece).tolist()
            speeds[piece] = read_speed(files, path, starts, piece)
    finally:
        files.close()
        path.unlink(missing_ok=True)
    return speeds


def read_speed(files: Files, path: Path, starts: list[int], nbytes: int) -> float:
    """Bytes a second of reads of so many bytes each, made as the expert store makes them."""
    own = threading.local()

    def read(start: int) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = unshared(nbytes + 2 * PAGE)
        read_once(files, Extent(path, start, nbytes), own.buffer, start % PAGE)

    with ThreadPoolExecutor(READERS) as pool:
        begun = time.perf_counter()
        list(pool.map(read, starts))
        return len(starts) * nbytes / (time.perf_counter() - begun)
