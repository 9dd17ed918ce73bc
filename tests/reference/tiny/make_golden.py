"""Logits of the training code for the exported weights, which numoe must agree with: tests/golden/tiny_model.npz.

    python tests/reference/tiny/make_golden.py    # after training; needs the `reference` extra

Also writes tests/golden/tiny_held_out.txt, text that was held out of training, for perplexity.
"""

import numpy as np
import torch
from corpus import held_out_documents
from train import HERE, Run

GOLDEN = HERE.parent.parent / "golden"
DOCUMENTS, TOKENS, POSITIONS = 4, 400, 12


@torch.no_grad()
def main() -> None:
    run = Run(HERE / "run", HERE / "data", seed=0, tokens=1)
    model = run.averaged()
    exact = ("hc_", "ape", "attn_sink", "gate.bias", "tid2eid")  # see released_tensors
    for name, tensor in model.state_dict().items():
        if not any(part in name for part in exact):
            tensor.copy_(tensor.bfloat16())
    texts = held_out_documents(200, seed=2)
    stream = run.tokenizer.encode("".join(texts), add_special_tokens=False).ids
    ids = torch.tensor(stream[: DOCUMENTS * TOKENS]).view(DOCUMENTS, TOKENS)
    positions = np.linspace(0, TOKENS - 1, POSITIONS).astype(np.int64)
    logits = model.logits(ids)[:, positions].numpy()
    np.savez_compressed(GOLDEN / "tiny_model.npz", ids=ids.numpy().astype(np.int16), positions=positions, logits=logits)
    (GOLDEN / "tiny_held_out.txt").write_text("".join(texts), encoding="utf-8")
    print(f"{logits.size} logits, {len(stream)} tokens of held-out text")


if __name__ == "__main__":
    main()
