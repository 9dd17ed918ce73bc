"""How well a model predicts a text, and how far its predictions are from another model's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from numoe.engine.layers.ops import Floats
from numoe.engine.layers.state import CHUNK
from numoe.quant.errors import InputError, WrongUsage

if TYPE_CHECKING:
    from numoe.engine.model import Model
    from numoe.engine.session import Session

DEFAULT_WINDOW = 2048
BLOCK_ELEMENTS = 1 << 18
"""Float64 log-probabilities alive at a time (2 MiB an array), unless one row is longer."""
LARGEST_NLL = 700.0
"""exp of more overflows; no intact model comes near, since even a uniform one has ln(vocab), about 12."""


@dataclass(frozen=True)
class Result:
    """What `perplexity` found; means are over the scored tokens, logarithms are natural."""

    nll: float
    """Mean negative log-likelihood: -mean(log P(token | tokens before))."""
    tokens: int
    """Tokens scored: all of the text, or all but the first where no BOS stands before it."""
    window: int
    stride: int
    seconds: float
    kl_mean: float | None
    """Mean of KL(reference || model) = sum(P_ref (log P_ref - log P)); None without a reference."""
    top1_agreement: float | None
    """Share of positions, 0 to 1, where both models find the same token likeliest; None without a reference."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)


def perplexity(
    model: Model,
    token_ids: Sequence[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    bos: int | None = None,
    against: Model | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Score every token of a text once, in windows that overlap.

    Each window is read from an empty session, so that a token never sees more than the `window - 1` before it; those
    that an earlier window has scored are context only. So every token has at least `window - stride` before it,
    except in the first window.

    Args:
        token_ids: the text, without a BOS.
        window: tokens that are read at once, the BOS included; None: 2048, or the context limit if lower.
        stride: tokens from one window to the next, 1 to window - 1; None: half a window.
        bos: the token to put before every window, for models that expect one; None: none.
        against: the reference for `kl_mean` and `top1_agreement`; it reads the same tokens.
        progress: `progress(done, total)`, in scored tokens, is called as the scoring goes on.

    Raises:
        InputError: window, stride or text out of range, a reference with another vocabulary, an id outside it, or
            logits that are not finite.
    """
    models = [model] if against is None else [model, against]
    ids = _ids(models, token_ids)
    window, stride = _sizes(models, window, stride)
    prefix = np.array([] if bos is None else [bos], np.int64)
    first = 1 - len(prefix)  # the first token that has something before it
    total = len(ids) - first
    if total < 1:
        raise InputError("the text is too short: there is no token to predict; give a longer one")

    begun = time.perf_counter()
    sessions = [m.session(min(window, len(prefix) + len(ids))) for m in models]
    sums = np.zeros(3)
    done = 0
    for start, scored, stop in windows(len(ids), first, window - len(prefix), stride):
        read = np.concatenate([prefix, ids[start:stop]])
        for count, part in _scores(sessions, read, len(prefix) + scored - start):
            sums += part
            done += count
            if progress:
                progress(done, total)
    nll, kl, agreed = (sums / total).tolist()
    if not (nll < LARGEST_NLL and math.isfinite(kl)):
        raise InputError("the model's logits are not finite numbers; its weights may be damaged, download them again")
    seconds = time.perf_counter() - begun
    compared = (None, None) if against is None else (kl, agreed)
    return Result(nll, total, window, stride, seconds, *compared)


def _scores(
    sessions: Sequence[Session], read: NDArray[np.int64], first: int
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Score the tokens of a window from its `first` on: how many, and what `_score` gives for them, part by part."""
    at = first - 1  # the logits after this one predict the first token to score
    for session in sessions:
        session.rewind(session.position)
        if at:
            session.feed(read[:at].tolist(), last=True)
    while at < len(read) - 1:
        end = min(at + CHUNK, len(read) - 1)
        yield end - at, _score([session.feed(read[at:end].tolist()) for session in sessions], read[at + 1 : end + 1])
        at = end


def windows(count: int, first: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, scored, stop) of each window: it reads tokens start..stop of `count` and scores scored..stop.

    first: the first token that can be scored. length: tokens in a window.
    """
    for start in range(0, count, stride):
        stop = min(start + length, count)
        yield start, first, stop
        if stop == count:
            return
        first = stop


def _ids(models: Sequence[Model], token_ids: Sequence[int]) -> NDArray[np.int64]:
    """The tokens of a text (T,). Raises InputError when they are not those of all models."""
    vocab, *others = (model.spec.vocab for model in models)
    for other in others:
        if other != vocab:
            raise InputError(
                f"the models have vocabularies of {vocab} and {other} tokens; "
                "`against` needs a model with the same vocabulary"
            )
    ids = np.asarray(token_ids, np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab):
        raise InputError(f"a token id is outside 0..{vocab - 1}; the tokens are not this model's")
    return ids


def _sizes(models: Sequence[Model], window: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride with their defaults. Raises InputError when they are out of range."""
    limit = min(model.spec.context for model in models)
    if window is None:
        window = min(limit, DEFAULT_WINDOW)
    if not 2 <= window <= limit:
        raise WrongUsage(f"`window` {window} is not possible; give 2 to {limit} tokens, the limit of the context")
    if stride is None:
        stride = window // 2
    if not 1 <= stride < window:
        raise WrongUsage(f"`stride` {stride} is not possible; a window of {window} tokens moves by 1 to {window - 1}")
    return window, stride


def _score(logits: Sequence[Floats], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums over T positions of (-log P(target), KL(reference || model), 1 where both likeliest tokens are the same).

    logits: the model's (T, vocab) and, if there is one, the reference's. targets: (T,) ids.
    """
    sums = np.zeros(3)
    count, vocab = logits[0].shape
    step = max(1, BLOCK_ELEMENTS // vocab)
    for a in range(0, count, step):
        b = min(a + step, count)
        tested = _log_softmax(logits[0][a:b])
        sums[0] -= tested[np.arange(b - a), targets[a:b]].sum()
        for other in logits[1:]:
            reference = _log_softmax(other[a:b])
            sums[2] += np.count_nonzero(reference.argmax(axis=1) == tested.argmax(axis=1))
            np.subtract(reference, tested, out=tested)
            sums[1] += np.vdot(np.exp(reference, out=reference), tested)
    return sums


def _log_softmax(logits: Floats) -> NDArray[np.float64]:
    """x - max - log(sum(exp(x - max))) of each row, (n, vocab).

    float64: KL divergences of nearly equal models are smaller than float32's rounding of a logarithm.
    """
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x
