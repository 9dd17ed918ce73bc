"""Tiny random checkpoints of every family, and the reference implementation's numbers for them.

`golden/CASE.json` holds a config.json and the tensor names, dtypes and shapes of one checkpoint; `golden/CASE.npz` the
float32 logits that transformers computes from it. The weights are not stored: `write_checkpoint` fills them from the
case and the tensor's name, so the folder that the reference saw is rebuilt here, bit for bit, without torch.
`reference/make_golden.py` makes both files.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from helpers import RawTensor, tiny_tokenizer, write_safetensors, write_sharded
from numpy.typing import NDArray

GOLDEN = Path(__file__).parent / "golden"
RECURRENT = ("qwen3_5", "qwen3_next", "qwen4_exp", "kimi_linear", "bailing_hybrid")
"""Families of which every token's rounding goes on through a state."""


@dataclass(frozen=True)
class Golden:
    """The reference's numbers for one case.

    config: the dict of its config.json.
    ids: int64 (T,), the prompt.
    logits: float32 (T, vocab), after each token of the prompt.
    greedy: int64 (N,), the greedy continuation of the prompt; it holds no end-of-sequence id.
    """

    config: dict[str, Any]
    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    greedy: NDArray[np.int64]


def cases() -> list[str]:
    """The names of all cases, sorted; a name starts with its family."""
    return sorted(path.stem for path in GOLDEN.glob("*.json") if path.with_suffix(".npz").exists())


@cache
def description(case: str) -> dict[str, Any]:
    """What `golden/CASE.json` holds, read once: leave it as it is."""
    return json.loads((GOLDEN / f"{case}.json").read_text())  # type: ignore[no-any-return]


@cache
def _arrays(case: str) -> tuple[NDArray[Any], ...]:
    with np.load(GOLDEN / f"{case}.npz") as arrays:
        read = tuple(arrays[name] for name in ("ids", "logits", "greedy"))
    for array in read:
        array.flags.writeable = False
    return read


def load_golden(case: str) -> Golden:
    """The stored numbers of one case, and a config of the caller's own."""
    return Golden(deepcopy(description(case)["config"]), *_arrays(case))


def write_checkpoint(case: str, folder: Path) -> Path:
    """Write config.json and the safetensors file (or shards and their index) of one case into `folder`; return it."""
    described = description(case)
    shapes = {name: (dtype, tuple(shape)) for name, dtype, shape in described["listing"]}
    seed = f"{case}/{described['salt']}"
    tensors = {name: _tensor(seed, name, shapes, described["config"]) for name in shapes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(described["config"], indent=2))
    if described["shards"] == 1:
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    else:
        write_sharded(folder, tensors, described["shards"])
    return folder


def write_model(case: str, folder: Path, **tokenizer: Any) -> Path:
    """Write one case with a tokenizer and a template, see `helpers.tiny_tokenizer`, into `folder`; return it."""
    write_checkpoint(case, folder)
    tiny_tokenizer(folder, load_golden(case).config["vocab_size"], **tokenizer)
    return folder


def random_ids(seed: str, count: int, vocab: int) -> NDArray[np.int64]:
    """`count` token ids below `vocab`, int64 (count,)."""
    return (_raw(seed, count) % np.uint64(vocab)).astype(np.int64)


Shapes = Mapping[str, tuple[str, tuple[int, ...]]]

# Standard deviations of matrices are gain / sqrt(fan_in). The gains keep routers, attention and the logits from being
# flat and the feed-forward blocks from drowning in the residual.
_GAINS = (
    (r"(^|lm_)head\.weight$", 2.0),
    (r"\.gate\.weight$", 2.0),
    (r"\.(wq_b|q_b_proj|q_proj)\.weight$", 1.5),
    (r"\.(w2|down_proj)(\.weight|_blocks)$", 2.0),
    (r"\.router\.weight$", 2.0),
    (r"\.router\.proj\.weight$", 16.0),  # of inputs that are scaled down
)
_FP8_RMS = 109.6  # root mean square of the 254 finite e4m3 codes
_FP4_RMS = 2.93  # and of the 16 e2m1 codes


def _raw(seed: str, count: int) -> NDArray[np.uint64]:
    """PCG64's own 64-bit words: unlike the distributions of `Generator`, they are the same in every NumPy."""
    digest = hashlib.sha256(seed.encode()).digest()
    return np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(count)


def _normal(seed: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Nearly normal, variance 1: four 16-bit uniforms summed exactly as integers (Irwin-Hall), then one rounding."""
    words = _raw(seed, int(np.prod(shape)))
    total = np.zeros(words.shape, np.int32)
    for shift in (0, 16, 32, 48):
        total += ((words >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int32)
    scale = np.float32(3**0.5 / 65535)
    return ((total - 2 * 65535).astype(np.float32) * scale).reshape(shape)


def _std(name: str, fan_in: int, shapes: Shapes) -> float:
    """Standard deviation of a tensor whose rows have `fan_in` values."""
    if re.search(r"(embed(_tokens)?|word_embeddings)\.weight$", name):
        tied = not any(re.search(r"^(lm_)?head\.weight$", other) for other in shapes)
        enlarged = any("pre_feedforward_layernorm" in other for other in shapes)  # by the root of their size, in Gemma
        return (1.0 if enlarged else 2.0) / fan_in**0.5 if tied else 1.0 / fan_in**0.5 if enlarged else 1.0
    if name.endswith((".ape", ".position_bias")):
        return 0.3
    gain = next((gain for pattern, gain in _GAINS if re.search(pattern, name)), 1.0)
    return gain / fan_in**0.5


def _floats(seed: str, name: str, shapes: Shapes) -> NDArray[np.float32]:
    """An unquantized tensor: weights of norms and scales around 1, other vectors around 0, matrices by fan-in."""
    _, shape = shapes[name]
    normal = _normal(f"{seed}/{name}", shape)
    if len(shape) > 1:
        return normal * np.float32(_std(name, shape[-1], shapes))
    if name.endswith(("norm.weight", "norm_1.weight", "norm_2.weight", "scale", "layer_scalar")):
        # Next to gated DeltaNets, norms are stored as what is added to one; theirs are not. So are Gemma 3's.
        added = any(".linear_attn." in other for other in shapes) and ".linear_attn." not in name
        added |= any("pre_feedforward_layernorm" in other for other in shapes) and not any(
            "scalar" in n for n in shapes
        )
        around = 0 if added else 1
        return np.float32(around) + np.float32(0.2) * normal
    return np.float32(0.3) * normal


def _scales(seed: str, name: str, shapes: Shapes) -> bytes:
    """Block scales that give their weight (random codes) about the standard deviation that `_std` asks for."""
    dtype, shape = shapes[name]
    if name.endswith("_scales"):  # gpt-oss: each 32 codes of X_blocks have one of X_scales
        weight = name.removesuffix("scales") + "blocks"
        exponent = 127 + round(np.log2(_std(weight, 32 * shape[-1], shapes) / _FP4_RMS))
        return (exponent - (_raw(f"{seed}/{name}", int(np.prod(shape))) % np.uint64(2)).astype(np.uint8)).tobytes()
    weight = name.removesuffix("_scale_inv") if name.endswith("_scale_inv") else name.removesuffix("scale") + "weight"
    packed, (_, columns) = shapes[weight]
    fan_in, rms = (columns * 2, _FP4_RMS) if packed == "I8" else (columns, _FP8_RMS)
    wanted = _std(weight, fan_in, shapes) / rms
    words = _raw(f"{seed}/{name}", int(np.prod(shape)))
    if dtype == "F8_E8M0":
        exponent = 127 + round(np.log2(wanted))
        return (exponent - (words % np.uint64(2)).astype(np.uint8)).tobytes()
    uniform = (words >> np.uint64(48)).astype(np.float32) / np.float32(65536)
    return (np.float32(wanted) * (np.float32(0.5) + uniform)).astype("<f4").tobytes()


def _tensor(seed: str, name: str, shapes: Shapes, config: Mapping[str, Any]) -> RawTensor:
    """The bytes of one tensor, a function of the seed, its name and the listing alone."""
    dtype, shape = shapes[name]
    size = int(np.prod(shape))
    if dtype == "I64":  # tid2eid: for each token id, distinct experts
        order = _raw(f"{seed}/{name}", shape[0] * config["n_routed_experts"]).reshape(shape[0], -1)
        data = order.argsort(axis=1, kind="stable")[:, : shape[1]].astype("<i8").tobytes()
    elif name.endswith("_scales"):
        data = _scales(seed, name, shapes)
    elif dtype == "I8" or name.endswith("_blocks"):  # two e2m1 codes a byte: every byte is valid
        data = (_raw(f"{seed}/{name}", size) & np.uint64(0xFF)).astype(np.uint8).tobytes()
    elif dtype == "F8_E4M3":
        codes = (_raw(f"{seed}/{name}", size) & np.uint64(0xFF)).astype(np.uint8)
        codes[(codes & 0x7F) == 0x7F] ^= 1  # the two NaN codes become +-448
        data = codes.tobytes()
    elif name.endswith(("_scale_inv", ".scale")) and len(shape) == 2:
        data = _scales(seed, name, shapes)
    elif dtype == "BF16":  # the upper half of a float32
        bits = _floats(seed, name, shapes).view(np.uint32) >> np.uint32(16)
        data = bits.astype("<u2").tobytes()
    elif dtype == "F32":
        data = _floats(seed, name, shapes).astype("<f4").tobytes()
    else:
        raise ValueError(f"{name}: no rule to fill a tensor of dtype {dtype}")
    return dtype, shape, data
