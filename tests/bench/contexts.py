"""What a token costs behind long contexts, and the memory that it takes: caches are filled with rows, not read.

    python tests/bench/contexts.py [MODEL] [--kv int8] [--contexts 1024,32768,262144] [--tokens 8] [--outside | --read]

MODEL is a folder; without it a V4-shaped one of random weights is written, with V4-Flash's heads in four layers. Prints
for each context: the planned bytes of the cache and those that the process took for it, milliseconds a token, and the
peak of what passes allocated meanwhile (NumPy's own, by tracemalloc). With --outside each context is a process's, of
which another one reads what it takes before passes of one token and of 512 and at most meanwhile (on Linux).

With --read a prompt of as many tokens as the longest context is read, in a process of which another one looks at the
time it computes and the memory it takes whenever one of the contexts is reached. A model that was made for fewer tokens
reads them all the same.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from numoe.engine import Model, describe, load
from numoe.engine.layers.cache import Cache
from numoe.engine.layers.state import CHUNK, KeptRows
from numoe.engine.plan import kv_bytes

TESTS = Path(__file__).parents[1]
ROWS = 32
"""Of noise that are written at once: few, for what the allocator keeps of them is measured too."""


def v4_shaped(folder: Path) -> Path:
    """Four layers with V4-Flash's heads and ratios, of little else."""
    sys.path.insert(0, str(TESTS))
    from helpers import write_safetensors

    config = json.loads((TESTS / "configs" / "deepseek-ai__DeepSeek-V4-Flash.json").read_text())
    config.pop("quantization_config", None)
    config |= {
        "num_hidden_layers": 4, "compress_ratios": [0, 4, 128, 4, 0], "hidden_size": 256, "n_routed_experts": 8,
        "moe_intermediate_size": 64, "num_hash_layers": 1, "vocab_size": 512, "num_experts_per_tok": 2,
        "num_nextn_predict_layers": 0,
    }  # fmt: skip
    from numoe.engine.families import family

    kind = family("deepseek_v4")
    random = np.random.default_rng(0)
    raw = {}
    for layer, name, tensor in kind.spec(config).listing():
        if tensor.below is not None:
            raw[next(kind.sources(name, layer)).name] = (
                "I64", tensor.shape, random.integers(0, tensor.below, tensor.shape).astype("<i8").tobytes()
            )  # fmt: skip
            continue
        values = random.standard_normal(tensor.shape, np.float32) * np.float32(tensor.shape[-1] ** -0.5)
        raw[next(kind.sources(name, layer, tensor.expert)).name] = ("F32", tensor.shape, values.tobytes())
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", raw)
    return folder


def fill(cache: Cache, position: int) -> None:
    """Rows of noise, as if so many tokens had been read."""
    cache.prepare(position)
    random = np.random.default_rng(0)
    for block in cache.blocks:
        for state in block.values():
            if isinstance(state, KeptRows):
                for plane in state._planes:
                    plane[:] = 0  # prompts in chunks write to all of it
                end, spec = position // state.spec.stride, state.spec
                noise = random.standard_normal((spec.groups, ROWS, spec.width), np.float32)
                for start in range(0 if spec.keep is None else max(0, end - spec.keep), end, ROWS):
                    state.write(noise[:, : min(ROWS, end - start)], start)


def measure(model: Model, context: int, tokens: int) -> tuple[int, int, float, int]:
    """Planned and taken bytes of the cache, seconds a token, and the peak of what passes allocate."""
    process = psutil.Process()
    before = process.memory_info().rss
    cache = model.decoder.cache(context)
    fill(cache, context - 2 * tokens - 1)
    taken = process.memory_info().rss - before
    times = []
    model.decoder.forward(np.array([1]), cache, last=True)
    for _ in range(tokens):
        begun = time.perf_counter()
        model.decoder.forward(np.array([1]), cache, last=True)
        times.append(time.perf_counter() - begun)
    tracemalloc.start()
    for _ in range(tokens):
        model.decoder.forward(np.array([1]), cache, last=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return kv_bytes(model.spec, context, model.decoder.form), taken, median(times), peak


def behind(model: Model, context: int, tokens: int) -> None:
    """In a process of its own: passes behind a context, between two lines that say so."""
    cache = model.decoder.cache(context)
    fill(cache, context - CHUNK - tokens)
    print("filled", flush=True)
    input()
    model.decoder.forward(np.arange(CHUNK) % model.spec.vocab, cache, last=True)
    for _ in range(tokens):
        model.decoder.forward(np.array([1]), cache, last=True)
    print("passed", flush=True)
    sys.stdin.read()


def read(model: Model, context: int) -> None:
    """In a process of its own: a prompt as long as the context, a line for each pass."""
    ids = np.random.default_rng(0).integers(0, model.spec.vocab, context).tolist()
    print("loaded", flush=True)
    with model.session(context) as session:
        session.feed(ids, last=True, progress=lambda done, _: print(done, flush=True))


def reading_from_outside(path: Path, kv: str, contexts: list[int]) -> None:
    """Print what tokens between contexts took, of the computing of all of a process, and what it takes by then."""
    command = [sys.executable, __file__, str(path), "--kv", kv, "--contexts", str(contexts[-1]), "--reading"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        reader = psutil.Process(process.pid)

        def computed() -> float:
            """Seconds, those of workers included."""
            return sum(sum(one.cpu_times()[:2]) for one in (reader, *reader.children()))

        ends, start, before = list(contexts), 0, 0.0
        for line in process.stdout:
            if line == "loaded\n":
                before, begun = computed(), time.perf_counter()
            elif int(line) >= ends[0]:
                done, now, clock = int(line), computed(), time.perf_counter()
                each, waited = ((b - a) / (done - start) for a, b in ((before, now), (begun, clock)))
                print(
                    f"{kv}, tokens {start:>9,} to {done:>9,}: {1e3 * each:7.2f} ms of computing a token, "
                    f"{1e3 * waited:7.2f} by the clock; the process takes {reader.memory_info().rss / 1e6:7.1f} MB",
                    flush=True,
                )
                start, before, begun = done, now, clock
                ends.pop(0)
                if not ends:
                    break
    if ends:
        raise SystemExit("the process that was to read has ended")


def able(path: Path, context: int, folder: Path) -> Path:
    """The model itself, or a copy whose config says that it was made for so many tokens."""
    config = json.loads((path / "config.json").read_text())
    if config["max_position_embeddings"] >= context:
        return path
    shutil.copytree(path, folder)
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    return folder


def scratch_from_outside(path: Path, kv: str, context: int, tokens: int) -> int:
    """By how much passes behind a context raise what a process takes."""
    options = ("--kv", kv, "--contexts", str(context), "--tokens", str(tokens), "--behind")
    command = [sys.executable, __file__, str(path), *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        if process.stdout.readline() != "filled\n":
            raise SystemExit("the process that was to be measured has ended")
        before = psutil.Process(process.pid).memory_info().rss
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # its peak begins here
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1]) - before  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--kv", default="int8")
    parser.add_argument("--contexts", default="1024,4096,32768,262144")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--outside", action="store_true")
    parser.add_argument("--read", action="store_true")
    parser.add_argument("--behind", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--reading", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reading:
        context = int(options.contexts)
        read(load(describe(options.model), kv=options.kv, ctx=context), context)
        return
    if options.behind:
        described, context = describe(options.model), int(options.contexts)
        behind(load(described, kv=options.kv, ctx=min(context, described.spec.context)), context, options.tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = describe(options.model).path if options.model else v4_shaped(Path(folder) / "v4")
        contexts = [int(context) for context in options.contexts.split(",")]
        if options.read:
            reading_from_outside(able(path, contexts[-1], Path(folder) / "able"), options.kv, contexts)
            return
        if options.outside:
            for context in contexts:
                scratch = scratch_from_outside(path, options.kv, context, options.tokens)
                print(f"{options.kv}, {context:>8,} tokens: passes take {scratch / 1e6:6.1f} MB", flush=True)
            return
        described = describe(path)
        model = load(described, kv=options.kv, ctx=min(max(contexts), described.spec.context))
        for context in contexts:
            planned, taken, seconds, peak = measure(model, context, options.tokens)
            print(
                f"{options.kv}, {context:>8,} tokens: cache planned {planned / 1e6:8.1f} MB, taken {taken / 1e6:8.1f} "
                f"({taken / planned - 1:+.1%}), {1e3 * seconds:7.1f} ms a token, passes allocate {peak / 1e6:6.1f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
