"""Which tensors a conversion puts into which file, and what waits for that.

A shard of the result is made from one of the source, in the same order. What a later shard needs of it besides (scales
stored apart from their codes, the rest of an expert) waits in a file of its own, so that no two shards of the source
must be there together. Matrices of one unit (a routed expert's gate, up and down with their scales) follow each other
without a gap, so that one read fetches them. Everything outside the units comes first, in the order of the source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from numoe.quant.convert.jobs import Array, Job, Matrix, copies
from numoe.quant.files import TensorInfo
from numoe.quant.stored.checkpoint import Checkpoint


@dataclass(frozen=True)
class Layout:
    """A conversion laid out. Shards of source and result have the same number."""

    shards: tuple[str, ...]
    """The files of the source."""
    jobs: tuple[tuple[Job, ...], ...]
    """For each shard what is written when it is there."""
    names: Mapping[int, str]
    """The files of the result; a shard without jobs has none."""
    stored: tuple[tuple[TensorInfo, ...], ...]
    """The tensors of each shard."""
    waiting: Mapping[int, tuple[TensorInfo, ...]]
    """Those of them that later shards of the result need."""
    needed_by: Mapping[int, frozenset[int]]
    """The shards of the result that need these."""

    @property
    def nbytes(self) -> int:
        """Bytes of the result's tensors."""
        return sum(self.shard_nbytes(number) for number in self.names)

    def shard_nbytes(self, number: int) -> int:
        """Bytes of the tensors in one shard of the result."""
        return sum(output.nbytes for job in self.jobs[number] for output in job.outputs)

    def waiting_nbytes(self) -> int:
        """The most that waits at a time."""
        sizes = {number: sum(info.nbytes for info in infos) for number, infos in self.waiting.items()}
        together = (
            sum(size for i, size in sizes.items() if i <= number < max(self.needed_by[i]))
            for number in range(len(self.shards))
        )
        return max(together, default=0)


def lay_out(source: Checkpoint, weights: Sequence[Matrix | Array], quant: str, passing: bool) -> Layout:
    """The layout of a conversion.

    Args:
        weights: what the result has under new names; every other tensor keeps its own.
        quant: see `recipes.roles`.
        passing: whether the shards of the source are there one by one.
    """
    shards = tuple(sorted({info.path.name for info in source.tensors.values()}))
    number = {name: i for i, name in enumerate(shards)}
    home = {name: number[info.path.name] for name, info in source.tensors.items()}
    jobs = _shared_out(_jobs(source, weights, quant), home, len(shards))
    waiting: dict[int, dict[str, TensorInfo]] = {}
    needed_by: dict[int, set[int]] = {}
    for i, made in enumerate(jobs if passing else ()):
        for name in {name for job in made for name in job.needs if home[name] < i}:
            waiting.setdefault(home[name], {})[name] = source.tensors[name]
            needed_by.setdefault(home[name], set()).add(i)
    stored: list[list[TensorInfo]] = [[] for _ in shards]
    for name, info in source.tensors.items():
        stored[home[name]].append(info)
    return Layout(
        shards,
        tuple(map(tuple, jobs)),
        _file_names(jobs),
        tuple(map(tuple, stored)),
        {i: tuple(sorted(infos.values(), key=lambda info: info.offset)) for i, infos in waiting.items()},
        {i: frozenset(users) for i, users in needed_by.items()},
    )


def _shared_out(units: Sequence[list[Job]], home: Mapping[str, int], shards: int) -> list[list[Job]]:
    """The jobs of each shard."""
    jobs: list[list[Job]] = [[] for _ in range(shards)]
    for unit in units:
        homes = [home[name] for job in unit for name in job.needs]
        if max(homes) - min(homes) > 1:  # to keep it together could make a large part of the source wait
            for job in unit:
                jobs[max(home[name] for name in job.needs)].append(job)
        else:
            jobs[max(homes)] += unit
    return jobs


def _file_names(jobs: Sequence[Sequence[Job]]) -> dict[int, str]:
    """Those of the shards that have jobs."""
    full = [i for i, made in enumerate(jobs) if made]
    if len(full) == 1:
        return {full[0]: "model.safetensors"}
    return {i: f"model-{k:05d}-of-{len(full):05d}.safetensors" for k, i in enumerate(full, 1)}


def _jobs(source: Checkpoint, weights: Sequence[Matrix | Array], quant: str) -> list[list[Job]]:
    """What to write, in order; the jobs of an inner list stay together in one file."""
    of_source: dict[str, list[Matrix | Array]] = {}
    for weight in weights:
        of_source.setdefault(weight.stored.name, []).append(weight)
    loose: list[list[Job]] = []
    for name in source.names():
        made = of_source.get(name, [])
        if not made:
            loose.append(copies(source[name]))
        loose.extend(weight.jobs(quant) for weight in made if not weight.unit)
    together = groupby((weight for weight in weights if weight.unit), key=lambda weight: weight.unit)
    return loose + [[job for one in unit for job in one.jobs(quant)] for _, unit in together]
