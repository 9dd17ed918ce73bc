"""From a folder or file to a model in memory.

`describe` reads only configuration and headers: it finds a place for every tensor of the spec and refuses what
does not fit. `load` then reads the bytes.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from numoe.engine.experts.local import LocalBank
from numoe.engine.experts.store import ExpertStore
from numoe.engine.families import family
from numoe.engine.families.common import drafting_layers
from numoe.engine.families.gguf import ROPE_FREQS, from_gguf
from numoe.engine.families.names import Family, Source
from numoe.engine.families.quantization import SIDE_FILE, fp8_block, refuse_foreign
from numoe.engine.home import locate
from numoe.engine.layers.decoder import Decoder
from numoe.engine.layers.ops import Ids
from numoe.engine.layers.spec import ModelSpec
from numoe.engine.layers.tensor import Tensor
from numoe.engine.layers.weights import Weights
from numoe.engine.places import Place
from numoe.engine.plan import Plan, available_memory, parse_bytes, peak_rss, plan, require_memory
from numoe.engine.session import Session, restore
from numoe.quant.compute import workers
from numoe.quant.compute.threads import usable_cores
from numoe.quant.compute.threads import use as use_threads
from numoe.quant.convert.convert import Matrix
from numoe.quant.convert.recipe import target
from numoe.quant.documents import parse_json, read_object
from numoe.quant.errors import InputError
from numoe.quant.files import Files, TensorInfo
from numoe.quant.formats.pack import Moments
from numoe.quant.formats.resident import hold
from numoe.quant.stored.checkpoint import Checkpoint, Rows, is_gguf, only_gguf, open_checkpoint
from numoe.quant.stored.manifest import read_manifest

if TYPE_CHECKING:
    from numoe.engine.chat.format import ChatFormat
    from numoe.engine.hub.repository import Repository
    from numoe.engine.text.tokenizer import Tokenizer

DEFAULT_CONTEXT = 8192
# Bytes of the tensors that `Model.identity` reads as a whole, and of its samples of others.
_WHOLE, _SAMPLE = 1 << 14, 256
_MOST_EXPERTS = 256  # of whose tensors it samples so many: a disk takes up to ten milliseconds for each


@dataclass(frozen=True)
class Description:
    """A model on disk: what it is, and where each of its tensors lies."""

    path: Path
    config: dict[str, Any]
    spec: ModelSpec
    checkpoint: Checkpoint
    places: dict[str, Place]

    def plan(self, context: int | None = None, quant: str = "native") -> Plan:
        """Bytes and parameters, without reading weights.

        Args:
            context: in tokens; None: 8192 or the model's limit.
            quant: a key of `recipe.RECIPES`: what the model would be when converted.

        Raises:
            InputError: the context is above the model's limit.
        """
        limit = self.spec.context
        if context is not None and not 1 <= context <= limit:
            raise InputError(f"--ctx {context} is not possible: this model reads from 1 to {limit} tokens")
        context = min(DEFAULT_CONTEXT, limit) if context is None else context
        disk = sum(info.nbytes for info in self.checkpoint.tensors.values())
        held = {}
        for name, tensor in self.spec.tensors().items():
            kind, nbytes, grown = self._held(tensor, self.places[name], quant)
            held[name] = kind, nbytes
            disk += grown
        return plan(self.spec, held, context, disk)

    def _held(self, tensor: Tensor, place: Place, quant: str) -> tuple[str, int, int]:
        """A weight's format and bytes in memory, and by how many bytes conversion makes it grow on disk."""
        checkpoint = self.checkpoint
        if tensor.held == "array":  # held as float32 (tables of ids: int64), however it is stored
            table = checkpoint.tensors[place.name].dtype.startswith(("I", "U"))
            return ("i64", 8 * tensor.size, 0) if table else ("f32", 4 * tensor.size, 0)
        whole = math.prod(checkpoint.shape(place.name))
        stored = checkpoint.stored_nbytes(place.name)
        wanted = target(quant, tensor.role, tensor.shape[1], 8 * stored / whole)
        if wanted:
            nbytes = wanted.nbytes(*tensor.shape)
            return wanted.format, nbytes, nbytes - stored * tensor.size // whole
        return checkpoint.format(place.name), checkpoint.loaded_nbytes(place.name) * tensor.size // whole, 0

    @cached_property
    def identity(self) -> str:
        """A hash that tells models apart: of the spec, the tensors' listing, bytes of many, and a manifest's hashes.

        By bytes and not by names and times of files: a model that is moved or copied stays the same one.
        """
        checkpoint = self.checkpoint
        digest = hashlib.sha256(repr(self.spec).encode())
        for name, info in sorted(checkpoint.tensors.items()):
            digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        manifest = read_manifest(self.path) if self.path.is_dir() else None
        for name, record in sorted(manifest.files.items()) if manifest else ():
            if name.endswith(".safetensors"):
                digest.update(f"{name} {record.sha256}\n".encode())
        names = [n for n, tensor in self.spec.tensors().items() if tensor.expert is not None]
        sources = {self.places[name].name for name in names}
        experts = sorted(chain.from_iterable(map(checkpoint.companions, sources)))
        others = sorted(checkpoint.tensors.keys() - set(experts))
        for name in others + experts[:: -(-len(experts) // _MOST_EXPERTS) or 1]:
            digest.update(_sample(checkpoint.files, checkpoint.tensors[name]))
        return digest.hexdigest()

    def matrices(self, inputs: Mapping[str, Moments] | None = None) -> list[Matrix]:
        """What `quant.convert` may write anew; routed experts are units, with names of their own even if stacked.

        inputs: those of a `Calibration`.
        """
        kind = family(self.config["model_type"])
        matrices = []
        for name, tensor in self.spec.tensors().items():
            if tensor.held == "array":
                continue
            place = self.places[name]
            stored = place.name
            if place.index is not None or place.rows is not None:
                stored = next(s.name for s, _ in kind.sources(name) if not s.stacked and not s.fused)
            unit = name.rpartition(".")[0] if tensor.expert is not None else ""
            moments = inputs.get(name) if inputs else None
            matrices.append(Matrix(stored, tensor.role, place.name, place.index, place.rows, unit, moments))
        return matrices

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises InputError when the model comes without one."""
        from numoe.engine.text.tokenizer import gguf_tokenizer, load_tokenizer

        if self.path.is_file():
            return gguf_tokenizer(self.checkpoint.metadata)
        return load_tokenizer(self.path)

    @cached_property
    def chat_format(self) -> ChatFormat:
        """How a conversation becomes a prompt. Raises InputError when the model comes without a template."""
        from numoe.engine.chat.format import chat_format

        return chat_format(self.config["model_type"], self.tokenizer)


def describe(model: str | Path) -> Description:
    """Read a model's configuration and headers.

    Args:
        model: a folder with config.json and safetensors, a GGUF file or a folder with one, or a hub id that was
            downloaded.

    Raises:
        InputError: a file is missing or damaged, the architecture or a config key is not known, a tensor is
            missing, has another shape than the config says, or has no place in the architecture.
    """
    path = locate(model)
    if path.is_dir():
        path = only_gguf(path) or path
    if path.is_file():
        checkpoint = open_checkpoint(path)
        if not is_gguf(path):
            raise InputError(f"{path} is one of a model's files; give its folder, {path.parent}")
        shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
        divisors = checkpoint.array(ROPE_FREQS).ravel().tolist() if ROPE_FREQS in shapes else None
        return arrange(path, *from_gguf(checkpoint.metadata, shapes, divisors, path), checkpoint)
    if not (path / "config.json").exists():
        raise InputError(f"{path} has no config.json; a model folder needs one beside its safetensors")
    config = read_object(path / "config.json")
    side = path / SIDE_FILE
    kind, spec, block = _read(config, read_object(side) if side.exists() else None)
    return arrange(path, config, kind, spec, open_checkpoint(path, block))


def describe_repository(repository: Repository) -> Description:
    """Read a model's configuration and headers on the hub, and nothing else.

    Raises:
        InputError: see `describe`; or the hub cannot be reached.
    """
    config = repository.config()
    side = None
    if SIDE_FILE in repository.files:
        side = parse_json(repository.read(SIDE_FILE), f"{repository.repo_id}/{SIDE_FILE}")
    kind, spec, block = _read(config, side if isinstance(side, dict) else None)
    return arrange(Path(repository.repo_id), config, kind, spec, repository.checkpoint(block))


def _read(config: dict[str, Any], side: dict[str, Any] | None) -> tuple[Family, ModelSpec, tuple[int, int]]:
    """The family and spec of a config.json, and the block size of FP8 weights; side: what `SIDE_FILE` holds."""
    kind = family(config.get("model_type"))
    block = fp8_block(config, side)
    return kind, kind.spec(config), block


def arrange(path: Path, config: dict[str, Any], kind: Family, spec: ModelSpec, checkpoint: Checkpoint) -> Description:
    """Find the place of every tensor of the spec in a checkpoint, which may be a mere listing without data.

    Where the config says that the embedding serves as head and both are stored, the stored head counts; where one of
    them is stored, it serves as both.

    Raises:
        InputError: a tensor is missing, has another shape than the config says, or has no place in the spec.
    """
    config_name = "the file's metadata" if path.is_file() else "config.json"
    if not path.is_file():
        refuse_foreign(checkpoint.tensors, path)
    if spec.tied and all(any(s.name in checkpoint for s, _ in kind.sources(name)) for name in ("embed", "head")):
        spec = replace(spec, tied=False)
    listing, routed = list(spec.listing()), spec.routed
    tensors = {name: tensor for _, name, tensor in listing}
    places = {}
    for layer, name, _ in listing:
        names = (name, "head") if name == "embed" and spec.tied else (name,)
        sources = chain.from_iterable(map(kind.sources, names))
        found = next((source for source in sources if source[0].name in checkpoint), None)
        if found is None:
            first, _ = next(kind.sources(name))
            raise InputError(
                f"{path}: tensor {first.name} is missing, which {config_name} asks for; check that all files "
                "of the model are there and belong together"
            )
        experts = routed[layer][0] if layer in routed else 0
        places[name] = _place(name, tensors, *found, experts, checkpoint, path, config_name)
    _refuse_leftovers(config, kind, spec, checkpoint, places, path, config_name)
    return Description(path, config, spec, checkpoint, places)


def _place(
    name: str,
    tensors: Mapping[str, Tensor],
    source: Source,
    expert: int | None,
    experts: int,
    checkpoint: Checkpoint,
    path: Path,
    config_name: str,
) -> Place:
    """Where a tensor of the spec lies in one of its sources, which the checkpoint has.

    experts: how many routed ones its layer has.
    """
    siblings = [f"{name.rpartition('.')[0]}.{part}" for part in source.fused] or [name]
    axis = -1 if tensors[name].held == "array" else 0
    lengths = [tensors[sibling].shape[axis] for sibling in siblings]
    want = list(tensors[name].shape)
    want[axis] = sum(lengths)
    if source.stacked:
        want.insert(0, experts)
    found = list(checkpoint.shape(source.name))
    same = found == want if axis == 0 else [n for n in found if n > 1] == [n for n in want if n > 1]
    if not same:
        raise InputError(
            f"{path}: tensor {source.name} has shape {found}, but {config_name} says {want}; "
            "they do not belong together"
        )
    index = siblings.index(name)
    rows: Rows | None = None
    if source.alternating:
        rows = index, sum(lengths), len(siblings)
    elif source.fused:
        rows = sum(lengths[:index]), sum(lengths[: index + 1])
    return Place(source.name, expert if source.stacked else None, rows, source.made)


def _refuse_leftovers(
    config: dict[str, Any],
    kind: Family,
    spec: ModelSpec,
    checkpoint: Checkpoint,
    places: dict[str, Place],
    path: Path,
    config_name: str,
) -> None:
    """A stored tensor without a place could change the numbers: refuse it, unless it is known to be unneeded."""
    left = set(checkpoint.names()) - {place.name for place in places.values()}
    drafting = drafting_layers(kind.config(config))
    layers = len(spec.layers)
    for name in sorted(left):
        if any(re.fullmatch(pattern, name) for pattern in kind.ignored):
            continue
        # Some checkpoints number their multi-token prediction layers on after the last one.
        number = re.search(r"\blayers\.(\d+)\.", name)
        if number and layers <= int(number[1]) < layers + drafting:
            continue
        raise InputError(
            f"{path}: tensor {name} is not part of {spec.family} as {config_name} describes it; "
            "numoe does not run this variant yet"
        )


class Model:
    """A model in memory: makes sessions, and says what it is."""

    def __init__(
        self,
        description: Description,
        weights: Weights,
        experts: ExpertStore | None = None,
        ram: int | None = None,
        kept_free: int = 0,
        wide_bytes: int = 0,
    ):
        """`ram` as in `load`; `kept_free`: bytes that were left for the caches of a session when `ram` is None.

        wide_bytes: how much more than planned the weights take because there was room for their faster form.
        """
        self.description = description
        self.spec = description.spec
        self.path = description.path
        self.experts = experts
        self.weights = weights
        self._ram = ram
        self._kept_free = kept_free
        self.wide_bytes = wide_bytes
        self.decoder = Decoder(self.spec, weights, LocalBank(experts) if experts else None)
        workers.know(weights.matrices.values())
        if experts and experts.complete:
            workers.know(experts.matrices())

    @property
    def tokenizer(self) -> Tokenizer:
        return self.description.tokenizer

    def session(self, ctx: int | None = None) -> Session:
        """An empty session for up to `ctx` tokens (default: 8192 or the model's own limit, if lower).

        Raises:
            InputError: ctx is above the model's limit, or its cache does not fit into memory.
        """

        planned = self.plan(ctx)
        budget, held = (self.experts.budget, self.experts.held_bytes) if self.experts else (0, 0)
        what = f"a context of {planned.context} tokens"
        if self._ram is not None:
            others = planned.resident_bytes + min(budget, planned.expert_bytes) + self.wide_bytes
            require_memory(what, others + planned.kv_bytes, self._ram)
        elif planned.kv_bytes > self._kept_free:
            require_memory(what, budget - held + planned.kv_bytes, None)
        return Session(self, planned.context)

    def restore(self, path: str | Path) -> Session:
        """The session that `Session.save` wrote.

        Raises:
            InputError: the file is not a session of this model.
        """
        return restore(self, Path(path))

    def plan(self, ctx: int | None = None) -> Plan:
        return self.description.plan(ctx)

    def trace_routes(self, trace: Callable[[int, int, Ids], None] | None) -> None:
        """Have trace(position of the first token, layer, chosen experts (T, K)) called from now on, or nothing."""
        self.decoder.shared.trace = trace

    def stats(self) -> dict[str, Any]:
        """Bytes in memory: of the weights, and the most this process has held since it started (RSS), with what its
        workers hold for themselves.

        "experts" are the counts of `ExpertStore.stats`, {} without routed experts.
        """
        weights = sum(w.nbytes for w in self.weights.matrices.values())
        weights += sum(w.nbytes for w in self.weights.arrays.values())
        experts = self.experts.stats() if self.experts else {}
        weights += experts.get("resident_bytes", 0)
        return {"weight_bytes": weights, "peak_rss_bytes": peak_rss() + workers.private_bytes(), "experts": experts}

    @property
    def identity(self) -> str:
        """See `Description.identity`."""
        return self.description.identity


def _sample(files: Files, info: TensorInfo) -> bytes:
    """A small tensor whole, and of a large one some bytes at even distances.

    Whoever trains, merges or rounds weights changes nearly all of a tensor.
    """
    if info.nbytes <= _WHOLE:
        return files.read_range(info.path, info.offset, info.nbytes).tobytes()
    count = 4 + min(info.nbytes >> 23, 60)
    starts = (i * (info.nbytes - _SAMPLE) // (count - 1) for i in range(count))
    return b"".join(files.read_range(info.path, info.offset + at, _SAMPLE).tobytes() for at in starts)


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
    checkpoint = description.checkpoint
    for name, tensor in description.spec.tensors().items():
        place = description.places[name]
        if tensor.held == "array":
            weights.arrays[name] = _array(checkpoint.array(place.name), place, tensor)
            if tensor.below is not None:
                _check_numbers(weights.arrays[name], tensor.below, f"{description.path}: tensor {place.name}")
        elif tensor.expert is None:
            matrix = checkpoint.matrix(place.name, place.index, place.rows)
            weights.matrices[name] = hold(matrix, multiplied=tensor.held == "matrix", wide=wide)
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
    experts: dict[tuple[int, int], dict[str, Place]] = {}
    for layer, name, tensor in description.spec.listing():
        if layer is not None and tensor.expert is not None:
            experts.setdefault((layer, tensor.expert), {})[name.rpartition(".")[2]] = description.places[name]
    return ExpertStore(description.checkpoint, experts) if experts else None


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


def _array(values: NDArray[Any], place: Place, tensor: Tensor) -> NDArray[Any]:
    """What a tensor of the spec is of what is stored."""
    if place.rows is not None:
        values = np.ascontiguousarray(values[..., slice(*place.rows)])
    if place.made is not None:
        values = place.made(values)
    return values.reshape(tensor.shape)
