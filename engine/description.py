"""What a model on disk or on the hub is: its specification, and a place for every tensor of it.

Only configuration and headers are read; what does not fit is refused.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numoe.engine.families import family_of, from_gguf
from numoe.engine.families.common import drafting_layers
from numoe.engine.families.gguf import DIVISORS
from numoe.engine.families.names import Family, Source
from numoe.engine.home import locate
from numoe.engine.layers.rows import FLOAT32, row_form
from numoe.engine.layers.spec import ModelSpec
from numoe.engine.layers.tensor import Tensor
from numoe.engine.places import Place
from numoe.engine.plan import Plan, plan
from numoe.engine.totals import aside
from numoe.quant.convert.recipe import target
from numoe.quant.documents import is_there, parse_json, read_object
from numoe.quant.errors import InputError, WrongUsage, word
from numoe.quant.files import Files, TensorInfo
from numoe.quant.formats.format import Format
from numoe.quant.formats.pack import Moments
from numoe.quant.stored.checked import CheckedFiles
from numoe.quant.stored.checkpoint import Checkpoint, gguf_listing, is_gguf, only_gguf, open_checkpoint
from numoe.quant.stored.manifest import read_manifest
from numoe.quant.stored.quantization import SIDE_FILE, Convention, announced_name, read_quantization, refuse_foreign

if TYPE_CHECKING:
    from numoe.engine.chat.format import ChatFormat
    from numoe.engine.hub.repository import Repository
    from numoe.engine.text.tokenizer import Tokenizer
    from numoe.quant.convert.jobs import Array, Matrix
    from numoe.quant.stored.gguf_sets import GgufSet

DEFAULT_CONTEXT = 8192
# Bytes of the tensors that `Model.identity` reads as a whole, and of its samples of others.
_WHOLE, _SAMPLE = 1 << 14, 256
_DRAFTER = re.compile("dspark|dflash|eagle3|medusa", re.IGNORECASE)
_MOST_EXPERTS = 256  # of whose tensors it samples so many: a disk takes up to ten milliseconds for each


@dataclass(frozen=True)
class Description:
    """A model on disk: what it is, and where each of its tensors lies."""

    path: Path
    config: dict[str, Any]
    spec: ModelSpec
    checkpoint: Checkpoint
    places: dict[str, Place]
    family: Family
    metadata: Mapping[str, Any] | None = None
    """Of the GGUF file that it is or was made of; None for what has a config.json and other files of its own."""

    def plan(self, context: int | None = None, quant: str = "native", kv: str = FLOAT32.name) -> Plan:
        """Bytes and parameters, without reading weights.

        Args:
            context: in tokens; None: 8192 or the model's limit.
            quant: see `recipes.roles`: what the model would be when converted.
            kv: a key of `rows.ROW_FORMS`: how rows of earlier tokens are held.

        Raises:
            InputError: the context is above the model's limit, or there is no such form.
        """
        limit = self.spec.context
        if context is not None and not 1 <= context <= limit:
            raise WrongUsage(f"`ctx` {context} is not possible: this model reads from 1 to {limit} tokens")
        context = min(DEFAULT_CONTEXT, limit) if context is None else context
        disk = sum(info.nbytes for info in self.checkpoint.tensors.values())
        formats = {}
        for name, tensor in self.spec.tensors().items():
            formats[name], grown = self._format(tensor, self.places[name], quant)
            disk += grown
        return plan(self.spec, formats, context, disk, row_form(kv))

    def _format(self, tensor: Tensor, place: Place, quant: str) -> tuple[Format, int]:
        """A weight's format, and by how many bytes conversion to it makes it grow on disk."""
        stored = place.stored
        if tensor.held == "array":  # held as float32 (tables of ids: int64), however it is stored
            return stored.array_format, 0
        wanted = target(quant, tensor.role, tensor.shape[1], 8 * stored.nbytes / tensor.size)
        if wanted is None:
            return stored.format, 0
        return wanted.format, wanted.format.nbytes(*tensor.shape) - stored.nbytes

    @cached_property
    def aside(self) -> dict[str, int]:
        """Bytes of the stored tensors that are not computed with, by what they serve; they are never in memory."""
        used = {info.name for place in self.places.values() for info in place.stored.parts}
        sums: Counter[str] = Counter()
        for name, info in self.checkpoint.tensors.items():
            if name not in used:
                number = re.search(r"\b(?:layers|blk)\.(\d+)\.", name)
                drafts = number is not None and int(number[1]) >= len(self.spec.layers)
                sums["drafting" if drafts else aside(name) or "other"] += info.nbytes
        return dict(sums.most_common())

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
        experts = sorted({info.name for name in names for info in self.places[name].stored.parts})
        others = sorted(checkpoint.tensors.keys() - set(experts))
        for name in others + experts[:: -(-len(experts) // _MOST_EXPERTS) or 1]:
            digest.update(_sample(checkpoint.files, checkpoint.tensors[name]))
        return digest.hexdigest()

    def weights(self, inputs: Mapping[str, Moments] | None = None) -> list[Matrix | Array]:
        """All weights, by their canonical names, for `quant.convert` to write anew; routed experts are units.

        inputs: those of a `Calibration`.
        """
        from numoe.quant.convert.jobs import Array, Matrix

        weights: list[Matrix | Array] = []
        for name, tensor in self.spec.tensors().items():
            place = self.places[name]
            if tensor.held == "array":
                made = None if place.made is None else partial(place.array, tensor.shape)
                weights.append(Array(name, place.stored, tensor.shape, place.columns, made))
            else:
                unit = name.rpartition(".")[0] if tensor.expert is not None else ""
                weights.append(Matrix(name, tensor.role, place.stored, unit, inputs.get(name) if inputs else None))
        return weights

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises InputError when the model comes without one."""
        from numoe.engine.text.tokenizer import gguf_tokenizer, load_tokenizer

        if self.metadata is not None:
            return gguf_tokenizer(self.metadata)
        return load_tokenizer(self.path)

    @cached_property
    def sampling(self) -> dict[str, Any]:
        """What the model's authors recommend, by the fields of `Sampling`; {} where they say nothing.

        Raises:
            InputError: a value is of another type or out of range.
        """
        from numoe.engine.text.recommended import from_folder, from_metadata

        return from_folder(self.path) if self.metadata is None else from_metadata(self.metadata)

    @cached_property
    def chat_format(self) -> ChatFormat:
        """How a conversation becomes a prompt. Raises InputError when the model comes without a template."""
        from numoe.engine.chat.formats import chat_format

        return chat_format(self.config["model_type"], self.tokenizer)


def describe(model: str | Path, *, check: bool = False) -> Description:
    """Read a model's configuration and headers.

    Args:
        model: a folder with config.json and safetensors, a GGUF file or a folder with one, or a hub id that was
            downloaded.
        check: compare every byte that is read with the hashes in the manifest of a converted folder.

    Raises:
        InputError: a file is missing or damaged, the architecture or a config key is not known, a tensor is
            missing, has another shape than the config says, or has no place in the architecture.
    """
    path = locate(model)
    if path.is_dir():
        path = only_gguf(path) or path
    files = CheckedFiles(path) if check else Files()
    if path.is_file():
        checkpoint = open_checkpoint(path, files=files)
        if not is_gguf(path):
            raise InputError(f"{path} is one of a model's files; give its folder, {path.parent}")
        return _of_gguf(path, checkpoint, checkpoint.tensors, checkpoint.metadata)
    if listing := gguf_listing(path, files):
        return _of_gguf(path, open_checkpoint(path, files=files), *listing)
    if not (path / "config.json").exists():
        raise WrongUsage(f"{path} has no config.json; a model folder needs one beside its safetensors")
    config = read_object(path / "config.json")
    side = path / SIDE_FILE
    kind, spec, convention = _read(config, read_object(side) if is_there(side) else None)
    return arrange(path, config, kind, spec, open_checkpoint(path, convention, files))


def describe_repository(repository: Repository, gguf: GgufSet | None = None) -> Description:
    """Read a model's configuration and headers on the hub, and nothing else.

    gguf: which of its models in GGUF it is; None: the one in safetensors.

    Raises:
        InputError: see `describe`; or the hub cannot be reached.
    """
    if gguf is not None:
        from numoe.engine.hub.gguf import distant_checkpoint

        checkpoint = distant_checkpoint(repository, gguf)
        return _of_gguf(checkpoint.path, checkpoint, checkpoint.tensors, checkpoint.metadata)
    config = repository.config()
    side = None
    if SIDE_FILE in repository.files:
        side = parse_json(repository.read(SIDE_FILE), f"{repository.repo_id}/{SIDE_FILE}")
    kind, spec, convention = _read(config, side if isinstance(side, dict) else None)
    return arrange(Path(repository.repo_id), config, kind, spec, repository.checkpoint(convention))


def _of_gguf(
    path: Path, checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Any]
) -> Description:
    """tensors, metadata: what the GGUF file says that it is, or was made of."""
    shapes = {name: info.shape for name, info in tensors.items()}
    of_rope = [checkpoint[name].array().ravel().tolist() for name in DIVISORS if name in shapes]
    divisors = of_rope[0] if of_rope else None
    return arrange(path, *from_gguf(metadata, shapes, divisors, path), checkpoint, metadata)


def _read(config: dict[str, Any], side: dict[str, Any] | None) -> tuple[Family, ModelSpec, Convention]:
    """The family and spec of a config.json, and how its weights are quantized; side: what `SIDE_FILE` holds."""
    names = config.get("architectures")
    drafters = [name for name in names if _DRAFTER.search(str(name))] if isinstance(names, list) else []
    if drafters:
        raise InputError(
            f"config.json: {word(drafters[0])} is a head that guesses tokens for one other model, which numoe does not "
            "use; give a whole model of the same vocabulary, a smaller one"
        )
    try:
        kind = family_of(config)
    except InputError as error:
        if stored := announced_name(config, side):
            raise InputError(f"{error}; its weights are {stored}") from None
        raise
    convention = read_quantization(config, side)
    if convention.name == "MLX" and not kind.mlx:
        raise InputError(
            f"MLX stores other weights of {config.get('model_type')} than its authors do, and numoe does not know "
            "which: take a release of the model in another format"
        )
    return kind, kind.spec(config), convention


def arrange(
    path: Path,
    config: dict[str, Any],
    kind: Family,
    spec: ModelSpec,
    checkpoint: Checkpoint,
    metadata: Mapping[str, Any] | None = None,
) -> Description:
    """Find the place of every tensor of the spec in a checkpoint, which may be a mere listing without data.

    Where the config says that the embedding serves as head and both are stored, the stored head counts; where one of
    them is stored, it serves as both.

    Raises:
        InputError: a tensor is missing, has another shape than the config says, or has no place in the spec.
    """
    config_name = "config.json" if metadata is None else "the file's metadata"
    if spec.tied and all(any(s.name in checkpoint for s in kind.sources(name)) for name in ("embed", "head")):
        spec = replace(spec, tied=False)
    listing, routed = list(spec.listing()), spec.routed
    tensors = {name: tensor for _, name, tensor in listing}
    places = {}
    for layer, name, tensor in listing:
        names = (name, "head") if name == "embed" and spec.tied else (name,)
        sources = (source for one in names for source in kind.sources(one, layer, tensor.expert))
        found = next((source for source in sources if _holds(checkpoint, source)), None)
        if found is None:
            first = next(kind.sources(name, layer, tensor.expert))
            refuse_foreign(checkpoint.names(), path)
            raise InputError(
                f"{path}: tensor {first.name} is missing, which {config_name} asks for; check that all files "
                "of the model are there and belong together"
            )
        experts = routed[layer][0] if layer in routed else 0
        places[name] = place(name, tensors, found, experts, checkpoint, config_name)
    _refuse_leftovers(config, kind, spec, checkpoint, places, path, config_name)
    return Description(path, config, spec, checkpoint, places, kind, metadata)


def _holds(checkpoint: Checkpoint, source: Source) -> bool:
    """Whether a checkpoint has a source; what is stored in MXFP4 blocks is never transposed."""
    return source.name in (checkpoint.tensors if source.transposed else checkpoint)


def place(
    name: str,
    tensors: Mapping[str, Tensor],
    source: Source,
    experts: int,
    checkpoint: Checkpoint,
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
    stored = checkpoint[source.name].fitted(want)
    if source.flat:
        stored = stored.flat()
    if source.transposed and not (source.either and list(stored.shape) == want):
        stored = stored.turned()
    found = list(stored.shape)
    same = found == want if axis == 0 else [n for n in found if n > 1] == [n for n in want if n > 1]
    # A vector may be stored in rows: those of groups, for one.
    if not same and (len(want) > 1 or source.fused or math.prod(found) != want[0]):
        raise InputError(
            f"{checkpoint.path}: tensor {source.name} has shape {found}, but {config_name} says {want}; "
            "they do not belong together"
        )
    expert, index = tensors[name].expert, siblings.index(name)
    if source.stacked and expert is not None:
        stored = stored.expert(expert)
    if source.alternating:
        part = slice(index, sum(lengths), len(siblings))
    else:
        part = slice(sum(lengths[:index]), sum(lengths[: index + 1]))
    if axis == -1:
        return Place(stored, part if source.fused else None, source.made)
    return Place(stored.rows(part.start, part.stop, part.step or 1) if source.fused else stored)


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
    left = set(checkpoint.names()) - {place.stored.name for place in places.values()}
    drafting = drafting_layers(kind.config(config))
    layers = len(spec.layers)
    for name in sorted(left):
        if any(re.fullmatch(pattern, name) for pattern in kind.ignored):
            continue
        # Some checkpoints number their multi-token prediction layers on after the last one.
        number = re.search(r"\blayers\.(\d+)\.", name)
        if number and layers <= int(number[1]) < layers + drafting:
            continue
        refuse_foreign([name], path)
        raise InputError(
            f"{path}: tensor {name} is not part of {spec.family} as {config_name} describes it; "
            "numoe does not run this variant yet"
        )


def _sample(files: Files, info: TensorInfo) -> bytes:
    """A small tensor whole, and of a large one some bytes at even distances.

    Whoever trains, merges or rounds weights changes nearly all of a tensor.
    """
    if info.nbytes <= _WHOLE:
        return files.read_range(info.path, info.offset, info.nbytes).tobytes()
    count = 4 + min(info.nbytes >> 23, 60)
    starts = (i * (info.nbytes - _SAMPLE) // (count - 1) for i in range(count))
    return b"".join(files.read_range(info.path, info.offset + at, _SAMPLE).tobytes() for at in starts)
