"""Make tests/golden/dspark.npz: what mlx-vlm's head of DeepSeek-V4-Flash-0731 guesses after the states of transformers.

Run: pip install -e '.[reference]' 'mlx[cpu]' mlx-vlm && python tests/reference/make_dspark.py

mlx-vlm 0.7 computes the head as its authors' inference code does, in float32 here. What the head reads of the model,
the mean of the residual streams after some layers, comes from transformers' own model of the same tiny checkpoint.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
import transformers
from mlx_vlm.speculative.drafters.deepseek_v4_dspark.config import DeepseekV4DsparkConfig
from mlx_vlm.speculative.drafters.deepseek_v4_dspark.deepseek_v4_dspark import DeepseekV4DsparkDraftModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dspark
import tiny

CASE, TOKENS = "v4_a", 45
ANCHORS = 9, 10, 31, 44  # the token that each block follows: within the window, one further, beyond it twice


def states(folder: Path, ids: np.ndarray, targets: list[int]) -> np.ndarray:
    """(S, targets x D): the means of the streams after each target layer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    seen: dict[int, np.ndarray] = {}

    def keep(layer: int) -> Any:
        def hook(module: Any, given: Any, out: Any) -> None:
            state = out[0] if isinstance(out, tuple) else out
            seen[layer] = state[0].mean(dim=1).numpy()  # (S, streams, D)

        return hook

    for target in targets:
        model.model.layers[target].register_forward_hook(keep(target))
    with torch.no_grad():
        model(torch.tensor(ids)[None])
    return np.concatenate([seen[target] for target in targets], axis=1)


def drafter(config: dict[str, Any], tensors: dict[str, np.ndarray], embed: np.ndarray, head: np.ndarray) -> Any:
    """The head of mlx-vlm, and what it takes of the model."""
    text = config | {
        "rope_theta": config["rope_parameters"]["main"]["rope_theta"],
        "compress_ratios": [0] * config["num_hidden_layers"],
    }
    made = DeepseekV4DsparkConfig.from_dict(
        {
            "text_config": text,
            "n_mtp_layers": dspark.STAGES,
            "target_layer_ids": config["dspark_target_layer_ids"],
            "mask_token_id": config["dspark_noise_token_id"],
            "markov_rank": config["dspark_markov_rank"],
            "block_size": config["dspark_block_size"] + 1,
        }
    )
    model = DeepseekV4DsparkDraftModel(made)
    weights = model.sanitize({name: mx.array(one) for name, one in tensors.items()})
    model.load_weights([(name, one.astype(mx.float32)) for name, one in weights.items()], strict=True)
    table, out = mx.array(embed), mx.array(head)
    model._input_embed = lambda ids: table[ids]
    model._lm_head_fn = lambda x: x @ out.T
    return model


def main() -> None:
    mx.set_default_device(mx.cpu)
    config = dspark.config_of(CASE)
    tensors = dspark.values(dspark.head(config))
    with tempfile.TemporaryDirectory() as temporary:
        folder = tiny.write_checkpoint(CASE, Path(temporary) / CASE)
        ids = tiny.load_golden(CASE).ids[:TOKENS]
        targets = states(folder, ids, config["dspark_target_layer_ids"])
        from safetensors.numpy import load_file

        stored = load_file(folder / "model.safetensors")
    model = drafter(config, tensors, stored["model.embed_tokens.weight"], stored["head.weight"])
    cache, done = model.make_cache(), 0
    hidden, logits, blocks, confidences = [], [], [], []
    last = dspark.STAGES - 1
    size = config["dspark_block_size"]
    for anchor in ANCHORS:
        inputs = mx.array([[int(ids[anchor]), *[config["dspark_noise_token_id"]] * (size - 1)]])
        kept: list[Any] = []
        collapse = model.stages[-1].hc_head

        class Kept:  # what the confidence reads: before the norm
            def __call__(self, h: Any, collapse: Any = collapse, kept: list[Any] = kept) -> Any:
                kept[:] = [collapse(h)]
                return kept[-1]

        model.stages[-1].hc_head = Kept()
        for position in range(done, anchor):  # one at a time its cache has the window's rows and no more
            state = model._hidden(inputs, mx.array(targets[None, position : position + 1]), cache)
        model.stages[-1].hc_head = collapse
        base = model._logits(state)
        done, previous = anchor, int(ids[anchor])
        rows, block, sure = [], [], []
        for place in range(size):
            token = mx.array([previous])
            row = model.markov_head.apply_step_logits(base[:, place], token)[0]
            embed = model.markov_head.get_prev_embeddings(token)[0]
            weights = tensors[f"mtp.{last}.confidence_head.proj.weight"][0]
            sure.append(float(np.concatenate([np.array(kept[0][0, place]), np.array(embed)]) @ weights))
            rows.append(np.array(row))
            previous = int(rows[-1].argmax())
            block.append(previous)
        hidden.append(np.array(kept[0][0]))
        logits.append(np.stack(rows))
        blocks.append(block)
        confidences.append(sure)
    np.savez_compressed(
        tiny.GOLDEN / "dspark.npz",
        ids=ids,
        anchors=np.array(ANCHORS),
        targets=targets.astype(np.float32),
        hidden=np.stack(hidden).astype(np.float32),
        logits=np.stack(logits).astype(np.float32),
        blocks=np.array(blocks, np.int64),
        confidences=np.array(confidences, np.float32),
    )
    print(blocks, confidences)


if __name__ == "__main__":
    main()
