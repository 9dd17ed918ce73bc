"""What a model's matrices are multiplied with, measured on a text by the model itself, for a quantizer to heed.

Rounding the weights of a row by d_j changes its product with an input x by sum_j d_j x_j. That has the mean
sum_j d_j E[x_j], and as far as channels are independent the mean square sum_j d_j^2 E[x_j^2]: so much does an error in
a column cost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from numoe.engine.experts.local import Arrivals, ExpertSource, LocalBank
from numoe.engine.layers.decoder import Decoder
from numoe.engine.layers.ops import Floats
from numoe.engine.layers.spec import ModelSpec
from numoe.engine.layers.state import CHUNK
from numoe.engine.layers.tensor import Tensor
from numoe.engine.layers.weights import Weights
from numoe.quant.compute.activations import Activations
from numoe.quant.compute.threads import Task
from numoe.quant.errors import InputError
from numoe.quant.formats.format import Format
from numoe.quant.formats.pack import Moments
from numoe.quant.formats.qtensor import QTensor

if TYPE_CHECKING:
    from numoe.engine.model import Model

MOST_TOKENS = 8192
"""More of a text is not read: the means have settled long before."""
_AVERAGE_TOKENS = 64  # the layer's average counts as so many tokens of every expert, so that rarely chosen ones have it
_FEWEST_TOKENS = 128


@dataclass(frozen=True)
class Calibration:
    """What a text says about a model's matrices."""

    inputs: Mapping[str, Moments]
    """By canonical name. Matrices that were not multiplied with anything are not in it."""
    text: str
    """A hash over the tokens."""
    tokens: int
    """How many were read."""


def calibrate(
    model: Model,
    token_ids: Sequence[int],
    *,
    bos: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Read a text, at most MOST_TOKENS of it, in pieces that know nothing of each other.

    A routed expert's channels are averaged over the tokens that chose it, and with the average over all experts of its
    layer, which decides where few tokens did. Memory, of that for sessions: two float32 a channel of every matrix, and
    the caches of a piece.

    Args:
        token_ids: the text, without a BOS.
        bos: the token to put before every piece, for models that expect one; None: none.
        progress: `progress(done, total)`, in tokens, is called as the reading goes on.

    Raises:
        InputError: the text has too few tokens to tell anything, or an id outside the vocabulary; or the memory is
            too little.
    """
    ids = list(token_ids[:MOST_TOKENS])
    if len(ids) < _FEWEST_TOKENS:
        raise InputError(f"the text has {len(ids)} tokens and calibration takes {_FEWEST_TOKENS} at least")
    dense = {name: _Watched(matrix) for name, matrix in model.weights.matrices.items() if name != "embed"}
    watched = _WatchedExperts(model.experts) if model.experts else None
    weights = Weights(model.weights.matrices | dense, model.weights.arrays)
    decoder = Decoder(model.spec, weights, LocalBank(watched) if watched else None)
    prefix = [] if bos is None else [bos]
    length = min(CHUNK, model.spec.context) - len(prefix)
    memory = model.reserve("calibrating", _sums_bytes(model.spec) + model.plan(length + len(prefix)).kv_bytes)
    for start in range(0, len(ids), length):
        piece = np.array(prefix + ids[start : start + length], np.int64)
        decoder.forward(piece, decoder.cache(len(piece)), last=True)
        if progress:
            progress(min(start + length, len(ids)), len(ids))
    inputs = {name: matrix.inputs.moments() for name, matrix in dense.items() if matrix.inputs.tokens}
    if watched:
        inputs |= dict(watched.moments(model.spec))
    memory.release()
    return Calibration(inputs, hashlib.sha256(repr(ids).encode()).hexdigest()[:16], len(ids))


def _sums_bytes(spec: ModelSpec) -> int:
    """Of the sums of all matrices, most of which may be routed experts'."""
    return sum(_Inputs.nbytes(tensor.shape[1]) for _, name, tensor in spec.listing() if _watches(name, tensor))


def _watches(name: str, tensor: Tensor) -> bool:
    """Whether a weight's inputs are summed: the gate of an expert, if it has one, has those of up."""
    return tensor.held == "matrix" and name != "embed" and not (tensor.expert is not None and name.endswith(".gate"))


class _Inputs:
    """Sums over the tokens that a matrix was multiplied with."""

    def __init__(self, columns: int):
        self.sums = np.zeros((2, columns), np.float32)
        """Of the values and of their squares."""
        self.tokens = 0

    @staticmethod
    def nbytes(columns: int) -> int:
        return 2 * 4 * columns

    def add(self, x: Floats) -> None:
        """x (T, in)."""
        self.sums[0] += x.sum(axis=0)
        self.sums[1] += np.einsum("tk,tk->k", x, x)
        self.tokens += len(x)

    def moments(self, average: Floats | None = None) -> Moments:
        """`average` (2, in): what counts as _AVERAGE_TOKENS more tokens."""
        sums, tokens = self.sums, self.tokens
        if average is not None:
            sums, tokens = sums + np.float32(_AVERAGE_TOKENS) * average, tokens + _AVERAGE_TOKENS
        return Moments(*(sums / np.float32(tokens)))


class _Watched(QTensor):
    """A matrix that takes down what it is multiplied with."""

    def __init__(self, matrix: QTensor, inputs: _Inputs | None = None):
        self.matrix = matrix
        self.inputs = inputs or _Inputs(matrix.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    @property
    def format(self) -> Format:
        return self.matrix.format

    def dequantize_rows(self, start: int, stop: int, out: Floats) -> None:
        self.matrix.dequantize_rows(start, stop, out)

    def slice_rows(self, start: int, stop: int, step: int = 1) -> QTensor:
        return _Watched(self.matrix.slice_rows(start, stop, step), self.inputs)

    def finite(self) -> bool:
        return self.matrix.finite()

    def products(self, x: Activations, out: Floats) -> list[Task]:
        self.inputs.add(x.x)
        return self.matrix.products(x, out)


class _WatchedExperts:
    """An `ExpertSource` whose matrices are watched. `gate`, if there is one, has the inputs of `up`."""

    def __init__(self, source: ExpertSource):
        self._source = source
        self._inputs: dict[tuple[int, int], tuple[_Inputs, _Inputs]] = {}
        """Of each expert's up and of its down matrix, by layer and number."""

    @contextmanager
    def stream(self, layer: int, experts: Iterable[int]) -> Iterator[Arrivals]:
        with self._source.stream(layer, experts) as arriving:
            yield ([(expert, self._watch(layer, expert, matrices)) for expert, matrices in batch] for batch in arriving)

    def expects(self, layer: int) -> bool:
        return False  # guesses would multiply the router with inputs that are not its own

    def expect(self, layer: int, experts: Iterable[int]) -> None:
        pass

    def _watch(self, layer: int, expert: int, matrices: dict[str, QTensor]) -> dict[str, QTensor]:
        key = layer, expert
        if key not in self._inputs:
            self._inputs[key] = _Inputs(matrices["up"].shape[1]), _Inputs(matrices["down"].shape[1])
        up, down = self._inputs[key]
        return matrices | {"up": _Watched(matrices["up"], up), "down": _Watched(matrices["down"], down)}

    def moments(self, spec: ModelSpec) -> Iterator[tuple[str, Moments]]:
        """(canonical name, its inputs) of every expert's matrices, in layers where any was used."""
        for layer in sorted({layer for layer, _ in self._inputs}):
            experts = sorted(expert for one, expert in self._inputs if one == layer)  # sums have one order
            used = {expert: self._inputs[layer, expert] for expert in experts}
            averages = []
            for inputs in zip(*used.values(), strict=True):
                tokens = sum(one.tokens for one in inputs)
                averages.append(np.sum([one.sums for one in inputs], axis=0) / np.float32(tokens))
            for name, tensor in spec.layer_tensors(layer).items():
                if tensor.expert is not None:
                    which = int(name.endswith(".down"))
                    unused = _Inputs(averages[which].shape[1])
                    one = used[tensor.expert][which] if tensor.expert in used else unused
                    yield name, one.moments(averages[which])
