"""Every kind of block against its formula, written once more the plain way and in float64."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from numoe.engine.families.config import Config, scaled_rope
from numoe.engine.layers import ops
from numoe.engine.layers.attention import softmax
from numoe.engine.layers.attention.grouped import GroupedQueryAttention, OutputGate
from numoe.engine.layers.attention.indexer import BlockIndexer, TokenIndexer
from numoe.engine.layers.attention.latent import MultiHeadLatentAttention
from numoe.engine.layers.block import Block, Compute, Kind, Shared
from numoe.engine.layers.cache import Cache
from numoe.engine.layers.ffn import SquaredReLU, SwiGLU, feed_forward
from numoe.engine.layers.norm import Norm
from numoe.engine.layers.parallel import Parallel
from numoe.engine.layers.recurrent.delta_rule import delta_rule, unit_length
from numoe.engine.layers.recurrent.deltanet import GatedDeltaNet
from numoe.engine.layers.recurrent.kda import KimiDeltaAttention
from numoe.engine.layers.recurrent.mamba2 import Mamba2
from numoe.engine.layers.recurrent.shortconv import ShortConvolution
from numoe.engine.layers.residual import HyperConnections, PlainResidual
from numoe.engine.layers.rope import Rope, Rotation, Temperature, frequencies
from numoe.engine.layers.router import Router, Routing
from numoe.engine.layers.rows import stretch
from numoe.engine.layers.state import CHUNK, SLACK, Recurrent, RecurrentState, Rows
from numoe.engine.layers.step import Step
from numoe.engine.layers.weights import Weights
from numoe.quant.compute.activations import Activations
from numoe.quant.formats.plain import F32

Wide = NDArray[np.float64]
HIDDEN, EPS = 24, 1e-6


def random(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def weights_of(kind: Kind, seed: int = 0) -> Weights:
    """Random ones, of about the size that keeps values near one."""
    weights = Weights()
    for i, (name, tensor) in enumerate(kind.tensors(HIDDEN).items()):
        values = random(*tensor.shape, seed=seed + i)
        if tensor.held == "array":
            weights.arrays[name] = 1 + values / 4 if name.endswith("norm") else values
        else:
            weights.matrices[name] = F32(values / np.float32(np.sqrt(tensor.shape[1])))
    return weights


def run(kind: Kind, weights: Weights, x: NDArray[np.float32], cuts: Iterable[int]) -> NDArray[np.float32]:
    """A sequence through one block, in passes that end at `cuts`."""
    compute: Compute = kind.build(weights, Shared(EPS))
    cache = Cache([kind.state()], len(x))
    outs, start = [], 0
    for stop in (*cuts, len(x)):
        step = Step.of([(np.zeros(stop - start, np.int64), cache)])
        with cache.step(stop - start):
            outs.append(compute(x[start:stop].copy(), step))
        start = stop
    return np.concatenate(outs)


def rotated(x: Wide, position: int, rope: Rope) -> Wide:
    """One head's channels (C,) at a position, pair by pair."""
    y = x.copy()
    base = 0 if rope.first else len(x) - rope.dim
    half = rope.dim // 2
    for i in range(half):
        a, b = (base + 2 * i, base + 2 * i + 1) if rope.interleaved else (base + i, base + i + half)
        angle = position * rope.theta ** (-2 * i / rope.dim)
        y[a] = x[a] * np.cos(angle) - x[b] * np.sin(angle)
        y[b] = x[b] * np.cos(angle) + x[a] * np.sin(angle)
    return y


def normed(x: Wide, weight: NDArray | float = 1.0) -> Wide:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS) * weight


def softmaxed(scores: Wide) -> Wide:
    e = np.exp(scores - scores.max())
    return e / e.sum()


def picked(kind: BlockIndexer, m: dict[str, Wide], a: dict[str, Wide], x: NDArray[np.float32], t: int) -> list[int]:
    """The tokens that one at t attends to: those of the best full blocks, and what is no full block yet."""
    query = normed((x[t] @ m["indexer.q"].T).reshape(kind.heads, -1), a["indexer.q_norm"])
    scores = []
    for start in range(0, (t + 1) // kind.ratio * kind.ratio, kind.ratio):
        key = normed((x[start : start + kind.ratio] @ m["indexer.k"].T).mean(axis=0), a["indexer.k_norm"])
        key = rotated(key, start, kind.rope)
        scores.append(sum(max(0, rotated(head, t, kind.rope) @ key) for head in query))
    best = np.argsort(-np.array(scores), kind="stable")[: kind.top_k]
    inside = [s for block in best for s in range(block * kind.ratio, (block + 1) * kind.ratio)]
    return [*inside, *range(len(scores) * kind.ratio, t + 1)]


def grouped_by_formula(kind: GroupedQueryAttention, w: Weights, x: NDArray[np.float32]) -> Wide:
    m = {name: matrix.dequantize().astype(np.float64) for name, matrix in w.matrices.items()}
    a = {name: array.astype(np.float64) for name, array in w.arrays.items()}
    count, dim = len(x), kind.head_dim
    projected = {name: x @ m[name].T + a.get(f"{name}_bias", 0) for name in "qkv" if name in m}
    projected.setdefault("v", projected["k"])
    q = projected["q"].reshape(count, kind.heads, -1)
    q, gate = q[..., :dim], q[..., dim:]
    if kind.whole_norm:
        q = normed(projected["q"], a["q_norm"]).reshape(q.shape)
        projected["k"] = normed(projected["k"], a["k_norm"])
    k, v = (projected[name].reshape(count, kind.kv_heads, -1) for name in "kv")
    v = v * kind.value_scale
    if kind.head_norm and not kind.late_norm:
        q, k = normed(q, a["q_norm"]), normed(k, a["k_norm"])
    if kind.clip:
        q, k, v = (np.clip(part, -kind.clip, kind.clip) for part in (q, k, v))
    out = np.zeros((count, kind.heads, v.shape[-1]))
    for t in range(count):
        first = t - t % kind.chunk if kind.chunk else 0 if kind.window is None else max(0, t - kind.window + 1)
        seen = picked(kind.indexer, m, a, x, t) if kind.indexer else [*range(first, t + 1)]
        for h in range(kind.heads):
            group = h * kind.kv_heads // kind.heads

            def turn(values: Wide, position: int) -> Wide:
                return rotated(values, position, kind.rope) if kind.rope else values

            def plain(name: str, values: Wide) -> Wide:
                if kind.late_norm and name != "v":
                    values = normed(values, a[f"{name}_norm"])
                return normed(values) if name in kind.plain_norms else values

            query = plain("q", turn(q[t, h], t))
            if kind.temperature:
                query *= 1 + kind.temperature.strength * np.log(1 + (t + 1) // kind.temperature.every)
            scores = np.array([query @ plain("k", turn(k[s, group], s)) for s in seen]) * (kind.scale or dim**-0.5)
            share = softmaxed(np.append(scores, a["sink"][h]))[:-1] if kind.sinks else softmaxed(scores)
            out[t, h] = share @ plain("v", v[seen, group])
    if kind.gate:
        out /= 1 + np.exp(-gate)
    if kind.output_gate:
        gate = (x @ m["gate"].T).reshape(count, kind.heads, -1)
        out *= np.log1p(np.exp(gate)) if kind.output_gate.score == "softplus" else 1 / (1 + np.exp(-gate))
    return out.reshape(count, -1) @ m["o"].T + a.get("o_bias", 0)


PLAIN = GroupedQueryAttention(4, 2, 8, Rope(8, 100.0))


@pytest.mark.parametrize(
    "kind",
    [
        PLAIN,
        replace(PLAIN, rope=Rope(8, 100.0, interleaved=True)),
        replace(PLAIN, rope=Rope(4, 100.0), window=5),
        replace(PLAIN, rope=Rope(4, 100.0, first=True), head_norm=True),
        replace(PLAIN, rope=None, biases="qkv", scale=0.8),
        replace(PLAIN, sinks=True, biases="qkvo", window=3),
        replace(PLAIN, gate=True, kv_heads=1, rope=Rope(4, 100.0, interleaved=True, first=True)),
        replace(PLAIN, head_norm=True, plain_norms="v", shared_values=True, biases="qkvo", scale=1.0),
        replace(PLAIN, chunk=5, plain_norms="qk"),
        replace(PLAIN, rope=None, temperature=Temperature(3, 0.6)),
        replace(PLAIN, rope=Rope(4, 100.0, first=True), whole_norm=True),
        replace(PLAIN, head_norm=True, late_norm=True),
        replace(PLAIN, value_dim=6, value_scale=0.7, sinks=True, window=4, biases="v"),
        replace(PLAIN, output_gate=OutputGate("sigmoid"), value_dim=6, window=4),
        replace(PLAIN, output_gate=OutputGate("softplus", by_head=True), head_norm=True),
        replace(PLAIN, clip=0.7, whole_norm=True, biases="qkv"),
        replace(PLAIN, gate=True, indexer=BlockIndexer(9, 6, 2, 3, Rope(4, 100.0, first=True))),
    ],
    ids=[
        "plain",
        "interleaved",
        "window, last channels",
        "first channels",
        "no rope",
        "sinks",
        "gate",
        "k is v",
        "chunks",
        "temperature",
        "norm of all heads",
        "norm after rope",
        "values of another size",
        "gates of channels",
        "gates of heads",
        "clipped",
        "blocks picked",
    ],
)
@pytest.mark.parametrize("cuts", [(), (1, 2, 9)])
def test_grouped_query_attention(kind: GroupedQueryAttention, cuts: tuple[int, ...]) -> None:
    weights, x = weights_of(kind), random(12, HIDDEN, seed=9)
    np.testing.assert_allclose(run(kind, weights, x, cuts), grouped_by_formula(kind, weights, x), atol=2e-5)


@pytest.mark.parametrize(
    ("q_rank", "rope", "gate"),
    [(None, Rope(4, 50.0, interleaved=True), False), (10, Rope(4, 50.0), True), (10, None, False)],
)
@pytest.mark.parametrize("cuts", [(), (1, 2, 7)])
def test_latent_attention(q_rank: int | None, rope: Rope | None, gate: bool, cuts: tuple[int, ...]) -> None:
    """Against keys and values that are expanded for every token and head."""
    kind = MultiHeadLatentAttention(3, q_rank, 12, 6, 4, 5, rope, scale=0.3, gate=gate)
    weights, x = weights_of(kind), random(9, HIDDEN, seed=9)
    m = {name: matrix.dequantize().astype(np.float64) for name, matrix in weights.matrices.items()}
    q = x @ m["q"].T if q_rank is None else normed(x @ m["q_a"].T, weights.arrays["q_norm"]) @ m["q_b"].T
    q = q.reshape(9, 3, 10)
    row = x @ m["kv_a"].T
    both = (normed(row[:, :12], weights.arrays["kv_norm"]) @ m["kv_b"].T).reshape(9, 3, 11)
    out = np.zeros((9, 3, 5))

    def turn(values: Wide, position: int) -> Wide:
        return rotated(values, position, rope) if rope else values

    for t in range(9):
        for h in range(3):
            query = turn(q[t, h], t)
            keys = [np.append(both[s, h, :6], turn(row[s, 12:], s)) for s in range(t + 1)]
            out[t, h] = softmaxed(np.array([query @ key for key in keys]) * kind.scale) @ both[: t + 1, h, 6:]
    if gate:
        out /= 1 + np.exp(-(x @ m["gate"].T))[..., None]
    np.testing.assert_allclose(run(kind, weights, x, cuts), out.reshape(9, -1) @ m["o"].T, atol=2e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("cuts", [(), (1, 2, 7, 8), (10,)])
def test_latent_attention_to_what_an_indexer_picks(interleaved: bool, cuts: tuple[int, ...]) -> None:
    """The same sum over the best tokens of each one alone; a layer that follows takes the same ones."""
    top_k, count = 4, 14
    indexer = TokenIndexer(3, 7, top_k, Rope(4, 50.0, interleaved, first=True))
    plain = MultiHeadLatentAttention(3, 10, 12, 6, 4, 5, Rope(4, 50.0, interleaved=True), scale=0.3)
    kind = replace(plain, indexer=indexer)
    weights, x = weights_of(kind), random(count, HIDDEN, seed=9)
    m = {name: matrix.dequantize().astype(np.float64) for name, matrix in weights.matrices.items()}
    latent = normed(x @ m["q_a"].T, weights.arrays["q_norm"])
    q, index = (latent @ m["q_b"].T).reshape(count, 3, 10), (latent @ m["indexer.q"].T).reshape(count, 3, 7)
    row = x @ m["kv_a"].T
    both = (normed(row[:, :12], weights.arrays["kv_norm"]) @ m["kv_b"].T).reshape(count, 3, 11)
    keys = x @ m["indexer.k"].T
    keys = (keys - keys.mean(axis=1, keepdims=True)) / np.sqrt(keys.var(axis=1, keepdims=True) + 1e-6)
    keys = keys * weights.arrays["indexer.k_norm"] + weights.arrays["indexer.k_norm_bias"]
    out = np.zeros((count, 3, 5))
    for t in range(count):
        scores = np.array([
            sum(w * max(0, rotated(h, t, indexer.rope) @ rotated(keys[s], s, indexer.rope))
                for w, h in zip(x[t] @ m["indexer.weights"].T, index[t], strict=True)) for s in range(t + 1)
        ])  # fmt: skip
        seen = np.argsort(-scores)[:top_k]
        for h in range(3):
            query = rotated(q[t, h], t, kind.rope)
            rows = [np.append(both[s, h, :6], rotated(row[s, 12:], s, kind.rope)) for s in seen]
            out[t, h] = softmaxed(np.array([query @ key for key in rows]) * kind.scale) @ both[seen, h, 6:]
    right = out.reshape(count, -1) @ m["o"].T
    np.testing.assert_allclose(run(kind, weights, x, cuts), right, atol=2e-5)
    follower = replace(plain, follows=True).build(weights, Shared(EPS, block=1))
    leader, cache, made, start = kind.build(weights, Shared(EPS)), Cache([kind.state(), plain.state()], count), [], 0
    for stop in (*cuts, count):
        step = Step.of([(np.zeros(stop - start, np.int64), cache)])
        with cache.step(stop - start):
            leader(x[start:stop].copy(), step)
            made.append(follower(x[start:stop].copy(), step))
        start = stop
    np.testing.assert_allclose(np.concatenate(made), right, atol=2e-5)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_attention_in_turn_is_attention_at_once(sink: bool, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several keys at a time where all scores of one query are above the bound."""
    groups, count, share, keys = (1 if own else 2), 3, 2, 40
    q = random(groups, count, share, 8)
    first = random(groups, 7, 8), random(groups, 7, 5), random(count, 7) > 1
    second = (random(count, keys, 8), random(count, keys, 5)) if own else (
        random(groups, keys, 8), random(groups, keys, 5)
    )  # fmt: skip
    parts: list[softmax.Part] = [
        (stretch(keys), stretch(values), hidden) for keys, values, hidden in (first, (*second, random(count, keys) > 1))
    ]
    sinks = random(groups, 1, share) if sink else None
    at_once = softmax.attend(q, parts, 0.7, sinks)
    monkeypatch.setattr(softmax, "SCORE_BYTES", 4 * groups * count * share * 3)
    np.testing.assert_allclose(softmax.attend(q, parts, 0.7, sinks), at_once, atol=1e-5)


@pytest.mark.parametrize("own", [False, True])
def test_attention_holds_few_scores_at_once(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of one query, whose keys are many."""
    q, keys = random(1, 2, 8, 2), stretch(random(2 if own else 1, 50_000, 2))
    monkeypatch.setattr(softmax, "SCORE_BYTES", 1 << 18)
    tracemalloc.start()
    softmax.attend(q, [(keys, keys, None)], 1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * softmax.SCORE_BYTES


@pytest.mark.parametrize(("limit", "alpha", "shift"), [(None, 1.0, 0.0), (0.5, 1.0, 0.0), (0.7, 1.702, 1.0)])
def test_feed_forward(limit: float | None, alpha: float, shift: float) -> None:
    kind = SwiGLU(16, limit, True, alpha, shift)
    parts = [(weights_of(kind, seed), Activations(random(seed, HIDDEN))) for seed in (1, 4)]
    for (w, x), out in zip(parts, feed_forward(kind, parts), strict=True):
        m, a = {n: t.dequantize().astype(np.float64) for n, t in w.matrices.items()}, w.arrays
        gate, up = x.x @ m["gate"].T + a["gate_bias"], x.x @ m["up"].T + a["up_bias"]
        if limit is not None:
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        right = (gate / (1 + np.exp(-alpha * gate)) * (up + shift)) @ m["down"].T + a["down_bias"]
        np.testing.assert_allclose(out, right, atol=1e-5)


def test_gelu_feed_forward() -> None:
    kind = SwiGLU(16, gelu=True)
    w, x = weights_of(kind), random(5, HIDDEN) * 3
    m = {n: t.dequantize().astype(np.float64) for n, t in w.matrices.items()}
    gate, up = x @ m["gate"].T, x @ m["up"].T
    gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    np.testing.assert_allclose(run(kind, w, x, (2,)), (gelu * up) @ m["down"].T, atol=1e-5)


@pytest.mark.parametrize("cuts", [(), (1, 2, 9)])
def test_parallel_blocks(cuts: tuple[int, ...]) -> None:
    """Each with its own norms, of the same input; what one of them keeps is kept."""
    blocks = Block("attention", PLAIN, after=Norm()), Block("ffn", SwiGLU(16), before=None)
    kind, x = Parallel(blocks), random(12, HIDDEN, seed=9)
    w, before = weights_of(kind), x.copy()
    a = {name: array.astype(np.float64) for name, array in w.arrays.items()}
    attention = grouped_by_formula(PLAIN, w.below("attention."), normed(x, a["attention_norm"]))
    ffn = run(SwiGLU(16), w.below("ffn."), x, ())
    right = normed(attention, a["attention_post_norm"]) + ffn
    np.testing.assert_allclose(run(kind, w, x, cuts), right, atol=5e-5)
    np.testing.assert_array_equal(x, before)
    assert [name for name, _ in kind.parts("both")] == ["attention", "ffn"]


def test_proportional_rope_turns_the_first_pairs_alone() -> None:
    config = {"rope_type": "proportional", "rope_theta": 100.0, "partial_rotary_factor": 0.5, "factor": 4.0}
    rope = scaled_rope(Config({}, {}), Config(config, {}), 12, interleaved=False)
    right = np.append(100.0 ** (-np.arange(0, 6, 2) / 12) / 4, [0, 0, 0])
    np.testing.assert_allclose(frequencies(rope), right, rtol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_squared_relu(bias: bool) -> None:
    kind = SquaredReLU(16, bias)
    parts = [(weights_of(kind, seed), Activations(random(seed, HIDDEN))) for seed in (1, 4)]
    for (w, x), out in zip(parts, kind.forward(parts), strict=True):
        m = {n: t.dequantize().astype(np.float64) for n, t in w.matrices.items()}
        up = np.maximum(x.x @ m["up"].T + w.arrays.get("up_bias", 0), 0)
        np.testing.assert_allclose(out, up**2 @ m["down"].T + w.arrays.get("down_bias", 0), atol=1e-5)


@pytest.mark.parametrize(
    "router",
    [
        Router("softmax"),
        Router("softmax", normalize=False, scale=2.5),
        Router("softmax", logit_bias=True),
        Router("sigmoid", bias=True, groups=4, top_groups=2, group_score="top2"),
        Router("softmax", groups=4, top_groups=2, normalize=False),
        Router("sqrtsoftplus", bias=True),
        Router("softmax", norm=True, expert_scale=True),
        Router("sigmoid", bias=True, cap=0.4),
        Router("softmax", bias=True, least=0.35),
    ],
    ids=str,
)
def test_routing(router: Router) -> None:
    experts, top_k, x = 12, 3, random(20, HIDDEN)
    w = Weights({"router": F32(random(experts, HIDDEN) / 5)})
    for name in router.tensors(HIDDEN, experts, top_k).keys() - {"router"}:
        w.arrays[name] = random(HIDDEN if name == "router_norm" else experts, seed=len(name)) / 4
    chosen, weights = Routing(router, top_k, w, EPS)(x, np.zeros(20, np.int64))
    for t in range(20):
        row = x[t].astype(np.float64)
        row = normed(row, w.arrays["router_norm"]) if router.norm else row
        logits = w.matrices["router"].dequantize() @ row + w.arrays.get("router_logit_bias", 0)
        logits = router.cap * np.tanh(logits / router.cap) if router.cap else logits
        scores = {
            "softmax": softmaxed(logits),
            "sigmoid": 1 / (1 + np.exp(-logits)),
            "sqrtsoftplus": np.sqrt(np.log1p(np.exp(logits))),
        }[router.score]
        ranked = scores + w.arrays.get("router_bias", 0)
        if router.groups > 1:
            members = np.sort(ranked.reshape(router.groups, -1), axis=1)
            best = members[:, -1] if router.group_score == "max" else members[:, -2:].sum(axis=1)
            kept = np.argsort(-best)[: router.top_groups]
            ranked = np.where(np.isin(np.arange(experts) // (experts // router.groups), kept), ranked, -np.inf)
        picked = np.sort(np.argsort(-ranked)[:top_k])
        right = scores[picked] / (max(scores[picked].sum(), router.least) if router.normalize else 1) * router.scale
        right *= w.arrays["router_scale"][picked] if router.expert_scale else 1
        assert chosen[t].tolist() == picked.tolist()
        np.testing.assert_allclose(weights[t], right, rtol=1e-5)


def test_sparse_mixer() -> None:
    """The best of those not yet taken, and its share of the softmax over those that are near it."""
    x, w = random(20, HIDDEN), Weights({"router": F32(random(6, HIDDEN) / 5)})
    kind = Router("sparse mixer", normalize=False, tolerance=0.6)
    chosen, weights = Routing(kind, 2, w, EPS)(x, np.zeros(20, np.int64))
    shared = 0
    for t in range(20):
        scores = x[t].astype(np.float64) @ w.matrices["router"].dequantize().T
        order = np.argsort(-scores)
        for k in range(2):
            best, rest = scores[order[k]], scores[order[k:]]
            near = rest[(best - rest) / np.maximum(np.abs(rest), best) <= 0.6]
            shared += len(near) > 1
            np.testing.assert_allclose(weights[t, k], np.exp(best) / np.exp(near).sum(), rtol=1e-5)
        assert chosen[t].tolist() == order[:2].tolist()
    assert 0 < shared < 40


@pytest.mark.parametrize("spec", [Norm(), Norm(center=True), Norm(bias=True), Norm(center=True, bias=True)], ids=str)
def test_norms(spec: Norm) -> None:
    x = random(5, HIDDEN) + 1
    arrays = {f"norm{name}": random(*one.shape, seed=len(name) + 1) for name, one in spec.tensors(HIDDEN).items()}
    centered = x - x.mean(axis=1, keepdims=True, dtype=np.float64) if spec.center else x.astype(np.float64)
    right = normed(centered, arrays["norm"]) + arrays.get("norm_bias", 0)
    norm, before = spec.build(Weights(arrays=arrays), "norm", EPS), x.copy()
    np.testing.assert_allclose(norm(x), right, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(x, before)


def test_hyper_connections() -> None:
    """Against DeepSeek-V4's formulas: the mixing matrix has rows and columns of sum one."""
    spec, streams = HyperConnections(3, 20, 1e-6), 3
    tensors = spec.tensors(HIDDEN)
    w = Weights(arrays={name: random(*t.shape, seed=len(name)) / 3 for name, t in tensors.items()})
    state = random(4, streams, HIDDEN)
    mixer = spec.connect(w, EPS)
    x, carried = mixer.enter(state.copy())
    f = normed(state.reshape(4, -1).astype(np.float64)) @ w.arrays["fn"].T
    f *= np.repeat(w.arrays["scale"], [streams, streams, streams**2])
    f += w.arrays["base"]
    pre = 1 / (1 + np.exp(-f[:, :streams])) + 1e-6
    np.testing.assert_allclose(x, np.einsum("tn,tnd->td", pre, state), rtol=1e-4, atol=1e-5)
    post, comb = carried
    np.testing.assert_allclose(post, 2 / (1 + np.exp(-f[:, streams : 2 * streams])), rtol=1e-5)
    np.testing.assert_allclose(comb.sum(axis=1), 1, atol=1e-4)
    np.testing.assert_allclose(comb.sum(axis=2), 1, atol=1e-4)
    mixed = mixer.leave(state, x, carried)
    right = np.einsum("tmn,tmd->tnd", comb, state) + post[:, :, None] * x[:, None]
    np.testing.assert_allclose(mixed, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_plain_residual_adds(scale: float) -> None:
    mixer = PlainResidual(scale).connect(Weights(), EPS)
    state, out = random(3, HIDDEN), random(3, HIDDEN, seed=1)
    x, carried = mixer.enter(state.copy())
    np.testing.assert_array_equal(mixer.leave(x, out, carried), state + scale * out)


def test_angles_of_far_positions_are_turned_back() -> None:
    rotation = Rotation(Rope(8, 10_000.0))
    x, angles = random(2, 3, 8), rotation.angles(np.array([5, 1_000_000], np.float32))
    turned = rotation.apply(x.copy(), angles)
    np.testing.assert_allclose(rotation.apply(turned, angles.inverse()), x, atol=1e-5)


def test_the_best_of_equal_scores_are_the_first() -> None:
    scores = np.array([[1, 3, 3, 3, 0], [2, 2, 2, 2, 2]], np.float32)
    assert ops.top_k(scores, 2).tolist() == [[1, 2], [0, 1]]


# -------------------------------------------------------------------------------------------------------------- state


@settings(max_examples=60, deadline=None)
@given(
    keep=st.sampled_from([None, 3, 17]),
    stride=st.sampled_from([1, 4]),
    moves=st.lists(st.tuples(st.integers(1, 300), st.integers(0, SLACK), st.booleans()), max_size=12),
)
def test_rows_are_what_was_written(keep: int | None, stride: int, moves: list[tuple[int, int, bool]]) -> None:
    """Whatever was read, taken back or interrupted: what a next token may need is there, and is the latest."""
    context = 2000
    cache = Cache([{"rows": Rows(1, 1, keep, stride)}], context)
    rows = cache.blocks[0]["rows"]
    written: list[float] = []  # of every row of the sequence
    value = 0.0
    for count, back, fails in moves:
        count = min(count, context - cache.position)
        first, stop = cache.position // stride, (cache.position + count) // stride
        new = [value + i for i in range(stop - first)]
        value += len(new)
        try:
            with cache.step(count):
                rows.write(np.array(new, np.float32).reshape(1, -1, 1), first)
                if fails:
                    raise KeyboardInterrupt
            written[first:] = new
        except KeyboardInterrupt:
            pass
        target = max(0, cache.position - back)
        if cache.reach(target) == target:
            cache.rewind(target)
            del written[target // stride :]
        end = cache.position // stride
        kept = 0 if keep is None else max(0, end - keep)
        assert rows.view(kept, end).floats()[0, :, 0].tolist() == written[kept:end]
        assert rows.needed(cache.position, 0)[""][0, :, 0].tolist() == written[kept:end]


def count_up(cache: Cache, tokens: int, fails: bool = False) -> None:
    """A pass of a recurrent state that counts its tokens."""
    state = cache.blocks[0]["count"]
    try:
        with cache.step(tokens):
            np.add(state.now, np.float32(tokens), out=state.following)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass


def test_a_recurrent_state_goes_back_to_where_the_prompt_ended() -> None:
    cache = Cache([{"count": Recurrent((2,))}], 100)

    def stands_at(position: int) -> None:
        assert cache.position == position
        assert cache.blocks[0]["count"].now.tolist() == [position, position]

    count_up(cache, 10)
    count_up(cache, 5, fails=True)
    stands_at(10)
    for _ in range(4):
        count_up(cache, 1)
    count_up(cache, 1, fails=True)
    stands_at(14)
    assert [cache.reach(position) for position in (14, 13, 10, 9)] == [14, 10, 10, 0]
    snapshot = cache.snapshot()
    cache.rewind(10)
    stands_at(10)
    count_up(cache, 1)
    cache.restore(snapshot)
    stands_at(14)
    other = Cache([{"count": Recurrent((2,))}], 50)
    for name, values in other.prepare(14).items():
        values[:] = cache.arrays()[name]
    assert other.position == 14 and other.blocks[0]["count"].now.tolist() == [14, 14]
    cache.rewind(0)
    stands_at(0)


def test_the_latest_rows_reach_back_by_the_slack_though_they_have_moved() -> None:
    rows = Rows(1, 1, 10)
    cache = Cache([{"rows": rows}], 10**4)
    state = cache.blocks[0]["rows"]
    last = rows.capacity(10**4) + 5
    for position in range(last):  # the last rows but five fill the memory, and the others have moved
        with cache.step(1):
            state.write(np.full((1, 1, 1), position, np.float32), position)
    moved = last - 5
    assert cache.reach(moved - SLACK) == moved - SLACK and cache.reach(moved - SLACK - 1) == 0
    cache.rewind(moved - SLACK)
    seen = state.view(moved - SLACK - 10, moved - SLACK).floats()
    np.testing.assert_array_equal(seen[0, :, 0], np.arange(moved - SLACK - 10, moved - SLACK))


def test_states_take_what_they_say() -> None:
    for spec in (Rows(2, 8), Rows(2, 8, 30), Rows(1, 4, stride=4), Recurrent((3, 5))):
        assert Cache([{"one": spec}], 1000).nbytes == spec.nbytes(1000)
    assert Rows(1, 1, 10).capacity(10**6) == 10 + SLACK + CHUNK


@pytest.mark.parametrize("cuts", [(), (1, 2, 70), (69,)])
@pytest.mark.parametrize("heads", [(2, 4), (3, 3)])
def test_gated_deltanet(cuts: tuple[int, ...], heads: tuple[int, int]) -> None:
    """Against the recurrence, token by token."""
    kind, count = GatedDeltaNet(*heads, 6, 5, 4), 75
    weights, x = weights_of(kind), random(count, HIDDEN, seed=9)
    weights.arrays["decay"] = -np.exp(weights.arrays["decay"])
    m = {name: matrix.dequantize().astype(np.float64) for name, matrix in weights.matrices.items()}
    a = {name: array.astype(np.float64) for name, array in weights.arrays.items()}
    padded = np.concatenate([np.zeros((3, kind.channels)), x @ m["qkv"].T])
    mixed = np.array([(padded[t : t + 4] * a["conv"].T).sum(axis=0) for t in range(count)])
    mixed /= 1 + np.exp(-mixed)
    decay = np.exp(np.log1p(np.exp(x @ m["a"].T + a["dt_bias"])) * a["decay"])
    beta, gate = 1 / (1 + np.exp(-(x @ m["b"].T))), (x @ m["gate"].T).reshape(count, heads[1], 5)
    memory, out = np.zeros((heads[1], 6, 5)), np.zeros((count, heads[1], 5))
    for t in range(count):
        q, k = mixed[t, : 12 * heads[0]].reshape(2, heads[0], 6)
        v = mixed[t, 12 * heads[0] :].reshape(heads[1], 5)
        for h in range(heads[1]):
            query, key = (y[h * heads[0] // heads[1]] for y in (q, k))
            key = key / np.sqrt(key @ key + 1e-6)
            memory[h] *= decay[t, h]
            memory[h] += np.outer(key, beta[t, h] * (v[h] - memory[h].T @ key))
            out[t, h] = memory[h].T @ (query / np.sqrt(query @ query + 1e-6)) / np.sqrt(6)
    out = normed(out, a["norm"]) * gate / (1 + np.exp(-gate))
    np.testing.assert_allclose(run(kind, weights, x, cuts), out.reshape(count, -1) @ m["o"].T, atol=2e-5)


@pytest.mark.parametrize("cuts", [(), (1, 2, 17), (16, 33)])
@pytest.mark.parametrize(("rank", "bound"), [(4, None), (None, -5.0), (None, None)])
def test_kimi_delta_attention(cuts: tuple[int, ...], rank: int | None, bound: float | None) -> None:
    """Against the recurrence, token by token, with channels that forget all at once."""
    kind, count = KimiDeltaAttention(2, 5, 3, rank, bound), 40
    weights, x = weights_of(kind), random(count, HIDDEN, seed=9)
    weights.arrays["decay"] = -np.exp(weights.arrays["decay"])
    weights.arrays["dt_bias"][::3] += 60
    m = {name: matrix.dequantize().astype(np.float64) for name, matrix in weights.matrices.items()}
    a = {name: array.astype(np.float64) for name, array in weights.arrays.items()}
    forget, gate = (x @ m[n].T if rank is None else x @ m[f"{n}_a"].T @ m[f"{n}_b"].T for n in ("forget", "gate"))
    parts = []
    for name in "qkv":
        padded = np.concatenate([np.zeros((2, 10)), x @ m[name].T])
        mixed = np.array([(padded[t : t + 3] * a[f"{name}_conv"].T).sum(axis=0) for t in range(count)])
        parts.append((mixed / (1 + np.exp(-mixed))).reshape(count, 2, 5))
    forget = (forget + a["dt_bias"]).reshape(count, 2, 5)
    rate, beta = a["decay"][:, None], 1 / (1 + np.exp(-(x @ m["b"].T)))
    decay = np.exp(rate * np.log1p(np.exp(forget)) if bound is None else bound / (1 + np.exp(rate * forget)))
    memory, out = np.zeros((2, 5, 5)), np.zeros((count, 2, 5))
    for t in range(count):
        for h in range(2):
            query, key, value = (part[t, h] for part in parts)
            key = key / np.sqrt(key @ key + 1e-6)
            memory[h] *= decay[t, h][:, None]
            memory[h] += np.outer(key, beta[t, h] * (value - memory[h].T @ key))
            out[t, h] = memory[h].T @ (query / np.sqrt(query @ query + 1e-6)) / np.sqrt(5)
    out = normed(out, a["norm"]) / (1 + np.exp(-gate.reshape(out.shape)))
    np.testing.assert_allclose(run(kind, weights, x, cuts), out.reshape(count, -1) @ m["o"].T, atol=2e-5)


def test_a_deltanet_whose_projections_are_joined() -> None:
    """Rows of each key head, with those of the value heads that it serves, beside one another."""
    apart = GatedDeltaNet(2, 6, 4, 5, 3)
    weights, x = weights_of(apart), random(9, HIDDEN, seed=9)
    rows = {name: matrix.dequantize() for name, matrix in weights.matrices.items()}
    by_head = {name: rows[name].reshape(2, -1, HIDDEN) for name in ("gate", "b", "a")}
    q, k, v = (part.reshape(2, -1, HIDDEN) for part in np.split(rows["qkv"], [8, 16]))
    for name, parts in {"qkvz": (q, k, v, by_head["gate"]), "ba": (by_head["b"], by_head["a"])}.items():
        weights.matrices[name] = F32(np.concatenate(parts, axis=1).reshape(-1, HIDDEN))
    right = run(apart, replace(weights, matrices={name: weights.matrices[name] for name in rows}), x, (4,))
    for joined, names in {("qkvz", "ba"): ("qkvz", "ba", "o"), ("ba",): ("qkv", "gate", "ba", "o")}.items():
        kind = replace(apart, joined=joined)
        own = Weights({name: weights.matrices[name] for name in names}, weights.arrays)
        assert {name: t.shape for name, t in kind.tensors(HIDDEN).items() if t.held == "matrix"} == {
            name: matrix.shape for name, matrix in own.matrices.items()
        }
        np.testing.assert_allclose(run(kind, own, x, (4,)), right, atol=1e-5)


@pytest.mark.parametrize("cuts", [(), (1, 2, 3, 17), tuple(range(1, 20))])
@pytest.mark.parametrize("bias", [False, True])
def test_short_convolution(cuts: tuple[int, ...], bias: bool) -> None:
    kind, count = ShortConvolution(10, 3, bias), 20
    weights, x = weights_of(kind), random(count, HIDDEN, seed=9)
    m = {name: matrix.dequantize().astype(np.float64) for name, matrix in weights.matrices.items()}
    a = {name: weights.arrays[name].astype(np.float64) if bias else 0 for name in ("in_bias", "conv_bias", "o_bias")}
    b, c, u = np.split(x @ m["in"].T + a["in_bias"], 3, axis=1)
    padded, kernel = np.concatenate([np.zeros((2, 10)), b * u]), weights.arrays["conv"].T
    mixed = np.array([(padded[t : t + 3] * kernel).sum(axis=0) for t in range(count)]) + a["conv_bias"]
    np.testing.assert_allclose(run(kind, weights, x, cuts), (c * mixed) @ m["o"].T + a["o_bias"], atol=2e-5)


@pytest.mark.parametrize("cuts", [(), (1, 2, 3, 80), tuple(range(1, 150))])
@pytest.mark.parametrize(
    "kind",
    [Mamba2(6, 5, 2, 7, 3, "co", (0.4, 1.1)), Mamba2(4, 3, 1, 5, 4, "i"), Mamba2(3, 6, 3, 4, 2)],
    ids=["two groups, limits", "one group", "a head a group"],
)
def test_mamba2(kind: Mamba2, cuts: tuple[int, ...]) -> None:
    count, values, share = 150, kind.heads * kind.head_dim, kind.heads // kind.groups
    weights, x = weights_of(kind), random(150, HIDDEN, seed=9)
    weights.arrays["decay"] = -np.exp(weights.arrays["decay"])
    a = {f"{name}_bias": np.zeros(1) for name in ("in", "conv", "o")}
    a |= {name: array.astype(np.float64) for name, array in weights.arrays.items()}
    m = {name: matrix.dequantize().astype(np.float64) for name, matrix in weights.matrices.items()}
    gate, mixed, d = np.split(x @ m["in"].T + a["in_bias"], (values, values + kind.channels), axis=1)
    d = np.clip(np.log1p(np.exp(d + a["dt_bias"])), *kind.step_limits)
    padded, kernel = np.concatenate([np.zeros((kind.kernel - 1, kind.channels)), mixed]), a["conv"].T
    seen = np.array([(padded[t : t + kind.kernel] * kernel).sum(axis=0) for t in range(count)]) + a["conv_bias"]
    seen /= 1 + np.exp(-seen)
    u = seen[:, :values].reshape(count, kind.heads, -1)
    b, c = np.split(seen[:, values:].reshape(count, 2 * kind.groups, -1), 2, axis=1)
    memory, y = np.zeros((kind.heads, kind.states, kind.head_dim)), np.zeros((count, kind.heads, kind.head_dim))
    for t in range(count):
        for h in range(kind.heads):
            memory[h] *= np.exp(d[t, h] * a["decay"][h])
            memory[h] += d[t, h] * np.outer(b[t, h // share], u[t, h])
            y[t, h] = memory[h].T @ c[t, h // share] + a["skip"][h] * u[t, h]
    y = y.reshape(count, -1) * gate / (1 + np.exp(-gate))
    y = normed(y.reshape(count, kind.groups, -1), a["norm"].reshape(kind.groups, -1)).reshape(count, -1)
    np.testing.assert_allclose(run(kind, weights, x, cuts), y @ m["o"].T + a["o_bias"], atol=3e-5)


@pytest.mark.parametrize("strength", [1, 300, 30000])
@pytest.mark.parametrize("channels", [1, 6])
def test_the_delta_rule_remembers_what_follows_a_token_that_wipes_all_out(strength: float, channels: int) -> None:
    """Within a chunk no digits are lost: most tokens keep nearly all, and every fifth nothing."""
    count, kind = 60, {"memory": Recurrent((2, 6, 5))}
    q, k, v = (random(2, count, width, seed=seed) for seed, width in enumerate((6, 6, 5)))
    q, k, b = unit_length(q), unit_length(k), np.full((2, count), 0.7, np.float32)
    decay = np.where(np.arange(count) % 5, np.float32(-3e-4), np.float32(-strength))
    decay = np.broadcast_to(decay[:, None], (2, count, channels))

    def told(cuts: Iterable[int]) -> NDArray[np.float32]:
        cache, out, start = Cache([kind], count), np.empty((count, 2, 5), np.float32), 0
        for stop in (*cuts, count):
            own = slice(start, stop)
            with cache.step(stop - start):
                state = Step.of([(np.zeros(1, np.int64), cache)]).segments[0].blocks[0]["memory"]
                assert isinstance(state, RecurrentState)
                delta_rule(q[:, own], k[:, own], v[:, own], b[:, own], decay[:, own], state, out[own])
            start = stop
        return out

    np.testing.assert_allclose(told(()), told(range(1, count)), atol=3e-5)


@pytest.mark.parametrize("strength", [1, 300, 30000])
def test_mamba2_remembers_what_follows_a_token_that_wipes_all_out(strength: float) -> None:
    """Within a chunk no digits are lost: most tokens keep nearly all, and every fifth nothing."""
    kind, count = Mamba2(2, 4, 1, 3, 2), 60
    weights, x = weights_of(kind), random(count, HIDDEN, seed=9)
    rows = weights.matrices["in"].dequantize().copy()
    rows[-2:] = 0  # steps follow from the first channel alone
    rows[-2:, 0] = strength
    x[:, 0] = np.where(np.arange(count) % 5, -8 / strength, 1)
    weights.matrices["in"] = F32(rows)
    weights.arrays["dt_bias"][:], weights.arrays["decay"][:] = 0, -1
    alone = run(kind, weights, x, tuple(range(1, count)))
    np.testing.assert_allclose(run(kind, weights, x, ()), alone, atol=3e-5)
