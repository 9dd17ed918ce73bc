"""How fast a model reads and writes on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from numoe.engine.sample import Sampler, Sampling
from numoe.quant.errors import InputError
from numoe.quant.threads import in_use

if TYPE_CHECKING:
    from numoe.engine.load import Model


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
    for flag, count in [("--prompt-tokens", prompt_tokens), ("-n", decode_tokens), ("--repetitions", repetitions)]:
        if count < 1:
            raise InputError(f"{flag} must be at least 1, not {count}")
    context = prompt_tokens + decode_tokens
    if context > model.spec.context:
        raise InputError(
            f"{prompt_tokens} tokens of prompt and {decode_tokens} to decode do not fit into this model's context of "
            f"{model.spec.context}; lower --prompt-tokens or -n"
        )
    # Raw words of PCG64 are the same in every NumPy.
    words = np.random.PCG64(0).random_raw(repetitions * context) % np.uint64(model.spec.vocab)
    session = model.session(context)
    sampler = Sampler(Sampling())
    prefill, first, decode = [], [], []
    for done, ids in enumerate(words.reshape(repetitions, context).tolist(), 1):
        session.rewind(session.position)
        begun = time.perf_counter()
        logits = session.feed(ids[:prompt_tokens], last=True)
        read = time.perf_counter()
        sampler.choose(logits[0])
        chosen = time.perf_counter()
        for token in ids[prompt_tokens:]:
            sampler.choose(session.feed([token], last=True)[0])
        decode.append(time.perf_counter() - chosen)
        prefill.append(read - begun)
        first.append(chosen - begun)
        if progress:
            progress(done, repetitions)
    stats = model.stats()
    return {
        "threads": in_use(),
        "prefill": {"tokens": prompt_tokens, "tokens_per_s": prompt_tokens / median(prefill)},
        "decode": {"tokens": decode_tokens, "tokens_per_s": decode_tokens / median(decode)},
        "load_s": load_seconds,
        "first_token_s": median(first),
        "peak_rss_bytes": stats["peak_rss_bytes"],
        "experts": stats["experts"],
    }
