"""The NumPy loops behind the quantized tensors: blocks of rows to float32, and the matmul that runs over them."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute import threads
from numoe.quant.compute.memory import scratch
from numoe.quant.compute.threads import Task
from numoe.quant.dtypes import Float32, UInt8, decode_e2m1_pairs

SCRATCH_ELEMENTS = 1 << 19
"""Float32 elements of dequantized weights alive at a time, unless one row, or one of fp8 blocks, is longer: 2 MiB. With
fewer, NumPy's calls take longer than the caches save."""

BLOCKS = (1 << 17, 1 << 18, 1 << 19)
"""Elements that can be alive at a time in products by columns with few tokens, of whose digits none depends on it:
512 KiB to 2 MiB, and up to 1.75 times as many where one token is multiplied with whole slabs. Which is fastest is the
processor's: one with 2 MiB of L2 cache a core gains a third by the least of them, and one with 1 MiB loses as much."""

_LARGE_L2 = 2 << 20
_CHECK_ELEMENTS = 1 << 20

FEW = 16
"""Up to so many tokens, making the weights float32 and rearranging them is most of a product's work."""

# Up to so many multiplications and results, a product is a small one of `threads.blas_has_small_products`.
_SMALL_MULTIPLICATIONS = 10**6
_SMALL_RESULTS = 1200
_SMALL_TOKENS = 128  # for more, rearranging weights by rows once is no more work than so many small products

# A block of weights by columns is multiplied in small products of these most tokens, columns and rows, however many
# tokens there are. What is not a multiple of 4 tokens is multiplied more slowly.
_TILE_TOKENS, _TILE_ROWS = 24, 64
_EVEN_TILES = 24, 20, 16, 12

TILE_ROWS = 32
"""Rows of a tile of a float32 matrix, by columns: what small products read then lies one after another, and the
processor fetches ahead. Wider ones take longer with one token, narrower ones with several."""

_BUFFER_STEP = 16  # what numbers of elements in NumPy's buffers are multiples of

# Rows of so many weights are multiplied with one token each by itself, in matrices of so many, which come from memory:
# BLAS's product of a matrix with a vector reads several rows at a time, at half the speed of memory. Shorter rows take
# longer to call than to compute, and from the cache BLAS is faster.
_LONG_ROW, _FROM_MEMORY = 256, 1 << 16


def block_rows(columns: int, most: int | None = None) -> int:
    """How many rows of `columns` elements fit in the scratch, or in `most` elements; at least one."""
    return max(1, (most or SCRATCH_ELEMENTS) // max(1, columns))


@cache
def equal_spans(count: int, size: int, most: int | None = None) -> Sequence[tuple[int, int]]:
    """Equal ranges of `count` things of `size` elements that fit in the scratch, for threads to share them evenly;
    or in `most` elements."""
    step = max(1, _step(count, block_rows(size, most)))
    return [(start, min(start + step, count)) for start in range(0, count, step)]


_block = 0


def block_elements() -> int:
    """Which of BLOCKS this process takes: as `use_block` was told, else by the size of the processor's L2 cache."""
    global _block
    if not _block:
        _block = BLOCKS[0] if cache_bytes("2") >= _LARGE_L2 else BLOCKS[-1]
    return _block


def use_block(elements: int) -> None:
    """Take blocks of so many elements from now on. Raises ValueError unless it is one of BLOCKS."""
    global _block
    if elements not in BLOCKS:
        raise ValueError(f"a block has {BLOCKS} elements, not {elements}")
    _block = elements


def cache_bytes(level: str = "*") -> int:
    """The size of the largest cache of a core, or of those with this number; 0 where the system does not tell it
    (Linux does)."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob(f"index{level}/size")
    return max((int(file.read_text().rstrip("K\n")) << 10 for file in sizes), default=0)  # "512K"


def products_by_rows(
    x: Float32, shape: tuple[int, int], dequantize_rows: Callable[[int, int, Float32], None], out: Float32
) -> list[Task]:
    """Tasks for out = x @ W.T, with W of `shape` (out, in) made a block of rows at a time.

    x (T, in), out (T, out) float32.
    """
    rows, columns = shape

    def multiply(start: int, stop: int) -> None:
        block = scratch("rows", (stop - start, columns))
        dequantize_rows(start, stop, block)
        multiply_rows(x, block, out[:, start:stop])

    return [partial(multiply, *span) for span in equal_spans(rows, columns)]


def products_of_float32(x: Float32, weights: Float32, out: Float32) -> list[Task]:
    """Tasks for out = x @ weights.T; x (T, in), weights (out, in), out (T, out)."""
    rows, columns = weights.shape
    spans = equal_spans(rows, 2 * columns)  # small matrices are shared, too
    if len(x) == 1 and columns >= _LONG_ROW and weights.size >= _FROM_MEMORY:
        return [partial(np.vecdot, weights[start:stop], x[0], out[0, start:stop]) for start, stop in spans]
    return [partial(multiply_rows, x, weights[start:stop], out[:, start:stop]) for start, stop in spans]


def products_of_tiles(x: Float32, tiles: Float32, out: Float32) -> list[Task]:
    """Tasks for `multiply_tiles`."""
    _, columns, width = tiles.shape
    spans = equal_spans(len(tiles), 2 * columns * width)  # small matrices are shared, too
    if len(x) == 1:  # for which the calls of `multiply_tiles` would take a tenth of the time
        cut = out.reshape(-1, 1, width)
        return [partial(np.matmul, x, tiles[first:last], cut[first:last]) for first, last in spans]
    return [
        partial(multiply_tiles, x, tiles[first:last], out[:, first * width : last * width]) for first, last in spans
    ]


def few_products_of_fp8(x: Float32, codes: UInt8, scales: Float32, block: tuple[int, int], out: Float32) -> list[Task]:
    """Tasks for out = x @ W.T of at most FEW tokens, if `FP8.folds`: x takes the scales of each row of blocks."""
    rows, columns = codes.shape
    height, width = block
    tokens = len(x)
    # Codes come as 2^-120 times their values, so x is made as much larger as it can be.
    lifted = x.reshape(tokens, -1, width) * np.float32(2.0**80)

    def multiply(first: int, last: int) -> None:
        start, stop = first * height, min(last * height, rows)
        values = scratch("rows", (stop - start, columns))
        _e4m3_bits(codes[start:stop], values)
        for index in range(first, last):
            own = slice(index * height, min((index + 1) * height, rows))
            scaled = (lifted * scales[index, :, None]).reshape(tokens, columns)
            multiply_rows(scaled, values[own.start - start : own.stop - start], out[:, own])
            out[:, own] *= np.float32(2.0**40)

    return [partial(multiply, *span) for span in equal_spans(len(scales), height * columns)]


def multiply_rows(x: Float32, weights: Float32, out: Float32) -> None:
    """out = x @ weights.T; x (T, in), weights (n, in), out (T, n), all float32."""
    tokens, columns = x.shape
    rows = len(weights)
    whole = 0
    if 1 < tokens <= _SMALL_TOKENS and threads.blas_has_small_products():
        if tokens > FEW:
            for first in range(0, tokens, FEW):
                multiply_rows(x[first : first + FEW], weights, out[first : first + FEW])
            return
        parts = max(-(-tokens * rows * columns // _SMALL_MULTIPLICATIONS), -(-tokens * rows // _SMALL_RESULTS))
        if 1 < parts <= rows:
            whole = rows - rows % parts
            blocks = weights[:whole].reshape(parts, -1, columns).transpose(0, 2, 1)
            np.matmul(x, blocks, out=out[:, :whole].reshape(tokens, parts, -1).transpose(1, 0, 2))
    if whole < rows:
        np.matmul(x, weights[whole:].T, out=out[:, whole:])


def scale_codes(codes: NDArray[np.integer], scales: Float32, out: Float32) -> None:
    """out = codes * scales; codes and out (..., rows), scales such that they broadcast."""
    # NumPy casts so many codes at a time into a buffer as it is told: those of one column stay in the fastest cache,
    # and it takes a fifth less than casting all of them first.
    before = np.setbufsize(-(-codes.shape[-1] // _BUFFER_STEP) * _BUFFER_STEP)
    try:
        np.multiply(codes, scales, out=out)
    finally:
        np.setbufsize(before)


def multiply_columns(x: Float32, block: Float32, out: Float32, *, add: bool = False) -> None:
    """out = x @ block, or out += x @ block; x (T, in), block (in, rows), out (T, rows), all float32."""
    if not threads.blas_has_small_products():
        to = scratch("part", out.shape) if add else out
        np.matmul(x, block, out=to)
        if add:
            out += to
        return
    for first, last, width in _tiles(block.shape[1], _TILE_ROWS):
        tiles = block[:, first:last].reshape(len(block), -1, width).transpose(1, 0, 2)  # (n, in, width)
        _multiply_small(x, tiles, out[:, first:last], add)


def multiply_tiles(x: Float32, tiles: Float32, out: Float32) -> None:
    """out = x @ W.T; x (T, in), out (T, out), all float32. tiles (n, in, width): the rows of W, so many at a time, by
    columns."""
    count, columns, width = tiles.shape
    if threads.blas_has_small_products():
        _multiply_small(x, tiles, out, add=False)
    elif len(x) <= FEW:
        np.matmul(x, tiles, out=out.reshape(len(x), count, width).transpose(1, 0, 2))
    else:
        block = scratch("rows", (columns, count * width))  # rearranged once: BLAS would do so with x for every tile
        np.copyto(block.reshape(columns, count, width), tiles.transpose(1, 0, 2))
        np.matmul(x, block, out=out)


def _multiply_small(x: Float32, tiles: Float32, out: Float32, add: bool) -> None:
    """`multiply_tiles` in small products, or out += x @ W.T."""
    count, columns, width = tiles.shape
    spans, pieces = _pieces(len(x), columns, width)
    for start, stop in spans:
        to = scratch("part", out.shape) if add or start else out
        for first, last, each in pieces:
            own = x[first:last, start:stop].reshape(-1, 1, each, stop - start)
            cut = to[first:last].reshape(-1, each, count, width).transpose(0, 2, 1, 3)
            np.matmul(own, tiles[:, start:stop], out=cut)  # (pieces, n, each, width)
        if to is not out:
            out += to


@cache
def _pieces(tokens: int, columns: int, width: int) -> tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int, int]]]:
    """How columns and tokens are cut into small products with tiles of so many rows."""
    # One call for all tokens where they can be cut evenly: at each, threads may wait for Python's lock.
    even = next((each for each in _EVEN_TILES if tokens % each == 0), 4 * _step(-(-tokens // 4), _TILE_TOKENS // 4))
    most = _SMALL_MULTIPLICATIONS // (min(even, tokens) * width)
    return equal_spans(columns, 1, most), list(_tiles(tokens, even))


def _step(count: int, most: int) -> int:
    """The least in which so many are cut into as few steps as by `most`."""
    return -(-count // max(1, -(-count // most)))


def _tiles(count: int, step: int) -> Iterator[tuple[int, int, int]]:
    """(first, last + 1, step) of what can be cut into steps, and of what is left."""
    whole = count - count % step
    if whole:
        yield 0, whole, step
    if whole < count:
        yield whole, count, count - whole


def dequantize_groups(out: Float32, scales: NDArray, bias: NDArray | None) -> None:
    """out[r, k] = out[r, k] * scales[r, k // g] + bias[r, k // g] in place; out (n, in) C-contiguous float32."""
    grouped = out.reshape(*scales.shape, -1)  # (n, groups, g)
    grouped *= scales.astype(np.float32, copy=False)[..., None]
    if bias is not None:
        grouped += bias.astype(np.float32, copy=False)[..., None]


def dequantize_int8(codes: NDArray[np.int8], scales: NDArray, bias: NDArray | None, out: Float32) -> None:
    """out = scale * code + bias; codes (n, in) int8, scales and bias (n, groups), out (n, in) float32."""
    np.copyto(out, codes)
    dequantize_groups(out, scales, bias)


def dequantize_int4(codes: UInt8, scales: NDArray, bias: NDArray | None, out: Float32) -> None:
    """out = scale * q + bias, or scale * (q - 8) without a bias; codes (n, in/2) uint8 as `pack_nibbles` lays them."""
    halves = out.reshape(*scales.shape, 2, -1)  # (n, groups, 2, g/2)
    packed = codes.reshape(*scales.shape, -1)  # (n, groups, g/2)
    np.copyto(halves[..., 0, :], packed & 15)
    np.copyto(halves[..., 1, :], packed >> 4)
    if bias is None:
        out -= np.float32(8)
    dequantize_groups(out, scales, bias)


def pack_nibbles(codes: UInt8) -> UInt8:
    """Two 4-bit codes a byte within each group: (..., g) of 0..15 -> (..., g/2).

    Low nibbles hold the group's first half and high nibbles its second, the order of GGUF's Q4_0 and Q4_1.
    """
    half = codes.shape[-1] // 2
    return codes[..., :half] | codes[..., half:] << np.uint8(4)


def dequantize_fp8(codes: UInt8, scales: Float32, block: tuple[int, int], start: int, out: Float32) -> None:
    """out = e4m3(code) * scale of its block, for codes that are not NaN.

    codes and out (n, in) are rows start.. of the matrix, scales all of it.
    """
    _e4m3_bits(codes, out)
    lift = np.float32(2.0**120)
    if scales.size and scales.max() >= 64:  # so large a scale would overflow with all of it
        out *= lift
        lift = np.float32(1)
    height, width = block
    row = 0
    while row < len(out):
        block_row = (start + row) // height
        end = min(len(out), (block_row + 1) * height - start)
        out[row:end] *= np.repeat(scales[block_row] * lift, width)[: out.shape[1]]
        row = end


def _e4m3_bits(codes: UInt8, out: Float32) -> None:
    """out = 2^-120 e4m3(code), for codes that are not NaN."""
    # Sign, exponent and mantissa move to their places in float32, whose exponent counts from 120 lower down: a third
    # of the time of a table.
    bits = out.view(np.int32)
    np.copyto(bits, codes.view(np.int8))
    np.left_shift(bits, 20, out=bits)
    np.bitwise_and(bits, -0x78100000, out=bits)


def dequantize_mxfp4(codes: UInt8, scales: Float32, out: Float32) -> None:
    """out = e2m1(code) * scale of its group of 32; codes (n, in/2) low nibble first, scales (n, in/32), out (n, in)."""
    decode_e2m1_pairs(codes, out)
    dequantize_groups(out, scales, None)


def all_finite(values: NDArray) -> bool:
    """Whether a float array holds no NaN or infinity, looked at in pieces of bounded size."""
    return not _any(values, lambda piece: ~np.isfinite(piece))


def has_bits(codes: NDArray, mask: int) -> bool:
    """Whether any unsigned code has all bits of `mask` set, looked at in pieces of bounded size."""
    return _any(codes, lambda piece: (piece & mask) == mask)


def _any(values: NDArray, test: Callable[[NDArray], NDArray]) -> bool:
    flat = values.reshape(-1)
    pieces = (flat[at : at + _CHECK_ELEMENTS] for at in range(0, flat.size, _CHECK_ELEMENTS))
    return any(bool(test(piece).any()) for piece in pieces)


def transposed(codes: NDArray) -> NDArray:
    """codes (n, m) of one or two bytes -> (m, n), several times faster than copying `.T`: first 8 bytes at a time."""
    rows, columns = codes.shape
    each = 8 // codes.itemsize
    whole = columns - columns % each
    out = np.empty((columns, rows), codes.dtype)
    eights = np.empty((whole // each, rows), np.uint64)
    for row in range(0, rows, 16):  # what is read stays in the cache until all of it is
        eights[:, row : row + 16] = codes[row : row + 16, :whole].view(np.uint64).T
    moved = eights.view(codes.dtype).reshape(-1, rows, each).transpose(0, 2, 1)
    np.copyto(out[:whole].reshape(-1, each, rows), moved)
    out[whole:] = codes[:, whole:].T
    return out
