"""What a whole model is, as data: layers of blocks, and what comes before and after them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from numoe.engine.layers.block import Block, Kind, Layer
from numoe.engine.layers.norm import Norm
from numoe.engine.layers.residual import PlainResidual, Residual
from numoe.engine.layers.tensor import Tensor, prefixed


def decoder_layer(attention: Kind, ffn: Kind) -> Layer:
    """The layer that most decoders have: norm, attention, join, norm, feed-forward, join."""
    return Block("attention", attention), Block("ffn", ffn)


@dataclass(frozen=True)
class ModelSpec:
    """A whole decoder. `context` is the longest sequence the model was made for, in tokens."""

    family: str
    vocab: int
    hidden: int
    layers: tuple[Layer, ...]
    context: int
    norm_eps: float
    tied: bool = False
    """The embedding serves as output head too."""
    residual: Residual = PlainResidual()
    head_bias: bool = False
    norm: Norm | None = Norm()
    """The last one, before the head."""
    embedding_scale: float = 1.0
    """Embeddings are multiplied with it before the first layer."""
    logit_scale: float = 1.0
    """And logits, after the head."""
    logit_cap: float | None = None
    """Bounds logits, after that: cap tanh(logit / cap)."""

    def blocks(self) -> Iterator[Block]:
        """Those of all layers, in the order in which they compute."""
        for blocks in self.layers:
            yield from blocks

    def parts(self) -> Iterator[tuple[str, Kind]]:
        """What blocks of all layers are made of: attentions and feed-forwards, also where those are parallel."""
        for block in self.blocks():
            yield from block.kind.parts(block.name)

    def layer_tensors(self, number: int) -> dict[str, Tensor]:
        """The weights of one layer by their canonical names, layers.L.attention.q for one."""
        table: dict[str, Tensor] = {}
        for block in self.layers[number]:
            table |= block.tensors(self.hidden)
            table |= prefixed(f"{block.name}_residual.", (block.join or self.residual).tensors(self.hidden))
        return prefixed(f"layers.{number}.", table)

    def listing(self) -> Iterator[tuple[int | None, str, Tensor]]:
        """Every weight with its layer's number and its canonical name: embed, layers.L.attention.q,
        layers.L.ffn.experts.E.gate, norm, head."""
        shape = self.vocab, self.hidden
        # An embedding is only looked up, a row a token, where it is not the head too.
        looked_up = Tensor(shape, "embedding", "rows", touched=self.hidden)
        yield None, "embed", Tensor(shape, "embedding") if self.tied else looked_up
        for number in range(len(self.layers)):
            for name, tensor in self.layer_tensors(number).items():
                yield number, name, tensor
        ends = prefixed("head_residual.", self.residual.head_tensors(self.hidden))
        if self.norm:
            ends |= prefixed("norm", self.norm.tensors(self.hidden))
        if not self.tied:
            ends["head"] = Tensor(shape, "head")
        if self.head_bias:
            ends["head_bias"] = Tensor((self.vocab,), "head", "array")
        for name, tensor in ends.items():
            yield None, name, tensor

    def tensors(self) -> dict[str, Tensor]:
        """The same by canonical name."""
        return {name: tensor for _, name, tensor in self.listing()}

    @property
    def routed(self) -> dict[int, tuple[int, int]]:
        """Of each layer that has routed experts, by its number: how many, and how many of them a token takes."""
        kinds = ((number, block.kind) for number, blocks in enumerate(self.layers) for block in blocks)
        return {number: kind.routed for number, kind in kinds if kind.routed[0]}

    @property
    def routed_experts(self) -> int:
        """How many there are in all layers together."""
        return sum(experts for experts, _ in self.routed.values())
