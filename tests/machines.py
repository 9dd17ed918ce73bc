"""A machine of known speed, which nothing was measured for."""

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


def a_machine(**changes: Any) -> Machine:
    """This one by name, with round figures."""
    figures = Machine(MACHINE._name(), threads.usable_cores(), dict.fromkeys(FORMATS, 1e9), 1e10, 5e9, 0.0, 50_000_000)
    figures = replace(figures, read_bytes_per_s={str(MACHINE._piece(1 << 24)): 1e9}, calls=USUAL_CALLS)
    return replace(figures, **changes)


def keep(machine: Machine) -> None:
    """As the machine on which the tests run, in a NUMOE_HOME that is there."""
    (home() / "machine.json").write_text(json.dumps(asdict(machine)))
