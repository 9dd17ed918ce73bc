"""Eight gigabytes of experts in two of memory, seen from outside. `pytest -m slow`; it needs 9 GB of disk."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ITEM_BYTES, released_v4_listing

LAYERS, EXPERTS, VOCAB = 3, 200, 1024
BLOCK = 1 << 22

SCRIPT = """
import json, sys
from numoe.engine import load
model = load(sys.argv[1], ram=2_000_000_000, ctx=2200)
session = model.session(2200)
for token in range(12):
    session.feed([token])
decoded = model.stats()
session.feed([token * 37 % 1024 for token in range(int(sys.argv[2]))], last=True)
print(json.dumps({"decode": decoded, "prefill": model.stats(), "experts": model.plan().expert_bytes}))
"""


def write_flash(folder: Path) -> Path:
    """A model with the shapes of DeepSeek-V4-Flash, few layers and a small vocabulary; the weights repeat."""
    folder.mkdir()
    config = json.loads((Path(__file__).parents[1] / "configs" / "deepseek-ai__DeepSeek-V4-Flash.json").read_text())
    config |= {"num_hidden_layers": LAYERS, "n_routed_experts": EXPERTS, "vocab_size": VOCAB, "num_hash_layers": 1}
    config |= {"num_nextn_predict_layers": 0, "compress_ratios": [0, 4, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    listing = {n: t for n, t in released_v4_listing(config).items() if not n.startswith("mtp.")}
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, BLOCK, np.uint8)
    normal = random.standard_normal(BLOCK // 4, np.float32) / 64
    blocks = {
        "I8": codes.tobytes(),
        "F8_E4M3": np.where(codes & 0x7F == 0x7F, 0, codes).tobytes(),
        "BF16": (normal.view("<u4") >> 16).astype("<u2").tobytes(),
        "F32": normal.astype("<f4").tobytes(),
    }
    table = random.permuted(np.tile(np.arange(EXPERTS), (VOCAB, 1)), axis=1)[:, : config["num_experts_per_tok"]]
    header, end = {}, 0
    for name, (dtype, shape) in listing.items():
        size = math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in listing.items():
            size = math.prod(shape) * ITEM_BYTES[dtype]
            if dtype == "I64":
                block = table.astype("<i8").tobytes()
            elif dtype == "F8_E8M0":  # of FP4 codes, and of FP8's, which are larger
                block = bytes([119 if ".experts." in name else 114]) * size
            else:
                block = blocks[dtype]
            for at in range(0, size, len(block)):
                file.write(block[: size - at])
    return folder


@pytest.mark.slow
def test_memory_stays_within_what_is_allowed(tmp_path: Path) -> None:
    folder = write_flash(tmp_path / "flash")
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), "2000"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    told = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    peak = 1024 * usage.ru_maxrss
    result = json.loads(told)
    (folder / "model.safetensors").unlink()
    print(f"peak RSS {peak / 1e9:.3f} GB", json.dumps(result, indent=1))
    assert result["experts"] > 8e9
    assert result["decode"]["experts"]["misses"] > 0
    # A pass of 512 tokens takes nearly all experts, each once.
    assert result["prefill"]["experts"]["bytes_read"] < (4 + 1) * result["experts"]
    assert peak < 1.1 * 2e9
