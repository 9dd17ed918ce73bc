"""From logits to the next token: penalties, filters, the draw, log-probabilities and stop strings.

The order is fixed: bias, penalties, temperature, top-k, top-p, min-p. Candidates are sorted by logit, highest
first, equal logits by id; every filter then keeps a prefix of that order, so all of them together are one length.
"""

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute.memory import scratch
from numoe.quant.errors import InputError, WrongUsage

_FIRST_SORTED = 128  # candidates sorted at first; most draws and top-p cuts fall among them
_ROUGH = 2e-5  # how far, of it, `_rough` may be from the sum of all weights; some 5e-6 is the most that it can be


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `WrongUsage` names a value that is out of range.

    temperature: 0 is greedy (the highest logit, the lowest id among equals); otherwise logits are divided by it.
    top_k: keep the k highest logits; 0 keeps all (Fan et al., 2018).
    top_p: keep the fewest tokens whose probabilities reach top_p together (Holtzman et al., 2020).
    min_p: keep tokens at least min_p times as probable as the best one (Nguyen et al., 2024).
    repetition_penalty: logits of the last `repeat_last_n` tokens are divided by it when positive and multiplied
        when not (Keskar et al., 2019); 1 is off.
    presence_penalty, frequency_penalty: what is taken from the logits of tokens that the answer has already, once for
        each token, and as often as it occurs there (as OpenAI's API defines them); 0 is off.
    seed: the same seed and logits give the same tokens on every machine; None draws one from the system.
    logit_bias: pairs of a token id and what is added to its logit; before all else.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= self.temperature <= 1e6, "between 0 (greedy) and 1e6")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (1 is off)")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 (off) and 1")
        penalty = self.repetition_penalty
        # Further out, logits would leave the range of float32.
        _check("repetition_penalty", penalty, 1e-3 <= penalty <= 1e3, "between 0.001 and 1000 (1 is off)")
        _check("repeat_last_n", self.repeat_last_n, self.repeat_last_n >= 0, "0 (off) or more")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(name, value, -2 <= value <= 2, "between -2 and 2 (0 is off)")
        if self.seed is not None:
            _check("seed", self.seed, 0 <= self.seed < 2**63, "between 0 and 2**63 - 1")
        for _, bias in self.logit_bias:
            _check("logit_bias", bias, -100 <= bias <= 100, "between -100 and 100")

    def require_tokens(self, vocab: int) -> None:
        """Raises InputError for `logit_bias` of a token that is none of so many."""
        for token_id, _ in self.logit_bias:
            if not 0 <= token_id < vocab:
                raise InputError(f"logit_bias names the token {token_id}, and this model's go from 0 to {vocab - 1}")


def _check(name: str, value: float, valid: bool, wanted: str) -> None:
    if not valid:
        raise WrongUsage(f"`{name}` is {value}; give a value {wanted}")


class Sampler:
    """Chooses one token after another under one `Sampling`. `seed` is the one in use, drawn if none was given."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self._bits = np.random.PCG64(self.seed)

    def choose(self, logits: NDArray[np.float32], recent_ids: Sequence[int] = (), made: int = 0) -> int:
        """The next token id from logits (V,) float32, which are not changed.

        recent_ids: the tokens so far, oldest first (prompt included), for the repetition penalty; the last `made` of
            them are the answer's own, for the other two.
        Raises InputError when the logits are not finite at their maximum (NaN weights, for one).
        """
        chosen = self.sampling
        logits = _repeated(_biased(logits, chosen.logit_bias), recent_ids, chosen)
        logits = _made(logits, recent_ids[len(recent_ids) - made :], chosen)
        best = float(logits.max())
        if not math.isfinite(best):
            raise InputError(
                "The model's logits are not finite numbers; its weights may be damaged, so fetch its files again."
            )
        if chosen.temperature == 0:
            return int(logits.argmax())
        limit = min(chosen.top_k or logits.size, logits.size)
        uniform = (self._bits.random_raw() >> 11) * 2.0**-53  # in [0, 1)
        count = limit if chosen.top_k else min(limit, _FIRST_SORTED)
        masses = None if count == limit else _rough(logits, best, chosen.temperature)
        while True:
            order = _descending(logits, count)  # (count,)
            weights = _weights(logits[order], best, chosen.temperature)
            cumulative = weights.cumsum()
            places = {_place(weights, cumulative, mass, limit, uniform, chosen) for mass in masses or cumulative[-1:]}
            if len(places) > 1:  # the sum itself decides
                masses = (_total(logits, best, chosen.temperature),)
                continue
            place = places.pop()
            if place < count:
                return int(order[place])
            count = min(limit, count * 8)


def _place(
    weights: NDArray[np.float64],
    cumulative: NDArray[np.float64],
    mass: float,
    limit: int,
    uniform: float,
    sampling: Sampling,
) -> int:
    """The place of the token that a draw means, among candidates that are sorted.

    weights, cumulative: (N,) of the highest, of which there are `limit` in all; mass: the sum of the weights of all.
    The place is N where the draw or a filter's cut lies behind these, or only is not known not to.
    """
    count, kept = len(weights), limit
    if sampling.top_p < 1:
        kept = min(kept, int(np.searchsorted(cumulative, sampling.top_p * mass)) + 1)
    if sampling.min_p > 0:
        kept = min(kept, int(np.count_nonzero(weights >= sampling.min_p)))
    if kept <= count:
        mass = cumulative[kept - 1]
    place = int(np.searchsorted(cumulative[:kept], uniform * mass, side="right"))
    filtered = sampling.top_p < 1 or sampling.min_p > 0
    sure = count == limit or (kept < count if filtered else place < count)
    return min(place, kept - 1) if sure else count


def _biased(logits: NDArray[np.float32], bias: Sequence[tuple[int, float]]) -> NDArray[np.float32]:
    if not bias:
        return logits
    logits = logits.copy()
    for token_id, added in bias:
        logits[token_id] += np.float32(added)
    return logits


def _repeated(logits: NDArray[np.float32], recent_ids: Sequence[int], sampling: Sampling) -> NDArray[np.float32]:
    if sampling.repetition_penalty == 1 or sampling.repeat_last_n == 0 or len(recent_ids) == 0:
        return logits
    recent = np.unique(np.asarray(recent_ids[-sampling.repeat_last_n :], dtype=np.int64))
    penalty = np.float32(sampling.repetition_penalty)
    values = logits[recent]
    logits = logits.copy()
    logits[recent] = np.where(values > 0, values / penalty, values * penalty)
    return logits


def _made(logits: NDArray[np.float32], made: Sequence[int], sampling: Sampling) -> NDArray[np.float32]:
    """Logits less the penalties of the tokens that an answer has."""
    if not (sampling.presence_penalty or sampling.frequency_penalty) or len(made) == 0:
        return logits
    ids, counts = np.unique(np.asarray(made, dtype=np.int64), return_counts=True)
    logits = logits.copy()
    logits[ids] -= (sampling.presence_penalty + sampling.frequency_penalty * counts).astype(np.float32)
    return logits


def _weights(logits: NDArray[np.float32], best: float, temperature: float) -> NDArray[np.float64]:
    """exp((logits - best) / temperature), of which the best one is exactly 1; scratch that the next call overwrites.

    float64, for then the rounding of a sum over the vocabulary is far below any probability that a draw notices.
    """
    weights = scratch("weights", logits.shape, np.float64)
    np.copyto(weights, logits)
    weights -= best
    if temperature != 1:
        with np.errstate(over="ignore"):  # to -inf, which means a weight of nothing
            weights /= temperature
    return _exp(weights)


def _rough(logits: NDArray[np.float32], best: float, temperature: float) -> tuple[float, ...]:
    """Two numbers that the sum of all weights is between, or itself where float32 does not tell.

    A tenth of the time that the sum takes, and nearly every draw means the same token by both.
    """
    weights = scratch("rough weights", logits.shape, np.float32)
    with np.errstate(all="ignore"):
        np.subtract(logits, np.float32(best), out=weights)
        if temperature != 1:
            weights /= np.float32(temperature)
        np.exp(weights, out=weights)
        total = float(weights.sum())
    if not math.isfinite(total):  # of a temperature that is 0 in float32
        return (_total(logits, best, temperature),)
    return total * (1 - _ROUGH), total * (1 + _ROUGH)


def _total(logits: NDArray[np.float32], best: float, temperature: float) -> float:
    """The sum of all weights. Blocks of them stay in the processor's cache, and are added by halves: in an order that
    is the same on every machine."""
    total = 0.0
    for start in range(0, logits.size, _BLOCK):
        sums = _weights(logits[start : start + _BLOCK], best, temperature)
        while sums.size > 1:
            half = sums.size // 2
            sums[:half] += sums[-half:]
            sums = sums[: sums.size - half]
        total += float(sums[0])
    return total


def _descending(logits: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Ids of the `count` highest logits, highest first, equal logits by id."""
    ids = None
    if count < logits.size:
        # So many logits at least reach what as many columns of a table of them do: the few that do are looked at.
        rows = min(_ROWS, logits.size // (count + 1))
        columns = logits.size // rows
        highest = logits[: columns * rows].reshape(rows, columns).max(axis=0)
        ids = np.flatnonzero(logits >= np.partition(highest, columns - count)[columns - count])
    keys = np.subtract(np.float32(0), logits if ids is None else logits[ids]).view(np.int32)
    keys ^= (keys >> 31) & 0x7FFFFFFF  # in the order of the numbers
    both = keys.astype(np.int64) << 32  # distinct numbers, which NumPy sorts in a third of the time
    both |= np.arange(logits.size) if ids is None else ids
    both.sort()
    return (both & 0xFFFFFFFF)[:count]


_BLOCK, _ROWS = 1 << 13, 16
_LN2 = math.log(2)
_BITS = 12
_STEPS = 1 << _BITS  # from 1 to 2
_TERMS = [1 / math.factorial(n) for n in range(20, -1, -1)]
_POWERS = reduce(lambda sums, term: sums * (np.arange(_STEPS) * (_LN2 / _STEPS)) + term, _TERMS, np.zeros(_STEPS))
_POWER_BITS = _POWERS.view(np.int64)  # of 2^(n / _STEPS)


def _exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp(x) for x <= 0, in its place: exp(n ln 2 / 4096 + r) = 2^(n / 4096) (1 + r + r^2 / 2), to 1e-12 of it.

    Only operations that IEEE 754 rounds exactly: the library's exp differs in the last bit between machines.
    """
    steps = scratch("steps of powers", x.shape, np.float64)
    bits, power = (scratch(use, x.shape, np.int64) for use in ("bits of powers", "powers"))
    np.maximum(x, -700.0, out=x)
    np.multiply(x, _STEPS / _LN2, out=steps)
    np.rint(steps, out=steps)
    np.copyto(bits, steps, casting="unsafe")
    steps *= _LN2 / _STEPS
    x -= steps  # r, at most ln(2) / 8192
    np.multiply(x, 0.5, out=steps)
    steps += 1.0
    x *= steps
    x += 1.0
    np.bitwise_and(bits, _STEPS - 1, out=power)
    bits >>= _BITS
    bits <<= 52  # where a float64 has its exponent
    _POWER_BITS.take(power, out=power, mode="clip")
    bits += power
    x *= bits.view(np.float64)
    return x


def logprobs(logits: NDArray[np.float32], k: int) -> list[tuple[int, float]]:
    """The k most probable tokens of logits (V,) as (id, natural log of the probability), best first.

    The model's own distribution: temperature, penalties and filters play no part.
    """
    order = _descending(logits, min(k, logits.size)) if k > 0 else np.empty(0, np.intp)
    normalizer = _log_sum_exp(logits)
    return [(int(i), float(logits[i]) - normalizer) for i in order]


def logprob(logits: NDArray[np.float32], token_id: int) -> float:
    """The natural log of one token's probability in the distribution that `logprobs` lists."""
    return float(logits[token_id]) - _log_sum_exp(logits)


def _log_sum_exp(logits: NDArray[np.float32]) -> float:
    best = float(logits.max())
    return best + math.log(_total(logits, best, 1.0))


def partial_match(text: str, strings: Iterable[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `strings`."""
    longest = 0
    for string in strings:
        begins = text.find(string[:1], max(0, len(text) - len(string) + 1))
        while 0 <= begins < len(text) - longest:
            if string.startswith(text[begins:]):
                longest = len(text) - begins
            begins = text.find(string[:1], begins + 1)
    return longest


class StopMatcher:
    """Passes streamed text on up to the first stop string, whichever way the text is cut into pieces.

    First is the one that is complete first; of two complete at once, the longer. Text that may be the beginning
    of a stop string is held back until it is decided. An empty stop string raises WrongUsage.
    stopped: whether one was found; found: which.
    """

    def __init__(self, stop_strings: Sequence[str] = ()) -> None:
        if "" in stop_strings:
            raise WrongUsage("a stop string is empty; give at least one character or leave it out")
        self._stops = tuple(stop_strings)
        self._held = ""
        self.stopped = False
        self.found = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """(text that can be shown now, whether a stop string ended the text). After a stop nothing more comes."""
        if self.stopped:
            return "", True
        text = self._held + piece
        starts = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            _, start, self.found = min(starts)
            self.stopped, self._held = True, ""
            return text[:start], True
        cut = len(text) - partial_match(text, self._stops)
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """What is still held back, once the stream has ended."""
        text, self._held = self._held, ""
        return text
