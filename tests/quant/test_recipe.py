"""Roles and their formats, and the groups that odd rows get."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numoe.quant.convert.recipe import Target, target
from numoe.quant.convert.recipes import RECIPES
from numoe.quant.errors import InputError

PRECISE = ("norms", "router", "indexer", "residual mixing")
BULK = ("attention", "compressor", "dense ffn", "shared experts", "experts")


def test_what_decides_stays_precise_and_the_bulk_shrinks() -> None:
    for quant in RECIPES:
        assert all(target(quant, role, 64, stored) is None for role in PRECISE for stored in (32, 16))
    assert {target("int8", role, 64, 16) for role in BULK} == {Target("int8", 32)}
    assert target("int4", "experts", 64, 16) == target("int4", "dense ffn", 64, 8) == Target("int4", 64)
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
    assert target("int8", "attention", 64, 8.5) is None  # int8 without minimums
    assert target("int4", "experts", 64, 8.001) == Target("int4", 64)


@pytest.mark.parametrize(
    ("columns", "int8", "int4"),
    [(32, 32, 32), (576, 32, 64), (96, 32, 96), (44, 44, 44), (60, 60, 60), (208, 104, 104), (26, 26, 26)]
    + [(columns, None, None) for columns in (254, 14, 45)],
)
def test_rows_get_a_group_that_divides_them(columns: int, int8: int | None, int4: int | None) -> None:
    assert target("int8", "experts", columns, 32) == (None if int8 is None else Target("int8", int8))
    assert target("int4", "experts", columns, 32) == (None if int4 is None else Target("int4", int4))


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(InputError, match='"int5" is not a way to quantize; choose one of native, int8, int4, or'):
        target("int5", "experts", 64, 32)


def test_formats_may_be_named_by_role() -> None:
    def kinds(quant: str) -> dict[str, str]:
        chosen = {role: target(quant, role, 128, 32) for role in (*BULK, "embedding", "head")}
        return {role: f"{one.kind} {one.group}" for role, one in chosen.items() if one}

    assert kinds("experts=int4,attention=int8") == {"experts": "int4 64", "attention": "int8 32"}
    assert kinds("shared-experts=int8,dense_ffn=int4") == {"shared experts": "int8 32", "dense ffn": "int4 64"}
    changed = kinds("int4") | {"shared experts": "int4 64"}
    assert changed.pop("attention") == "int8 64"
    assert kinds("int4,attention=native,shared experts=int4") == changed
    assert kinds("int8,experts=int4,head=native").keys() == kinds("int8").keys() - {"head"}
    assert kinds("embedding=bf16") == {"embedding": "bf16 1"}


@pytest.mark.parametrize(
    "quant",
    ["", "int5", "experts", "experts=", "experts=int3", "norms=int8", "router=int4", "experts=int4,int8",
     "attention=int8,attention=int4", "experts=int4,", "int4,,head=bf16", "experts=int4;attention=int8"],
)  # fmt: skip
def test_what_is_no_recipe_is_refused(quant: str) -> None:
    with pytest.raises(InputError, match=r"is not a way to quantize; choose one of native, int8, int4, or|twice"):
        target(quant, "experts", 64, 32)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["int8", "int4"]), st.integers(1, 9), st.integers(1, 400), st.integers(0, 1 << 30))
def test_packed_weights_have_the_layout_that_was_promised(quant: str, rows: int, columns: int, seed: int) -> None:
    wanted = target(quant, "experts", columns, 32)
    if wanted is None:
        assert all(columns % group for group in range(16, 129, 2))
        return
    packed = wanted.pack(np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32))
    assert packed.nbytes == pytest.approx(rows * columns * wanted.format.bits_each / 8)
    assert (packed.format, packed.nbytes) == (wanted.format, wanted.format.nbytes(rows, columns))
    layout = [shape for _, shape in wanted.layout(rows, columns)]
    assert [packed.codes.shape, packed.scales.shape, packed.bias.shape] == layout
