"""The released V4 checkpoints at full size, from their tensor listing alone: every byte has its place."""

import json
import math
from pathlib import Path

import pytest
from helpers import ITEM_BYTES, released_v4_listing

from numoe.engine.description import arrange
from numoe.engine.families import family
from numoe.quant.files import TensorInfo
from numoe.quant.stored.checkpoint import Checkpoint

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize(
    ("name", "total_size", "tensors"),
    [
        pytest.param("V4-Flash", 159_609_485_896, 69_187, marks=pytest.mark.slow),  # of the same kinds, and smaller
        ("V4-Pro", 864_704_792_696, 145_116),
    ],
)
def test_every_byte_of_a_release_has_its_place(name: str, total_size: int, tensors: int) -> None:
    """`total_size` and the number of tensors are those of the released index files."""
    config = json.loads((CONFIGS / f"deepseek-ai__DeepSeek-{name}.json").read_text())
    infos, end, file = {}, 0, Path("model.safetensors")
    for stored, (dtype, shape) in released_v4_listing(config).items():
        nbytes = math.prod(shape) * ITEM_BYTES[dtype]
        infos[stored] = TensorInfo(stored, dtype, shape, file, end, nbytes)
        end += nbytes
    assert (len(infos), end) == (tensors, total_size)

    checkpoint = Checkpoint(Path(name), infos, {})
    kind = family("deepseek_v4")
    described = arrange(Path(name), config, kind, kind.spec(config), checkpoint)
    used = {info.name for place in described.places.values() for info in place.stored.parts}
    assert all(stored.startswith("mtp.") for stored in set(infos) - used)

    mtp = sum(info.nbytes for stored, info in infos.items() if stored.startswith("mtp."))
    # In memory norms and other bf16 vectors take float32.
    wider = sum(info.nbytes for s, info in infos.items() if s in used and info.dtype == "BF16" and len(info.shape) == 1)
    plan = described.plan()
    assert plan.stored_bytes == total_size - mtp + wider
    # And so do matrices of less than half a million weights: of the indexer and of the residual streams.
    assert 0 < plan.weight_bytes - plan.stored_bytes < 1e-4 * total_size

    one = [place for n, place in described.places.items() if n.startswith("layers.4.ffn.experts.7.")]
    expert = sum(place.stored.nbytes for place in one)
    assert expert == {"V4-Flash": 13_369_344, "V4-Pro": 35_094_528}[name]
