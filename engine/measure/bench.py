"""How fast a model reads and writes on this machine, and how fast matrices are multiplied."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from itertools import cycle, islice
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from numoe.engine.layers.ops import Floats
from numoe.engine.text.sample import Sampler, Sampling
from numoe.quant.compute import workers
from numoe.quant.compute.activations import Activations
from numoe.quant.compute.kernels import FEW, cache_bytes
from numoe.quant.compute.threads import in_use, run, usable_cores, use
from numoe.quant.errors import InputError
from numoe.quant.formats.qtensor import QTensor, matmul_all
from numoe.quant.formats.resident import fastest, settled
from numoe.quant.formats.samples import BLOCK_KINDS, PACKS, blocks

if TYPE_CHECKING:
    from numoe.engine.model import Model
    from numoe.engine.session import Session

SHAPES = (1408, 2048), (2048, 4096)
"""(out, in) of experts' matrices in DeepSeek-V2-Lite and DeepSeek-V4-Flash."""
TOKENS = 1, 4, 512

_TOGETHER = 8  # matrices that few tokens are multiplied with at once, as with the experts that a token takes
_SECONDS = 0.03  # of a sample at least


def bench(
    model: Model,
    *,
    load_seconds: float,
    prompt_tokens: int = 512,
    decode_tokens: int = 32,
    repetitions: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Read a prompt and decode after it, several times; the figures are medians over the repetitions.

    The tokens are pseudo-random and always the same, those that are decoded too: what one model or format would say
    does not change the work. Every repetition reads others, so that none profits from the one before.

    Args:
        load_seconds: how long loading took; passed on into the result.
        progress: `progress(done, total)` is called after each repetition.

    Returns:
        {"threads", "prefill": {"tokens", "tokens_per_s"}, "decode": {"tokens", "tokens_per_s"}, "load_s",
        "first_token_s", "peak_rss_bytes", "experts"}. A decoded token is one choice and one pass through the layers;
        the first one takes the prompt's pass and a choice. The peak is that of the process since it started,
        and "experts" are the counts of `ExpertStore.stats` since the model was loaded.

    Raises:
        InputError: a count below 1, or more tokens than the model's context.
    """
    counts = {"prompt_tokens": prompt_tokens, "decode_tokens": decode_tokens, "repetitions": repetitions}
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"`{name}` must be at least 1, not {count}")
    context = prompt_tokens + decode_tokens
    if context > model.spec.context:
        raise InputError(
            f"{prompt_tokens} tokens of prompt and {decode_tokens} to decode do not fit into this model's context of "
            f"{model.spec.context}; lower `prompt_tokens` or `decode_tokens`"
        )
    # Raw words of PCG64 are the same in every NumPy.
    words = np.random.PCG64(0).random_raw(repetitions * context) % np.uint64(model.spec.vocab)
    session = model.session(context)
    seconds = []
    for done, ids in enumerate(words.reshape(repetitions, context).tolist(), 1):
        seconds.append(_seconds(session, ids[:prompt_tokens], ids[prompt_tokens:]))
        if progress:
            progress(done, repetitions)
    prefill, first, decode = map(median, zip(*seconds, strict=True))
    stats = model.stats()
    return {
        "threads": in_use(),
        "prefill": {"tokens": prompt_tokens, "tokens_per_s": prompt_tokens / prefill},
        "decode": {"tokens": decode_tokens, "tokens_per_s": decode_tokens / decode},
        "load_s": load_seconds,
        "first_token_s": first,
        "peak_rss_bytes": stats["peak_rss_bytes"],
        "experts": stats["experts"],
    }


def _seconds(session: Session, prompt: list[int], decoded: list[int]) -> tuple[float, float, float]:
    """What it takes to read a prompt, until the first token after it is chosen, and for the others that are decoded."""
    sampler = Sampler(Sampling())
    session.rewind(session.position)
    begun = time.perf_counter()
    logits = session.feed(prompt, last=True)
    read = time.perf_counter()
    sampler.choose(logits[0])
    chosen = time.perf_counter()
    for token in decoded:
        sampler.choose(session.feed([token], last=True)[0])
    return read - begun, chosen - begun, time.perf_counter() - chosen


def bench_kernels(
    *,
    threads: int | None = None,
    repetitions: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Multiply matrices of every format with 1, 4 and 512 tokens; the figures are medians over the repetitions.

    A repetition takes in turn what is compared: our products with one thread, plain NumPy's (`plain_products`), our
    products with all threads, and reading of memory without any computing.

    Args:
        threads: as many are compared with one, and are in use afterwards; None: one a core.
        progress: `progress(done, total)` is called after each format and shape.

    Returns:
        {"threads", "working_set_bytes", "read_bytes_per_s", "kernels"}, the last a list of {"format", "shape",
        "tokens", "weights_per_s", "bytes_per_s", "times_plain", "scaling", "of_read_speed"}. Speeds are those of all
        threads, and `scaling` is how many times one thread's they are; `times_plain` compares one thread with one. A
        product with several tokens counts its weights once; their bytes include scales.

    Raises:
        InputError: fewer than one repetition.
    """
    if repetitions < 1:
        raise InputError(f"`repetitions` must be at least 1, not {repetitions}")
    count = threads or usable_cores()
    nbytes = working_set_bytes()
    reading = _reads(np.ones(nbytes // 8, np.uint64), 4 * count)
    reads: list[float] = []
    rows: list[dict[str, Any]] = []
    kinds = [made for shape in SHAPES for made in _every(shape)]
    for done, make in enumerate(kinds, 1):
        stored = make()
        shape = stored.shape
        fast = fastest(stored)
        ours, plain = _products(stored, fast, nbytes)
        samples = []
        for _ in range(repetitions):
            samples.append(_turn(ours, plain, count))
            reads.append(per_second(reading))
        for tokens, alone, simple_rate, rate in zip(TOKENS, *np.median(samples, axis=0).tolist(), strict=True):
            rows.append(
                {
                    "format": str(stored.format),
                    "shape": list(shape),
                    "tokens": tokens,
                    "weights_per_s": rate,
                    "bytes_per_s": rate * fast.nbytes / (shape[0] * shape[1]),
                    "times_plain": alone / simple_rate,
                    "scaling": rate / alone,
                }
            )
        if progress:
            progress(done, len(kinds))
    read = median(reads)
    for row in rows:
        row["of_read_speed"] = row["bytes_per_s"] / read
    return {"threads": count, "working_set_bytes": nbytes, "read_bytes_per_s": read, "kernels": rows}


def _every(shape: tuple[int, int]) -> Iterator[Callable[[], QTensor]]:
    """What makes a matrix of each format."""
    for pack in PACKS:
        yield lambda pack=pack: pack(np.random.default_rng(0).standard_normal(shape, np.float32))  # type: ignore[misc]
    yield from (partial(blocks, kind, shape) for kind in BLOCK_KINDS)


def _products(stored: QTensor, fast: QTensor, nbytes: int) -> tuple[list[Iterator[int]], list[Iterator[int]]]:
    """Our products with the fast form and plain ones with the stored one, of each number of TOKENS."""
    known = copies(fast, nbytes)
    workers.know(known)
    turns, plain_turns = cycle(known), cycle(copies(stored, nbytes))
    columns = stored.shape[1]
    xs = [np.random.default_rng(1).standard_normal((tokens, columns), np.float32) for tokens in TOKENS]
    return [products(turns, x) for x in xs], [plain_products(plain_turns, x) for x in xs]


def _turn(ours: list[Iterator[int]], plain: list[Iterator[int]], threads: int) -> list[list[float]]:
    """Speeds of our products with one thread, of plain ones, and of ours with all threads, which stay in use."""
    use(1)
    one, simple = ([per_second(work) for work in works] for works in (ours, plain))
    use(threads)
    return [one, simple, [per_second(work) for work in ours]]


def working_set_bytes() -> int:
    """Twice the last-level cache; 64 MiB where the system does not tell its size (Linux does)."""
    return 2 * (cache_bytes() or 32 << 20)


def copies(matrix: QTensor, nbytes: int) -> list[QTensor]:
    """Copies of the matrix, at least two, that take `nbytes` or more, where a model's weights would lie."""
    return [settled(deepcopy(matrix)) for _ in range(max(2, -(-nbytes // matrix.nbytes)))]


def per_second(work: Iterator[int]) -> float:
    """How fast work goes that yields how much of it was done since it last did; it can go on from there afterwards."""
    done, begun = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < _SECONDS or not done:
        done += next(work)
    return done / elapsed


def products(matrices: Iterator[QTensor], x: Floats) -> Iterator[int]:
    """Multiply one matrix after the other with x (T, in), several at once for few tokens; yields counts of weights."""
    together = _TOGETHER if len(x) <= FEW else 1
    while True:
        batch = list(islice(matrices, together))
        activations = Activations(x)
        matmul_all([(matrix, activations, None) for matrix in batch])
        yield sum(matrix.shape[0] * matrix.shape[1] for matrix in batch)


def plain_products(matrices: Iterator[QTensor], x: Floats) -> Iterator[int]:
    """The same as anybody would write it: the whole matrix to float32, then NumPy's product, all on one thread."""
    for matrix in matrices:
        rows, columns = matrix.shape
        if matrix.format.kind == "f32":
            (weights,) = matrix.arrays().values()
        else:
            weights = np.empty((rows, columns), np.float32)
            matrix.dequantize_rows(0, rows, weights)
        np.matmul(x, weights.T)
        yield rows * columns


def _reads(memory: NDArray[np.uint64], parts: int) -> Iterator[int]:
    """Read all of it; yields counts of bytes."""
    tasks: list[Callable[[], Any]] = [partial(np.bitwise_or.reduce, part) for part in np.array_split(memory, parts)]
    while True:
        run(tasks)
        yield memory.nbytes
