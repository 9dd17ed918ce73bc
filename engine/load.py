"""From what a model is to a model in memory: reads the weights, and decides which experts stay on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from numoe.engine.budget import Budget, free_memory
from numoe.engine.description import Description, describe
from numoe.engine.experts import heat
from numoe.engine.experts.cluster import Cluster
from numoe.engine.experts.remote import RemoteBank
from numoe.engine.experts.share import LEFT_TO_OTHERS, Settings, experts_on_disk
from numoe.engine.experts.store import ExpertStore
from numoe.engine.layers.rows import FLOAT32
from numoe.engine.layers.weights import Weights
from numoe.engine.measure import machine
from numoe.engine.model import Memory, Model
from numoe.engine.plan import Plan, Verdict, longest_context
from numoe.quant.compute.kernels import block_elements, use_block
from numoe.quant.compute.threads import usable_cores
from numoe.quant.compute.threads import use as use_threads
from numoe.quant.errors import DoesNotFit, InputError, WrongUsage
from numoe.quant.formats.resident import hold


def load(
    model: str | Path | Description,
    *,
    ram: str | int | Budget | None = None,
    threads: int | None = None,
    ctx: int | None = None,
    kv: str = FLOAT32.name,
    ray: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Model:
    """Load a model; its weights stay in the formats they are stored in.

    Routed experts that do not fit into memory stay on disk and are read when a token takes them. Where there is room
    for twice the bytes of 4-bit weights, they are held in a form that is multiplied faster, to the same digits.

    Args:
        model: see `describe`; or what that gave.
        ram: memory that weights, caches and activations may take, such as "8GiB"; None: nine tenths of what is free
            now. A `Budget` is for several models together.
        threads: threads, and on Linux workers, to compute with, for the whole process; None: one a core.
        ctx: tokens of the sessions that memory is set aside for, as in `Model.session`. Where it is not given and
            there are no routed experts, they get what there is.
        kv: how sessions hold the rows of earlier tokens, see `rows.ROW_FORMS`.
        ray: the address of a Ray cluster, whose nodes have `ram` and `threads` each and hold and compute the experts
            together with this process; "local" starts one on this machine.
        progress: told the bytes of weights that are in memory and those that will be, as they are read.
        tell: told in a sentence when a node of the cluster leaves or joins.

    Raises:
        InputError: see `describe`; or the weights hold NaN, or what must be in memory does not fit: all but the routed
            experts, and those that one token takes in a layer. It does where `Plan.verdict` says so. Or the cluster
            cannot be reached, or a node of it has not this model.
    """
    budget = ram if isinstance(ram, Budget) else Budget(ram)
    if threads is not None and threads < 1:
        raise WrongUsage(f"`threads` must be at least 1, not {threads}")
    use_threads(threads or usable_cores())
    if measured := machine.known():
        use_block(measured.block)
    description = model if isinstance(model, Description) else describe(model)
    experts = experts_on_disk(description)
    planned = _planned(description, ctx, kv, budget)
    cluster = bank = None
    if ray is not None:
        cluster, bank = _spread(ray, description, experts, budget, planned, threads, tell)
    try:
        memory = _reserve(budget, planned, description.path.name, experts, bank.own_bytes if bank else None)
    except DoesNotFit as error:
        fits = longest_context(description.spec, budget.room - planned.least_bytes + planned.kv_bytes, planned.kv)
        raise DoesNotFit(f"{error}; `ctx` {fits} fits" if fits else str(error)) from None
    weights = _read_all(description, experts, memory, progress)
    loaded = Model(description, weights, experts, memory, bank)
    identity = description.identity  # now, while the files are those that were read
    if cluster and bank:
        bank.begin()
        cluster.watch(bank)
    elif experts and memory.experts is not None:
        experts.warm(heat.kept(identity))
    return loaded


def _planned(description: Description, ctx: int | None, kv: str, budget: Budget) -> Plan:
    """The plan of a context, for which a model without experts has what there is where nobody says how long it is."""
    planned = description.plan(ctx, kv=kv)
    missing = planned.least_bytes - budget.room
    if ctx is None and not description.spec.routed and 0 < missing <= planned.kv_bytes:
        planned = replace(planned, kv_bytes=planned.kv_bytes - missing)
    return planned


def _spread(
    address: str,
    description: Description,
    experts: ExpertStore | None,
    budget: Budget,
    planned: Plan,
    threads: int | None,
    tell: Callable[[str], None] | None,
) -> tuple[Cluster, RemoteBank]:
    """The nodes of a cluster, and the bank that shares a model's experts with them.

    Raises:
        InputError: it has none; or see `Cluster`.
    """
    if experts is None:
        raise WrongUsage(f"{description.path.name} has no routed experts, which are what `ray` shares out")
    from numoe.engine.experts.pulled import Written, origin  # and all that reaches the hub

    budget.require(description.path.name, planned.least_bytes)
    identity, pulled = description.identity, origin(description)
    ram = budget.allowed if budget.given else None
    cluster = Cluster(address, Settings(str(description.path), identity, pulled, ram, threads, block_elements()), tell)
    written = Written(description, pulled.recipe if pulled else "native")
    room = budget.room - planned.beside_experts
    return cluster, RemoteBank(experts, written, room, cluster.nodes, heat.kept(identity), tell)


def _read_all(
    description: Description,
    experts: ExpertStore | None,
    memory: Memory,
    progress: Callable[[int, int], None] | None,
) -> Weights:
    """All weights, and all experts where there is memory for them."""
    total = memory.planned.weight_bytes if memory.experts is None else memory.planned.resident_bytes
    tell = (lambda done: progress(min(done, total), total)) if progress else None
    weights = _read(description, wide=bool(memory.wide_bytes), tell=tell)
    if experts and memory.experts is None:
        read = total - experts.total_bytes
        experts.allow(experts.total_bytes, (lambda done: tell(read + done)) if tell else None)
        if memory.wide_bytes:
            experts.widen()
    return weights


def _read(description: Description, *, wide: bool, tell: Callable[[int], None] | None = None) -> Weights:
    """All weights but the routed experts; `tell` is told their bytes so far."""
    weights, done = Weights(), 0
    for name, tensor in description.spec.tensors().items():
        place = description.places[name]
        if tensor.held == "array":
            weights.arrays[name] = place.array(tensor.shape)
            if tensor.below is not None:
                _check_numbers(weights.arrays[name], tensor.below, f"{description.path}: tensor {place.stored.name}")
        elif tensor.held == "disk":
            weights.matrices[name] = place.stored.on_disk()
        elif tensor.expert is None:
            weights.matrices[name] = hold(  # which alone has the matrix as it is stored, and so can let go of it
                place.stored.matrix(), multiplied=tensor.held == "matrix", wide=wide
            )
        if tell and tensor.expert is None:
            done += weights.arrays[name].nbytes if tensor.held == "array" else weights.matrices[name].nbytes
            tell(done)
    return weights


def _reserve(budget: Budget, planned: Plan, name: str, experts: ExpertStore | None, own: int | None) -> Memory:
    """What a model takes of the budget, as it is planned; experts that stay on disk are allowed what is left.

    own: bytes of the experts that are this process's where others have the rest; None: it has all.

    Raises:
        DoesNotFit: there is too little.
    """
    budget.require(name, planned.least_bytes)
    room = budget.room
    if own is None and planned.verdict(room) is Verdict.IN_MEMORY:
        wide = planned.wide_bytes if planned.widens(room) else 0
        weights = budget.reserve(name, planned.weight_bytes + wide)
        sessions = budget.reserve(name, planned.kv_bytes)
        scratch = budget.reserve(name, planned.scratch_bytes)
        return Memory(planned, wide, weights, scratch, sessions)
    assert experts is not None
    weights = budget.reserve(name, planned.resident_bytes)
    sessions = budget.reserve(name, planned.kv_bytes)
    scratch = budget.reserve(name, planned.scratch_bytes)
    most = planned.held_experts(room)
    if own is not None:  # never all for good: they go to others, and come from them
        most = min(most, max(own, planned.least_experts), experts.total_bytes - 1)
    # What the largest takes while it is read may be more than one token's experts afterwards: the rest is scratch.
    floor = max(experts.largest.values())
    held = budget.reserve(
        name,
        most,
        least=planned.least_experts,
        resize=lambda nbytes: experts.allow(max(nbytes, floor)),
    )
    experts.share(free_memory, budget.total // LEFT_TO_OTHERS)
    return Memory(planned, 0, weights, scratch, sessions, held)


def _check_numbers(values: NDArray[Any], below: int, where: str) -> None:
    """What a table names must exist."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= below:
        raise InputError(f"{where} names expert {low if low < 0 else high} of {below}; download the model again")
