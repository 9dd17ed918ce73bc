"""What the codes of ggml's IQ types index: tables whose entries are the codes of several weights at once.

The grids themselves come from the gguf package. An entry is one integer of as many bytes as it has codes, int8 each.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from numoe.quant.dtypes import UInt16

UInt32 = NDArray[np.uint32]
UInt64 = NDArray[np.uint64]

IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
"""(16,): the values of IQ4_NL's and IQ4_XS's codes."""


def _grid(name: str) -> NDArray[np.int8]:
    """(entries, 4 or 8)."""
    from gguf import quants  # which those who read no such file need not wait for

    kind = getattr(quants, name)
    kind.init_grid()
    return kind.grid.reshape(kind.grid_shape).astype(np.int8)


def _with_parity(signs: UInt16) -> UInt16:
    """Seven signs, and an eighth that makes the number of minuses even."""
    folded = signs ^ signs >> 4
    folded ^= folded >> 2
    folded ^= folded >> 1
    return (signs | (folded & 1) * 128).astype(np.uint16)


def _eight_signs() -> NDArray[np.int8]:
    """(256, 8): 1, or -1 for a set bit."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return 1 - 2 * bits.astype(np.int8)


def _signed(grid: NDArray[np.int8]) -> UInt64:
    """Entries (128, entries): first those with signs 0, seven signs above the index."""
    return _together(seven_signs().view(np.int8).reshape(128, 1, 8) * grid)


def _together(codes: NDArray[np.int8]) -> UInt64:
    return np.ascontiguousarray(codes).view(np.uint64).ravel()


@cache
def signs() -> UInt64:
    """(256,) entries of eight factors, by a byte of signs."""
    return _together(_eight_signs())


@cache
def seven_signs() -> UInt64:
    """(128,) entries of eight factors, by seven signs."""
    return _together(_eight_signs()[_with_parity(np.arange(128, dtype=np.uint16))])


@cache
def iq4() -> UInt32:
    """(65536,) entries of four codes, by two bytes of two nibbles each: the low nibble of both, then the high one."""
    low, high = np.tile(IQ4, 16), np.repeat(IQ4, 16)  # of each byte
    four = np.empty((256, 256, 4), np.int8)
    four[..., 0], four[..., 1] = low, low[:, None]
    four[..., 2], four[..., 3] = high, high[:, None]
    return four.view(np.uint32).ravel()


@cache
def iq2_xxs() -> UInt64:
    """(32768,), by eight bits of the grid's index and seven signs above them."""
    return _signed(_grid("IQ2_XXS"))


@cache
def iq2_xs() -> UInt64:
    """(65536,), by nine bits of the grid's index and seven signs above them."""
    return _signed(_grid("IQ2_XS"))


@cache
def iq2_s() -> UInt64:
    """(1024,), without signs."""
    return _together(_grid("IQ2_S"))


@cache
def iq3_xxs() -> UInt64:
    """(65536,), by two bytes that index four codes each, without signs."""
    grid = _grid("IQ3_XXS")
    pairs = np.empty((256, 256, 8), np.int8)
    pairs[..., :4], pairs[..., 4:] = grid, grid[:, None]
    return _together(pairs)


@cache
def iq3_s() -> tuple[UInt64, UInt64]:
    """(8192,) each, by nine bits of the grid's index and four signs above them: the first four of eight codes, and the
    others."""
    signs = _eight_signs()[:16, :4]
    four = signs[:, None] * _grid("IQ3_S")  # (16, 512, 4)
    nothing = np.zeros_like(four)
    return _together(np.concatenate([four, nothing], axis=2)), _together(np.concatenate([nothing, four], axis=2))


@cache
def iq1() -> UInt64:
    """(4096,) entries of eight times a value of -1, 0 or 1 and of its group's shift, by the grid's index of eleven bits
    and, above it, whether the shift is -1/8 and not 1/8."""
    grid = 8 * _grid("IQ1_S")
    return _together(np.stack([grid + np.int8(1), grid - np.int8(1)]))
