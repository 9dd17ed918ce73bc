"""What a model takes: parameters, bytes by role and format, cache for a context. Only adds up what the pieces say."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from math import prod

from numoe.engine.layers.rows import FLOAT32, RowForm
from numoe.engine.layers.spec import ModelSpec
from numoe.engine.layers.state import CHUNK
from numoe.engine.layers.tensor import Held
from numoe.quant.errors import WrongUsage
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
    kv: RowForm
    """How rows of earlier tokens are held."""
    kv_bytes: int
    scratch_bytes: int
    """What a pass through the layers takes beside weights and caches, at most and about."""
    table_bytes: int
    """Of the weights those that are never in memory: tables of which tokens take rows."""
    float32_bytes: int
    """How much more memory small matrices take, which are held as float32."""
    wide_bytes: int
    """How much more memory weights take where there is room for the form that is multiplied faster."""

    @property
    def active_parameters(self) -> int:
        return sum(self.active.values())

    @property
    def chunk_parameters(self) -> int:
        """Parameters that a token of a chunk computes with: the head is for the last one."""
        heads = Counter[str]()
        for (role, _), size in self.sizes.items():
            heads[role] += size
        return self.active_parameters - (heads["head"] or heads["embedding"])  # which is both where there is no head

    @property
    def chunk(self) -> Mapping[Format, int]:
        """Parameters that a chunk of tokens is multiplied with, by format: with all experts, and of the embedding and
        the head it takes rows."""
        sizes: Counter[Format] = Counter()
        for (role, stored), size in self.sizes.items():
            if stored.kind != "i64" and role not in ("embedding", "head"):
                sizes[stored] += size
        return sizes

    @property
    def stored_bytes(self) -> int:
        """The weights in the formats they are stored in."""
        return sum(self.weights.values())

    @property
    def weight_bytes(self) -> int:
        """The weights as they are held, where they are not widened."""
        return self.stored_bytes - self.table_bytes + self.float32_bytes

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
        return self.beside_experts + self.expert_bytes

    @property
    def beside_experts(self) -> int:
        """What is in memory whether routed experts are or not."""
        return self.resident_bytes + self.kv_bytes + self.scratch_bytes

    @property
    def least_experts(self) -> int:
        """The least that is taken for routed experts, where they stay on disk: a layer's for one token."""
        return max(self.active_experts.values(), default=0)

    @property
    def least_bytes(self) -> int:
        """The memory below which the model does not run."""
        if not self.active_experts:
            return self.total_bytes
        return min(self.beside_experts + self.least_experts, self.total_bytes)

    def widens(self, room: int) -> bool:
        """Whether `load` takes the faster form in `room` bytes."""
        return room >= self.total_bytes + self.wide_bytes

    def verdict(self, room: int) -> Verdict:
        """Whether it runs in `room` bytes, as `load` will find."""
        if room >= self.total_bytes:
            return Verdict.IN_MEMORY
        return Verdict.FROM_DISK if room >= self.least_bytes else Verdict.TOO_LARGE

    def for_sessions(self, room: int) -> int:
        """What `load` leaves in `room` bytes for the caches of all sessions together; negative where it refuses."""
        if room >= self.total_bytes:
            return room - self.total_bytes + self.kv_bytes - (self.wide_bytes if self.widens(room) else 0)
        return room - self.least_bytes + self.kv_bytes

    def enough(self, sessions: int, above: int) -> int:
        """The least memory, in full MB above so many bytes, of which `load` leaves so much for sessions."""
        kinds = self.least_bytes, self.total_bytes, self.total_bytes + self.wide_bytes
        rooms = (-(-max(taken - self.kv_bytes + sessions, above + 1) // 10**6) * 10**6 for taken in kinds)
        return next(room for room in rooms if self.for_sessions(room) >= sessions)

    def of_size(self, nbytes: int) -> Plan:
        """About what the same model takes where its weights, in other formats, take so many bytes on disk."""
        share = nbytes / max(self.disk_bytes, 1)
        return replace(
            self,
            weights={key: round(size * share) for key, size in self.weights.items()},
            active_experts={layer: round(size * share) for layer, size in self.active_experts.items()},
            largest_expert=round(self.largest_expert * share),
            disk_bytes=nbytes,
        )

    def held_experts(self, room: int) -> int:
        """Bytes of the routed experts that `room` bytes hold beside all else."""
        if room >= self.total_bytes:
            return self.expert_bytes
        return min(max(0, room - self.beside_experts), self.expert_bytes)


def plan(
    spec: ModelSpec, stored: Mapping[str, Format], context: int, disk_bytes: int = 0, kv: RowForm = FLOAT32
) -> Plan:
    """Add up a model.

    Args:
        stored: canonical tensor name -> its format, of a local folder or of a remote listing.
        context: tokens that a session holds.
        disk_bytes: passed on.
        kv: how rows of earlier tokens are held.
    """
    weights: Counter[tuple[str, Format]] = Counter()
    sizes: Counter[tuple[str, Format]] = Counter()
    active: Counter[Format] = Counter()
    taken: Counter[int] = Counter()
    float32 = wide = tables = 0
    # Experts are many and alike: they are counted first, and computed with once. Formats take long to hash.
    kinds: dict[int, Format] = {}
    alike: Counter[tuple[int | None, int, tuple[int, ...], str, Held, bool, int | None]] = Counter()
    for layer, name, tensor in spec.listing():
        kind = stored[name]
        kinds[id(kind)] = kind
        alike[layer, id(kind), tensor.shape, tensor.role, tensor.held, tensor.expert is not None, tensor.touched] += 1
    for (layer, which, shape, role, held, of_expert, touched), count in alike.items():
        kind, size = kinds[which], prod(shape)
        nbytes = kind.nbytes(*shape)
        weights[role, kind] += count * nbytes
        sizes[role, kind] += count * size
        if held == "matrix":
            rows, columns = shape
            plain, widest = held_nbytes(kind, (rows, columns), routed=of_expert)
            float32 += count * (plain - nbytes)
            wide += count * (widest - plain)
        elif held == "disk":
            tables += count * nbytes
        if used := size if touched is None else touched:
            active[kind] += count * used
            if of_expert and layer is not None:
                taken[layer] += count * nbytes
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
        kv=kv,
        kv_bytes=kv_bytes(spec, context, kv),
        scratch_bytes=scratch_bytes(spec),
        table_bytes=tables,
        float32_bytes=float32,
        wide_bytes=wide,
    )


def kv_bytes(spec: ModelSpec, context: int, kv: RowForm = FLOAT32) -> int:
    """Bytes of all layers' caches for so many tokens."""
    return sum(state.nbytes(context, kv) for block in spec.blocks() for state in block.kind.state().values())


def longest_context(spec: ModelSpec, room: int, kv: RowForm = FLOAT32) -> int:
    """The most tokens, up to the model's limit, whose caches take so many bytes at most; 0 where not even one's do."""
    return bisect_right(range(1, spec.context + 1), room, key=lambda tokens: kv_bytes(spec, tokens, kv))


def scratch_bytes(spec: ModelSpec) -> int:
    """Memory of the activations while a chunk of tokens goes through the layers.

    A token takes a few copies of the widest thing a layer computes, of every residual stream, and of what each
    chosen expert reads and gives.
    """
    copies = 4
    most = 0
    for blocks in set(spec.layers):
        tensors = [t for block in blocks for t in block.kind.tensors(spec.hidden).values()]
        widest = max(t.shape[0] for t in tensors if t.held == "matrix")
        chosen = sum(block.kind.routed[1] for block in blocks)
        most = max(most, copies * (widest + spec.residual.streams * spec.hidden) + 2 * chosen * spec.hidden)
    return 4 * CHUNK * most


_UNITS = {
    "B": 1,
    **{p + s: b**e for e, p in enumerate("KMGT", 1) for s, b in (("B", 1000), ("", 1000), ("iB", 1024))},
}
_BITS = {p + "BIT": 1000**e / 8 for e, p in enumerate(("", "K", "M", "G", "T"))}


def parse_bytes(text: str | int) -> int:
    """Bytes of "16GB", "8 GiB" or "500M"; a number that is no text is one of bytes.

    Raises:
        WrongUsage: anything else.
    """
    if isinstance(text, int) and 1 <= text < 2**63:
        return text
    number, unit = _amount(text)
    unit = unit.replace("I", "i")
    count = number * _UNITS.get(unit, 0)
    if not 1 <= count < 2**63:
        unitless = not unit and number > 0
        why = "has no unit" if unitless else "is not an amount of memory"
        raise WrongUsage(f'"{text}" {why}; write it like {f"{text}GB or {text}MB" if unitless else "16GB or 8GiB"}')
    return int(count)


def parse_rate(text: str) -> float:
    """Bytes a second of a network's "1Gbit", "2.5 Gbit/s" or "300Mbit".

    Raises:
        WrongUsage: anything else.
    """
    number, unit = _amount(text.strip().removesuffix("/s"))
    rate = number * _BITS.get(unit, 0)
    if not 1 <= rate < 2**63:
        unitless = not unit and number > 0
        why = "has no unit" if unitless else "is not the speed of a network"
        raise WrongUsage(
            f'"{text}" {why}; write it like {f"{text}Gbit or {text}Mbit" if unitless else "1Gbit or 300Mbit"}'
        )
    return rate


def _amount(text: str | int) -> tuple[float, str]:
    """A number and its unit in capitals; (0, "") of what is neither."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    return (float(match[1]), match[2].upper()) if match else (0.0, "")


def format_bytes(count: int) -> str:
    """1_234_567_890 -> "1.23 GB"."""
    if count < 1000:
        return f"{count} B"
    amount, units = count / 1000, ["kB", "MB", "GB", "TB"]
    while amount >= 999.5 and len(units) > 1:
        amount /= 1000
        units.pop(0)
    return f"{amount:.3g} {units[0]}"


def format_count(count: int) -> str:
    """284_331_000_000 -> "284 B"."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return str(count)
