"""How fast this machine is: measured in about three seconds, kept, tried again after a while, and told of every run."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from numoe.engine.budget import free_memory
from numoe.engine.experts.store import READERS
from numoe.engine.experts.unit import read_once
from numoe.engine.home import home, make
from numoe.engine.layers.state import CHUNK
from numoe.engine.measure.forecast import Calls, Machine, Run
from numoe.engine.measure.forecast import piece as _piece
from numoe.engine.plan import format_bytes
from numoe.engine.python import isolated
from numoe.quant.compute import threads, workers
from numoe.quant.compute.kernels import BLOCKS, use_block
from numoe.quant.compute.memory import unshared
from numoe.quant.documents import read_object
from numoe.quant.errors import DoesNotFit, InputError
from numoe.quant.files import PAGE, Extent, Files, write_whole
from numoe.quant.formats.qtensor import QTensor
from numoe.quant.formats.resident import fastest
from numoe.quant.formats.samples import BLOCK_KINDS, blocks, samples

if TYPE_CHECKING:
    from numoe.engine.model import Model

_FORMATS = "f32", "f16", "bf16", "fp8", "mxfp4", "nvfp4", "nf4", "int8", "int4"
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
_KEPT = 20
_LEAST_TOKENS = 8
_FRESH_S, _FRESH_UNDER_LOAD_S = 3600, 60  # what is older is tried
_FACTOR = 1.7  # between two measurements of one machine there are smaller ones
_PROCESS_BYTES = 94_000_000  # where nothing was measured: about the most of machines that were tried
_LIBRARIES_BYTES = 24_000_000  # beside what the probe takes: of commands, of BLAS, of workers with large matrices


def process_bytes() -> int:
    """About what a process of numoe takes beside the memory that a model is given, as it was measured here."""
    machine = known()
    return machine.process_bytes if machine else _PROCESS_BYTES


def known() -> Machine | None:
    """What was measured of this machine before; None for nothing, with other versions, or in a damaged file."""
    try:
        document = read_object(_file())
        runs = tuple(Run(**run) for run in document.pop("runs"))
        calls = document.pop("calls", None)
        machine = Machine(**document, runs=runs, calls=_calls(calls))
        sane = _sane(machine)
    except (InputError, TypeError, KeyError, AttributeError):
        return None
    return machine if sane and machine.name == _name() else None


def _calls(document: Any) -> Calls | None:
    return None if document is None else Calls(**{**document, "seconds": tuple(document["seconds"])})


def _sane(machine: Machine) -> bool:
    """Whether all figures are numbers that something can take or reach, of all formats.

    Raises TypeError or AttributeError where something else than a table is in place of one.
    """
    speeds = [machine.macs_per_s, machine.expert_macs_per_s]
    for rates in (machine.weights_per_s, machine.wide_weights_per_s, machine.read_bytes_per_s):
        speeds += rates.values()
    speeds += [figure for run in machine.runs for figure in (run.predicted, run.correction, run.measured)]
    speeds += [run.weights for run in machine.runs if run.weights is not None]
    if machine.calls is not None:
        speeds += [*machine.calls.seconds, machine.calls.further_s, machine.calls.bytes_per_s]
    times = [machine.load, *([] if machine.measured_at is None else [machine.measured_at])]
    return (
        all(type(speed) in (int, float) and 1e-9 < speed < 1e18 for speed in speeds)
        and all(
            type(figure) in (int, float) and 0 <= figure < 1e18
            for figure in (machine.layer_s, machine.chunk_layer_s, machine.process_bytes, *times)
        )
        and type(machine.cores) is int
        and machine.cores > 0
        and type(machine.block) is int
        and machine.block in BLOCKS
        and set(_FORMATS) <= machine.weights_per_s.keys() <= {*_FORMATS, *BLOCK_KINDS}
        and machine.wide_weights_per_s.keys() <= machine.weights_per_s.keys()
        and (machine.calls is None or len(machine.calls.seconds) > 1)
    )


def calibrate(
    reads: Iterable[int] = (),
    told: Callable[[str], None] = lambda text: None,
    kinds: Iterable[str] = (),
    anew: bool = False,
    calls: bool = False,
) -> Machine:
    """What is known of this machine; what is not is measured and kept in NUMOE_HOME.

    What was measured more than an hour ago is tried: where the machine is faster or slower by a factor now, all of
    it is measured again, and earlier runs count no more.

    Args:
        reads: how many bytes at a time the speed of reading from disk is to be known for.
        kinds: which of ggml's block types, among others, the speed of products is to be known of.
        told: called with a few words about what is being measured.
        anew: measure all again.
        calls: what calls between nodes take is to be known, where Ray is installed.

    Raises:
        DoesNotFit: there is no memory to measure with.
        InputError: NUMOE_HOME cannot be written, and only a new file there would tell how fast its disk reads.
    """
    machine = None if anew else known()
    if machine is None or _changed(machine, told):
        told("measuring how fast this machine computes")
        load = _load()
        machine = replace(_measure(), measured_at=time.time(), load=load)
        _keep(machine)
    if unknown := set(BLOCK_KINDS) & set(kinds) - machine.weights_per_s.keys():
        told("measuring how fast this machine computes")
        machine = _with_kinds(machine, sorted(unknown))
        _keep(machine)
    if pieces := {piece for piece in map(_piece, reads) if str(piece) not in machine.read_bytes_per_s}:
        told("measuring how fast this machine reads")
        try:
            speeds = _read_speeds(home(), pieces)
        except OSError as error:
            raise InputError(
                f"{home()} cannot be written ({error.strerror or error}), which it takes to measure how fast its disk "
                "reads; give that with `read_gb_s`, make room there, or set NUMOE_HOME to a folder that can be written"
            ) from error
        for piece, rate in speeds.items():
            machine = machine.with_reading(piece, rate)
        _keep(machine)
    if calls and machine.calls is None and find_spec("ray") is not None:
        from numoe.engine.measure.calls import measure_calls

        told("measuring what calls between nodes take")
        machine = replace(machine, calls=measure_calls())
        _keep(machine)
    return machine


def _changed(machine: Machine, told: Callable[[str], None]) -> bool:
    """Whether a machine that was measured a while ago, or while others computed, is another one by now."""
    fresh = _FRESH_S if machine.load < machine.cores / 2 else _FRESH_UNDER_LOAD_S
    if machine.measured_at is None or 0 <= time.time() - machine.measured_at < fresh:
        return False
    told("looking whether this machine is as fast as it was")
    threads.use(machine.cores)
    use_block(machine.block)
    now = _one_token_weights_per_s([fastest(matrix) for matrix in samples(*_sizes())["int8"]])
    if not 1 / _FACTOR < now / machine.weights_per_s["int8"] < _FACTOR:
        return True
    if machine.read_bytes_per_s:
        piece = max(map(int, machine.read_bytes_per_s))
        with suppress(OSError):  # where nothing can be written now, what was measured is all that is known
            rate = _read_speeds(home(), [piece])[piece]
            return not 1 / _FACTOR < rate / machine.read_bytes_per_s[str(piece)] < _FACTOR
    return False


def _load() -> float:
    """How many processes compute or wait for a core, on average over a minute; 0 where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows has none
        return 0.0


def record(model: Model, tokens: int, seconds: float) -> None:
    """Compare what a run took with what would have been predicted, and keep both for later predictions.

    Nothing is kept of a few tokens, of other threads than cores, of nodes that helped, of a machine that was not
    calibrated for it, and where NUMOE_HOME cannot be written.
    """
    machine = known()
    if machine is None or model.shared or tokens < _LEAST_TOKENS or threads.in_use() != machine.cores:
        return
    planned = model.plan()
    share = model.experts.budget / model.experts.total_bytes if model.experts else 1.0
    if share < 1 and str(_piece(planned.largest_expert)) not in machine.read_bytes_per_s:
        return
    if any(stored.kind not in machine.weights_per_s for stored in planned.active):
        return
    alike = machine.about(planned)
    predicted = math.sqrt(math.prod(alike.decode(planned, share, bool(model.wide_bytes))))
    run = Run(model.path.name, predicted, alike.correction, tokens / seconds, planned.active_parameters)
    _keep(replace(machine, runs=(*machine.runs, run)[-_KEPT:]))


def _file() -> Path:
    return home() / "machine.json"


def _keep(machine: Machine) -> None:
    """For later, where that can be: neither an answer nor a forecast fails because figures cannot be noted."""
    with suppress(OSError):
        make(home())
        write_whole(_file(), json.dumps(asdict(machine), indent=1).encode(), private=True)


def processor() -> str:
    """What this machine computes with, by name."""
    lines = []
    with suppress(OSError):  # Linux alone has it
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    # asked last, for it may start a program
    return next(names, "") or platform.processor() or platform.machine()


def _name() -> str:
    from importlib.metadata import PackageNotFoundError, version  # takes 2 MB, and most runs know no machine

    try:
        numoe = version("numoe")
    except PackageNotFoundError:  # run from a folder that was never installed
        numoe = str(Path(__file__).parent)
    return f"{processor()}, {threads.usable_cores()} cores, numpy {np.__version__}, numoe {numoe}"


def _sizes() -> tuple[tuple[int, int], int]:
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


def _measure() -> Machine:
    cores = threads.usable_cores()
    matrices = samples(*_sizes())
    block = _fastest_block([fastest(matrix) for matrix in matrices["int4"][:_BLOCK_MATRICES]])
    use_block(block)
    threads.use(cores)
    rates: dict[str, float] = {}
    wide_rates: dict[str, float] = {}
    for kind, stored in matrices.items():
        dense = [fastest(matrix) for matrix in stored]
        rates[kind] = _one_token_weights_per_s(dense)
        wide = [fastest(matrix, wide=True) for matrix in dense]
        if wide[0] is not dense[0]:
            wide_rates[kind] = _one_token_weights_per_s(wide)
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
    return Machine(_name(), cores, rates, macs, expert_macs, layer_s, chunk_layer_s, process, wide_rates, block=block)


def _further_macs_per_s(matrices: list[QTensor], tokens: int, one_token: float) -> float:
    """Multiply-adds a second of all tokens of a product but the first, which has the weights decoded, where
    `one_token` is how many weights a second are multiplied with one."""
    seconds = 1 / _weights_per_s(matrices, tokens)  # for each weight
    return (tokens - 1) / max(seconds - 1 / one_token, seconds / 2)  # decoding is not most of it


def _with_kinds(machine: Machine, kinds: Iterable[str]) -> Machine:
    """This machine with the speeds of some of ggml's block types."""
    threads.use(machine.cores)
    rates, wide_rates = {}, {}
    shape, working_set = _sizes()
    for kind in kinds:
        dense = fastest(blocks(kind, shape))
        turns = [dense] + [deepcopy(dense) for _ in range(working_set // dense.nbytes)]
        rates[kind] = _one_token_weights_per_s(turns)
        wide_rates[kind] = _one_token_weights_per_s([fastest(matrix, wide=True) for matrix in turns[:_WIDE_MATRICES]])
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


def _one_token_weights_per_s(matrices: list[QTensor]) -> float:
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


def _read_speeds(folder: Path, pieces: Iterable[int]) -> dict[int, float]:
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
