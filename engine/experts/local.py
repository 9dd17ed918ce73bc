"""The bank that computes experts in this process, of matrices that come from memory or from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Protocol

import numpy as np

from numoe.engine.layers.bank import Formula
from numoe.engine.layers.ops import Floats, Ids
from numoe.engine.layers.weights import Weights
from numoe.quant.compute.activations import Activations
from numoe.quant.compute.kernels import FEW
from numoe.quant.formats.qtensor import QTensor

Arrived = list[tuple[int, dict[str, QTensor]]]
"""Experts that are there, with their matrices."""
Arrivals = Iterator[Arrived]


class ExpertSource(Protocol):
    """Who has the matrices of experts, see `ExpertStore`."""

    def stream(self, layer: int, experts: Iterable[int]) -> AbstractContextManager[Arrivals]: ...

    def expects(self, layer: int) -> bool: ...

    def expect(self, layer: int, experts: Iterable[int]) -> None: ...


class LocalBank:
    """An `ExpertBank`. Every chosen expert runs once, on all its tokens, as soon as it is there."""

    def __init__(self, source: ExpertSource):
        self._source = source
        self._formulas: dict[int, tuple[Formula, Mapping[str, Floats]]] = {}

    def define(self, layer: int, formula: Formula, biases: Mapping[str, Floats]) -> None:
        self._formulas[layer] = formula, biases

    def apply(self, layer: int, x: Floats, chosen: Ids, meanwhile: Callable[[], None]) -> Floats:
        activations = Activations(x)
        count, k = chosen.shape
        order = chosen.argsort(axis=None, kind="stable")  # (T * K,)
        ranked = chosen.ravel()[order]
        bounds = [0, *((ranked[1:] != ranked[:-1]).nonzero()[0] + 1).tolist(), len(order)]
        # The places among the T * K choices that are an expert's, by expert, ascending.
        places = {int(ranked[a]): order[a:b] for a, b in pairwise(bounds)}
        outputs = np.empty((count * k, x.shape[1]), np.float32)
        formula, biases = self._formulas[layer]
        with self._source.stream(layer, places) as arriving:
            meanwhile()
            for batch in arriving:
                for part in _shared(batch, places, max(count, FEW * k)):
                    blocks = [
                        (
                            Weights(matrices, {name: bias[expert] for name, bias in biases.items()}),
                            activations.take(places[expert] // k),
                        )
                        for expert, matrices in part
                    ]
                    for (expert, _), out in zip(part, formula(blocks), strict=True):
                        outputs[places[expert]] = out
        return outputs

    def wants(self, layer: int) -> bool:
        return self._source.expects(layer)

    def prefetch(self, layer: int, chosen: Ids) -> None:
        self._source.expect(layer, np.unique(chosen).tolist())


def _shared(batch: Arrived, places: Mapping[int, Ids], most: int) -> Iterator[Arrived]:
    """Experts that share the threads, since few tokens leave each little work: parts of a batch that have at most
    `most` tokens, so that what is alive between their products is no more than all tokens take in one expert."""
    part: Arrived = []
    rows = 0
    for one in batch:
        taken = len(places[one[0]])
        if part and rows + taken > most:
            yield part
            part, rows = [], 0
        part.append(one)
        rows += taken
    yield part
