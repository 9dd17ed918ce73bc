"""Rotary position embedding: angles of a span of positions, and the rotation of channel pairs."""

from __future__ import annotations

from math import ceil, floor, log, pi

import numpy as np

from numoe.engine.ops import Floats
from numoe.engine.spec import DividedFrequencies, LinearScaling, Llama3Scaling, Rope, Yarn


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
        case DividedFrequencies(divisors):
            return np.divide(base, np.fromiter(divisors, np.float32), dtype=np.float32)
        case Llama3Scaling(factor, low, high, context):
            turns = context * base / np.float32(2 * pi)  # full turns within the original context
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


SPANS = 4
"""Spans whose angles are remembered: the tokens of a pass, and the windows that compressed entries begin at."""


class Rotation:
    """Rotates pairs of channels by position. One object serves all layers of equal `Rope`, and computes the
    angles of a span of positions once for all of them."""

    def __init__(self, rope: Rope):
        self.rope = rope
        self._frequencies = frequencies(rope)
        self._factor = np.float32(rope.scaling.attention_factor if isinstance(rope.scaling, Yarn) else 1)
        self._spans: dict[tuple[int, int, int], tuple[Floats, Floats, Floats]] = {}

    def angles(self, start: int, count: int, step: int = 1) -> tuple[Floats, Floats, Floats]:
        """Of the positions start, start + step, ...: cos of each channel's angle, (count, 1, dim), and sin and -sin of
        each pair's, (count, 1, dim/2)."""
        span = (start, count, step)
        if span not in self._spans:
            if len(self._spans) >= SPANS:
                self._spans.clear()
            positions = np.arange(start, start + count * step, step, dtype=np.float32)
            angle = positions[:, None, None] * self._frequencies
            cos, sin = np.cos(angle) * self._factor, np.sin(angle) * self._factor
            both = np.repeat(cos, 2, axis=-1) if self.rope.interleaved else np.concatenate([cos, cos], axis=-1)
            self._spans[span] = both, sin, -sin
        return self._spans[span]

    def apply(self, x: Floats, start: int, step: int = 1, *, inverse: bool = False) -> Floats:
        """Rotate the last `dim` channels of x (T, H, C) in place; row t is at position start + t * step."""
        cos, sin, less = self.angles(start, len(x), step)
        if inverse:
            sin, less = less, sin
        tail = x[..., x.shape[-1] - self.rope.dim :]
        # Pairs (a, b) -> (a cos - b sin, b cos + a sin).
        turned = np.empty(tail.shape, np.float32)
        (a, b), (from_b, from_a) = self._pairs(tail), self._pairs(turned)
        np.multiply(b, less, out=from_b)
        np.multiply(a, sin, out=from_a)
        tail *= cos
        tail += turned
        return x

    def _pairs(self, x: Floats) -> tuple[Floats, Floats]:
        """First and second channels of each pair."""
        if self.rope.interleaved:
            return x[..., 0::2], x[..., 1::2]
        half = self.rope.dim // 2
        return x[..., :half], x[..., half:]
