"""A lean PyTorch DeepSeek-V4, written for training a small one on a CPU.

It computes what the `deepseek_v4` model of transformers computes (`check_against_transformers` holds it to that), and
adds what training needs: the multi-token-prediction head, the indexer's own loss and the load counts of the routers.
Parameters carry the names of the released checkpoints, so exporting is `released_tensors`.

Shapes: B rows, T tokens, D hidden, H residual streams, N heads, Dh head_dim, Dr rotated channels, C compressed entries,
E experts, K experts a token, W expert width, V vocabulary. Parameters and results are float32; under `torch.autocast`
the matrix products are bfloat16, which makes training on a CPU with AVX512-BF16 about twice as fast; those of the
routed experts stay float32, because their row counts change every step and bfloat16 kernels are built for one shape.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 128  # token counts are padded to a multiple of this; a multiple of the window and of every compression ratio


@dataclass(frozen=True)
class Config:
    """The keys of a released `config.json` that change numbers, with the sizes of the tiny model."""

    vocab_size: int = 1024
    hidden_size: int = 128
    num_hidden_layers: int = 5
    compress_ratios: tuple[int, ...] = (0, 4, 128, 4, 0, 0)  # one a layer, then one for the MTP block
    num_attention_heads: int = 4
    head_dim: int = 64
    qk_rope_head_dim: int = 32
    q_lora_rank: int = 64
    o_groups: int = 2
    o_lora_rank: int = 64
    sliding_window: int = 128
    index_n_heads: int = 16
    index_head_dim: int = 32
    index_topk: int = 32
    n_routed_experts: int = 16
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 64
    num_hash_layers: int = 1
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 2
    hc_sinkhorn_iters: int = 4
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    max_position_embeddings: int = 4096
    rope_scaling: dict[str, float | str] = field(
        default_factory=lambda: {
            "type": "yarn",
            "factor": 8,
            "original_max_position_embeddings": 512,
            "beta_fast": 32,
            "beta_slow": 1,
        }
    )

    def released(self) -> dict[str, object]:
        """The `config.json` of a released checkpoint with these sizes."""
        return {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_key_value_heads": 1,
            "num_nextn_predict_layers": 1,
            "scoring_func": "sqrtsoftplus",
            "tie_word_embeddings": False,
            "topk_method": "noaux_tc",
            "torch_dtype": "float32",
            "use_cache": True,
            **asdict(self),
            "compress_ratios": list(self.compress_ratios),
        }


# -- rotary embedding ------------------------------------------------------------------------------------------------


def rope_frequencies(config: Config, compressed: bool) -> Tensor:
    """Angle per position of each rotated pair, (Dr/2); layers with a compressor stretch the slow pairs by YaRN."""
    dim = config.qk_rope_head_dim
    theta = config.compress_rope_theta if compressed else config.rope_theta
    frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if compressed:
        s = config.rope_scaling
        factor, trained = float(s["factor"]), float(s["original_max_position_embeddings"])

        def pair_turning(times: float) -> float:
            return dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(pair_turning(float(s["beta_fast"]))), 0)
        high = min(math.ceil(pair_turning(float(s["beta_slow"]))), dim - 1)
        ramp = ((torch.arange(dim // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
        frequencies = frequencies * (1 - ramp) + frequencies / factor * ramp
    return frequencies.float()


def rope_table(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (positions, Dr/2)."""
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last Dr channels of x as interleaved pairs; cos and sin broadcast against (..., Dr/2)."""
    dim = 2 * cos.shape[-1]
    pairs = x[..., -dim:].unflatten(-1, (-1, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    return torch.cat((x[..., :-dim], turned), dim=-1)


# -- small pieces ----------------------------------------------------------------------------------------------------


def rms(x: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms(x, self.eps) * self.weight


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Compressor(nn.Module):
    """Mixes each closed window of `ratio` tokens into one entry; at ratio 4 the previous window takes part as well."""

    def __init__(self, config: Config, ratio: int, dim: int):
        super().__init__()
        self.ratio, self.dim, self.overlap = ratio, dim, ratio == 4
        wide = dim * (2 if self.overlap else 1)
        self.ape = nn.Parameter(torch.zeros(ratio, wide))
        self.wkv = linear(config.hidden_size, wide)
        self.wgate = linear(config.hidden_size, wide)
        self.norm = RMSNorm(dim, config.rms_norm_eps)

    def forward(self, x: Tensor, frequencies: Tensor) -> Tensor:
        """x (B, T, D) -> entries (B, T // ratio, dim), rotated to the first position of their window."""
        kv = self.wkv(x).unflatten(1, (-1, self.ratio))  # (B, C, ratio, dim or 2*dim)
        gate = self.wgate(x).unflatten(1, (-1, self.ratio)) + self.ape
        if self.overlap:
            kv = torch.cat((self._previous(kv, 0.0), kv[..., self.dim :]), dim=2)  # (B, C, 2*ratio, dim)
            gate = torch.cat((self._previous(gate, -1e30), gate[..., self.dim :]), dim=2)
        entries = self.norm((kv * gate.float().softmax(dim=2)).sum(dim=2))
        first = torch.arange(entries.shape[1]) * self.ratio
        return rotate(entries, *rope_table(frequencies, first))

    def _previous(self, x: Tensor, fill: float) -> Tensor:
        """The first half of each window's predecessor; `fill` for the window that has none."""
        return F.pad(x[:, :-1, :, : self.dim], (0, 0, 0, 0, 1, 0), value=fill)


class Indexer(nn.Module):
    """Scores every compressed entry for every token (the lightning indexer)."""

    def __init__(self, config: Config):
        super().__init__()
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.compressor = Compressor(config, 4, self.dim)
        self.wq_b = linear(config.q_lora_rank, self.heads * self.dim)
        self.weights_proj = linear(config.hidden_size, self.heads)

    def forward(self, x: Tensor, qr: Tensor, frequencies: Tensor) -> Tensor:
        """x (B, T, D), qr (B, T, q_lora) -> scores (B, T, C)."""
        keys = self.compressor(x, frequencies)  # (B, C, dim)
        cos, sin = rope_table(frequencies, torch.arange(x.shape[1]))
        q = rotate(self.wq_b(qr).unflatten(-1, (self.heads, self.dim)), cos[:, None], sin[:, None])
        match = (q.flatten(1, 2) @ keys.mT).unflatten(1, (-1, self.heads)).relu()  # (B, T, heads, C)
        weights = self.weights_proj(x).float() * (self.heads * self.dim) ** -0.5
        return (match * weights[..., None]).sum(dim=2)


class Attention(nn.Module):
    def __init__(self, config: Config, ratio: int):
        super().__init__()
        self.config, self.ratio = config, ratio
        heads, dim, groups = config.num_attention_heads, config.head_dim, config.o_groups
        self.attn_sink = nn.Parameter(torch.zeros(heads))
        self.wq_a = linear(config.hidden_size, config.q_lora_rank)
        self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.wq_b = linear(config.q_lora_rank, heads * dim)
        self.wkv = linear(config.hidden_size, dim)
        self.kv_norm = RMSNorm(dim, config.rms_norm_eps)
        self.wo_a = linear(heads * dim // groups, groups * config.o_lora_rank)
        self.wo_b = linear(groups * config.o_lora_rank, config.hidden_size)
        self.register_buffer("frequencies", rope_frequencies(config, ratio > 0), persistent=False)
        if ratio:
            self.compressor = Compressor(config, ratio, dim)
        if ratio == 4:
            self.indexer = Indexer(config)

    def forward(self, x: Tensor, sparse: bool, guessed: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D), T a multiple of CHUNK -> output (B, T, D), the indexer's loss (), and the rows kept, (B, T, Dh).

        With `sparse` the indexer's choice is obeyed; without it every visible entry is attended to, as the loss is
        learnt best before the choice means anything. guessed: rows of passes before this one, of a sliding layer that
        goes on from its own guesses: a token sees the last pass's row of the token before it, the row before that of
        the pass before, and from there on those of the first."""
        c = self.config
        rows, tokens, _ = x.shape
        heads, dim, window = c.num_attention_heads, c.head_dim, c.sliding_window
        cos, sin = rope_table(self.frequencies, torch.arange(tokens))
        qr = self.q_norm(self.wq_a(x))
        q = rms(self.wq_b(qr).unflatten(-1, (heads, dim)), c.rms_norm_eps)
        q = rotate(q, cos[:, None], sin[:, None]) * dim**-0.5  # (B, T, N, Dh)
        kv = rotate(self.kv_norm(self.wkv(x)), cos, sin)  # (B, T, Dh)

        # A block of `window` queries sees its own block of keys and the one before: 2*window keys hold every window.
        blocks = tokens // window
        own = (guessed[0] if guessed else kv).unflatten(1, (blocks, window))
        near = torch.cat((F.pad(own[:, :-1], (0, 0, 0, 0, 1, 0)), own), dim=2)  # (B, blocks, 2*window, Dh)
        scores = q.reshape(rows, blocks, window * heads, dim) @ near.mT
        scores = scores.view(rows, blocks, window, heads, 2 * window)
        query, key = torch.arange(window)[:, None], torch.arange(2 * window) - window
        visible = (key <= query - len(guessed)) & (key > query - window)  # (window, 2*window)
        visible = visible & ((torch.arange(blocks)[:, None, None] > 0) | (key >= 0))
        scores = scores.masked_fill(~visible[:, :, None], -1e30).reshape(rows, tokens, heads, 2 * window)

        logits = [scores, self.attn_sink[None, None, :, None].expand(rows, tokens, heads, 1)]
        if self.ratio:
            entries = self.compressor(x, self.frequencies)  # (B, C, Dh)
            closed = (torch.arange(tokens) + 1) // self.ratio
            allowed = (torch.arange(entries.shape[1]) < closed[:, None])[None]  # (1, T, C)
            if self.ratio == 4:
                index = self.indexer(x.detach(), qr.detach(), self.frequencies).masked_fill(~allowed, -1e30)
                if sparse and entries.shape[1] > c.index_topk:
                    chosen = index.detach().topk(c.index_topk, dim=-1).indices
                    allowed = torch.zeros_like(index, dtype=torch.bool).scatter(-1, chosen, True) & allowed
            far = (q.flatten(1, 2) @ entries.mT).unflatten(1, (tokens, heads))  # (B, T, N, C)
            logits.append(far.masked_fill(~allowed[:, :, None], -1e30))
        later = [F.pad(row, (0, 0, back, 0))[:, :tokens] for back, row in enumerate(reversed([*guessed[1:], kv]))]
        if guessed:  # (B, T, N) of each
            logits += [(q * row[:, :, None]).sum(dim=-1, keepdim=True) for row in later]
        mass = torch.cat(logits, dim=-1).float().softmax(dim=-1)

        out = mass[..., : 2 * window].reshape(rows, blocks, window * heads, 2 * window) @ near
        out = out.view(rows, tokens, heads, dim)
        loss = x.new_zeros(())
        if guessed:
            for row, weight in zip(later, mass[..., -len(later) :].unbind(-1), strict=True):
                out = out + weight[..., None] * row[:, :, None]
        if self.ratio:
            far_mass = mass[..., 2 * window + 1 :]
            out = out + (far_mass.flatten(1, 2) @ entries).view_as(out)
            if self.ratio == 4:
                loss = indexer_loss(index.masked_fill(~allowed, -1e30), far_mass.detach().sum(dim=2))
        out = rotate(out, cos[:, None], -sin[:, None])
        grouped = out.reshape(rows * tokens, c.o_groups, -1).transpose(0, 1)  # (groups, B*T, N*Dh/groups)
        low = grouped @ self.wo_a.weight.unflatten(0, (c.o_groups, -1)).mT
        return self.wo_b(low.transpose(0, 1).reshape(rows, tokens, -1)), loss, kv


def indexer_loss(index: Tensor, mass: Tensor) -> Tensor:
    """KL(attention mass over entries || softmax of the indexer's scores), mean over tokens; both (B, T, C).

    The aim of the DeepSeek-V3.2 report: the indexer learns to rank entries as the attention weighs them. Tokens that
    spend nothing on entries teach nothing."""
    total = mass.sum(dim=-1, keepdim=True)
    target = mass / (total + 1e-9)
    gap = (target + 1e-9).log() - index.log_softmax(dim=-1)
    return ((target * gap).sum(dim=-1) * (total[..., 0] > 1e-6)).mean()


# -- mixture of experts ----------------------------------------------------------------------------------------------


@torch.library.custom_op("tiny::grouped_matmul", mutates_args=())
def grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (R, in) sorted by expert, weight (E, in, out), ends (E) the end row of each expert -> (R, out)."""
    out = x.new_empty(x.shape[0], weight.shape[2])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        torch.mm(x[start:end], weight[expert], out=out[start:end])
        start = end
    return out


@grouped_matmul.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("tiny::grouped_outer", mutates_args=())
def grouped_outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """x (R, in), y (R, out), both sorted by expert -> x.T @ y of each expert, (E, in, out)."""
    out = x.new_empty(ends.shape[0], x.shape[1], y.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        torch.mm(x[start:end].T, y[start:end], out=out[expert])
        start = end
    return out


@grouped_outer.register_fake
def _(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], y.shape[1])


def _save_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return grouped_matmul(grad, weight.mT, ends), grouped_outer(x, grad, ends), None


grouped_matmul.register_autograd(_grouped_backward, setup_context=_save_inputs)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


class Gate(nn.Module):
    def __init__(self, config: Config, hashed: bool):
        super().__init__()
        experts, k = config.n_routed_experts, config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        if hashed:
            self.register_buffer("tid2eid", torch.zeros(config.vocab_size, k, dtype=torch.int64))
        else:
            self.register_buffer("bias", torch.zeros(experts))


class Expert(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.w1 = linear(config.hidden_size, config.moe_intermediate_size)
        self.w2 = linear(config.moe_intermediate_size, config.hidden_size)
        self.w3 = linear(config.hidden_size, config.moe_intermediate_size)
        self.limit = config.swiglu_limit

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w1(x), self.w3(x), self.limit))


class Experts(nn.Module):
    """All routed experts of a layer, stacked: w13 (E, 2*W, D) holds gate over up, w2 (E, D, W) is down."""

    def __init__(self, config: Config):
        super().__init__()
        experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.w13 = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, width))


class MoE(nn.Module):
    def __init__(self, config: Config, hashed: bool):
        super().__init__()
        self.config, self.hashed = config, hashed
        self.gate = Gate(config, hashed)
        self.experts = Experts(config)
        self.shared_experts = Expert(config)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D), ids (B, T) -> output (B, T, D) and how many tokens each expert got (E)."""
        c = self.config
        flat = x.flatten(0, 1)
        scores = F.softplus((flat @ self.gate.weight.T).float()).sqrt()  # (B*T, E)
        if self.hashed:
            experts = self.gate.tid2eid[ids.flatten()]
        else:
            experts = (scores.detach() + self.gate.bias).topk(c.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(1, experts)  # (B*T, K)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * c.routed_scaling_factor

        order = experts.flatten().argsort(stable=True)  # rows of (token, choice), grouped by expert
        load = (experts.flatten()[:, None] == torch.arange(c.n_routed_experts)).sum(dim=0)
        ends = load.cumsum(0)
        token = order // c.num_experts_per_tok
        gate_up = grouped_matmul(flat[token], self.experts.w13.mT, ends)
        hidden = swiglu(*gate_up.chunk(2, dim=-1), c.swiglu_limit)
        hidden = hidden * weights.flatten()[order][:, None]
        down = grouped_matmul(hidden, self.experts.w2.mT, ends)
        routed = down[order.argsort()].unflatten(0, (-1, c.num_experts_per_tok)).sum(dim=1)
        return routed.view_as(x) + self.shared_experts(x), load


# -- residual streams and blocks -------------------------------------------------------------------------------------


def sinkhorn(comb: Tensor, iterations: int, eps: float) -> Tensor:
    """Rows and columns of the (..., H, H) matrices scaled to sum to one."""
    comb = comb.softmax(dim=-1) + eps
    comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(dim=-1, keepdim=True) + eps)
        comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    return comb


class Block(nn.Module):
    def __init__(self, config: Config, ratio: int, hashed: bool):
        super().__init__()
        self.config = config
        streams = config.hc_mult
        for part in ("attn", "ffn"):
            mixes = (2 + streams) * streams
            self.register_parameter(f"hc_{part}_fn", nn.Parameter(torch.empty(mixes, streams * config.hidden_size)))
            self.register_parameter(f"hc_{part}_base", nn.Parameter(torch.zeros(mixes)))
            self.register_parameter(f"hc_{part}_scale", nn.Parameter(torch.ones(3)))
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, ratio)
        self.ffn = MoE(config, hashed)

    def forward(
        self, x: Tensor, ids: Tensor, sparse: bool, guessed: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Streams x (B, T, H, D) -> streams, the indexer's loss (), the experts' load (E), the attention's rows."""
        read, post, comb = self._mix(x, self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale)
        out, loss, kept = self.attn(self.attn_norm(read), sparse, guessed)
        x = self._write(x, out, post, comb)
        read, post, comb = self._mix(x, self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale)
        out, load = self.ffn(self.ffn_norm(read), ids)
        return self._write(x, out, post, comb), loss, load, kept

    def _mix(self, x: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Block input (B, T, D), write weights (B, T, H), stream mixing (B, T, H, H)."""
        c = self.config
        h = c.hc_mult
        f = (rms(x.flatten(2), c.rms_norm_eps) @ fn.T).float()
        pre = (f[..., :h] * scale[0] + base[:h]).sigmoid() + c.hc_eps
        post = 2 * (f[..., h : 2 * h] * scale[1] + base[h : 2 * h]).sigmoid()
        comb = (f[..., 2 * h :] * scale[2] + base[2 * h :]).unflatten(-1, (h, h))
        return (pre[..., None] * x).sum(dim=2), post, sinkhorn(comb, c.hc_sinkhorn_iters, c.hc_eps)

    def _write(self, x: Tensor, out: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        # out stream k gets sum_j comb[j, k] * stream j
        return post[..., None] * out[:, :, None] + (comb[..., None] * x[:, :, :, None]).sum(dim=2)


class Collapse(nn.Module):
    """Base of the two ends (the model and its MTP block) that read the streams once more before a norm and the head."""

    def add_collapse(self, config: Config) -> None:
        self.hc_head_fn = nn.Parameter(torch.empty(config.hc_mult, config.hc_mult * config.hidden_size))
        self.hc_head_base = nn.Parameter(torch.zeros(config.hc_mult))
        self.hc_head_scale = nn.Parameter(torch.ones(1))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def collapse(self, x: Tensor, config: Config) -> Tensor:
        """Streams (B, T, H, D) -> (B, T, D), normed."""
        f = (rms(x.flatten(2), config.rms_norm_eps) @ self.hc_head_fn.T).float()
        pre = (f * self.hc_head_scale + self.hc_head_base).sigmoid() + config.hc_eps
        return self.norm((pre[..., None] * x).sum(dim=2))


class MTPBlock(Block, Collapse):
    """Predicts one token further from the last streams and the embedding of the token in between."""

    def __init__(self, config: Config):
        super().__init__(config, config.compress_ratios[-1], hashed=False)
        self.add_collapse(config)
        self.e_proj = linear(config.hidden_size, config.hidden_size)
        self.h_proj = linear(config.hidden_size, config.hidden_size)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def enter(self, x: Tensor, embedded: Tensor) -> Tensor:
        """Streams (B, T, H, D) and embedded next tokens (B, T, D) -> this block's streams."""
        return self.e_proj(self.enorm(embedded))[:, :, None] + self.h_proj(self.hnorm(x))


@dataclass(frozen=True)
class Losses:
    """Means over tokens, each (), and the load of every score-routed layer, (layers, E)."""

    main: Tensor
    mtp: Tensor
    indexer: Tensor
    loads: Tensor


class Model(Collapse):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        layers = config.num_hidden_layers
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, config.compress_ratios[i], i < config.num_hash_layers) for i in range(layers)
        )
        self.mtp = nn.ModuleList([MTPBlock(config)])
        self.add_collapse(config)
        self.head = linear(config.hidden_size, config.vocab_size)

    def initialise(self, seed: int) -> None:
        """Seeded start: matrices at unit gain, outputs of blocks at zero, streams that begin apart."""
        g = torch.Generator().manual_seed(seed)
        c = self.config
        for name, p in self.named_parameters():
            if name.endswith(("wo_b.weight", "w2", "w2.weight", "head.weight")):
                nn.init.zeros_(p)
            elif name == "embed.weight":
                nn.init.normal_(p, std=0.5, generator=g)
            elif p.dim() >= 2 and "ape" not in name:
                std = 0.3 if "hc_" in name or "gate.weight" in name else 0.7
                nn.init.normal_(p, std=std * p.shape[-1] ** -0.5, generator=g)
        with torch.no_grad():
            h = c.hc_mult
            for i, block in enumerate([*self.layers, *self.mtp]):
                for j, base in enumerate((block.hc_attn_base, block.hc_ffn_base)):
                    base[:h] = -math.log(h - 0.99)
                    base[(2 * i + j) % h] += 1.0
                    base[2 * h :] = (3.0 * torch.eye(h)).flatten()
            for block in self.layers[: c.num_hash_layers]:
                draws = torch.rand(c.vocab_size, c.n_routed_experts, generator=g)
                block.ffn.gate.tid2eid.copy_(draws.argsort(dim=-1)[:, : c.num_experts_per_tok])

    def streams(self, ids: Tensor, sparse: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        x = self.embed(ids)[:, :, None].expand(-1, -1, self.config.hc_mult, -1)
        losses, loads = [], []
        for block in self.layers:
            x, loss, load, _ = block(x, ids, sparse)
            losses.append(loss)
            if not block.ffn.hashed:
                loads.append(load)
        return x, losses, loads

    def losses(self, ids: Tensor, sparse: bool, ignore: int) -> Losses:
        """ids (B, T + 2): T tokens to read, one more for the model to predict and one more for the MTP block.

        Positions that hold `ignore` are not predicted."""
        tokens = ids.shape[1] - 2
        read = ids.clamp(min=0)  # what is not predicted may lie outside the vocabulary
        x, indexer, loads = self.streams(read[:, :tokens], sparse)
        main = self._cross_entropy(self.collapse(x, self.config), ids[:, 1:-1], ignore)
        block = self.mtp[0]
        drafted, _, load, _ = block(block.enter(x, self.embed(read[:, 1:-1])), read[:, 1:-1], sparse)
        mtp = self._cross_entropy(block.collapse(drafted, self.config), ids[:, 2:], ignore)
        return Losses(main, mtp, torch.stack(indexer).sum(), torch.stack([*loads, load]))

    def _cross_entropy(self, x: Tensor, targets: Tensor, ignore: int) -> Tensor:
        return F.cross_entropy(self.head(x).float().flatten(0, 1), targets.flatten(), ignore_index=ignore)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, V), any T; the indexer chooses."""
        tokens = ids.shape[1]
        padded = F.pad(ids, (0, -tokens % CHUNK))
        x, _, _ = self.streams(padded, sparse=True)
        return self.head(self.collapse(x, self.config)[:, :tokens])


def released_tensors(model: Model) -> dict[str, Tensor]:
    """The weights in the naming and dtypes of the released checkpoints, one tensor an expert and matrix.

    bfloat16, but for float32 where the released ones have it: stream mixing, position biases, sinks, router biases.
    """
    width = model.config.moe_intermediate_size
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.w13"):
            prefix = name.removesuffix(".w13")
            for e, pair in enumerate(tensor):
                tensors[f"{prefix}.{e}.w1.weight"] = pair[:width].clone()
                tensors[f"{prefix}.{e}.w3.weight"] = pair[width:].clone()
        elif name.endswith("ffn.experts.w2"):
            for e, down in enumerate(tensor):
                tensors[f"{name.removesuffix('.w2')}.{e}.w2.weight"] = down.clone()
        else:
            tensors[name] = tensor.clone()
    exact = ("hc_", "ape", "attn_sink", "gate.bias", "tid2eid")
    return {n: t if any(part in n for part in exact) else t.bfloat16() for n, t in tensors.items()}


def load_released(model: Model, tensors: dict[str, Tensor]) -> None:
    """Give a model the weights that `released_tensors` made."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.w13"):
            below = [f"{name.removesuffix('.w13')}.{e}" for e in range(len(tensor))]
            state[name] = torch.stack([torch.cat([tensors[f"{b}.w{n}.weight"] for n in (1, 3)]) for b in below])
        elif name.endswith("ffn.experts.w2"):
            state[name] = torch.stack(
                [tensors[f"{name.removesuffix('.w2')}.{e}.w2.weight"] for e in range(len(tensor))]
            )
        else:
            state[name] = tensors[name]
    model.load_state_dict({name: tensor.to(model.state_dict()[name].dtype) for name, tensor in state.items()})


def check_against_transformers() -> float:
    """Largest difference from transformers' logits on random weights, read by it from a released-form checkpoint."""
    import json
    import tempfile
    from pathlib import Path

    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = Config(vocab_size=200, hc_mult=3, index_topk=8, num_hash_layers=2)
    model = Model(config)
    model.initialise(0)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=g)
            p.add_(noise * (0.1 if p.dim() < 2 else p.shape[-1] ** -0.5))
            p.copy_(p.bfloat16())
        for name, b in model.named_buffers():
            if name.endswith("gate.bias"):
                b.copy_(torch.randn(b.shape, generator=g) * 0.1)
    ids = torch.randint(0, config.vocab_size, (2, 300), generator=g)
    with tempfile.TemporaryDirectory() as folder:
        save_file(released_tensors(model), Path(folder, "model.safetensors"), {"format": "pt"})
        Path(folder, "config.json").write_text(json.dumps(config.released()))
        oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return (oracle(ids).logits - model.logits(ids)).abs().max().item()


if __name__ == "__main__":
    print(f"largest difference from transformers: {check_against_transformers():.1e}")
