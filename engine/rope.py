"""Rotary position embedding: angles of a span of positions, and the rotation of channel pairs."""

from __future__ import annotations

from math import ceil, floor, log, pi

import numpy as np

from numoe.engine.ops import Floats
from numoe.engine.spec import LinearScaling, Llama3Scaling, Rope, Yarn


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
        self._spans: dict[tuple[int, int, int], tuple[Floats, Floats]] = {}

    def angles(self, start: int, count: int, step: int = 1) -> tuple[Floats, Floats]:
        """cos and sin, each (count, 1, dim/2), of the positions start, start + step, ..."""
        span = (start, count, step)
        if span not in self._spans:
            if len(self._spans) >= SPANS:
                self._spans.clear()
            positions = np.arange(start, start + count * step, step, dtype=np.float32)
            angle = positions[:, None, None] * self._frequencies
            self._spans[span] = np.cos(angle) * self._factor, np.sin(angle) * self._factor
        return self._spans[span]

    def apply(self, x: Floats, start: int, step: int = 1, *, inverse: bool = False) -> Floats:
        """Rotate the last `dim` channels of x (T, H, C) in place; row t is at position start + t * step."""
        cos, sin = self.angles(start, len(x), step)
        half = self.rope.dim // 2
        tail = x[..., x.shape[-1] - self.rope.dim :]
        a, b = (tail[..., 0::2], tail[..., 1::2]) if self.rope.interleaved else (tail[..., :half], tail[..., half:])
        # (a, b) -> (a cos - b sin, b cos + a sin); the inverse turns the other way
        turned = a * sin
        if inverse:
            np.negative(turned, out=turned)
            shift = b * sin
        else:
            shift = b * -sin
        a *= cos
        a += shift
        b *= cos
        b += turned
        return x
