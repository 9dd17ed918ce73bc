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
from typing import TYPE_CHECKING, cast

import numpy as np

from numoe.engine.experts import ExpertStore
from numoe.engine.kvcache import CHUNK
from numoe.engine.ops import Floats
from numoe.engine.spec import MixtureOfExperts
from numoe.engine.weights import Weights
from numoe.quant.activations import Activations
from numoe.quant.errors import InputError
from numoe.quant.pack import Moments
from numoe.quant.qtensor import QTensor
from numoe.quant.threads import Task

if TYPE_CHECKING:
    from numoe.engine.load import Model

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
    layer, which decides where few tokens did. Memory: two float32 a channel of every matrix.

    Args:
        token_ids: the text, without a BOS.
        bos: the token to put before every piece, for models that expect one; None: none.
        progress: `progress(done, total)`, in tokens, is called as the reading goes on.

    Raises:
        InputError: the text has too few tokens to tell anything, or an id outside the vocabulary.
    """
    from numoe.engine.load import Model

    ids = list(token_ids[:MOST_TOKENS])
    if len(ids) < _FEWEST_TOKENS:
        raise InputError(f"the text has {len(ids)} tokens and calibration takes {_FEWEST_TOKENS} at least")
    dense = {name: _Watched(matrix) for name, matrix in model.weights.matrices.items() if name != "embed"}
    watching = Model(model.description, Weights(model.weights.matrices | dense, model.weights.arrays), model.experts)
    stores = {}
    for mixture in watching.decoder.mixtures:
        store = stores[mixture.layer] = _WatchedExperts(mixture.experts, mixture.spec, model.spec.hidden)
        mixture.experts = cast(ExpertStore, store)
    prefix = [] if bos is None else [bos]
    length = min(CHUNK, model.spec.context) - len(prefix)
    session = watching.session(length + len(prefix))
    for start in range(0, len(ids), length):
        session.rewind(session.position)
        session.feed(prefix + ids[start : start + length], last=True)
        if progress:
            progress(min(start + length, len(ids)), len(ids))
    inputs = {name: matrix.inputs.moments() for name, matrix in dense.items() if matrix.inputs.tokens}
    for layer, store in stores.items():
        inputs |= {f"layers.{layer}.ffn.experts.{name}": moments for name, moments in store.moments()}
    return Calibration(inputs, hashlib.sha256(repr(ids).encode()).hexdigest()[:16], len(ids))


class _Inputs:
    """Sums over the tokens that a matrix was multiplied with."""

    def __init__(self, columns: int):
        self.sums = np.zeros((2, columns), np.float32)
        """Of the values and of their squares."""
        self.tokens = 0

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
    def format(self) -> str:
        return self.matrix.format

    def dequantize_rows(self, start: int, stop: int, out: Floats) -> None:
        self.matrix.dequantize_rows(start, stop, out)

    def slice_rows(self, start: int, stop: int) -> QTensor:
        return _Watched(self.matrix.slice_rows(start, stop), self.inputs)

    def finite(self) -> bool:
        return self.matrix.finite()

    def products(self, x: Activations, out: Floats) -> list[Task]:
        self.inputs.add(x.x)
        return self.matrix.products(x, out)


class _WatchedExperts:
    """What a mixture asks of its store, with matrices that are watched. `up` has the inputs of `gate`."""

    def __init__(self, store: ExpertStore, spec: MixtureOfExperts, hidden: int):
        self.store = store
        self.inputs = [(_Inputs(hidden), _Inputs(spec.expert.width)) for _ in range(spec.experts)]
        """Of each expert's gate and of its down matrix."""

    @contextmanager
    def stream(self, layer: int, experts: Iterable[int]) -> Iterator[Iterator[list[tuple[int, dict[str, QTensor]]]]]:
        with self.store.stream(layer, experts) as arriving:
            yield ([(expert, self._watch(expert, matrices)) for expert, matrices in batch] for batch in arriving)

    def expects(self, layer: int) -> bool:
        return False  # guesses would multiply the router with inputs that are not its own

    def _watch(self, expert: int, matrices: dict[str, QTensor]) -> dict[str, QTensor]:
        gate, down = self.inputs[expert]
        return matrices | {"gate": _Watched(matrices["gate"], gate), "down": _Watched(matrices["down"], down)}

    def moments(self) -> Iterator[tuple[str, Moments]]:
        """("EXPERT.MATRIX", its inputs) of every expert."""
        for names, inputs in zip((("gate", "up"), ("down",)), zip(*self.inputs, strict=True), strict=True):
            average = np.sum([one.sums for one in inputs], axis=0) / np.float32(sum(one.tokens for one in inputs))
            for expert, one in enumerate(inputs):
                moments = one.moments(average)
                yield from ((f"{expert}.{name}", moments) for name in names)
