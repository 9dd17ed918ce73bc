"""What a token of DeepSeek-V4-Flash costs on this machine: some layers of its own dimensions, with random weights.

    pip install llama-cpp-python torch
    python tests/bench/flagship.py [--llama-cpp SOURCE] [--experts 64] [--rounds 5] [--only ram disk parts]

All three kinds of attention are there, one layer each, in the released form: FP4 experts, FP8 attention and shared
experts, hyper-connections. There are fewer experts than 256 a layer, of which a token takes six all the same.
SOURCE is vendor/llama.cpp of an unpacked sdist of llama-cpp-python: its converter makes the GGUF file that llama.cpp
runs, the experts' bits unchanged. Without it the rows about llama.cpp are left out.

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 && tar xzf llama_cpp_python-*.tar.gz

It takes some ten minutes; a layer takes 1 GB on disk (TMPDIR), and twice that of memory in the wide form.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from peers import ROOT, Row, in_turn, missing, ratios, reading, say, tokens, told

from numoe.engine import load
from numoe.engine.description import describe
from numoe.engine.layers import mixture, residual
from numoe.engine.layers.attention import compressed
from numoe.engine.measure.machine import calibrate, processor
from numoe.engine.measure.speeds import read_speed
from numoe.quant.compute.threads import usable_cores
from numoe.quant.convert.convert import Folder, convert
from numoe.quant.files import Files

CONFIG = ROOT / "tests/configs/deepseek-ai__DeepSeek-V4-Flash.json"
RATIOS = 0, 4, 128
"""Sliding, CSA and HCA attention."""
WHOLE_LAYERS = 43
VOCAB = 4096  # the whole model's embedding and head take a hundredth of its time
CONTEXT = 2048

FP8_BLOCK, FP4_GROUP = 128, 32
_FP8_RMS, _FP4_RMS = 109.6, 2.93  # root mean square of all finite codes


def write_checkpoint(folder: Path, experts: int) -> Path:
    """The layers as a released folder: config.json and one safetensors file; returns the folder."""
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    config |= {
        "num_hidden_layers": len(RATIOS),
        "compress_ratios": list(RATIOS),
        "n_routed_experts": experts,
        "num_hash_layers": 0,
        "num_nextn_predict_layers": 0,
        "vocab_size": VOCAB,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    makers: list[Callable[[], bytes]] = []
    end = 0
    for name, dtype, shape, make in _tensors(config):
        nbytes = math.prod(shape) * {"F32": 4, "BF16": 2}.get(dtype, 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        makers.append(make)
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for make in makers:
            file.write(make())
    return folder


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, str, list[int], Callable[[], bytes]]]:
    """(name, dtype, shape, what makes its bytes) of every tensor."""
    random = np.random.default_rng(0)
    hidden, width, heads, dim = (
        config[key] for key in ("hidden_size", "moe_intermediate_size", "num_attention_heads", "head_dim")
    )
    rank, groups, streams = config["q_lora_rank"], config["o_groups"], config["hc_mult"]
    index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]

    def values(scale: float, *shape: int, kind: str = "F32") -> tuple[str, list[int], Callable[[], bytes]]:
        def make() -> bytes:
            x = random.standard_normal(shape, np.float32) * np.float32(scale)
            return (x.view(np.uint32) >> 16).astype(np.uint16).tobytes() if kind == "BF16" else x.tobytes()

        return kind, list(shape), make

    def ones(*shape: int) -> tuple[str, list[int], Callable[[], bytes]]:
        return "BF16", list(shape), lambda: np.full(shape, 0x3F80, np.uint16).tobytes()

    def bf16(*shape: int) -> tuple[str, list[int], Callable[[], bytes]]:
        return values(shape[-1] ** -0.5, *shape, kind="BF16")

    def quantized(name: str, dtype: str, rows: int, columns: int) -> Iterator[tuple[str, str, list[int], Any]]:
        """Codes at random, with scales that make the standard deviation of weights 1 / sqrt(in)."""
        fp8 = dtype == "F8_E4M3"
        exponent = round(math.log2(columns**-0.5 / (_FP8_RMS if fp8 else _FP4_RMS)))
        blocks = [-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)] if fp8 else [rows, columns // FP4_GROUP]

        def codes() -> bytes:
            if not fp8:
                return random.bytes(rows * columns // 2)
            # As quantizers fill the range: the largest of a block of normal weights is 448.
            weights = random.standard_normal((rows, columns), np.float32) * np.float32(104)
            bits = np.minimum(np.abs(weights), 448).view(np.uint32) + np.uint32(1 << 19)
            exponents = (bits >> 20).astype(np.int32) - (120 << 3)
            return (np.clip(exponents, 0, 126).astype(np.uint8) | (weights < 0).astype(np.uint8) << 7).tobytes()

        yield f"{name}.weight", dtype, [rows, columns if fp8 else columns // 2], codes
        yield f"{name}.scale", "F8_E8M0", blocks, lambda: bytes([127 + exponent]) * math.prod(blocks)

    yield "embed.weight", *values(1.0, VOCAB, hidden, kind="BF16")
    for layer, ratio in enumerate(config["compress_ratios"]):
        at = f"layers.{layer}"
        for block in ("attn", "ffn"):
            yield f"{at}.hc_{block}_fn", *values((streams * hidden) ** -0.5, (2 + streams) * streams, streams * hidden)
            yield f"{at}.hc_{block}_base", *values(0.1, (2 + streams) * streams)
            yield f"{at}.hc_{block}_scale", *values(0.1, 3)
            yield f"{at}.{block}_norm.weight", *ones(hidden)
        yield f"{at}.attn.attn_sink", *values(1.0, heads)
        for name, rows, columns in (
            ("wq_a", rank, hidden),
            ("wq_b", heads * dim, rank),
            ("wkv", dim, hidden),
            ("wo_a", groups * config["o_lora_rank"], heads * dim // groups),
            ("wo_b", hidden, groups * config["o_lora_rank"]),
        ):
            yield from quantized(f"{at}.attn.{name}", "F8_E4M3", rows, columns)
        yield f"{at}.attn.q_norm.weight", *ones(rank)
        yield f"{at}.attn.kv_norm.weight", *ones(dim)
        compressors = [("attn.compressor", dim)] if ratio else []
        if ratio == 4:
            compressors.append(("attn.indexer.compressor", index_dim))
            yield from quantized(f"{at}.attn.indexer.wq_b", "F8_E4M3", index_heads * index_dim, rank)
            yield f"{at}.attn.indexer.weights_proj.weight", *bf16(index_heads, hidden)
        for name, size in compressors:
            both = size * (2 if ratio == 4 else 1)
            yield f"{at}.{name}.ape", *values(0.3, ratio, both)
            yield f"{at}.{name}.wkv.weight", *bf16(both, hidden)
            yield f"{at}.{name}.wgate.weight", *bf16(both, hidden)
            yield f"{at}.{name}.norm.weight", *ones(size)
        yield f"{at}.ffn.gate.weight", *bf16(config["n_routed_experts"], hidden)
        yield f"{at}.ffn.gate.bias", *values(0.1, config["n_routed_experts"])
        for part, rows, columns in (("w1", width, hidden), ("w2", hidden, width), ("w3", width, hidden)):
            for expert in range(config["n_routed_experts"]):
                yield from quantized(f"{at}.ffn.experts.{expert}.{part}", "I8", rows, columns)
            yield from quantized(f"{at}.ffn.shared_experts.{part}", "F8_E4M3", rows, columns)
    yield "norm.weight", *ones(hidden)
    yield "head.weight", *bf16(VOCAB, hidden)
    yield "hc_head_fn", *values((streams * hidden) ** -0.5, streams, streams * hidden)
    yield "hc_head_base", *values(0.1, streams)
    yield "hc_head_scale", *values(0.1, 1)


def converted(source: Path, llama_cpp: Path) -> Path:
    """The folder as a GGUF file beside it, by llama.cpp's converter."""
    out = source.parent / "flagship.gguf"
    converter = ROOT / "tests/reference/gguf_agreement.py"
    command = [sys.executable, converter, llama_cpp.resolve(), "--outtype", "q8_0", "--convert", source, out]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return out


def decode(session: Any, ids: Iterator[int], count: int) -> float:
    """Tokens a second, one after the other."""
    begun = time.perf_counter()
    for _ in range(count):
        session.feed([next(ids)], last=True)
    return count / (time.perf_counter() - begun)


def ids_without_end() -> Iterator[int]:
    random = np.random.default_rng(1)
    while True:
        yield int(random.integers(VOCAB))


def in_memory(folder: Path, gguf: Path | None, threads: int, rounds: int) -> Iterator[Row]:
    """Prompts and single tokens with all weights in memory; what `numoe fit` forecasts of them."""
    say("flagship: measuring the machine")
    machine = calibrate(anew=True)
    say("flagship: loading")
    model = load(folder, threads=threads, ctx=CONTEXT)
    sessions: dict[str, Any] = {"ours": model.session(CONTEXT)}
    if gguf:
        from peer_models import LlamaCpp

        say("flagship: loading with llama.cpp")
        sessions["llama.cpp"] = LlamaCpp(gguf, CONTEXT, threads)
    prompt, ids = tokens(512, VOCAB), ids_without_end()
    say("flagship: prefill")
    read = in_turn(rounds, {name: partial(reading, one, prompt) for name, one in sessions.items()})
    say("flagship: decode")
    made = in_turn(2 * rounds, {name: partial(decode, one, ids, 3) for name, one in sessions.items()})
    figures = told(made, "tok/s")
    token = len(RATIOS) / WHOLE_LAYERS * median(made["ours"])
    form = "wide" if model.wide_bytes else "as stored"
    if gguf:
        yield Row("prefill of 512 against llama.cpp", ratios(read, "ours", "llama.cpp"), told(read, "tok/s"), 1.0, 1.4)
        yield Row(f"decode ({form}) against llama.cpp", ratios(made, "ours", "llama.cpp"), figures, 0.25, 0.4)
    low, high = replace(machine, runs=()).decode(model.plan(CONTEXT), 1.0, bool(model.wide_bytes))
    expected = f"forecast {low:.3g} to {high:.3g}; {figures}"
    yield Row(
        f"decode ({form}) against the middle of the forecast", [median(made["ours"]) / math.sqrt(low * high)], expected
    )
    yield Row(f"decode ({form}), tokens a second of {WHOLE_LAYERS} such layers", [token], figures)


def from_disk(folder: Path, threads: int, rounds: int) -> Iterator[Row]:
    """Single tokens within a third of the memory, and what takes as long: reading alone, or computing alone.

    Of the folder that `numoe pull` would make of the release, whose experts lie as they are read.
    """
    say("flagship: from disk")
    released, folder = describe(folder), folder.with_name("own")
    convert(released.checkpoint, released.weights(), folder, "native", Folder(released.path, "flagship"))
    plan = describe(folder).plan(CONTEXT)
    whole = load(folder, threads=threads, ctx=CONTEXT, ram=plan.beside_experts + plan.expert_bytes)
    third = load(folder, threads=threads, ctx=CONTEXT, ram=plan.beside_experts + plan.expert_bytes // 3)
    path, random = folder / "model.safetensors", ids_without_end()
    sessions = {"whole": whole.session(CONTEXT), "third": third.session(CONTEXT)}
    for session in sessions.values():
        session.feed(tokens(64, VOCAB), last=True)
    taken = []
    for turn in range(3 * rounds):
        Files().drop_cached(path, 0, path.stat().st_size)
        ids = [next(random) for _ in range(5)]  # the same for both, which so take the same experts
        seconds: dict[str, float] = {}
        needed = 0
        for name in sorted(sessions, reverse=turn % 2 == 1):
            decode(sessions[name], iter(ids), 1)  # the processor's caches hold the other's weights
            before = needed_bytes(third, plan.largest_expert)
            seconds[name] = 1 / decode(sessions[name], iter(ids[1:]), 4)
            needed += needed_bytes(third, plan.largest_expert) - before
        reading = needed / 4 / reading_speed(path, plan.largest_expert)
        taken.append((seconds["third"], reading, seconds["whole"]))
    bound = [token / max(read, compute) for token, read, compute in taken]
    token, read, compute = (median(column) * 1000 for column in zip(*taken, strict=True))
    stats = third.stats()["experts"]
    guessed = stats["ahead_used"] / max(1, stats["ahead_fetched"])
    figures = f"{token:.0f} ms a token, reading {read:.0f}, computing {compute:.0f}; {guessed:.0%} of guesses right"
    yield Row(
        "a third in memory: time against the longer of the two (lower is better)", bound, figures, 1.15, 1.08, True
    )


def needed_bytes(model: Any, largest_expert: int) -> int:
    """Bytes of experts that were read so far, without those that were guessed in vain."""
    stats = model.stats()["experts"]
    bytes_read: int = stats["bytes_read"] - (stats["ahead_fetched"] - stats["ahead_used"]) * largest_expert
    return bytes_read


def reading_speed(path: Path, nbytes: int) -> float:
    """Bytes a second of reads of so many bytes at random places."""
    files, size = Files(), path.stat().st_size
    files.drop_cached(path, 0, size)
    return read_speed(files, path, np.random.default_rng().integers(0, size - nbytes, 64).tolist(), nbytes)


@contextmanager
def watched(owner: Any, name: str, key: Callable[..., str], spent: dict[str, float]) -> Iterator[None]:
    """Adds the seconds of every call of owner.name to spent[key(arguments)], less what is watched inside of it."""
    function = getattr(owner, name)

    def timed(*arguments: Any, **named: Any) -> Any:
        inner, begun = sum(spent.values()), time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            elapsed = time.perf_counter() - begun
            spent[key(*arguments)] += elapsed - (sum(spent.values()) - inner)

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, function)


def parts(folder: Path, rounds: int) -> Iterator[Row]:
    """Where the time of a single token goes, on one thread."""
    say("flagship: parts of a token")
    model = load(folder, threads=1, ctx=CONTEXT)
    session, ids = model.session(CONTEXT), ids_without_end()
    session.feed(tokens(512, VOCAB), last=True)
    spent: dict[str, float] = defaultdict(float)

    def of_product(products: Any) -> str:
        return f"products of {products[0][0].format}"

    with ExitStack() as stack:
        for owner, name, part in (
            (residual.Hyper, "enter", "hyper-connections"),
            (residual.Hyper, "leave", "hyper-connections"),
            (compressed.Compressed, "__call__", "attention beside its products"),
            (mixture.Mixture, "__call__", "mixture beside its products"),
        ):
            stack.enter_context(watched(owner, name, lambda *_, part=part: part, spent))
        for name, module in list(sys.modules.items()):
            if name.startswith("numoe.") and hasattr(module, "matmul_all"):
                stack.enter_context(watched(module, "matmul_all", of_product, spent))
        decode(session, ids, 2)
        spent.clear()
        begun = time.perf_counter()
        decode(session, ids, 4 * rounds)
        whole = time.perf_counter() - begun
    spent["all else"] = whole - sum(spent.values())
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        yield Row(f"share of a token: {name}", [seconds / whole], f"{seconds / (4 * rounds) * 1000:.1f} ms")


SECTIONS = ("ram", "disk", "parts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, metavar="SOURCE")
    parser.add_argument("--experts", type=int, default=64, help="a layer")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION")
    given = parser.parse_args()
    print(f"{processor()}, {given.threads} threads, {len(RATIOS)} layers of {given.experts} experts\n")
    print("| | ratio | must | push for | reached | medians |\n| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as temporary:
        say("flagship: writing the layers")
        folder = write_checkpoint(Path(temporary, "flagship"), given.experts)
        gguf = None
        if "ram" in given.only and given.llama_cpp and not missing("llama_cpp") and not missing("torch"):
            say("flagship: converting for llama.cpp")
            gguf = converted(folder, given.llama_cpp)
        sections = {
            "ram": partial(in_memory, folder, gguf, given.threads, given.rounds),
            "disk": partial(from_disk, folder, given.threads, given.rounds),
            "parts": partial(parts, folder, given.rounds),
        }
        for name in given.only:
            for row in sections[name]():
                print(row, flush=True)


if __name__ == "__main__":
    main()
