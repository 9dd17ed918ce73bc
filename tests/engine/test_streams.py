"""What Qwen3.8-Flash-Next does with its streams, against the formulas written the plain way."""

import numpy as np
import pytest
from test_kinds import EPS, HIDDEN, normed, random, weights_of

from numoe.engine.layers.block import Shared
from numoe.engine.layers.cache import Cache
from numoe.engine.layers.ngram import NgramEmbedding
from numoe.engine.layers.residual import GatedStreams
from numoe.engine.layers.step import Step
from numoe.engine.layers.weights import Weights
from numoe.quant.formats.plain import F32


@pytest.mark.parametrize("cuts", [(), (1, 2, 9), (3, 4, 5, 6)])
def test_ngrams(cuts: tuple[int, ...]) -> None:
    """Tokens before the last end of a text are none, and the table is cut in parts of which the last is shorter."""
    end, sizes, by = 4, (7, 11, 13, 17), (3, 5, 9)
    kind = NgramEmbedding(2, HIDDEN, sizes, by, 12, 3, end, 50, 3)
    w, x = weights_of(kind), random(14, 2, HIDDEN, seed=9)
    ids = np.array([1, 2, 4, 3, 5, 6, 1, 4, 4, 2, 6, 5, 0, 3])
    table = np.concatenate([w.matrices[f"table.{part}"].dequantize() for part in range(3)])
    assert [len(w.matrices[f"table.{part}"].dequantize()) for part in range(3)] == [17, 17, 16]
    gated, rows = np.zeros((14, 2, HIDDEN)), np.zeros((14, 2, HIDDEN))
    norms = {name: w.arrays[f"{name}_norm"].reshape(2, HIDDEN) for name in ("key", "query", "conv")}
    for t in range(14):
        said: list[int] = []
        for back in range(3):
            ended = end in ids[max(0, t - back) : t] or t < back
            said.append(end if ended else int(ids[t - back]))
        hashes = [said[0] * 3 ^ said[1] * 5, said[0] * 3 ^ said[1] * 5 ^ said[2] * 9]
        names = [hashes[0] % 7, 7 + hashes[0] % 11, 18 + hashes[1] % 13, 31 + hashes[1] % 17]
        e = table[names].ravel().astype(np.float64)
        key = normed((w.matrices["key"].dequantize() @ e).reshape(2, HIDDEN), norms["key"])
        score = (key * normed(x[t].astype(np.float64), norms["query"])).sum(axis=1) / np.sqrt(HIDDEN)
        gate = 1 / (1 + np.exp(-np.sign(score) * np.sqrt(np.abs(score))))
        gated[t] = gate[:, None] * (w.matrices["value"].dequantize() @ e)
        rows[t] = normed(gated[t], norms["conv"])
    kernel = w.arrays["conv"].reshape(2, HIDDEN, 3)
    for t in range(14):
        mixed = sum(kernel[..., j] * rows[t - 3 * (2 - j)] for j in range(3) if t >= 3 * (2 - j))
        gated[t] += mixed / (1 + np.exp(-mixed))
    compute, cache, outs, start = kind.build(w, Shared(EPS)), Cache([kind.state()], 14), [], 0
    for stop in (*cuts, 14):
        step = Step.of([(ids[start:stop], cache)])
        with cache.step(stop - start):
            outs.append(compute(x[start:stop].copy(), step))
        start = stop
    np.testing.assert_allclose(np.concatenate(outs), gated, atol=2e-5)


def test_gated_streams() -> None:
    spec, count = GatedStreams(3, 5), 4
    weights = Weights()
    for i, (name, tensor) in enumerate(spec.tensors(HIDDEN).items()):
        values = random(*tensor.shape, seed=i)
        if tensor.held == "array":
            weights.arrays[name] = values
        else:
            weights.matrices[name] = F32(values / 4)
    state, out = random(count, 3, HIDDEN, seed=7), random(count, HIDDEN, seed=8)
    m = {name: matrix.dequantize().astype(np.float64) for name, matrix in weights.matrices.items()}
    rows = normed(state.astype(np.float64), weights.arrays["norm"].reshape(3, -1))
    low = rows.reshape(count, -1) @ m["down"].T / 3
    gate = 1 / (1 + np.exp(-(low / (1 + np.exp(-low))) @ m["up"].T))
    entered = (gate.reshape(rows.shape) * rows).mean(axis=1)
    post = 2 / (1 + np.exp(-rows.reshape(count, -1) @ m["inject"].T / 3))
    mixer = spec.connect(weights, EPS)
    given, carried = mixer.enter(state)
    np.testing.assert_allclose(given, entered, atol=1e-5)
    left = mixer.leave(state.copy(), out, carried)
    np.testing.assert_allclose(left, state + post[..., None] * out[:, None], atol=1e-5)
    del weights.matrices["inject"]
    np.testing.assert_allclose(spec.collapse(weights, EPS)(state), entered, atol=1e-5)
