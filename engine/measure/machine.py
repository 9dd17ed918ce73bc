"""How fast this machine is: measured once, in about three seconds, and corrected by every run that follows.

What one token takes is a sum: its weights by the speed of their format's kernel, something a layer, and the bytes of
its experts that are not in memory by the speed of the disk. All real runs together say by which factor that sum errs.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from numoe.engine.experts.store import READERS
from numoe.engine.home import home, make
from numoe.engine.layers.state import CHUNK
from numoe.engine.plan import Plan, Verdict
from numoe.engine.python import isolated
from numoe.quant.compute import threads, workers
from numoe.quant.compute.kernels import BLOCKS, use_block
from numoe.quant.documents import read_object
from numoe.quant.errors import InputError
from numoe.quant.files import Files, write_whole
from numoe.quant.formats.format import Format
from numoe.quant.formats.qtensor import QTensor
from numoe.quant.formats.resident import fastest
from numoe.quant.formats.samples import samples

if TYPE_CHECKING:
    from numoe.engine.model import Model

_FORMATS = "f32", "f16", "bf16", "fp8", "mxfp4", "nvfp4", "nf4", "int8", "int4"
_SHAPE = 2048, 4096  # of an expert's matrix in DeepSeek-V4-Flash
_WORKING_SET = 1 << 26  # more than the caches hold
_SECONDS = 0.05  # for each figure
_BLOCK_TURNS = 5
_BLOCK_MATRICES = 8
_CLEARLY = 0.95
_EXPERT_BATCH = 16  # tokens of a chunk that take the same expert, or so
_SCRATCH_FILE = 1 << 27
_KEPT = 20
_JUDGED = 5
_LEAST_TOKENS = 8
_UNTRIED = 1.5
_LEAST_MARGIN = 1.1


@dataclass(frozen=True)
class Run:
    """Tokens a second of a run: as predicted before it, with the correction of then, and as measured."""

    model: str
    predicted: float
    correction: float
    measured: float


@dataclass(frozen=True)
class Forecast:
    """What a model does on a machine. Speeds are tokens a second, low and high; 0 where it does not run."""

    verdict: Verdict
    expert_bytes: int
    """Routed experts that are in memory."""
    peak_bytes: int
    """The most memory that the process takes, or would take at least where it does not run."""
    decode: tuple[float, float]
    prefill: tuple[float, float]


@dataclass(frozen=True)
class Machine:
    """What was measured of a machine. `name` tells it from others, and from itself with other versions."""

    name: str
    cores: int
    weights_per_s: Mapping[str, float]
    """Weights that one token is multiplied with in a second, by `Format.kind`."""
    macs_per_s: float
    """Multiply-adds a second of further tokens with the same weights, all tokens of a chunk."""
    expert_macs_per_s: float
    """The same of as many tokens as share a routed expert."""
    layer_s: float
    """What a layer takes beside its weights."""
    process_bytes: int
    """Memory of a process with an empty model."""
    wide_weights_per_s: Mapping[str, float] = field(default_factory=dict)
    """`weights_per_s` in the form that takes more memory, of the formats that have one."""
    read_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    """Reading from disk, as many reads at a time as the expert store makes, by the bytes of a read."""
    block: int = BLOCKS[-1]
    """Which of BLOCKS few tokens are multiplied fastest with."""
    runs: tuple[Run, ...] = ()
    """The latest, oldest first."""

    @property
    def correction(self) -> float:
        """What the speeds that the figures give are multiplied by: the median of what runs have shown."""
        return median([run.measured / run.predicted * run.correction for run in self.runs]) if self.runs else 1.0

    @property
    def judged(self) -> tuple[float, ...]:
        """Of the latest runs, measured through predicted."""
        return tuple(run.measured / run.predicted for run in self.runs[-_JUDGED:])

    @property
    def margin(self) -> float:
        """The factor by which a prediction may be too high or too low."""
        return max([_LEAST_MARGIN, *self.judged, *(1 / ratio for ratio in self.judged)]) if self.runs else _UNTRIED

    def with_cores(self, cores: int) -> Machine:
        """This machine if it had so many cores."""
        share = cores / self.cores
        dense, wide = (
            {kind: share * rate for kind, rate in rates.items()}
            for rates in (self.weights_per_s, self.wide_weights_per_s)
        )
        return replace(
            self,
            cores=cores,
            weights_per_s=dense,
            wide_weights_per_s=wide,
            macs_per_s=share * self.macs_per_s,
            expert_macs_per_s=share * self.expert_macs_per_s,
        )

    def with_reading(self, nbytes: int, rate: float) -> Machine:
        """This machine if it read so many bytes a second, `nbytes` at a time."""
        return replace(self, read_bytes_per_s={**self.read_bytes_per_s, str(_piece(nbytes)): rate})

    def reading(self, nbytes: int) -> float:
        """Bytes a second of reads of about so many bytes. Raises KeyError where that was not measured."""
        return self.read_bytes_per_s[str(_piece(nbytes))]

    def forecast(self, plan: Plan, room: int) -> Forecast:
        """What a model does here with `room` bytes of memory.

        Raises:
            KeyError: experts are read from disk, and how fast that goes at their size was not measured.
        """
        verdict = plan.verdict(room)
        held = plan.held_experts(room)
        peak = self.process_bytes + max(plan.beside_experts + held, plan.least_bytes)
        none = (0.0, 0.0)
        if verdict is Verdict.TOO_LARGE:
            return Forecast(verdict, held, peak, none, none)
        share = held / plan.expert_bytes if plan.expert_bytes else 1.0
        wide = plan.widens(room)
        return Forecast(verdict, held, peak, self.decode(plan, share, wide), self._prefill(plan, share, wide))

    def decode(self, plan: Plan, share: float, wide: bool) -> tuple[float, float]:
        """Tokens a second that a model writes, low and high, with this share of its routed experts in memory.

        `wide`: whether its weights take the form that needs more of it.

        Low: the others are missed as often as they are many, and are waited for. High: routers repeat themselves, so
        that only the square of that is missed, and reading goes on beside computing. Raises what `forecast` raises.
        """
        missing = sum(plan.active_experts.values()) * (1 - share)
        return self._range(1, plan, self._kernels(plan.active, wide), missing, missing * (1 - share))

    def _prefill(self, plan: Plan, share: float, wide: bool) -> tuple[float, float]:
        """The same for tokens that a model reads, `CHUNK` at a time: together they take all experts once."""
        weights: Counter[Format] = Counter()
        for (role, stored), size in plan.sizes.items():
            if stored.kind != "i64" and role not in ("embedding", "head"):  # of which a chunk takes rows
                weights[stored] += size
        macs = (CHUNK - 1) * plan.active_parameters
        rate = self.expert_macs_per_s if plan.active_experts else self.macs_per_s
        kernels = self._kernels(weights, wide) + macs / rate
        missing = plan.expert_bytes * (1 - share)
        return self._range(CHUNK, plan, kernels, missing, missing)

    def _kernels(self, weights: Mapping[Format, int], wide: bool) -> float:
        """Seconds for one token."""
        rates = {**self.weights_per_s, **self.wide_weights_per_s} if wide else self.weights_per_s
        return sum(count / rates[stored.kind] for stored, count in weights.items())

    def _range(self, tokens: int, plan: Plan, kernels: float, missing: float, fewer: float) -> tuple[float, float]:
        compute = plan.layers * self.layer_s + kernels
        slow = fast = compute
        if missing:
            rate = self.reading(plan.largest_expert)
            slow, fast = compute + missing / rate, max(compute, fewer / rate)
        corrected = tokens * self.correction
        return corrected / slow / self.margin, corrected / fast * self.margin


def known() -> Machine | None:
    """What was measured of this machine before; None for nothing, with other versions, or in a damaged file."""
    try:
        document = read_object(_file())
        runs = tuple(Run(**run) for run in document.pop("runs"))
        machine = Machine(**document, runs=runs)
        sane = _sane(machine)
    except (InputError, TypeError, KeyError, AttributeError):
        return None
    return machine if sane and machine.name == _name() else None


def _sane(machine: Machine) -> bool:
    """Whether all figures are numbers that something can take or reach, of all formats.

    Raises TypeError or AttributeError where something else than a table is in place of one.
    """
    speeds = [machine.macs_per_s, machine.expert_macs_per_s]
    for rates in (machine.weights_per_s, machine.wide_weights_per_s, machine.read_bytes_per_s):
        speeds += rates.values()
    speeds += [figure for run in machine.runs for figure in (run.predicted, run.correction, run.measured)]
    return (
        all(type(speed) in (int, float) and 1e-9 < speed < 1e18 for speed in speeds)
        and all(
            type(figure) in (int, float) and 0 <= figure < 1e18 for figure in (machine.layer_s, machine.process_bytes)
        )
        and type(machine.cores) is int
        and machine.cores > 0
        and type(machine.block) is int
        and machine.block in BLOCKS
        and machine.weights_per_s.keys() == set(_FORMATS)
        and machine.wide_weights_per_s.keys() <= set(_FORMATS)
    )


def calibrate(reads: Iterable[int] = (), told: Callable[[str], None] = lambda text: None) -> Machine:
    """What is known of this machine; what is not is measured and kept in NUMOE_HOME.

    Args:
        reads: how many bytes at a time the speed of reading from disk is to be known for.
        told: called with a few words about what is being measured.

    Raises:
        InputError: NUMOE_HOME cannot be written, and only a new file there would tell how fast its disk reads.
    """
    machine = known()
    if machine is None:
        told("measuring how fast this machine computes")
        machine = _measure()
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
    return machine


def record(model: Model, tokens: int, seconds: float) -> None:
    """Compare what a run took with what would have been predicted, and keep both for later predictions.

    Nothing is kept of a few tokens, of other threads than cores, of a machine that was not calibrated, and where
    NUMOE_HOME cannot be written.
    """
    machine = known()
    if machine is None or tokens < _LEAST_TOKENS or threads.in_use() != machine.cores:
        return
    planned = model.plan()
    share = model.experts.budget / model.experts.total_bytes if model.experts else 1.0
    if share < 1 and str(_piece(planned.largest_expert)) not in machine.read_bytes_per_s:
        return
    predicted = math.sqrt(math.prod(machine.decode(planned, share, bool(model.wide_bytes))))
    run = Run(model.path.name, predicted, machine.correction, tokens / seconds)
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


def _piece(nbytes: int) -> int:
    """The size of reads that stands for `nbytes`: a power of two from 64 KiB to 16 MiB."""
    return 1 << min(max(nbytes - 1, 0).bit_length(), 24) if nbytes > 1 << 16 else 1 << 16


def _measure() -> Machine:
    cores = threads.usable_cores()
    matrices = samples(_SHAPE, _WORKING_SET)
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
    macs, expert_macs = (tokens * _weights_per_s(matrices["f32"], tokens) for tokens in (CHUNK, _EXPERT_BATCH))
    probe = _probe()
    kernels = sum(count / rates[kind] for kind, count in probe["active"])
    layer_s = max(0.0, probe["token_s"] - kernels) / probe["layers"]
    return Machine(_name(), cores, rates, macs, expert_macs, layer_s, probe["process_bytes"], wide_rates, block=block)


def _fastest_block(matrices: list[QTensor]) -> int:
    """Which of BLOCKS one token is multiplied fastest with, on one thread: the caches of a core are its own.

    What counts is the processor's time, which others change least, and the largest is taken where none is clearly
    faster.
    """
    threads.use(1)
    x = np.ones((1, _SHAPE[1]), np.float32)
    out = np.empty((1, _SHAPE[0]), np.float32)
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
from numoe.quant.compute import workers
from numoe.quant.formats.samples import PACKS
model = load("tiny")
session = model.session(64)
for _ in session.generate("Hello", max_tokens=8):
    pass
times = []
for token in range(24):
    begun = time.perf_counter()
    session.feed([token], last=True)
    times.append(time.perf_counter() - begun)
plan = model.plan(64)
large = PACKS[0](np.ones((4096, 256), np.float32))  # enough for workers to be started
workers.know([large])
large.matmul(np.ones((1, 256), np.float32))
process = model.stats()["peak_rss_bytes"] - plan.total_bytes - large.nbytes
active = [(stored.kind, count) for stored, count in plan.active.items()]
figures = {"token_s": statistics.median(times), "layers": plan.layers, "active": active, "process_bytes": process}
print(json.dumps(figures))
"""


def _one_token_weights_per_s(matrices: list[QTensor]) -> float:
    workers.know(matrices)
    return _weights_per_s(matrices, tokens=1)


def _weights_per_s(matrices: list[QTensor], tokens: int) -> float:
    """Weights that so many tokens are multiplied with in a second, the matrices taken in turn."""
    rows, columns = _SHAPE
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
            with ThreadPoolExecutor(READERS) as pool:
                begun = time.perf_counter()
                read = sum(pool.map(lambda start, piece=piece: len(files.read_range(path, start, piece)), starts))
                speeds[piece] = read / (time.perf_counter() - begun)
    finally:
        files.close()
        path.unlink(missing_ok=True)
    return speeds
