"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), computed on the latents.

Every head's keys and values are linear in one latent vector c a token: k_h = [Wk_h c | k_rope], v_h = Wv_h c.
So q_h k_h = (Wk_h^T q_h) c + q_rope k_rope, and sum_t p_t v_ht = Wv_h sum_t p_t c_t: with the query taken into
the latent space all heads attend over the same cached rows [c | k_rope], and nothing is ever expanded per token.

With an indexer each token attends to those that it picks, or that the one of an earlier layer picked (DeepSeek Sparse
Attention, arXiv 2512.02556); checked against transformers' deepseek_v32 and glm_moe_dsa.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from numoe.engine.layers import ops
from numoe.engine.layers.attention.indexer import TokenIndexer, TokenLightningIndexer
from numoe.engine.layers.attention.softmax import SHORT, Queries, attend, attend_together, hidden_keys
from numoe.engine.layers.block import Compute, Kind, Shared, angles
from numoe.engine.layers.ops import Floats, Ids
from numoe.engine.layers.rope import Rope, Temperature
from numoe.engine.layers.rows import stretch
from numoe.engine.layers.state import KeptRows, Rows, Span
from numoe.engine.layers.step import Company, Segment, Step
from numoe.engine.layers.tensor import Tensor, prefixed
from numoe.engine.layers.weights import Weights
from numoe.quant.compute import threads
from numoe.quant.compute.activations import Activations
from numoe.quant.compute.memory import scratch
from numoe.quant.formats.qtensor import matmul_all


@dataclass(frozen=True)
class MultiHeadLatentAttention(Kind):
    """Keys and values are expanded from one latent of `kv_rank` a token."""

    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    shared_dim: int
    """Channels of keys that all heads have in common, and that `rope` rotates."""
    value_dim: int
    rope: Rope | None
    """None: positions play no part but for the mask."""
    scale: float
    norm_eps: float = 1e-6
    split: bool = False
    """Wk, transposed a head, and Wv are matrices of their own, as GGUF files have them."""
    indexer: TokenIndexer | None = None
    follows: bool = False
    """It attends to what the last indexer of the layers before chose (GLM-5.2)."""
    gate: bool = False
    """Each head's output is multiplied with the sigmoid of one projection of x (Ling 3.0)."""
    temperature: Temperature | None = None
    """What queries are multiplied with (Mistral Small 4)."""

    @property
    def label(self) -> str:
        return "DSA" if self.indexer or self.follows else "MLA"

    @property
    def details(self) -> str:
        return f"the best {self.indexer.top_k} tokens" if self.indexer else "the same tokens" if self.follows else ""

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        q = self.heads * (self.nope_dim + self.shared_dim)
        if self.q_rank is None:
            table = {"q": Tensor((q, hidden), "attention")}
        else:
            table = {
                "q_a": Tensor((self.q_rank, hidden), "attention"),
                "q_norm": Tensor((self.q_rank,), "norms", "array"),
                "q_b": Tensor((q, self.q_rank), "attention"),
            }
        table |= {
            "kv_a": Tensor((self.kv_rank + self.shared_dim, hidden), "attention"),
            "kv_norm": Tensor((self.kv_rank,), "norms", "array"),
        }
        if self.split:
            table["k_b"] = Tensor((self.heads * self.kv_rank, self.nope_dim), "attention", "rows")
            table["v_b"] = Tensor((self.heads * self.value_dim, self.kv_rank), "attention", "rows")
        else:
            both = self.nope_dim + self.value_dim
            table["kv_b"] = Tensor((self.heads * both, self.kv_rank), "attention", "rows")
        if self.gate:
            table["gate"] = Tensor((self.heads, hidden), "attention")
        if self.indexer:
            assert self.q_rank is not None
            table |= prefixed("indexer.", self.indexer.tensors(hidden, self.q_rank))
        return table | {"o": Tensor((hidden, self.heads * self.value_dim), "attention")}

    def state(self) -> Mapping[str, Rows]:
        table = {"latent": Rows(1, self.kv_rank + self.shared_dim, apart=self.shared_dim, fine=True)}
        return table | {"indexer": self.indexer.state()} if self.indexer else table

    def build(self, weights: Weights, shared: Shared) -> Compute:
        return Latent(self, weights, shared)


class Latent:
    """One layer's latent attention."""

    def __init__(self, spec: MultiHeadLatentAttention, weights: Weights, shared: Shared):
        self.spec = spec
        self.w = weights
        self.rotation = shared.rotation(spec.rope) if spec.rope else None
        self.states = shared.states()
        self.indexer: TokenLightningIndexer | None = None
        if spec.indexer:
            self.indexer = TokenLightningIndexer(spec.indexer, weights.below("indexer."), shared)

    def __call__(self, x: Floats, step: Step) -> Floats:
        """(T, D) -> (T, D)."""
        spec, count, m = self.spec, len(x), self.w.matrices
        given = Activations(x)
        q, row = matmul_all([(m["q" if spec.q_rank is None else "q_a"], given, None), (m["kv_a"], given, None)])
        if spec.q_rank is not None:
            ops.rms_norm(q, self.w.arrays["q_norm"], spec.norm_eps, out=q)
            q_latent = Activations(q)
            q = m["q_b"].matmul(q_latent)
            if self.indexer:
                self._index(self.indexer, given, q_latent, step)
        q = q.reshape(count, spec.heads, -1)  # (T, H, nope + rope)
        latent = row[:, : spec.kv_rank]  # of (T, rank + rope)
        ops.rms_norm(latent, self.w.arrays["kv_norm"], spec.norm_eps, out=latent)
        if self.rotation:
            turned = angles(self.rotation, step)
            self.rotation.apply(q, turned)
            self.rotation.apply(row[:, None], turned)
        if spec.temperature:
            q *= spec.temperature.of(step.positions)[:, None, None]

        query = np.empty((count, spec.heads, spec.kv_rank + spec.shared_dim), np.float32)
        query[..., spec.kv_rank :] = q[..., spec.nope_dim :]
        mixed = np.empty((count, spec.heads, spec.kv_rank), np.float32)
        out = np.empty((count, spec.heads, spec.value_dim), np.float32)
        heads = range(spec.heads)
        threads.run([partial(self._into_latents, q[:, h], query[:, h], h) for h in heads])
        step.keep(self.states, "latent", row[:, None])
        alone = list(step.alone)
        for company in step.companies:
            alone += self._attend_together(query, company, step, mixed)
        queries = Queries()
        for segment in alone:
            own, kept = segment.rows, self.states(segment)["latent"]
            if (chosen := self._chosen(segment, step)) is None:
                self._attend(query[own], kept, segment, mixed[own], queries)
            else:
                self._attend_to(chosen, query[own], kept, segment, mixed[own], queries)
        queries.run()
        threads.run([partial(self._out_of_latents, mixed[:, h], out[:, h], h) for h in heads])
        if spec.gate:
            out *= ops.sigmoid(m["gate"].matmul(given))[..., None]
        return m["o"].matmul(out.reshape(count, -1))

    def _chosen(self, segment: Segment, step: Step) -> Ids | None:
        """The tokens that those of a sequence attend to, (T, K); None: to all."""
        return step.chosen[segment.first] if self.spec.indexer or self.spec.follows else None

    def _attend_together(self, query: Floats, company: Company, step: Step, out: Floats) -> list[Segment]:
        """Of query (T, H, rank + rope) and out (T, H, rank), the rows of those that see few keys, and all there are;
        gives the others."""
        rank, others = self.spec.kv_rank, list[Segment]()
        for some, span in self._runs(company, step):
            if len(some.segments) == 1:
                others += some.segments
                continue
            rows, hidden = self.states(some)["latent"].floats(span)  # (B, 1, S, rank + rope)
            keys = [(rows, rows[..., :rank], hidden)]
            together = attend_together(query[some.rows][:, None], keys, self.spec.scale)  # (B, 1, H, rank)
            out[some.rows] = together[:, 0]
        return others

    def _runs(self, company: Company, step: Step) -> list[tuple[Company, Span]]:
        most = SHORT // (self.spec.kv_rank + self.spec.shared_dim)
        counts = [one.stop_position if self._chosen(one, step) is None else most + 1 for one in company.segments]
        runs = company.runs(counts, most)
        return [(some, Span.of((0, one.stop_position) for one in some.segments)) for some in runs]

    def _index(self, indexer: TokenLightningIndexer, x: Activations, q_latent: Activations, step: Step) -> None:
        """Choose the tokens that those of the pass attend to, here and in the layers that follow."""
        keys = indexer.keys(x, step)
        q, weights = indexer.queries(x, q_latent, step)
        step.keep(self.states, "indexer", keys[:, None])
        for segment in step.segments:
            own, kept = segment.rows, self.states(segment)["indexer"]
            step.chosen[segment.first] = indexer.choose_tokens(q[own], weights[own], kept, segment)

    def _into_latents(self, q: Floats, query: Floats, head: int) -> None:
        """Wk_h^T q_h: the first channels of q (T, nope + rope) to those of query (T, rank + rope)."""
        spec = self.spec
        if spec.split:
            to_key = self._expanding("k_b", head * spec.kv_rank, (head + 1) * spec.kv_rank).T
        else:
            first = head * (spec.nope_dim + spec.value_dim)
            to_key = self._expanding("kv_b", first, first + spec.nope_dim)  # (nope, rank)
        np.matmul(q[:, : spec.nope_dim], to_key, out=query[:, : spec.kv_rank])

    def _out_of_latents(self, mixed: Floats, out: Floats, head: int) -> None:
        """Wv_h mixed: (T, rank) to out (T, value)."""
        spec = self.spec
        if spec.split:
            name, first = "v_b", head * spec.value_dim
        else:
            name, first = "kv_b", head * (spec.nope_dim + spec.value_dim) + spec.nope_dim
        np.matmul(mixed, self._expanding(name, first, first + spec.value_dim).T, out=out)

    def _expanding(self, name: str, start: int, stop: int) -> Floats:
        """Rows of Wk and Wv, made float32 where they are used: all heads' are 67 MB in V3."""
        matrix = self.w.matrices[name]
        block: Floats = scratch("kv_b", (stop - start, matrix.shape[1]))
        matrix.dequantize_rows(start, stop, block)
        return block

    def _attend(self, query: Floats, rows: KeptRows, segment: Segment, out: Floats, queries: Queries) -> None:
        """query (T, H, rank + rope) and out (T, H, rank) of one sequence, which `queries` is to fill."""
        rank, start = self.spec.kv_rank, segment.start

        def block(a: int, b: int) -> None:
            keys = rows.view(0, start + b)
            hidden = hidden_keys(start + a, start + b, 0, None)
            out[a:b] = attend(query[None, a:b], [(keys, keys.first(rank), hidden)], self.spec.scale)[0]

        queries.add(block, segment.count, self.spec.heads, start + segment.count, query.shape[-1])

    def _attend_to(
        self, chosen: Ids, query: Floats, rows: KeptRows, segment: Segment, out: Floats, queries: Queries
    ) -> None:
        """The same, where each token has its own keys (T, K); what comes after it is none."""
        rank, every = self.spec.kv_rank, rows.view(0, segment.start + segment.count)
        count, keys = chosen.shape

        def block(a: int, b: int) -> None:
            own = stretch(every.pick(chosen[a:b]))  # (T, K, rank + rope)
            hidden = chosen[a:b] > np.arange(segment.start + a, segment.start + b)[:, None]
            out[a:b] = attend(query[None, a:b], [(own, own.first(rank), hidden)], self.spec.scale)[0]

        queries.add(block, count, max(self.spec.heads, every.shape[-1]), keys, every.shape[-1])
