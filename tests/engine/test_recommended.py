"""How a model's authors recommend to sample, and where it is taken from."""

import json
from pathlib import Path
from typing import Any

import pytest

from numoe.engine.chat.answer import repeats
from numoe.engine.text.recommended import from_folder, from_metadata
from numoe.quant.errors import InputError


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (None, {}),
        ({"eos_token_id": 1}, {}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95}, {"temperature": 0.6, "top_p": 0.95}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}),
        ({"top_k": 20, "temperature": None, "min_p": 0}, {"top_k": 20, "min_p": 0.0}),
        ({"repetition_penalty": 1.05}, {"repetition_penalty": 1.05}),
    ],
)
def test_generation_config(tmp_path: Path, config: Any, wanted: dict[str, Any]) -> None:
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert from_folder(tmp_path) == wanted


def test_gguf_metadata() -> None:
    prefix = "general.sampling."
    stored = {"temp": 0.33000001311302185, "top_k": -1, "top_p": 0.949999988079071, "penalty_last_n": 32, "mirostat": 0}
    assert from_metadata({prefix + key: value for key, value in stored.items()}) == {
        "temperature": 0.33,
        "top_k": 0,
        "top_p": 0.95,
        "repeat_last_n": 32,
    }
    assert from_metadata({"general.name": "x"}) == {}


@pytest.mark.parametrize("number", [10**400, -(10**400), float("inf"), float("nan")], ids=["huge", "low", "inf", "nan"])
@pytest.mark.parametrize("key", ["temp", "top_k", "top_p", "penalty_last_n"])
def test_numbers_without_bounds_are_refused(key: str, number: float) -> None:
    with pytest.raises(InputError, match=r"general\.sampling: .*orrect or remove it"):
        from_metadata({f"general.sampling.{key}": number})


@pytest.mark.parametrize("wrong", [{"temperature": "hot"}, {"top_p": 3}, {"top_k": True}, {"top_k": 1.5}])
def test_values_that_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(wrong))
    with pytest.raises(InputError, match=r"generation_config\.json: .*orrect or remove it"):
        from_folder(tmp_path)


@pytest.mark.parametrize("period", [1, 2, 11, 64])
def test_repetition_is_told_from_text(period: int) -> None:
    loop = [*range(100), *list(range(period)) * (512 // period + 1)]
    assert repeats(loop)
    assert not repeats(loop[:600])
    assert not repeats([*loop, 999])
    assert not repeats(list(range(65)) * 20)
