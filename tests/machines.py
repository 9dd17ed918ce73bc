"""Machines of known speed, which nothing is measured for."""

import json
from dataclasses import asdict, replace
from importlib import import_module
from typing import Any

from numoe.engine.home import home
from numoe.engine.measure.forecast import USUAL_CALLS
from numoe.engine.measure.machine import Machine
from numoe.quant.compute import threads

MACHINE = import_module("numoe.engine.measure.machine")
FORMATS = MACHINE._FORMATS
_BILLIONS = {"f32": 10.1, "f16": 5.2, "bf16": 8.1, "fp8": 6.6, "mxfp4": 4.1, "nvfp4": 1.8, "nf4": 2.8}
_BILLIONS |= {"int8": 9.7, "int4": 6.1}
_WIDE = {"mxfp4": 8.9, "int8": 9.8, "int4": 9.2}
_READS = {str(1 << power): 2.1e9 for power in range(16, 25)}


def a_machine(**changes: Any) -> Machine:
    """This one by name, with round figures."""
    rates = dict.fromkeys(FORMATS, 1e9)
    figures = Machine(MACHINE._name(), threads.usable_cores(), rates, 1e10, 5e9, 0.0, 0.0, 50_000_000)
    figures = replace(figures, read_bytes_per_s={str(MACHINE._piece(1 << 24)): 1e9}, calls=USUAL_CALLS)
    return replace(figures, **changes)


def idle_epyc() -> Machine:
    """What two idle cores of an AMD EPYC (Zen 4) were measured at."""
    rates = {kind: 1e9 * _BILLIONS.get(kind, 2.0) for kind in FORMATS}
    wide = {kind: 1e9 * rate for kind, rate in _WIDE.items()}
    return replace(
        a_machine(layer_s=0.00058, chunk_layer_s=0.01), weights_per_s=rates, wide_weights_per_s=wide,
        macs_per_s=83e9, expert_macs_per_s=89e9, process_bytes=86_000_000, read_bytes_per_s=_READS,
    )  # fmt: skip


def keep(machine: Machine) -> None:
    """As the machine on which the tests run, in a NUMOE_HOME that is there."""
    (home() / "machine.json").write_text(json.dumps(asdict(machine)))
