"""Whole models in llama.cpp and transformers, with the face of our sessions, and a random mixture of experts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from numoe.engine.layers.ops import Floats


class LlamaCpp:
    """A GGUF file in llama-cpp-python: model and session in one, as `numoe.engine.measure.perplexity` uses them.

    every: whether logits are wanted after every token, as `feed` without `last` gives them.
    """

    def __init__(self, path: Path, context: int, threads: int, every: bool = False) -> None:
        import llama_cpp

        self._logits = llama_cpp.llama_get_logits_ith
        self._llama = llama_cpp.Llama(
            str(path),
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=0,
            logits_all=every,
            verbose=False,
        )
        self.spec = SimpleNamespace(vocab=self._llama.n_vocab(), context=context)

    def session(self, context: int) -> LlamaCpp:
        return self

    @property
    def position(self) -> int:
        return self._llama.n_tokens

    def rewind(self, count: int) -> None:
        self._llama.n_tokens -= count  # the next tokens are written over the cache from there

    def feed(self, token_ids: Sequence[int], *, last: bool = False) -> Floats:
        start = self.position
        self._llama.eval(token_ids)
        if not last:
            return self._llama.scores[start : self.position].copy()
        pointer = self._logits(self._llama.ctx, -1)
        return np.ctypeslib.as_array(pointer, (1, self.spec.vocab)).copy()


class LlamaCppTogether:
    """A GGUF file in llama-cpp-python with several sequences, of which every pass decodes a token each."""

    def __init__(self, path: Path, context: int, threads: int, sequences: int) -> None:
        import llama_cpp as api

        self._api = api
        model = api.llama_model_default_params()
        model.n_gpu_layers = 0
        options = api.llama_context_default_params()
        options.n_ctx = context * sequences
        options.n_seq_max = sequences
        options.n_threads = options.n_threads_batch = threads
        self._model = api.llama_model_load_from_file(str(path).encode(), model)
        self._context = api.llama_init_from_model(self._model, options)
        self._batch = api.llama_batch_init(sequences, 0, 1)
        self._sequences = sequences
        self._position = 0

    def feed(self, token_ids: Sequence[int]) -> None:
        """A token of each sequence."""
        batch = self._batch
        batch.n_tokens = self._sequences
        for i, token in enumerate(token_ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, self._position, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, i
        if self._api.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp did not decode the batch")
        self._api.llama_get_logits_ith(self._context, self._sequences - 1)
        self._position += 1


@dataclass(frozen=True)
class Shape:
    """A Qwen3-MoE model; by default of OLMoE's sizes."""

    layers: int = 16
    hidden: int = 2048
    heads: int = 16
    head_dim: int = 128
    experts: int = 64
    top_k: int = 8
    width: int = 1024
    vocab: int = 50304
    context: int = 4096


EPS, THETA = 1e-5, 10000.0


class Transformers:
    """A model of this shape in bf16 on torch, with random weights, and the fastest way that transformers has for it.

    Every second layer has the same tensors, which takes an eighth of the memory: since the experts of one layer are
    many times larger than any cache, they are read from memory for every token all the same.
    """

    def __init__(self, shape: Shape, threads: int) -> None:
        import torch
        from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

        config = Qwen3MoeConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            head_dim=shape.head_dim,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            moe_intermediate_size=shape.width,
            norm_topk_prob=True,
            max_position_embeddings=shape.context,
            rms_norm_eps=EPS,
            tie_word_embeddings=False,
        )
        torch.set_num_threads(threads)
        self._torch = torch
        normal = torch.randn((1 << 22) + 1).bfloat16()
        with torch.device("meta"):
            model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
        made: dict[str, Any] = {}
        for name, parameter in list(model.named_parameters()):
            key = ".".join(str(int(part) % 2) if part.isdigit() else part for part in name.split("."))
            if key not in made:
                size = parameter.numel()
                values = normal.repeat(-(-size // len(normal)))[:size].view(parameter.shape)
                made[key] = torch.ones_like(values) if "norm" in name else values * parameter.shape[-1] ** -0.5
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, torch.nn.Parameter(made[key], requires_grad=False))
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        self._model = model.eval()
        self._cache = DynamicCache(config=config)
        self.experts = min(("eager", "batched_mm", "grouped_mm"), key=self._seconds)
        self._model.set_experts_implementation(self.experts)

    def _seconds(self, experts: str) -> float:
        """The least that a token takes when experts are computed this way."""
        self._model.set_experts_implementation(experts)
        times = []
        for token in range(5):
            begun = time.perf_counter()
            self.feed([token], last=True)
            times.append(time.perf_counter() - begun)
        self.rewind(len(times))
        return min(times)

    @property
    def position(self) -> int:
        return self._cache.get_seq_length()

    def rewind(self, count: int) -> None:
        self._cache.crop(-count)

    def feed(self, token_ids: Sequence[int], *, last: bool = False) -> Floats:
        torch = self._torch
        with torch.inference_mode():
            ids = torch.tensor([token_ids])
            out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=int(last))
            return out.logits[0].float().numpy()


def write_gguf(path: Path, shape: Shape) -> None:
    """The model as a GGUF file with random Q4_0 weights, and Q6_K ones in the head, as llama.cpp quantizes to Q4_0.

    All layers have the same weights, each its own copy of them.
    """
    writer = GGUFWriter(path, "qwen3moe")
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.width)
    writer.add_expert_feed_forward_length(shape.width)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_rope_freq_base(THETA)
    writer.add_tokenizer_model("none")

    random = np.random.default_rng(0)

    def quantized(kind: GGMLQuantizationType, *size: int) -> np.ndarray:
        """Codes at random; scales make the standard deviation of weights 1 / sqrt(in)."""
        weights, nbytes = GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (*size[:-1], size[-1] // weights, nbytes), np.uint8)
        deviation = size[-1] ** -0.5
        if kind == GGMLQuantizationType.Q4_0:  # d, then codes 0..15 that stand for -8..7
            blocks[..., :2] = np.array([deviation / 4.6], np.float16).view(np.uint8)
        else:  # Q6_K: codes 0..63 that stand for -32..31, scales int8, d
            blocks[..., 192:208] = 16
            blocks[..., 208:] = np.array([deviation / 18.5 / 16], np.float16).view(np.uint8)
        return blocks.reshape(*size[:-1], -1)

    q4, q6, f32 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q6_K, GGMLQuantizationType.F32
    heads = shape.heads * shape.head_dim
    layer = {
        "attn_norm": (f32, np.ones(shape.hidden, np.float32)),
        "attn_q": (q4, quantized(q4, heads, shape.hidden)),
        "attn_k": (q4, quantized(q4, heads, shape.hidden)),
        "attn_v": (q4, quantized(q4, heads, shape.hidden)),
        "attn_output": (q4, quantized(q4, shape.hidden, heads)),
        "attn_q_norm": (f32, np.ones(shape.head_dim, np.float32)),
        "attn_k_norm": (f32, np.ones(shape.head_dim, np.float32)),
        "ffn_norm": (f32, np.ones(shape.hidden, np.float32)),
        "ffn_gate_inp": (f32, random.standard_normal((shape.experts, shape.hidden), np.float32)),
        "ffn_gate_exps": (q4, quantized(q4, shape.experts, shape.width, shape.hidden)),
        "ffn_up_exps": (q4, quantized(q4, shape.experts, shape.width, shape.hidden)),
        "ffn_down_exps": (q4, quantized(q4, shape.experts, shape.hidden, shape.width)),
    }
    writer.add_tensor("token_embd.weight", quantized(q4, shape.vocab, shape.hidden), raw_dtype=q4)
    for index in range(shape.layers):
        for name, (kind, values) in layer.items():
            writer.add_tensor(f"blk.{index}.{name}.weight", values, raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(shape.hidden, np.float32))
    writer.add_tensor("output.weight", quantized(q6, shape.vocab, shape.hidden), raw_dtype=q6)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
