"""Write tests/golden/defaults.json: what transformers takes for the keys that a config.json leaves out, by family.

Run: pip install -e '.[reference]' && python tests/reference/make_defaults.py
"""

import dataclasses
import json
import sys
from pathlib import Path

from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from make_golden import ALIASES, PARTS
from tiny import GOLDEN, cases, load_golden

# Of configuration classes that models bring along (Ling 2.0's configuration_bailing_moe_v2.py).
REMOTE = {
    "bailing_moe": {
        "first_k_dense_replace": 1, "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 32768,
        "moe_intermediate_size": 512, "n_group": 8, "num_experts": 256, "num_experts_per_tok": 8,
        "num_key_value_heads": 4, "num_nextn_predict_layers": 0, "num_shared_experts": 1, "rms_norm_eps": 1e-6,
        "rope_theta": 600000.0, "routed_scaling_factor": 1.0, "tie_word_embeddings": False, "topk_group": 4,
        "use_bias": False, "use_qkv_bias": False,
    },
}  # fmt: skip

table = dict(REMOTE)
for model_type in sorted({load_golden(case).config["model_type"] for case in cases()} - REMOTE.keys()):
    made = type(AutoConfig.for_model(ALIASES.get(model_type, model_type)))
    keys = {field.name: field.default for field in dataclasses.fields(made)}
    if isinstance(made.default_theta, dict):  # Gemma 3, by the kind of layer
        keys |= {"rope_theta": made.default_theta["global"], "rope_local_base_freq": made.default_theta["local"]}
    keys.setdefault("rope_theta", made.default_theta)
    if model_type in PARTS:  # whether its head is tied says the whole model
        whole = type(AutoConfig.for_model(model_type.removesuffix("_text")))
        keys["tie_word_embeddings"] = next(
            field.default for field in dataclasses.fields(whole) if field.name == "tie_word_embeddings"
        )
    # DeepSeek-V4 has defaults for keys that its released configs use and its class renames.
    keys |= {
        key.removeprefix("default_"): getattr(made, key)
        for key in ("default_num_hash_layers", "default_compress_rates", "default_partial_rotary_factor")
        if hasattr(made, key)
    }
    table[model_type] = {key: value for key, value in sorted(keys.items()) if not key.endswith("token_id")}
(GOLDEN / "defaults.json").write_text(json.dumps(dict(sorted(table.items())), indent=0) + "\n")
