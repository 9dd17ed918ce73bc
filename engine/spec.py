"""What a model is, as data: frozen dataclasses that say which kinds a layer is made of and with which sizes.

A kind (an attention, a feed-forward, a residual) knows the tensors it needs and the rows it caches; loading,
planning and `show` all read these two tables, so that an estimate cannot drift from the engine.

Letters used in shapes: T tokens, D hidden, H heads, E experts, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from numoe.engine.config import Config


@dataclass(frozen=True)
class Tensor:
    """One weight: its shape, what it serves, and how it is held."""

    shape: tuple[int, ...]
    role: str
    held: Literal["matrix", "array"] = "matrix"
    """"matrix": a QTensor (out, in) in its stored format; "array": a float32 (or int64) ndarray."""

    @property
    def size(self) -> int:
        """Number of parameters."""
        return prod(self.shape)


@dataclass(frozen=True)
class Stream:
    """Rows that a layer keeps for later tokens: one row every `stride` tokens, `groups` x `width` float32."""

    groups: int
    width: int
    keep: int | None = None
    """How many of the latest rows a later token can need; None: all of them."""
    stride: int = 1


# ---------------------------------------------------------------------------------------------- rope


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): slow channels are interpolated by `factor`, fast ones are left alone."""

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    """Multiplies cos and sin."""
    truncate: bool = True


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths are divided by `factor`, middle ones blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class LinearScaling:
    """Every position is divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class DividedFrequencies:
    """Every pair's frequency is divided by a number of its own (GGUF's `rope_freqs`)."""

    divisors: tuple[float, ...]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of `dim` channels; `interleaved` rotates neighbours (0,1), (2,3), ..."""

    dim: int
    theta: float
    interleaved: bool = False
    scaling: Yarn | Llama3Scaling | LinearScaling | DividedFrequencies | None = None


# ----------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class GroupedQueryAttention:
    """H query heads share `kv_heads` key/value heads; with `window`, a token sees only that many positions."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    window: int | None = None
    head_norm: bool = False
    """RMS norm over each query and key head (Qwen3)."""
    bias: bool = False
    """Biases on the four projections."""

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        table = {
            "q": Tensor((q, hidden), "attention"),
            "k": Tensor((kv, hidden), "attention"),
            "v": Tensor((kv, hidden), "attention"),
            "o": Tensor((hidden, q), "attention"),
        }
        if self.head_norm:
            table |= {name: Tensor((self.head_dim,), "norms", "array") for name in ("q_norm", "k_norm")}
        if self.bias:
            table |= {f"{n}_bias": Tensor((table[n].shape[0],), "attention", "array") for n in "qkvo"}
        return table

    def streams(self) -> dict[str, Stream]:
        row = Stream(self.kv_heads, self.head_dim, self.window)
        return {"k": row, "v": row}


@dataclass(frozen=True)
class MultiHeadLatentAttention:
    """MLA (DeepSeek-V2, arXiv 2405.04434): keys and values are expanded from one latent of `kv_rank` a token."""

    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    value_dim: int
    rope: Rope
    scale: float
    norm_eps: float = 1e-6

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        q = self.heads * (self.nope_dim + self.rope.dim)
        if self.q_rank is None:
            table = {"q": Tensor((q, hidden), "attention")}
        else:
            table = {
                "q_a": Tensor((self.q_rank, hidden), "attention"),
                "q_norm": Tensor((self.q_rank,), "norms", "array"),
                "q_b": Tensor((q, self.q_rank), "attention"),
            }
        return table | {
            "kv_a": Tensor((self.kv_rank + self.rope.dim, hidden), "attention"),
            "kv_norm": Tensor((self.kv_rank,), "norms", "array"),
            "kv_b": Tensor((self.heads * (self.nope_dim + self.value_dim), self.kv_rank), "attention"),
            "o": Tensor((hidden, self.heads * self.value_dim), "attention"),
        }

    def streams(self) -> dict[str, Stream]:
        return {"latent": Stream(1, self.kv_rank + self.rope.dim)}


@dataclass(frozen=True)
class Compressor:
    """Each closed window of `ratio` tokens becomes one key/value row of `dim`.

    With `overlap` a row also mixes in the previous window, through a second half of the projections.
    """

    ratio: int
    dim: int
    overlap: bool

    @property
    def width(self) -> int:
        """Columns of the kv and gate projections."""
        return self.dim * (2 if self.overlap else 1)

    def tensors(self, hidden: int, role: str) -> dict[str, Tensor]:
        return {
            "ape": Tensor((self.ratio, self.width), role, "array"),
            "kv": Tensor((self.width, hidden), role),
            "gate": Tensor((self.width, hidden), role),
            "norm": Tensor((self.dim,), "norms", "array"),
        }

    def streams(self) -> dict[str, Stream]:
        """`rows`: the compressed entries; `open`: kv and gate of the tokens that a coming entry still needs."""
        return {
            "rows": Stream(1, self.dim, stride=self.ratio),
            "open": Stream(1, 2 * self.width, self.ratio * (2 if self.overlap else 1)),
        }


@dataclass(frozen=True)
class Indexer:
    """Lightning indexer: scores every compressed entry for a token and keeps the `top_k` best."""

    heads: int
    top_k: int
    compressor: Compressor


@dataclass(frozen=True)
class CompressedAttention:
    """DeepSeek-V4's attention: one shared key/value head over a window of tokens and over compressed entries.

    Without a compressor it is the sliding kind, with one the heavily compressed kind (HCA), with an indexer
    besides the compressed sparse kind (CSA). The output goes through `out_groups` separate projections.
    """

    heads: int
    head_dim: int
    q_rank: int
    window: int
    out_groups: int
    out_rank: int
    rope: Rope
    compressor: Compressor | None = None
    indexer: Indexer | None = None

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        q = self.heads * self.head_dim
        grouped = self.out_groups * self.out_rank
        table = {
            "q_a": Tensor((self.q_rank, hidden), "attention"),
            "q_norm": Tensor((self.q_rank,), "norms", "array"),
            "q_b": Tensor((q, self.q_rank), "attention"),
            "kv": Tensor((self.head_dim, hidden), "attention"),
            "kv_norm": Tensor((self.head_dim,), "norms", "array"),
            "sink": Tensor((self.heads,), "attention", "array"),
            "o_a": Tensor((grouped, q // self.out_groups), "attention"),
            "o_b": Tensor((hidden, grouped), "attention"),
        }
        if self.compressor:
            table |= _prefixed("compressor.", self.compressor.tensors(hidden, "compressor"))
        if self.indexer:
            dim = self.indexer.compressor.dim
            table |= {
                "indexer.q": Tensor((self.indexer.heads * dim, self.q_rank), "indexer"),
                "indexer.weights": Tensor((self.indexer.heads, hidden), "indexer"),
            }
            table |= _prefixed("indexer.compressor.", self.indexer.compressor.tensors(hidden, "indexer"))
        return table

    def streams(self) -> dict[str, Stream]:
        table = {"window": Stream(1, self.head_dim, self.window)}
        if self.compressor:
            table |= _prefixed("compressor.", self.compressor.streams())
        if self.indexer:
            table |= _prefixed("indexer.", self.indexer.compressor.streams())
        return table


Attention = GroupedQueryAttention | MultiHeadLatentAttention | CompressedAttention


# -------------------------------------------------------------------------------------- feed-forward


@dataclass(frozen=True)
class SwiGLU:
    """down(silu(gate x) * up x); with `limit`, gate is clipped above and up on both sides."""

    width: int
    limit: float | None = None
    bias: bool = False

    def tensors(self, hidden: int, role: str = "dense ffn") -> dict[str, Tensor]:
        table = {
            "gate": Tensor((self.width, hidden), role),
            "up": Tensor((self.width, hidden), role),
            "down": Tensor((hidden, self.width), role),
        }
        if self.bias:
            table |= {f"{n}_bias": Tensor((t.shape[0],), role, "array") for n, t in list(table.items())}
        return table


@dataclass(frozen=True)
class Router:
    """Chooses K experts a token: scores = score(x W^T), choice by scores + bias, weights from the scores."""

    score: Literal["softmax", "sigmoid", "sqrtsoftplus"]
    bias: bool = False
    """A learned correction that takes part in the choice and not in the weights (aux-loss-free balancing)."""
    hash_vocab: int = 0
    """Rows of the table that fixes the choice by token id (V4's first layers); 0: the choice is by score."""
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    """Experts are chosen within the `top_groups` best groups, a group being scored by its best (two) experts."""
    normalize: bool = True
    """Divide the chosen weights by their sum."""
    scale: float = 1.0


@dataclass(frozen=True)
class MixtureOfExperts:
    """K of E expert SwiGLUs a token, weighted by the router, plus `shared` that every token passes through."""

    experts: int
    top_k: int
    expert: SwiGLU
    router: Router
    shared: SwiGLU | None = None

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        table = {"router": Tensor((self.experts, hidden), "router")}
        if self.router.bias:
            table["router_bias"] = Tensor((self.experts,), "router", "array")
        if self.router.hash_vocab:
            table["router_table"] = Tensor((self.router.hash_vocab, self.top_k), "router", "array")
        if self.shared:
            table |= _prefixed("shared.", self.shared.tensors(hidden, "shared experts"))
        one = self.expert.tensors(hidden, "experts")
        for e in range(self.experts):
            table |= _prefixed(f"experts.{e}.", one)
        return table


FeedForward = SwiGLU | MixtureOfExperts


# ------------------------------------------------------------------------------------------ residual


@dataclass(frozen=True)
class PlainResidual:
    """x + block(x)."""

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        return {}

    def head_tensors(self, hidden: int) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class HyperConnections:
    """mHC (DeepSeek-V4): `streams` residual streams, mixed by a doubly stochastic matrix around every block."""

    streams: int
    sinkhorn_iterations: int
    eps: float

    def _mixer(self, outputs: int, scales: int, hidden: int) -> dict[str, Tensor]:
        return {
            "fn": Tensor((outputs, self.streams * hidden), "residual mixing", "array"),
            "base": Tensor((outputs,), "residual mixing", "array"),
            "scale": Tensor((scales,), "residual mixing", "array"),
        }

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        return self._mixer((2 + self.streams) * self.streams, 3, hidden)

    def head_tensors(self, hidden: int) -> dict[str, Tensor]:
        """The last collapse of the streams, before the final norm."""
        return self._mixer(self.streams, 1, hidden)


Residual = PlainResidual | HyperConnections


# --------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class LayerSpec:
    attention: Attention
    ffn: FeedForward
    residual: Residual = PlainResidual()


@dataclass(frozen=True)
class ModelSpec:
    """A whole decoder. `context` is the longest sequence the model was made for, in tokens."""

    family: str
    vocab: int
    hidden: int
    layers: tuple[LayerSpec, ...]
    context: int
    norm_eps: float
    tied: bool = False
    """The embedding serves as output head too."""

    def tensors(self) -> dict[str, Tensor]:
        """Every weight by canonical name: embed, layers.L.attention.q, layers.L.ffn.experts.E.gate, norm, head."""
        table = {"embed": Tensor((self.vocab, self.hidden), "embedding")}
        norm = Tensor((self.hidden,), "norms", "array")
        for i, layer in enumerate(self.layers):
            parts = {
                "attention_norm": {"": norm},
                "attention.": layer.attention.tensors(self.hidden),
                "attention_residual.": layer.residual.tensors(self.hidden),
                "ffn_norm": {"": norm},
                "ffn.": layer.ffn.tensors(self.hidden),
                "ffn_residual.": layer.residual.tensors(self.hidden),
            }
            for part, tensors in parts.items():
                table |= _prefixed(f"layers.{i}.{part}", tensors)
        table |= _prefixed("head_residual.", self.layers[-1].residual.head_tensors(self.hidden))
        table["norm"] = norm
        if not self.tied:
            table["head"] = Tensor((self.vocab, self.hidden), "head")
        return table

    @property
    def routed_experts(self) -> int:
        """How many there are in all layers together."""
        return sum(layer.ffn.experts for layer in self.layers if isinstance(layer.ffn, MixtureOfExperts))

    def active(self, name: str, tensor: Tensor) -> int:
        """How many parameters of a tensor one token's computation touches.

        Of the routed experts a token touches K of E, counted as the first K; of the embedding one row.
        """
        if name == "embed":
            return tensor.size if self.tied else self.hidden
        if name.endswith("router_table"):
            return 0
        if tensor.role == "experts":
            ffn = self.layers[int(name.split(".")[1])].ffn
            assert isinstance(ffn, MixtureOfExperts)
            return tensor.size if int(name.split(".")[4]) < ffn.top_k else 0
        return tensor.size


def _prefixed(prefix: str, table: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in table.items()}


# -------------------------------------------------------------------------------------------- family


@dataclass(frozen=True)
class Source:
    """Where a checkpoint keeps a tensor: a name with {layer} and {expert} filled in.

    `stacked`: the experts of a layer are one tensor, this expert its slice along the first axis.
    `fused`: the stored tensor holds the rows of these tensors one after another, itself among them; their canonical
    names differ from its own in the last word.
    """

    name: str
    stacked: bool = False
    fused: tuple[str, ...] = ()


Names = Mapping[str, tuple[Source, ...]]
"""Canonical name with {layer}/{expert} -> the places it may be stored at, tried in order."""


@dataclass(frozen=True)
class Family:
    """A model family: a pure function from config.json to a ModelSpec, and its tensors' names.

    `defaults`: what keys that a config.json leaves out stand for, as in transformers.
    `ignored`: regular expressions of stored tensors that the decoder does not need (drafting heads, tables
    that are recomputed). Any other tensor without a place in the spec is refused when loading.
    """

    reader: Callable[[Config], ModelSpec]
    names: Names
    defaults: Mapping[str, Any]
    ignored: tuple[str, ...] = ()

    def spec(
        self, values: Mapping[str, Any], where: str = "config.json", spelt: Callable[[str], str] = str
    ) -> ModelSpec:
        """What a config.json describes.

        Args:
            where, spelt: what errors call the file and a key.

        Raises:
            InputError: a key is missing, of a wrong type, or says what is not computed.
        """
        from numoe.engine.config import Config  # which makes parts of a spec

        return self.reader(Config(values, self.defaults, where, spelt))

    def sources(self, canonical: str) -> Iterator[tuple[Source, int | None]]:
        """The places where a tensor may be, names filled in, with the expert's index if it is one's."""
        parts = canonical.split(".")
        layer = expert = None
        for i in range(len(parts) - 1):
            if parts[i] == "layers":
                layer, parts[i + 1] = int(parts[i + 1]), "{layer}"
            elif parts[i] == "experts":
                expert, parts[i + 1] = int(parts[i + 1]), "{expert}"
        for source in self.names[".".join(parts)]:
            yield replace(source, name=source.name.format(layer=layer, expert=expert)), expert
