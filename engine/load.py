"""From what a model is to a model in memory: reads the weights, and decides which experts stay on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from numoe.engine.experts.store import ExpertStore
from numoe.engine.layers.weights import Weights
from numoe.engine.plan import Plan, available_memory, parse_bytes, require_memory
from numoe.quant.compute.threads import usable_cores
from numoe.quant.compute.threads import use as use_threads
from numoe.quant.errors import InputError
from numoe.quant.formats.resident import hold
from numoe.quant.stored.handle import Stored

if TYPE_CHECKING:
    pass

from numoe.engine.description import Description, describe
from numoe.engine.model import Model


def load(
    model: str | Path | Description,
    *,
    ram: str | int | None = None,
    threads: int | None = None,
    ctx: int | None = None,
) -> Model:
    """Load a model; its weights stay in the formats they are stored in.

    Routed experts that do not fit into memory stay on disk and are read when a token takes them. Where there is room
    for twice the bytes of 4-bit weights, they are held in a form that is multiplied faster, to the same digits.

    Args:
        model: see `describe`; or what that gave.
        ram: memory that weights, caches and activations may take, such as "8GiB"; None: nine tenths of what is free.
        threads: threads, and on Linux workers, to compute with, for the whole process; None: one a core.
        ctx: tokens of the sessions that memory is set aside for, as in `Model.session`.

    Raises:
        InputError: see `describe`; or the weights hold NaN, or what must be in memory does not fit: all but the routed
            experts, and those that one token takes in a layer.
    """
    budget = None if ram is None else parse_bytes(ram)
    if threads is not None and threads < 1:
        raise InputError(f"--threads must be at least 1, not {threads}")
    use_threads(threads or usable_cores())
    description = model if isinstance(model, Description) else describe(model)
    experts = _experts_on_disk(description)
    planned = description.plan(ctx)
    room = _expert_room(description, experts, planned, budget)
    wide = planned.widens(available_memory() if budget is None else budget)
    weights = Weights()
    for name, tensor in description.spec.tensors().items():
        place = description.places[name]
        if tensor.held == "array":
            weights.arrays[name] = place.array(tensor.shape)
            if tensor.below is not None:
                _check_numbers(weights.arrays[name], tensor.below, f"{description.path}: tensor {place.stored.name}")
        elif tensor.expert is None:
            weights.matrices[name] = hold(place.stored.matrix(), multiplied=tensor.held == "matrix", wide=wide)
    wide_bytes = planned.wide_bytes if wide else 0
    if experts is None:
        loaded = Model(description, weights, ram=budget, wide_bytes=wide_bytes)
    else:
        experts.allow(room)
        if wide:
            experts.widen()
        loaded = Model(description, weights, experts, budget, planned.kv_bytes, wide_bytes)
    description.identity  # noqa: B018  now, while the files are those that were read
    return loaded


def _experts_on_disk(description: Description) -> ExpertStore | None:
    experts: dict[tuple[int, int], dict[str, Stored]] = {}
    for layer, name, tensor in description.spec.listing():
        if layer is not None and tensor.expert is not None:
            experts.setdefault((layer, tensor.expert), {})[name.rpartition(".")[2]] = description.places[name].stored
    return ExpertStore(description.checkpoint.files, experts) if experts else None


def _expert_room(description: Description, experts: ExpertStore | None, planned: Plan, ram: int | None) -> int:
    """The bytes that routed experts may take of `ram`, which everything else is taken from first.

    Raises:
        InputError: too few for those that one token takes in a layer.
    """
    if experts is None:
        require_memory(description.path.name, planned.weight_bytes, ram)
        return 0
    room = available_memory() if ram is None else ram
    if planned.total_bytes <= room:
        return experts.total_bytes
    others = planned.beside_experts
    least = max(top_k * experts.largest[layer] for layer, (_, top_k) in description.spec.routed.items())
    require_memory(description.path.name, min(others + least, planned.total_bytes), ram)
    return room - others


def _check_numbers(values: NDArray[Any], below: int, where: str) -> None:
    """What a table names must exist."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= below:
        raise InputError(f"{where} names expert {low if low < 0 else high} of {below}; download the model again")
