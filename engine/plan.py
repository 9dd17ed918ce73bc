"""What a model takes: parameters, bytes by role and format, cache for a context. Only adds up what the pieces say."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from numoe.engine.layers.spec import ModelSpec
from numoe.engine.layers.state import CHUNK
from numoe.quant.errors import DoesNotFit, InputError
from numoe.quant.formats.format import Format
from numoe.quant.formats.resident import held_nbytes


class Verdict(StrEnum):
    """Whether a model runs in an amount of memory."""

    IN_MEMORY = "FITS IN RAM"
    FROM_DISK = "RUNS FROM DISK"
    TOO_LARGE = "DOES NOT FIT"


@dataclass(frozen=True)
class Plan:
    """The memory of one model at one context length, in bytes, and the weights that it computes with."""

    layers: int
    parameters: int
    weights: Mapping[tuple[str, Format], int]
    """Bytes by (role, format)."""
    sizes: Mapping[tuple[str, Format], int]
    """Parameters by (role, format)."""
    active: Mapping[Format, int]
    """Parameters that one token's computation touches, by format."""
    active_experts: Mapping[int, int]
    """Bytes of the routed experts that one token takes, by layer."""
    largest_expert: int
    """Bytes of the largest routed expert, 0 without any."""
    disk_bytes: int
    """All stored tensors, also those that the decoder does not need."""
    context: int
    kv_bytes: int
    scratch_bytes: int
    """What a pass through the layers takes beside weights and caches, at most and about."""
    float32_bytes: int
    """How much more memory small matrices take, which are held as float32."""
    wide_bytes: int
    """How much more memory weights take where there is room for the form that is multiplied faster."""

    @property
    def active_parameters(self) -> int:
        return sum(self.active.values())

    @property
    def stored_bytes(self) -> int:
        """The weights in the formats they are stored in."""
        return sum(self.weights.values())

    @property
    def weight_bytes(self) -> int:
        """The weights as they are held, where they are not widened."""
        return self.stored_bytes + self.float32_bytes

    @property
    def expert_bytes(self) -> int:
        """The routed experts, which may stay on disk."""
        return sum(nbytes for (role, _), nbytes in self.weights.items() if role == "experts")

    @property
    def resident_bytes(self) -> int:
        """All other weights, which may not."""
        return self.weight_bytes - self.expert_bytes

    @property
    def total_bytes(self) -> int:
        """The memory in which nothing is read from disk."""
        return self.weight_bytes + self.kv_bytes

    @property
    def beside_experts(self) -> int:
        """What is taken from the memory first where routed experts stay on disk."""
        return self.resident_bytes + self.kv_bytes + self.scratch_bytes

    @property
    def least_bytes(self) -> int:
        """The memory below which the model does not run: a layer holds the experts of one token at once."""
        if not self.active_experts:
            return self.total_bytes
        return min(self.beside_experts + max(self.active_experts.values()), self.total_bytes)

    def widens(self, room: int) -> bool:
        """Whether `load` takes the faster form in `room` bytes."""
        return room >= self.total_bytes + self.wide_bytes

    def verdict(self, room: int) -> Verdict:
        """Whether it runs in `room` bytes, as `load` will find."""
        if room >= self.total_bytes:
            return Verdict.IN_MEMORY
        return Verdict.FROM_DISK if room >= self.least_bytes else Verdict.TOO_LARGE

    def held_experts(self, room: int) -> int:
        """Bytes of the routed experts that `room` bytes hold beside all else."""
        if room >= self.total_bytes:
            return self.expert_bytes
        return min(max(0, room - self.beside_experts), self.expert_bytes)


def plan(spec: ModelSpec, stored: Mapping[str, Format], context: int, disk_bytes: int = 0) -> Plan:
    """Add up a model.

    Args:
        stored: canonical tensor name -> its format, of a local folder or of a remote listing.
        context: tokens that a session holds.
        disk_bytes: passed on.
    """
    weights: Counter[tuple[str, Format]] = Counter()
    sizes: Counter[tuple[str, Format]] = Counter()
    active: Counter[Format] = Counter()
    taken: Counter[int] = Counter()
    float32 = wide = 0
    for layer, name, tensor in spec.listing():
        kind = stored[name]
        nbytes = kind.nbytes(*tensor.shape)
        weights[tensor.role, kind] += nbytes
        sizes[tensor.role, kind] += tensor.size
        if tensor.held == "matrix":
            rows, columns = tensor.shape
            plain, widest = held_nbytes(kind, (rows, columns), routed=tensor.expert is not None)
            float32 += plain - nbytes
            wide += widest - plain
        if tensor.active:
            active[kind] += tensor.active
            if tensor.expert is not None and layer is not None:
                taken[layer] += nbytes
    routed = spec.routed
    return Plan(
        layers=len(spec.layers),
        parameters=sizes.total(),
        weights=dict(weights),
        sizes=dict(sizes),
        active=dict(active),
        active_experts=dict(taken),
        largest_expert=max((nbytes // routed[layer][1] for layer, nbytes in taken.items()), default=0),
        disk_bytes=disk_bytes,
        context=context,
        kv_bytes=kv_bytes(spec, context),
        scratch_bytes=scratch_bytes(spec),
        float32_bytes=float32,
        wide_bytes=wide,
    )


def kv_bytes(spec: ModelSpec, context: int) -> int:
    """Bytes of all layers' caches for so many tokens."""
    return sum(state.nbytes(context) for block in spec.blocks() for state in block.kind.state().values())


def scratch_bytes(spec: ModelSpec) -> int:
    """Memory of the activations while a chunk of tokens goes through the layers.

    A token takes a few copies of the widest thing a layer computes, of every residual stream, and of what each
    chosen expert reads and gives.
    """
    copies = 4
    most = 0
    for blocks in spec.layers:
        tensors = [t for block in blocks for t in block.kind.tensors(spec.hidden).values()]
        widest = max(t.shape[0] for t in tensors if t.held != "array")
        chosen = sum(block.kind.routed[1] for block in blocks)
        most = max(most, copies * (widest + spec.residual.streams * spec.hidden) + 2 * chosen * spec.hidden)
    return 4 * CHUNK * most


_UNITS = {
    "": 1,
    "B": 1,
    **{p + s: b**e for e, p in enumerate("KMGT", 1) for s, b in (("B", 1000), ("", 1000), ("iB", 1024))},
}


def parse_bytes(text: str | int) -> int:
    """Bytes of "16GB", "8 GiB", "500M" or a plain number.

    Raises:
        InputError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = match[2].upper().replace("I", "i") if match else ""
    count = float(match[1]) * _UNITS[unit] if match and unit in _UNITS else 0.0
    if not 1 <= count < 2**63:
        raise InputError(f'"{text}" is not an amount of memory; write it like 16GB or 8GiB')
    return int(count)


def format_bytes(count: int) -> str:
    """1_234_567_890 -> "1.23 GB"."""
    if count < 1000:
        return f"{count} B"
    amount, units = count / 1000, ["kB", "MB", "GB", "TB"]
    while amount >= 999.5 and len(units) > 1:
        amount /= 1000
        units.pop(0)
    return f"{amount:.3g} {units[0]}"


def peak_rss() -> int:
    """The most memory this process has held, in bytes."""
    if sys.platform == "linux":  # whose getrusage counts the memory of the process that started this one too
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE):
            return 1024 * int(found[1])
    try:
        import resource
    except ImportError:  # Windows keeps count elsewhere
        import psutil

        return int(psutil.Process().memory_info().peak_wset)  # type: ignore[attr-defined]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can take now without anything being swapped out; a tenth is left to others.

    The least of what the machine has free, what the control groups that it is in leave it (those of a container or a
    service), and what its own limits do. `root` is where proc and sys are.
    """
    import psutil

    room = min([psutil.virtual_memory().available, *_left_by_groups(root), *_left_by_limits()])
    return max(0, int(room)) * 9 // 10


# Of both versions of control groups: folder, limits, what is taken, and the part of it that is given back when needed.
_GROUPS = {
    "": ("sys/fs/cgroup", ("memory.max", "memory.high"), "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}


def _left_by_groups(root: Path) -> Iterator[int]:
    """What each control group around this process leaves to it."""
    for line in _lines(root / "proc/self/cgroup"):
        controllers, _, path = line.partition(":")[2].partition(":")
        for kind in {"", "memory"} & set(controllers.split(",")):
            folder, limits, taken, reclaimable = _GROUPS[kind]
            # Where a container sees its own group as the outermost one, the path does not exist or leads out.
            names = [] if ".." in path.split("/") else [name for name in path.split("/") if name]
            for depth in range(len(names) + 1):
                group = root.joinpath(folder, *names[:depth])
                statistics = dict(line.split(" ", 1) for line in _lines(group / "memory.stat") if " " in line)
                used = _number(_lines(group / taken)) or 0
                used -= min(used, _number([statistics.get(reclaimable, "")]) or 0)
                found = (_number(_lines(group / limit)) for limit in limits)
                yield from (limit - used for limit in found if limit is not None)


def _left_by_limits() -> Iterator[int]:
    """What the limits of this process leave to it (`ulimit -v`, `ulimit -d`)."""
    if sys.platform != "linux":
        return  # macOS does not keep to them
    import resource

    import psutil

    memory = psutil.Process().memory_info()
    for kind, taken in ((resource.RLIMIT_AS, memory.vms), (resource.RLIMIT_DATA, memory.data)):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            yield limit - taken


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no control groups, or not of this version
        return []


def _number(lines: Sequence[str]) -> int | None:
    """What a file of one number says; None for nothing, or no limit ("max")."""
    return int(lines[0]) if lines and re.fullmatch(r"[0-9]{1,20}", lines[0]) else None


def require_memory(what: str, needed: int, ram: int | None) -> None:
    """Refuse what does not fit into `ram` bytes, or into the memory that is free now when None.

    Raises:
        DoesNotFit: says how much is needed and how much there is.
    """
    room = available_memory() if ram is None else ram
    if needed > room:
        raised = f"are allowed; raise --ram to {-(-needed // 10**6)}MB"
        source = "are free now; close other programs" if ram is None else raised
        raise DoesNotFit(
            f"{what} needs {format_bytes(needed)} of memory and {format_bytes(room)} {source} or take a smaller model"
        )
