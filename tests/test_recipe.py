"""Roles and their formats, the groups that odd rows get, and the searched int4 scales that recipes ask for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numoe.cli.options import Recipe
from numoe.quant import pack
from numoe.quant.errors import InputError
from numoe.quant.recipe import RECIPES, Target, target

PRECISE = ("norms", "router", "indexer", "residual mixing")
BULK = ("attention", "compressor", "dense ffn", "shared experts", "experts")


def squared_error(weights: np.ndarray, **options: object) -> float:
    return float(((pack.pack_int4(weights, symmetric=True, **options).dequantize() - weights) ** 2).sum())


def test_what_decides_stays_precise_and_the_bulk_shrinks() -> None:
    for quant in RECIPES:
        assert all(target(quant, role, 64, stored) is None for role in PRECISE for stored in (32, 16))
    assert {target("int8", role, 64, 16) for role in BULK} == {Target("int8", 32)}
    assert target("int4", "experts", 64, 16) == target("int4", "dense ffn", 64, 8) == Target("int4", 32)
    assert all(target("native", role, 64, 32) is None for role in (*BULK, "embedding", "head"))


def test_only_float32_words_become_bf16() -> None:
    for quant in ("int8", "int4"):
        for role in ("embedding", "head"):
            assert target(quant, role, 64, 32) == Target("bf16")
            assert target(quant, role, 64, 16) is None


def test_a_weight_stored_in_no_more_bits_is_left_alone() -> None:
    assert target("int4", "experts", 64, 4.5) is None  # this very format
    assert target("int4", "experts", 64, 4.25) is None  # a checkpoint's own FP4
    assert target("int8", "attention", 64, 8.001) is None  # its own FP8
    assert target("int4", "experts", 64, 8.001) == Target("int4", 32)


@pytest.mark.parametrize(
    ("columns", "group"),
    [(32, 32), (576, 32), (44, 44), (60, 60), (208, 104), (254, None), (26, 26), (14, None), (45, None)],
)
def test_rows_that_32_does_not_divide(columns: int, group: int | None) -> None:
    assert target("int8", "experts", columns, 32) == (None if group is None else Target("int8", group))


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(InputError, match='"int5" is not a way to quantize; choose one of native, int8, int4'):
        target("int5", "experts", 64, 32)


def test_the_command_line_knows_the_recipes() -> None:
    assert {recipe.value for recipe in Recipe} == set(RECIPES)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["int8", "int4"]), st.integers(1, 9), st.integers(1, 400), st.integers(0, 1 << 30))
def test_packed_weights_have_the_layout_that_was_promised(quant: str, rows: int, columns: int, seed: int) -> None:
    wanted = target(quant, "experts", columns, 32)
    if wanted is None:
        assert all(columns % group for group in range(16, 129, 2))
        return
    packed = wanted.pack(np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32))
    assert packed.nbytes == pytest.approx(rows * columns * wanted.bits / 8)
    layout = [shape for _, shape in wanted.layout(rows, columns)]
    assert [packed.codes.shape, packed.scales.shape] == layout
    assert packed.bias is None


@pytest.mark.parametrize("columns", [32, 60, 128])
def test_searched_scales_beat_the_plain_ones(columns: int) -> None:
    rng = np.random.default_rng(columns)
    for draw in (
        rng.standard_normal((256, columns)),
        rng.standard_t(5, (256, columns)),
        rng.uniform(-1, 1, (256, columns)),
    ):
        weights = draw.astype(np.float32)
        group = min(columns, 64) if columns != 128 else 32
        plain, searched = squared_error(weights, group=group), squared_error(weights, group=group, search=True)
        assert searched < 0.85 * plain


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([1e-38, 1e-7, 1e-3, 1.0, 1e6, 1e37]))
def test_searched_scales_are_sane_at_every_magnitude(seed: int, scale: float) -> None:
    weights = np.random.default_rng(seed).standard_normal((5, 64), dtype=np.float32) * np.float32(scale)
    weights[1] = 0
    weights[2, :32] = scale
    tensor = pack.pack_int4(weights, symmetric=True, search=True)
    assert tensor.finite()
    values = tensor.dequantize()
    assert not values[1].any()
    if 1e-3 <= scale <= 1:
        assert np.abs(values - weights).max() <= np.abs(weights).max() / 6
        np.testing.assert_allclose(values[2, :32], scale, rtol=1e-3)


def test_only_symmetric_scales_are_searched() -> None:
    with pytest.raises(ValueError, match="only symmetric"):
        pack.pack_int4(np.zeros((1, 32), np.float32), search=True)
