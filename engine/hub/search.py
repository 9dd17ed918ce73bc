"""Which repositories of the hub there are for a text, and about what their models take: two small requests for each.

The hub tells how many parameters of which type a repository has, and config.json what they make up. `numoe fit` reads
the headers and is exact; here every matrix has the average size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from numoe.engine.description import DEFAULT_CONTEXT
from numoe.engine.families import family, gguf_architectures
from numoe.engine.hub import network
from numoe.engine.hub.hub_id import is_hub_id
from numoe.engine.hub.network import HubError, Wait
from numoe.engine.layers.spec import ModelSpec
from numoe.engine.layers.tensor import Tensor
from numoe.engine.plan import Plan, Verdict, plan
from numoe.quant.convert.recipe import target
from numoe.quant.convert.recipes import RECIPES
from numoe.quant.documents import parse_json
from numoe.quant.errors import InputError
from numoe.quant.formats.format import FLOAT32, Format

_LARGEST = 16 << 20
_PARALLEL = 8
_Q4_K_M_BITS = 4.85  # of a weight, as llama.cpp mixes its types
_BESIDE = 1.15  # what a model takes in memory, by the size of its file
_FEWEST_BITS = 3  # of a weight: where others than the most have fewer, they are not all the others
_TOLD = "config", "safetensors", "gguf", "downloads", "gated"
_BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16}
# What stands for matrices of about so many bits a weight, the most first.
_FORMATS = Format("f32", 32), Format("bf16", 16), Format("fp8", 8), Format("mxfp4", 4, (1, 32), 8)


@dataclass(frozen=True)
class Best:
    """About what is best of a repository: in which quantization, what that takes on disk, and whether it runs."""

    quant: str
    disk_bytes: int
    parameters: int
    verdict: Verdict | None
    """None: what little the list tells does not say; `fit` does."""

    @property
    def runs(self) -> bool:
        return self.verdict in (Verdict.IN_MEMORY, Verdict.FROM_DISK)


@dataclass(frozen=True)
class FoundGguf:
    """A repository of GGUF files of an architecture that numoe runs."""

    repo_id: str
    downloads: int
    gated: bool
    parameters: int

    @property
    def nbytes(self) -> int:
        """Of the file in 4 bits that most take."""
        return int(self.parameters * _Q4_K_M_BITS / 8)

    def best(self, room: int) -> Best:
        """As of `Found`. What does not fit runs from disk if it has experts, of which the list does not tell."""
        fits = Verdict.IN_MEMORY if self.nbytes * _BESIDE <= room else None
        return Best("Q4_K_M", self.nbytes, self.parameters, fits)


@dataclass(frozen=True)
class Found:
    """A repository whose model numoe runs, as far as its config.json tells."""

    repo_id: str
    downloads: int
    """Of the last month."""
    gated: bool
    sizes: Mapping[str, int]
    """Bytes of its weights on the hub, by dtype."""
    spec: ModelSpec

    @property
    def nbytes(self) -> int:
        """Of its weights on the hub."""
        return sum(self.sizes.values())

    def best(self, room: int) -> Best:
        """The most precise way to have it, of those that run best in so many bytes of memory."""
        tensors = self.spec.tensors()
        experts, others = self._native(tensors.values())
        made: dict[str, Plan] = {}
        before: dict[str, Format] = {}
        for quant in RECIPES:
            formats = {
                name: _format(quant, tensor, others if tensor.expert is None else experts)
                for name, tensor in tensors.items()
            }
            if formats != before:  # else what is stored in few bits is not rounded again
                made[quant] = plan(self.spec, formats, min(DEFAULT_CONTEXT, self.spec.context))
                if made[quant].verdict(room) is Verdict.IN_MEMORY:
                    break
            before = formats
        quant = min(made, key=lambda quant: list(Verdict).index(made[quant].verdict(room)))
        return Best(quant, made[quant].stored_bytes, made[quant].parameters, made[quant].verdict(room))

    def _native(self, tensors: Iterable[Tensor]) -> tuple[Format, Format]:
        """About how routed experts and other matrices are stored: experts in the dtype there is most of."""
        parameters = Counter[bool]()
        for tensor in tensors:
            parameters[tensor.expert is not None] += tensor.size
        most = max(self.sizes.values())
        beside = 8 * (self.nbytes - most) / max(1, parameters[False])
        if parameters[True] and beside > _FEWEST_BITS:
            return _closest(8 * most / parameters[True]), _closest(beside)
        return (_closest(8 * self.nbytes / max(1, parameters.total())),) * 2


def _closest(bits: float) -> Format:
    return min(_FORMATS, key=lambda one: abs(one.bits_each - bits))


def _format(quant: str, tensor: Tensor, native: Format) -> Format:
    """That of a weight, quantized in one of the ways of `RECIPES`."""
    wanted = None if tensor.held == "array" else target(quant, tensor.role, tensor.shape[1], native.bits_each)
    return FLOAT32 if tensor.held == "array" else wanted.format if wanted else native


def search(
    text: str = "", *, model_type: str = "", owner: str = "", limit: int = 20, wait: Wait = network.sleep
) -> tuple[list[Found | FoundGguf], int]:
    """The repositories that run, those downloaded most first, and how many others the hub has found.

    Args:
        text: part of their names; "": any.
        model_type: of their config.json; "": any.
        owner: of the repositories; "": anyone.
        limit: how many the hub is asked for.

    Raises:
        HubError: the hub cannot be asked, or does not answer with a list.
    """
    asked = {"search": text, "filter": model_type, "author": owner, "sort": "downloads", "direction": -1}
    query = [(key, value) for key, value in asked.items() if value] + [("limit", limit)]
    what = f'the search for "{text or model_type or owner}"'
    path = f"/api/models?{urlencode([*query, *(('expand[]', one) for one in _TOLD)])}"
    listed = _document(path, what, wait)
    if not isinstance(listed, list):
        raise HubError(f"what answers at {network.hub_name()} has no list for {what}; {network.CHECK_HUB}")
    rows = [row for row in listed[:limit] if isinstance(row, dict) and is_hub_id(str(row.get("id")))]
    with ThreadPoolExecutor(_PARALLEL) as pool:
        found = [one for one in pool.map(lambda row: _found(row, wait), rows) if one]
    return found, len(listed) - len(found)


def _found(row: Mapping[str, Any], wait: Wait) -> Found | FoundGguf | None:
    """One of the list; None where numoe does not run it, or nobody may read it."""
    repo_id, told, gguf = str(row["id"]), row.get("config"), row.get("gguf")
    downloads = row["downloads"] if type(row.get("downloads")) is int else 0
    model_type = told.get("model_type") if isinstance(told, dict) else None
    weights = row.get("safetensors")
    counts = weights.get("parameters") if isinstance(weights, dict) else None
    if not isinstance(counts, dict) or not counts:
        if not isinstance(gguf, dict) or gguf.get("architecture") not in gguf_architectures():
            return None
        total = gguf.get("total")
        known = type(total) is int and total > 0
        return FoundGguf(repo_id, downloads, bool(row.get("gated")), int(total or 0)) if known else None
    try:
        kind = family(model_type)
        config = _document(f"/{repo_id}/resolve/main/config.json", repo_id, wait)
        spec = kind.spec(config) if isinstance(config, dict) else None
    except InputError:  # a family or a variant that is not supported; `fit` says why
        return None
    if spec is None:
        return None
    sizes = {dtype: count * _BITS.get(dtype, 8) // 8 for dtype, count in counts.items() if type(count) is int}
    return Found(repo_id, downloads, bool(row.get("gated")), sizes, spec)


def _document(path: str, what: str, wait: Wait) -> Any:
    """A JSON document of the hub."""

    def attempt() -> bytes:
        data = bytearray()
        with network.ask(path, what) as response:
            for block in network.blocks(response):
                data += block
                if len(data) > _LARGEST:
                    raise HubError(f"{network.hub_name()} gives more for {what} than can be; {network.CHECK_HUB}")
        return bytes(data)

    data = network.patiently(attempt, wait, known=False)
    try:
        return parse_json(data, what)
    except InputError as error:
        raise HubError(f"what answers at {network.hub_name()} is not the hub: {error}; {network.CHECK_HUB}") from error
