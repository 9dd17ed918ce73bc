"""Goes on training the head that predicts one token further, so that it guesses several in a row; nothing else changes.

    python train_head.py export [--tokens 0.66e6]    # after `train.py --export`, in place

Training made it read states of the model's last layer alone, but whatever it guesses beyond the first token it guesses
from its own. So it is run over a text as often as it is to guess at once, each time on what it gave the last time (the
training-time test of EAGLE-3, arXiv 2503.01840), and learns what the model says of the token that it guesses.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model_torch import Config, Model, load_released, released_tensors
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from train import BIAS_STEP, CONTEXT, HERE, IGNORE, MATRIX_RATE, ROWS, VECTOR_RATE, Muon, batches, documents, is_matrix

GUESSES = 3
WARMUP_STEPS = 50
SHARE = 0.5  # of the rates that all of the model was trained with


def losses(model: Model, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ids (B, T + 2) -> of each guess (GUESSES,) the cross entropy with what the model says, and how often it is its
    best token; the load of the experts (E)."""
    tokens = ids.shape[1] - 2
    read = ids.clamp(min=0)
    with torch.no_grad():
        x, _, _ = model.streams(read[:, :tokens], sparse=True)
        said = model.head(model.collapse(x, model.config)).float()[:, 1:]  # of the token that follows the next one
        embedded = model.embed(read[:, 1:-1])
    block, rows = model.mtp[0], []
    entropies, right, loads = [], [], []
    for guess in range(GUESSES):
        x, _, load, kept = block(block.enter(x, embedded), read[:, 1:-1], sparse=False, guessed=rows)
        rows.append(kept)
        loads.append(load)
        made = model.head(block.collapse(x, model.config)).float()[:, guess:-1]
        known = ids[:, 2 + guess : -1] != IGNORE
        target = said[:, guess:][known]
        entropies.append(F.cross_entropy(made[known], target.softmax(dim=-1)))
        right.append((made[known].argmax(-1) == target.argmax(-1)).float().mean())
        x = F.pad(x[:, :-1], (0, 0, 0, 0, 1, 0))  # a token is guessed from what came of the one before it
    return torch.stack(entropies), torch.stack(right), torch.stack(loads).sum(dim=0)


def text(tokenizer: Tokenizer, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Token ids one after another, and where each document begins."""
    encoded = tokenizer.encode_batch(documents(data / "train.jsonl"), add_special_tokens=False)
    starts = np.cumsum([0, *(len(one.ids) for one in encoded)])
    return np.concatenate([np.array(one.ids, np.uint16) for one in encoded]), starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--tokens", type=float, default=0.66e6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = Model(Config())
    load_released(model, load_file(args.model / "model.safetensors"))
    model.requires_grad_(False)
    block = model.mtp[0].requires_grad_(True)
    named = list(block.named_parameters())
    matrices = [p for n, p in named if is_matrix(n, p)]
    rest = [p for n, p in named if not is_matrix(n, p)]
    optimisers = [Muon(matrices, MATRIX_RATE), torch.optim.AdamW(rest, VECTOR_RATE, betas=(0.9, 0.98), weight_decay=0)]
    steps, began = int(args.tokens / (ROWS * CONTEXT)), time.monotonic()
    stream = batches(*text(Tokenizer.from_file(str(args.model / "tokenizer.json")), args.data), args.seed, 0)
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            entropies, right, load = losses(model, next(stream))
        for optimiser in optimisers:
            optimiser.zero_grad()
        entropies.mean().backward()
        torch.nn.utils.clip_grad_norm_(block.parameters(), 1.0)
        now = SHARE * min((step + 1) / WARMUP_STEPS, 1 - step / steps)
        for optimiser, peak in zip(optimisers, (MATRIX_RATE, VECTOR_RATE), strict=True):
            optimiser.param_groups[0]["lr"] = peak * now
            optimiser.step()
        with torch.no_grad():
            block.ffn.gate.bias.add_((load.float().mean() - load).sign() * BIAS_STEP * now)
        if step % 20 == 0:
            told = " ".join(f"{loss:.3f} {share:.1%}" for loss, share in zip(entropies.tolist(), right, strict=True))
            print(f"step {step} of {steps}, {time.monotonic() - began:.0f} s: {told}", flush=True)
    save_file(released_tensors(model), args.model / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
