"""What rounding costs: KL divergence of our int8 and int4 and of llama.cpp's formats from the unrounded model.

    pip install llama-cpp-python
    python tests/bench/quality.py FOLDER [--smollm2 FILE] [--threads N] [--only smollm2 | tiny]

The base of SmolLM2 are the weights of its Q4_1 file in float32. The text is 80 sequences of 256 tokens that the base
itself has sampled, at temperature 1 and from a fixed seed; int4 is calibrated on 20 others. llama.cpp quantizes its own
float32 file, and what it makes is read by our engine, which changes none of its values: all rows are computed alike,
with float32 activations. The ids and llama.cpp's files (1.5 GB) are kept in FOLDER and found there the next time; the
base's logits take 4 GB of memory.

The base's weights lie on 16 levels a group of 32. int8 with a minimum a group holds such levels nearly exactly and
int4 in groups of 32 would hold them all; groups of 64, which our int4 has, and llama.cpp's other formats do not.

llama.cpp cannot run `tiny`, a DeepSeek-V4: ggml rounds the same matrices that we do, and they are put back (Q5_0 is
what Q4_K_M makes of rows that 256 does not divide). The text was held out from training: three quarters are scored,
the last one calibrates.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from peer_ggml import ggml
from peers import ROOT, SMOLLM2, TEXT
from safetensors.numpy import save_file

from numoe.engine import Model, describe, load
from numoe.engine.description import Description
from numoe.engine.layers.ops import Floats
from numoe.engine.measure.calibrate import Calibration, calibrate
from numoe.engine.measure.perplexity import perplexity
from numoe.quant.compute.threads import usable_cores
from numoe.quant.convert.convert import Folder, convert
from numoe.quant.convert.jobs import Matrix
from numoe.quant.convert.recipe import target
from numoe.quant.dtypes import E2M1_MAX, E4M3_MAX, decode_e4m3, encode_e4m3
from numoe.quant.formats.nf4 import NF4_VALUES
from numoe.quant.formats.pack import Moments, pack_fp8, pack_mxfp4

SEQUENCES, CALIBRATION, LENGTH = 80, 20, 256
PUBLISHED = {
    "FP8, blocks of 128x128": lambda weights: pack_fp8(weights, (128, 128), True).dequantize(),
    "FP8, a scale a row": lambda weights: pack_fp8(weights, (1, weights.shape[1]), True).dequantize(),
    "FP8, a scale a tensor": lambda weights: pack_fp8(weights, weights.shape, True).dequantize(),
    "int8, a scale a row": lambda weights: integers(weights, 8, weights.shape[1], symmetric=True),
    "NVFP4": lambda weights: nvfp4(weights),
    "MXFP4": lambda weights: pack_mxfp4(weights).dequantize(),
    "NF4 in blocks of 64": lambda weights: nf4(weights),
    "int4 g32, symmetric (Kimi)": lambda weights: integers(weights, 4, 32, symmetric=True),
    "int4 g64, zero points (AWQ, GPTQ)": lambda weights: integers(weights, 4, 64),
    "int4 g192, zero points (AWQ, GPTQ)": lambda weights: integers(weights, 4, 192),
    "int3 g64, zero points": lambda weights: integers(weights, 3, 64),
    "int2 g32, zero points": lambda weights: integers(weights, 2, 32),
}
"""What others publish, rounded to the nearest: a format -> weights (out, in) to their values. 576 has no groups of
128. What AWQ, GPTQ and others do to err less is not in it."""
SIZES = {"FP8": 8, "int8": 8, "NVFP4": 4.5, "MXFP4": 4.25, "NF4": 4.13, "int4 g32": 4.5, "int4 g64": 4.5,
         "int4 g192": 4.17, "int3": 3.5, "int2": 3}  # fmt: skip
ROUNDED = ("attention", "compressor", "dense ffn", "shared experts", "experts")
"""The roles of the matrices that are rounded; their bits are the ones in the table."""


Rounding = Callable[[Matrix, Floats], Floats]
"""(a matrix, its weights (out, in)) -> its values after rounding."""


@dataclass(frozen=True)
class Row:
    weights: str
    bits: float
    kl: float
    top1: float

    def __str__(self) -> str:
        return f"| {self.weights} | {self.bits:.2f} | {self.kl:.6f} | {self.top1:.1%} |"


# ------------------------------------------------------------------------------------------------ the base


def write_base(source: Path, folder: Path) -> None:
    """A llama's GGUF file as a folder of float32 safetensors."""
    description = describe(source)
    config, checkpoint = description.config, description.checkpoint

    def weights(name: str) -> Floats:
        return description.places[name].stored.matrix().dequantize()

    def halves(name: str, heads: int) -> Floats:
        """A head's rows: GGUF has the two channels that are rotated together side by side, safetensors in halves."""
        rows = weights(name)
        return np.ascontiguousarray(rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2)).reshape(rows.shape)

    tensors = {
        "model.embed_tokens.weight": weights("embed"),
        "model.norm.weight": checkpoint["output_norm.weight"].array(),
    }
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
        for name in "qkvo":
            full = f"{ours}.attention.{name}"
            tensors[f"{theirs}.self_attn.{name}_proj.weight"] = (
                halves(full, heads[name]) if name in heads else weights(full)
            )
        for name in ("gate", "up", "down"):
            tensors[f"{theirs}.mlp.{name}_proj.weight"] = weights(f"{ours}.ffn.{name}")
        for name, norm in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            tensors[f"{theirs}.{norm}.weight"] = checkpoint[f"blk.{i}.{name}.weight"].array()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


def sample(model: Model, first: int, sequences: int, length: int) -> np.ndarray:
    """Ids (sequences, length + 1), sampled side by side after the token `first`."""
    random = np.random.default_rng(0)
    decoder = model.decoder
    caches = [decoder.cache(length) for _ in range(sequences)]
    ids = np.full((sequences, length + 1), first)
    for position in range(length):
        tokens = ids[:, position : position + 1]
        logits = decoder.forward_all(list(zip(tokens, caches, strict=True)))
        ids[:, position + 1] = (logits + random.gumbel(size=logits.shape)).argmax(axis=1)
        print(f"\rsampling {position + 1}/{length}", end="", flush=True)
    print()
    return ids


# ------------------------------------------------------------------------------------------------ the formats


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: object) -> None:
    """It tells of every matrix that gets another type."""


def quantized_by_llama_cpp(source: Path, made: Path, kind: str) -> Path:
    """A GGUF file in one of llama.cpp's mixtures of types."""
    if not made.exists():
        llama_cpp.llama_log_set(_silent, None)
        new = made.with_suffix(".new")
        wanted = llama_cpp.llama_model_quantize_default_params()
        wanted.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{kind}")
        wanted.allow_requantize = True
        if llama_cpp.llama_model_quantize(str(source).encode(), str(new).encode(), ctypes.byref(wanted)):
            raise SystemExit(f"llama.cpp did not write {new}")
        new.rename(made)
    return made


def quantized_by_ggml(weights: Floats, kind: GGMLQuantizationType) -> Floats:
    """The values (out, in) after rounding."""
    rows, columns = weights.shape
    block, nbytes = GGML_QUANT_SIZES[kind]
    codes = np.empty((rows, columns // block * nbytes), np.uint8)
    ggml.ggml_quantize_chunk(kind, weights.ctypes.data, codes.ctypes.data, 0, rows, columns, None)
    return dequantize(codes, kind).reshape(weights.shape)


def rounded(description: Description, inputs: Mapping[str, Moments] | None = None) -> list[Matrix]:
    """The matrices that a recipe rounds."""
    return [one for one in description.weights(inputs) if isinstance(one, Matrix) and one.role in ROUNDED]


def put_back(
    description: Description, folder: Path, rounding: Rounding, inputs: Mapping[str, Moments] | None = None
) -> Path:
    """The model in float32 with its matrices rounded, always written anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    checkpoint = description.checkpoint
    tensors = {name: checkpoint[name].array() for name in checkpoint.names()}
    for matrix in rounded(description, inputs):
        name = matrix.stored.name
        tensors[name] = rounding(matrix, tensors[name])
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(description.path / "config.json", folder)
    return folder


def quantized(description: Description, made: Path, quant: str, calibration: Calibration | None = None) -> Path:
    """A folder as `numoe quantize` writes it, always anew."""
    shutil.rmtree(made, ignore_errors=True)
    inputs, text = (None, None) if calibration is None else (calibration.inputs, calibration.text)
    origin = Folder(description.path, description.path.name)
    convert(description.checkpoint, description.weights(inputs), made, quant, origin, calibration=text)
    return made


def bits(description: Description) -> float:
    """What a weight takes in the file, of the matrices that are rounded."""
    stored = [matrix.stored for matrix in rounded(description)]
    return 8 * sum(one.nbytes for one in stored) / sum(math.prod(one.shape) for one in stored)


def int4_everywhere(description: Description, folder: Path, inputs: Mapping[str, Moments]) -> tuple[Path, float]:
    """The model with every matrix in int4, those too that the recipe gives more, and what a weight takes."""
    sizes = []

    def rounding(matrix: Matrix, weights: Floats) -> Floats:
        chosen = target("int4", "experts", weights.shape[1], 32)
        if chosen is None:
            raise SystemExit(f"no group divides the rows of {matrix.name}")
        sizes.append((weights.size, weights.size * chosen.format.bits_each))
        return chosen.pack(weights, matrix.inputs).dequantize()

    made = put_back(description, folder, rounding, inputs)
    weights, used = np.sum(sizes, axis=0)
    return made, float(used / weights)


def integers(weights: Floats, bits: int, group: int, symmetric: bool = False) -> Floats:
    """Rounded to the nearest of 2**bits levels a group, whose scales are float16."""
    groups = weights.reshape(len(weights), -1, group)
    top = np.float32(2**bits - 1)
    if symmetric:
        scales = np.abs(groups).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
        scales = np.maximum(scales.astype(np.float16).astype(np.float32), np.float32(1e-7))
        return (np.clip(np.rint(groups / scales), -(2 ** (bits - 1)), top // 2) * scales).reshape(weights.shape)
    low, high = np.minimum(groups.min(-1, keepdims=True), 0), np.maximum(groups.max(-1, keepdims=True), 0)
    scales = np.maximum(((high - low) / top).astype(np.float16).astype(np.float32), np.float32(1e-7))
    zero = np.rint(-low / scales)
    return ((np.clip(np.rint(groups / scales) + zero, 0, top) - zero) * scales).reshape(weights.shape)


def nvfp4(weights: Floats) -> Floats:
    """e2m1 in groups of 16 with e4m3 scales, and a float32 one for all."""
    groups = weights.reshape(len(weights), -1, 16)
    whole = np.abs(weights).max() / np.float32(E4M3_MAX * E2M1_MAX)
    scales = decode_e4m3(encode_e4m3(np.abs(groups).max(-1, keepdims=True) / np.float32(E2M1_MAX) / whole)) * whole
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    nearest = sizes[np.searchsorted((sizes[1:] + sizes[:-1]) / 2, np.abs(groups) * inverse)]
    return (np.copysign(nearest, groups) * scales).reshape(weights.shape)


def nf4(weights: Floats) -> Floats:
    """The nearest of sixteen values between -1 and 1, times the largest of a block of 64."""
    groups = weights.reshape(-1, 64)
    scales = np.maximum(np.abs(groups).max(-1, keepdims=True), np.float32(1e-12))
    middles = (NF4_VALUES[1:] + NF4_VALUES[:-1]) / 2
    return (NF4_VALUES[np.searchsorted(middles, groups / scales)] * scales).reshape(weights.shape)


# ------------------------------------------------------------------------------------------------ the tables


class Remembered:
    """A model and its session in one, as `perplexity` uses them, that computes the logits of a text once."""

    def __init__(self, model: Model) -> None:
        self.spec = model.spec
        self.position = 0
        self._session = model.session(LENGTH + 1)
        self._known: dict[bytes, Floats] = {}

    def session(self, context: int) -> Remembered:
        return self

    def rewind(self, count: int) -> None:
        self.position = 0

    def feed(self, token_ids: Sequence[int]) -> Floats:
        key = np.asarray(token_ids).tobytes()
        if key not in self._known:
            self._session.rewind(self._session.position)
            self._known[key] = self._session.feed(token_ids)
        self.position = len(token_ids)
        return self._known[key]


def compare(model: Model, base: Any, texts: Sequence[Sequence[int]], window: int) -> tuple[float, float]:
    """Mean KL divergence and top-1 agreement over all texts, each after its first token."""
    results = [perplexity(model, text, window=window, against=base) for text in texts]
    shares = np.array([result.tokens for result in results], np.float64)
    figures = np.array([(result.kl_mean, result.top1_agreement) for result in results])
    kl, top1 = shares @ figures / shares.sum()
    return float(kl), float(top1)


def smollm2(source: Path, folder: Path, threads: int, sequences: int = SEQUENCES) -> Iterator[Row]:
    if not (folder / "base").exists():
        write_base(source, folder / "part")
        (folder / "part").rename(folder / "base")
    description = describe(folder / "base")
    base = load(description, threads=threads)
    sampled = folder / "sampled.npy"
    if not sampled.exists():
        first = describe(source).tokenizer.bos_id
        np.save(sampled, sample(load(description), 0 if first is None else first, SEQUENCES + CALIBRATION, LENGTH))
    ids = np.load(sampled)
    texts, rest = ids[:sequences].tolist(), ids[SEQUENCES:, :LENGTH].ravel().tolist()

    reference = Remembered(base)

    def row(name: str, made: Path, size: float) -> Row:
        return Row(name, size, *compare(load(made), reference, texts, LENGTH + 1))

    original = quantized_by_llama_cpp(source, folder / "base.gguf", "ALL_F32")
    for kind in ("Q8_0", "Q4_0", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K"):
        made = quantized_by_llama_cpp(original, folder / f"{kind}.gguf", f"MOSTLY_{kind}")
        yield row(f"llama.cpp {kind}", made, bits(describe(made)))
    yield from ours(description, folder / "ours", calibrate(base, rest), row)
    for name, rounding in PUBLISHED.items():
        made = put_back(description, folder / "published", lambda _, weights, rounding=rounding: rounding(weights))
        yield row(name, made, next(size for start, size in SIZES.items() if name.startswith(start)))


def tiny(folder: Path, threads: int) -> Iterator[Row]:
    description = describe(ROOT / "tests/reference/tiny/master")
    base = load(description, threads=threads)
    ids = base.tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    scored = 3 * len(ids) // 4

    def row(name: str, made: Path, size: float) -> Row:
        return Row(name, size, *compare(load(made), base, [ids[:scored]], 512))

    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q5_0, GGMLQuantizationType.Q4_0):
        made = put_back(description, folder / "tiny", lambda _, weights, kind=kind: quantized_by_ggml(weights, kind))
        block, nbytes = GGML_QUANT_SIZES[kind]
        yield row(f"ggml {kind.name}", made, 8 * nbytes / block)
    yield from ours(description, folder / "tiny", calibrate(base, ids[scored:]), row)


def ours(
    description: Description, folder: Path, calibration: Calibration, row: Callable[[str, Path, float], Row]
) -> Iterator[Row]:
    for quant, by in (("int8", None), ("int4", None), ("int4", calibration)):
        made = quantized(description, folder, quant, by)
        yield row(quant if by is None else f"{quant}, calibrated", made, bits(describe(made)))
    for name, inputs in (("int4 everywhere", {}), ("int4 everywhere, calibrated", calibration.inputs)):
        yield row(name, *int4_everywhere(description, folder, inputs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--smollm2", type=Path, default=SMOLLM2)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="of SmolLM2's, how many are scored")
    parser.add_argument("--only", choices=("smollm2", "tiny"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "smollm2": lambda: smollm2(arguments.smollm2, arguments.folder, arguments.threads, arguments.sequences),
        "tiny": lambda: tiny(arguments.folder, arguments.threads),
    }
    for name, rows in tables.items():
        if arguments.only in (None, name):
            print(f"\n| {name} | bits a weight | mean KL | same best token |\n| --- | ---: | ---: | ---: |")
            for row in rows():
                print(row, flush=True)


if __name__ == "__main__":
    main()
