"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), computed on the latents.

Every head's keys and values are linear in one latent vector c a token: k_h = [Wk_h c | k_rope], v_h = Wv_h c.
So q_h k_h = (Wk_h^T q_h) c + q_rope k_rope, and sum_t p_t v_ht = Wv_h sum_t p_t c_t: with the query taken into
the latent space all heads attend over the same cached rows [c | k_rope], and nothing is ever expanded per token.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from numoe.engine import ops
from numoe.engine.attention import attend, hidden_keys, query_blocks
from numoe.engine.kvcache import Rows
from numoe.engine.ops import Floats
from numoe.engine.rope import Rotation
from numoe.engine.spec import MultiHeadLatentAttention
from numoe.engine.weights import Weights
from numoe.quant.activations import Activations
from numoe.quant.qtensor import matmul_all


class Latent:
    """One layer's latent attention."""

    def __init__(self, spec: MultiHeadLatentAttention, weights: Weights, rotation: Rotation, norm_eps: float):
        self.spec = spec
        self.w = weights
        self.rotation = rotation

    def __call__(self, x: Floats, cache: Mapping[str, Rows], start: int) -> Floats:
        """x (T, D) of tokens at start, start + 1, ... -> (T, D)."""
        spec, count, m = self.spec, len(x), self.w.matrices
        given = Activations(x)
        q, row = matmul_all([(m["q" if spec.q_rank is None else "q_a"], given, None), (m["kv_a"], given, None)])
        if spec.q_rank is not None:
            ops.rms_norm(q, self.w.arrays["q_norm"], spec.norm_eps, out=q)
            q = m["q_b"].matmul(q)
        q = self.rotation.apply(q.reshape(count, spec.heads, -1), start)  # (T, H, nope + rope)

        latent = row[:, : spec.kv_rank]  # of (T, rank + rope)
        ops.rms_norm(latent, self.w.arrays["kv_norm"], spec.norm_eps, out=latent)
        self.rotation.apply(row[:, None], start)
        cache["latent"].append(row[None])

        expand = m["kv_b"].dequantize().reshape(spec.heads, spec.nope_dim + spec.value_dim, spec.kv_rank)
        to_key, to_value = expand[:, : spec.nope_dim], expand[:, spec.nope_dim :]
        query = np.empty((count, spec.heads, spec.kv_rank + spec.rope.dim), np.float32)
        np.matmul(q[..., : spec.nope_dim].transpose(1, 0, 2), to_key, out=query[..., : spec.kv_rank].transpose(1, 0, 2))
        query[..., spec.kv_rank :] = q[..., spec.nope_dim :]

        mixed = np.empty((count, spec.heads, spec.kv_rank), np.float32)
        for a, b in query_blocks(count, spec.heads, start + count):
            keys = cache["latent"].view(0, start + b)
            hidden = hidden_keys(start + a, start + b, 0, None)
            mixed[a:b] = attend(query[None, a:b], [(keys, keys[..., : spec.kv_rank], hidden)], spec.scale)[0]
        out = np.matmul(mixed.transpose(1, 0, 2), to_value.transpose(0, 2, 1))  # (H, T, value)
        return m["o"].matmul(np.ascontiguousarray(out.transpose(1, 0, 2)).reshape(count, -1))
