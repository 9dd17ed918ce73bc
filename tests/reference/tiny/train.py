"""Trains the tiny DeepSeek-V4 on the CPU, from nothing to an exported checkpoint.

    python corpus.py data --seed 0 --megabytes 30     # the text
    python train.py                                   # trains; run it again after any stop and it goes on
    python train.py --export                          # writes export/ in the released checkpoint's form

It writes run/checkpoint.pt every few minutes, run/loss.csv as it goes and run/loss.png at the end. The whole run is a
function of the seed and of --tokens; changing --tokens while it runs moves the end of the learning-rate schedule and
nothing else. On a machine shared with other work, OMP_WAIT_POLICY=passive keeps its threads from spinning.
"""

import argparse
import contextlib
import csv
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from corpus import ASSISTANT, BOS, END_THINK, EOS, THINK, USER
from model_torch import Config, Losses, Model, released_tensors
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

HERE = Path(__file__).parent
CONTEXT, ROWS = 512, 4
MARKERS = [BOS, EOS, USER, ASSISTANT, THINK, END_THINK]  # ids 0 to 5
IGNORE = -100
MTP_WEIGHT, INDEXER_WEIGHT = 0.2, 0.5
DENSE_SHARE = 0.3  # of the run in which attention still sees every compressed entry
COOLDOWN = 0.5  # share of the run over which the learning rates fall to zero
WARMUP_STEPS = 100
MATRIX_RATE, VECTOR_RATE = 0.02, 3e-3  # of Muon and of AdamW
BIAS_STEP = 1e-3  # of the router biases, each step, towards even load
ROUND_SHARE = 0.7  # of the run after which gradients are taken at weights rounded to four bits
ROUND_GROUP = 32
AVERAGE = 0.998  # decay of the weight average that is exported


# -- text ------------------------------------------------------------------------------------------------------------


def documents(path: Path) -> list[str]:
    with path.open() as file:
        return [json.loads(line) for line in file]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; every digit is a token of its own, so that sums can be learnt digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(m, normalized=False, special=True) for m in MARKERS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": Config().max_position_embeddings,
    }


def pack(lengths: np.ndarray, room: int, rng: np.random.Generator) -> list[list[int]]:
    """Documents into rows of at most `room` tokens by best fit, in random order; longer documents are left out."""
    order = rng.permutation(np.flatnonzero(lengths <= room))
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(room + 1)]  # rows by the room they have left
    for document in order.tolist():
        need = int(lengths[document])
        left = next((r for r in range(need, room + 1) if open_rows[r]), room)
        if open_rows[left]:
            row = open_rows[left].pop()
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(document)
        open_rows[left - need].append(row)
    return [rows[i] for i in rng.permutation(len(rows))]


def batches(tokens: np.ndarray, starts: np.ndarray, seed: int, step: int) -> Iterator[Tensor]:
    """Endless (ROWS, CONTEXT + 2) of whole documents, IGNORE after the last; `step` batches into the run."""
    room = CONTEXT + 2
    lengths = np.diff(starts)
    done = 0
    epoch = 0
    while True:
        rows = pack(lengths, room, np.random.default_rng([seed, epoch]))
        epoch += 1
        for i in range(0, len(rows) - ROWS + 1, ROWS):
            done += 1
            if done <= step:
                continue
            batch = np.full((ROWS, room), IGNORE, np.int64)
            for r, row in enumerate(rows[i : i + ROWS]):
                text = np.concatenate([tokens[starts[d] : starts[d + 1]] for d in row])
                batch[r, : len(text)] = text
            yield torch.from_numpy(batch)


# -- optimiser -------------------------------------------------------------------------------------------------------


def orthogonal(g: Tensor) -> Tensor:
    """The nearest matrix with singular values near one, (..., rows, columns), by five Newton-Schulz steps.

    The quintic of Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024)."""
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.bfloat16()
    for _ in range(5):
        s = x @ x.mT
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * (s @ s)) @ x
    x = x.float()
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal, for matrices and stacks of matrices; weights decay towards zero."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for p in group["params"]:
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.lerp_(p.grad, 1 - group["momentum"])
                by_shape.setdefault(tuple(p.shape[-2:]), []).append(p)
            for (rows, columns), params in by_shape.items():
                looked_ahead = [p.grad.lerp(self.state[p]["velocity"], group["momentum"]) for p in params]
                flat = torch.cat([u.reshape(-1, rows, columns) for u in looked_ahead])
                steps = orthogonal(flat) * (group["lr"] * max(1.0, rows / columns) ** 0.5)
                for p, u in zip(params, steps.split([p.numel() // (rows * columns) for p in params]), strict=True):
                    p.mul_(1 - group["lr"] * group["decay"]).sub_(u.view_as(p))


def is_matrix(name: str, p: Tensor) -> bool:
    """Whether Muon trains it: the matrices inside blocks, but not the small ones that mix streams or score experts."""
    outside = ("embed", "head", "hc_", "ape", "ffn.gate")
    return p.dim() >= 2 and not any(part in name for part in outside)


def optimisers(model: Model) -> list[torch.optim.Optimizer]:
    named = list(model.named_parameters())
    matrices = [p for n, p in named if is_matrix(n, p)]
    rest = [p for n, p in named if not is_matrix(n, p)]
    return [Muon(matrices, MATRIX_RATE), torch.optim.AdamW(rest, VECTOR_RATE, betas=(0.9, 0.98), weight_decay=0.0)]


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Each group of ROUND_GROUP inputs to the nearest of 2**bits levels from its least to its greatest weight."""
    groups = weight.unflatten(-1, (-1, ROUND_GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    return (((groups - low) / step).round_() * step + low).flatten(-2)


@contextlib.contextmanager
def rounded_weights(model: Model, bits: int) -> Iterator[None]:
    """The matrices rounded inside, as they were outside: gradients taken inside pass straight through the rounding."""
    with torch.no_grad():
        kept = [
            (p, p.clone()) for n, p in model.named_parameters() if p.dim() >= 2 and "hc_" not in n and "ape" not in n
        ]
        for p, _ in kept:
            p.copy_(rounded(p, bits))
    yield
    with torch.no_grad():
        for p, exact in kept:
            p.copy_(exact)


def rate(share: float, step: int) -> float:
    """Learning rate as a share of its peak: warm-up, flat, then linear to zero at the end of the run."""
    return min((step + 1) / WARMUP_STEPS, 1.0) * min(1.0, max(0.0, (1 - share) / COOLDOWN))


# -- the run ---------------------------------------------------------------------------------------------------------


def objective(model: Model, ids: Tensor, sparse: bool) -> tuple[Tensor, Losses]:
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(ids, sparse, IGNORE)
    return losses.main + MTP_WEIGHT * losses.mtp + INDEXER_WEIGHT * losses.indexer, losses


@torch.no_grad()
def balance(model: Model, loads: Tensor, step: float) -> None:
    """Moves the bias of every router towards the experts that got less than their share (Wang et al., 2024)."""
    gates = [b.ffn.gate for b in [*model.layers, *model.mtp] if not b.ffn.hashed]
    for gate, load in zip(gates, loads.float(), strict=True):
        gate.bias.add_((load.mean() - load).sign() * step)


class Run:
    """A training run in a folder; everything it needs to go on is in its checkpoint."""

    def __init__(self, folder: Path, data: Path, seed: int, tokens: float):
        self.folder, self.seed, self.planned = folder, seed, tokens
        folder.mkdir(parents=True, exist_ok=True)
        self.config = Config()
        self.tokenizer, self.tokens, self.starts = self._text(data)
        self.model = Model(self.config)
        self.model.initialise(seed)
        self.optimisers = optimisers(self.model)
        self.average = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.step = 0
        self.seconds = 0.0
        if (folder / "checkpoint.pt").exists():
            self._restore(torch.load(folder / "checkpoint.pt", weights_only=True))

    def _text(self, data: Path) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
        path, cache = self.folder / "tokenizer.json", self.folder / "tokens.npz"
        if not cache.exists():
            texts = documents(data / "train.jsonl")
            tokenizer = train_tokenizer(texts[:20000], self.config.vocab_size)
            tokenizer.save(str(path))
            ids = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
            starts = np.cumsum([0, *map(len, ids)])
            np.savez(cache, tokens=np.concatenate([np.array(i, np.uint16) for i in ids]), starts=starts)
        stored = np.load(cache)
        return Tokenizer.from_file(str(path)), stored["tokens"], stored["starts"]

    def _restore(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.average = state["average"]
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimisers": [o.state_dict() for o in self.optimisers],
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
        }
        temporary = self.folder / "checkpoint.tmp"
        torch.save(state, temporary)
        temporary.replace(self.folder / "checkpoint.pt")

    @property
    def share(self) -> float:
        return self.step * ROWS * CONTEXT / self.planned

    def train(self, compiled: bool, save_seconds: float) -> None:
        stop = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.append(True))
        compute = torch.compile(objective, dynamic=False) if compiled else objective
        stream = batches(self.tokens, self.starts, self.seed, self.step)
        saved = told = time.monotonic()
        told_step = self.step
        while self.share < 1 and not stop:
            began = time.monotonic()
            for optimiser in self.optimisers:
                optimiser.zero_grad()
            with rounded_weights(self.model, 4) if self.share >= ROUND_SHARE else contextlib.nullcontext():
                loss, parts = compute(self.model, next(stream), self.share >= DENSE_SHARE)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            now = rate(self.share, self.step)
            for optimiser, peak in zip(self.optimisers, (MATRIX_RATE, VECTOR_RATE), strict=True):
                optimiser.param_groups[0]["lr"] = peak * now
                optimiser.step()
            balance(self.model, parts.loads, BIAS_STEP * now)
            self.step += 1
            decay = min(AVERAGE, 1 - 1 / (self.step / 10 + 1))
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    self.average[name].lerp_(p, 1 - decay)
            self.seconds += time.monotonic() - began
            if self.step % 40 == 0:
                speed = (self.step - told_step) * ROWS * CONTEXT / (time.monotonic() - told)
                told, told_step = time.monotonic(), self.step
                self._log(parts, speed)
            if time.monotonic() - saved > save_seconds:
                self.save()
                saved = time.monotonic()
        self.save()
        if self.share >= 1:
            plot(self.folder / "loss.csv", self.folder / "loss.png")

    def _log(self, parts: Losses, speed: float) -> None:
        load = parts.loads.float()
        row = {
            "step": self.step,
            "tokens": self.step * ROWS * CONTEXT,
            "seconds": round(self.seconds),
            "loss": f"{parts.main.item():.4f}",
            "mtp": f"{parts.mtp.item():.4f}",
            "indexer": f"{parts.indexer.item():.4f}",
            "heaviest_load": f"{(load.amax(1) / load.mean(1)).max().item():.2f}",
            "tokens_per_s": round(speed),
        }
        path = self.folder / "loss.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(" ".join(f"{k} {v}" for k, v in row.items()), f"done {self.share:.1%}", flush=True)

    def averaged(self) -> Model:
        """The model with its averaged weights, ready to be evaluated."""
        model = Model(self.config)
        model.load_state_dict({**self.model.state_dict(), **self.average})
        return model.eval().requires_grad_(False)

    def export(self, folder: Path) -> None:
        """Safetensors in the released form, with config and tokenizer."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(released_tensors(self.averaged()), folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config.released(), indent=2) + "\n")
        (folder / "tokenizer_config.json").write_text(
            json.dumps(tokenizer_config(), indent=2, ensure_ascii=False) + "\n"
        )
        self.tokenizer.save(str(folder / "tokenizer.json"))


def plot(source: Path, picture: Path) -> None:
    """The loss curve, drawn with Pillow: loss on a log axis over tokens, each point the mean of its neighbours."""
    from PIL import Image, ImageDraw

    with source.open() as file:
        rows = list(csv.DictReader(file))
    tokens = np.array([float(r["tokens"]) for r in rows])
    width, height, left, bottom = 900, 500, 60, 40
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    curves = {"loss": "#1f4e9c", "mtp": "#c0632a"}
    values = {k: np.array([float(r[k]) for r in rows]) for k in curves}
    top = max(v.max() for v in values.values())
    low = min(v.min() for v in values.values()) * 0.9

    def y(value: float) -> float:
        return 10 + (height - bottom - 10) * np.log(top / value) / np.log(top / low)

    for mark in (0.25, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7):
        if low < mark < top:
            draw.line((left, y(mark), width, y(mark)), "#dddddd")
            draw.text((10, y(mark) - 6), f"{mark:g}", "black")
    for i in range(5):
        x = left + (width - left - 50) * i / 4
        draw.text((x, height - 25), f"{tokens[-1] * i / 4 / 1e6:.0f} M tokens", "black")
    for place, (name, colour) in enumerate(curves.items()):
        smooth = np.convolve(values[name], np.ones(9) / 9, "valid") if len(rows) > 9 else values[name]
        xs = left + (width - left - 10) * tokens[: len(smooth)] / tokens[-1]
        draw.line([(float(a), float(y(b))) for a, b in zip(xs, smooth, strict=True)], colour, 2)
        draw.text((width - 160, 20 + 16 * place), f"{name} (nats a token)", colour)
    image.save(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--run", type=Path, default=HERE / "run")
    parser.add_argument("--out", type=Path, default=HERE / "export")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=float, default=20e6, help="length of the run")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--save-seconds", type=float, default=240)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--export", action="store_true", help="write the checkpoint as it stands and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = Run(args.run, args.data, args.seed, args.tokens)
    if args.export:
        run.export(args.out)
    else:
        run.train(not args.no_compile, args.save_seconds)


if __name__ == "__main__":
    main()
