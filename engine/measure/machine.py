"""How fast this machine is: measured in about three seconds, kept, tried again after a while, and told of every run."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from numoe.engine.home import home, make
from numoe.engine.measure import speeds
from numoe.engine.measure.forecast import Calls, Machine, Run
from numoe.engine.measure.forecast import piece as _piece
from numoe.quant.compute import threads
from numoe.quant.compute.kernels import BLOCKS, use_block
from numoe.quant.documents import read_object
from numoe.quant.errors import InputError
from numoe.quant.files import write_whole
from numoe.quant.formats.resident import fastest
from numoe.quant.formats.samples import BLOCK_KINDS, samples

if TYPE_CHECKING:
    from numoe.engine.model import Model

_FORMATS = "f32", "f16", "bf16", "fp8", "mxfp4", "nvfp4", "nf4", "int8", "int4"
_KEPT = 20
_LEAST_TOKENS = 8
_FRESH_S, _FRESH_UNDER_LOAD_S = 3600, 60  # what is older is tried
_FACTOR = 1.7  # between two measurements of one machine there are smaller ones
_PROCESS_BYTES = 94_000_000  # where nothing was measured: about the most of machines that were tried


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
    figures = [machine.macs_per_s, machine.expert_macs_per_s]
    for rates in (machine.weights_per_s, machine.wide_weights_per_s, machine.read_bytes_per_s):
        figures += rates.values()
    figures += [figure for run in machine.runs for figure in (run.predicted, run.correction, run.measured)]
    figures += [run.weights for run in machine.runs if run.weights is not None]
    if machine.calls is not None:
        figures += [*machine.calls.seconds, machine.calls.further_s, machine.calls.bytes_per_s]
    times = [machine.load, *([] if machine.measured_at is None else [machine.measured_at])]
    return (
        all(type(figure) in (int, float) and 1e-9 < figure < 1e18 for figure in figures)
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
        machine = replace(speeds.measure(), name=_name(), measured_at=time.time(), load=load)
        _keep(machine)
    if unknown := set(BLOCK_KINDS) & set(kinds) - machine.weights_per_s.keys():
        told("measuring how fast this machine computes")
        machine = speeds.with_kinds(machine, sorted(unknown))
        _keep(machine)
    if pieces := {piece for piece in map(_piece, reads) if str(piece) not in machine.read_bytes_per_s}:
        told("measuring how fast this machine reads")
        try:
            found = speeds.read_speeds(home(), pieces)
        except OSError as error:
            raise InputError(
                f"{home()} cannot be written ({error.strerror or error}), which it takes to measure how fast its disk "
                "reads; give that with `read_gb_s`, make room there, or set NUMOE_HOME to a folder that can be written"
            ) from error
        for piece, rate in found.items():
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
    now = speeds.one_token_weights_per_s([fastest(matrix) for matrix in samples(*speeds.sizes())["int8"]])
    if not 1 / _FACTOR < now / machine.weights_per_s["int8"] < _FACTOR:
        return True
    if machine.read_bytes_per_s:
        piece = max(map(int, machine.read_bytes_per_s))
        with suppress(OSError):  # where nothing can be written now, what was measured is all that is known
            rate = speeds.read_speeds(home(), [piece])[piece]
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
