"""Rotary position embedding: angles of a span of positions, and the rotation of channel pairs."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log, pi
from typing import NamedTuple

import numpy as np

from numoe.engine.layers.ops import Floats, Ids


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): slow channels are interpolated by `factor`, fast ones are left alone."""

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    """Multiplies cos and sin."""
    truncate: bool = True


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths are divided by `factor`, middle ones blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class LinearScaling:
    """Every position is divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class DividedFrequencies:
    """Every pair's frequency is divided by a number of its own (GGUF's `rope_freqs`)."""

    divisors: tuple[float, ...]
    attention_factor: float = 1.0
    """Multiplies cos and sin."""


@dataclass(frozen=True)
class Temperature:
    """What queries are multiplied with: 1 + c log(1 + floor((position + ahead) / n)) (arXiv 2501.19399; Llama 4).

    every: n. strength: c. Ministral 3 counts positions from 0, Llama 4 from 1.
    """

    every: int
    strength: float
    ahead: int = 1

    def of(self, positions: Floats | Ids) -> Floats:
        """Of each position, float32."""
        turns = np.floor((positions + self.ahead) / np.float32(self.every))
        return (1 + self.strength * np.log1p(turns)).astype(np.float32)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of `dim` channels of a head: the last ones, or with `first` the first ones.

    `interleaved` rotates neighbours (0,1), (2,3), ...; otherwise channel i is paired with i + dim/2.
    """

    dim: int
    theta: float
    interleaved: bool = False
    scaling: Yarn | Llama3Scaling | LinearScaling | DividedFrequencies | None = None
    first: bool = False


def frequencies(rope: Rope) -> Floats:
    """Angle per position of each channel pair, (dim/2,) float32: theta^(-2i/dim), scaled as the spec says.

    The float32 steps follow transformers' modeling_rope_utils.py, so that the digits agree at long positions.
    """
    dim, theta = rope.dim, rope.theta
    wavelengths = np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    base = np.float32(1) / wavelengths
    match rope.scaling:
        case None:
            return base
        case LinearScaling(factor):
            return base / np.float32(factor)
        case DividedFrequencies(divisors, _):
            return np.divide(base, np.fromiter(divisors, np.float32), dtype=np.float32)
        case Llama3Scaling(factor, low, high, context):
            turns = context * base / np.float32(2 * pi)  # full turns within the original context
            if high == low:  # as in Llama 4 Scout, without a blend between
                return np.where(turns < low, base / np.float32(factor), base)
            smooth = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
            return (1 - smooth) * base / np.float32(factor) + smooth * base
        case Yarn() as yarn:

            def channel(rotations: float) -> float:
                """The (fractional) pair that turns this often within the original context."""
                return dim * log(yarn.original_context / (rotations * 2 * pi)) / (2 * log(theta))

            low, high = channel(yarn.beta_fast), channel(yarn.beta_slow)
            if yarn.truncate:
                low, high = floor(low), ceil(high)
            low, high = max(low, 0), min(high, dim - 1)
            if low == high:
                high += 0.001
            ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
            slow = np.float32(1) / (np.float32(yarn.factor) * wavelengths)
            return slow * ramp + base * (1 - ramp)


class Angles(NamedTuple):
    """Of some positions: cos of each channel's angle (T, 1, dim), and sin and -sin of each pair's (T, 1, dim/2)."""

    cos: Floats
    sin: Floats
    less: Floats

    def inverse(self) -> Angles:
        """Those that turn back."""
        return Angles(self.cos, self.less, self.sin)


class Rotation:
    """Rotates pairs of channels by position. One object serves all layers of equal `Rope`."""

    def __init__(self, rope: Rope):
        self.rope = rope
        self._frequencies = frequencies(rope)
        scaling = rope.scaling
        self._factor = np.float32(scaling.attention_factor if isinstance(scaling, Yarn | DividedFrequencies) else 1)

    def angles(self, positions: Floats) -> Angles:
        """Of positions (T,)."""
        angle = positions[:, None, None] * self._frequencies  # (T, 1, dim/2)
        cos, sin = np.cos(angle) * self._factor, np.sin(angle) * self._factor
        both = np.repeat(cos, 2, axis=-1) if self.rope.interleaved else np.concatenate([cos, cos], axis=-1)
        return Angles(both, sin, -sin)

    def apply(self, x: Floats, angles: Angles) -> Floats:
        """Rotate `dim` channels of x (T, H, C) in place, row t by angle t."""
        part = x[..., : self.rope.dim] if self.rope.first else x[..., x.shape[-1] - self.rope.dim :]  # (T, H, dim)
        # Pairs (a, b) -> (a cos - b sin, b cos + a sin).
        turned = np.empty(part.shape, np.float32)
        (a, b), (from_b, from_a) = self._pairs(part), self._pairs(turned)
        np.multiply(b, angles.less, out=from_b)
        np.multiply(a, angles.sin, out=from_a)
        part *= angles.cos
        part += turned
        return x

    def _pairs(self, x: Floats) -> tuple[Floats, Floats]:
        """First and second channels of each pair."""
        if self.rope.interleaved:
            return x[..., 0::2], x[..., 1::2]
        half = self.rope.dim // 2
        return x[..., :half], x[..., half:]
