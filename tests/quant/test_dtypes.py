"""Every code of every format against its definition, and encoding against a search for the nearest value."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from numoe.quant import dtypes

CODES = np.arange(256, dtype=np.uint8)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def e4m3(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def test_e4m3_decodes_every_code():
    expected = np.array([e4m3(code) for code in range(256)], np.float32)
    np.testing.assert_array_equal(dtypes.decode_e4m3(CODES), expected)
    assert np.nanmax(expected) == dtypes.E4M3_MAX


def test_e8m0_decodes_every_code():
    expected = np.array([2.0 ** (code - 127) for code in range(255)] + [math.nan], np.float32)
    np.testing.assert_array_equal(dtypes.decode_e8m0(CODES), expected)


def test_e2m1_decodes_every_code_and_pair():
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    expected = np.array(magnitudes + [-value for value in magnitudes], np.float32)
    np.testing.assert_array_equal(dtypes.decode_e2m1(CODES[:16]), expected)
    pairs = dtypes.decode_e2m1_pairs(CODES)
    np.testing.assert_array_equal(pairs[0::2], expected[CODES & 15])  # low nibble first
    np.testing.assert_array_equal(pairs[1::2], expected[CODES >> 4])


def test_bf16_decodes_every_code():
    codes = np.arange(1 << 16, dtype=np.uint16)
    values = dtypes.decode_bf16(codes)
    np.testing.assert_array_equal(values.view(np.uint32), codes.astype(np.uint32) << 16)


@pytest.mark.parametrize(
    ("decode", "codes"),
    [
        (dtypes.decode_bf16, np.arange(1 << 16, dtype=np.uint16)),
        (dtypes.decode_e4m3, CODES),
        (dtypes.decode_e8m0, CODES),
        (dtypes.decode_e2m1, CODES[:16]),
        (dtypes.decode_e2m1_pairs, CODES),
    ],
)
def test_decode_writes_to_out(decode, codes):
    expected = decode(codes)
    out = np.full(expected.shape, 7, np.float32)
    assert decode(codes, out) is out
    np.testing.assert_array_equal(out, expected)


def test_encoding_a_decoded_code_gives_it_back():
    every = np.arange(1 << 16, dtype=np.uint16)
    numbers = every[(every & 0x7FFF) <= 0x7F80]
    np.testing.assert_array_equal(dtypes.encode_bf16(dtypes.decode_bf16(numbers)), numbers)
    nans = dtypes.encode_bf16(dtypes.decode_bf16(every[(every & 0x7FFF) > 0x7F80]))
    assert np.isnan(dtypes.decode_bf16(nans)).all()
    np.testing.assert_array_equal(dtypes.encode_e4m3(dtypes.decode_e4m3(CODES)), CODES)
    np.testing.assert_array_equal(dtypes.encode_e8m0(dtypes.decode_e8m0(CODES)), CODES)
    np.testing.assert_array_equal(dtypes.encode_e2m1(dtypes.decode_e2m1(CODES[:16])), CODES[:16])


TABLES = {
    "e4m3": (dtypes.encode_e4m3, np.delete(dtypes.E4M3[:128], 127)),
    "e2m1": (dtypes.encode_e2m1, dtypes.E2M1[:8]),
    "e8m0": (dtypes.encode_e8m0, dtypes.decode_e8m0(np.arange(255, dtype=np.uint8))),
}


@pytest.mark.parametrize("kind", TABLES)
def test_encode_breaks_ties_to_the_even_code(kind):
    encode, table = TABLES[kind]
    middles = (table[:-1].astype(np.float64) + table[1:]) / 2
    codes = encode(middles.astype(np.float32))
    lower = np.arange(len(middles))
    np.testing.assert_array_equal(codes, lower + lower % 2)
    with np.errstate(under="ignore"):
        below = np.nextafter(middles.astype(np.float32), np.float32(0))
        above = np.nextafter(middles.astype(np.float32), np.float32(np.inf))
    np.testing.assert_array_equal(encode(below), lower)
    np.testing.assert_array_equal(encode(above), lower + 1)


@given(values=hnp.arrays(np.float32, 16, elements=FINITE))
def test_encode_picks_the_nearest_value(values):
    for kind, (encode, table) in TABLES.items():
        signed = np.abs(values) if kind == "e8m0" else values
        codes = encode(signed)
        # A wide exact distance: float32 differences would round the comparison itself.
        distances = np.abs(np.abs(signed).astype(np.float64)[:, None] - table.astype(np.float64))
        magnitude = codes if kind == "e8m0" else codes & (7 if kind == "e2m1" else 127)
        chosen = distances[np.arange(16), magnitude]
        np.testing.assert_array_equal(chosen, distances.min(axis=1))
        if kind != "e8m0":
            sign_bit = 8 if kind == "e2m1" else 128
            np.testing.assert_array_equal(codes & sign_bit != 0, np.signbit(values))


@given(values=hnp.arrays(np.float32, 16, elements=FINITE))
def test_bf16_encode_is_within_half_a_step_and_finite(values):
    decoded = dtypes.decode_bf16(dtypes.encode_bf16(values))
    assert np.isfinite(decoded).all()
    low = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    with np.errstate(over="ignore"):
        high = ((values.view(np.uint32) >> 16) + 1 << 16).astype(np.uint32).view(np.float32)
    exact = values.astype(np.float64)
    best = np.minimum(np.abs(low - exact), np.where(np.isfinite(high), np.abs(high - exact), np.inf))
    np.testing.assert_array_equal(np.abs(decoded - exact), best)


def test_encode_saturates_and_keeps_nan():
    extremes = np.array([np.inf, -np.inf, 3e38, -3e38], np.float32)
    np.testing.assert_array_equal(dtypes.decode_e4m3(dtypes.encode_e4m3(extremes)), [448, -448, 448, -448])
    np.testing.assert_array_equal(dtypes.decode_e2m1(dtypes.encode_e2m1(extremes)), [6, -6, 6, -6])
    np.testing.assert_array_equal(dtypes.encode_e8m0(np.array([np.inf, 0, -1, np.nan], np.float32)), [254, 0, 255, 255])
    assert np.isnan(dtypes.decode_e4m3(dtypes.encode_e4m3(np.array([np.nan], np.float32)))).all()
    largest = np.finfo(np.float32).max
    assert dtypes.encode_bf16(np.array([largest, -largest, np.inf], np.float32)).tolist() == [0x7F7F, 0xFF7F, 0x7F80]
