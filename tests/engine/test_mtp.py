"""Heads that predict one token further, against their formula: the join in plain NumPy, and their layer as the only one
of a model whose embedding is what was joined."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from gguf_files import stored, write_gguf
from helpers import tiny_tokenizer, write_safetensors

from numoe.engine import Model, load
from numoe.engine.layers.ops import Floats
from numoe.engine.layers.step import Step
from numoe.engine.mtp import load_mtp

Arrays = dict[str, np.ndarray]
PARTS = "eh_proj", "enorm", "hnorm", "norm"


@dataclass(frozen=True)
class Head:
    """How checkpoints of a family keep one.

    like: the layer that its own is like, by what each part is. names: of `PARTS`. below: of its layer.
    """

    like: dict[str, int]
    names: tuple[str, str, str, str]
    below: str
    only: dict[str, Any]
    """Keys of the config of one such layer."""
    words: tuple[str, str] = ("", "")
    """What a part of its layer is called elsewhere, and here."""
    normed: bool = True
    one_more: bool = False
    """Norms are stored as what is added to one."""
    says: dict[str, Any] = field(default_factory=dict)
    """What the config says of it."""


def numbered(layer: int, like: int, **only: Any) -> Head:
    begin = f"model.layers.{layer}."
    names = f"{begin}eh_proj", f"{begin}enorm", f"{begin}hnorm", f"{begin}shared_head.norm"
    return Head({"": like}, names, begin, only, says={"num_nextn_predict_layers": 1})


QWEN = "mtp.fc", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm"
MIMO = "model.mtp.layers.0."
HEADS = {
    "v3_a": numbered(4, 3, first_k_dense_replace=0),
    "glm4_moe_a": numbered(3, 2, first_k_dense_replace=0),
    "glm4_moe_lite_a": numbered(3, 2, mlp_layer_types=["sparse"]),
    "glm_moe_dsa_a": numbered(
        5, 2, mlp_layer_types=["sparse"], indexer_types=["full"], layer_types=["indexed_attention"]
    ),
    "qwen3_next_a": Head({"": 3}, QWEN, "mtp.layers.0.", {"layer_types": ["full_attention"]}, one_more=True),
    "qwen3_5_moe_a": Head({"": 3}, QWEN, "mtp.layers.0.", {"layer_types": ["full_attention"]}, one_more=True),
    "mimo_v2_flash_a": Head(
        {"mlp.": 0, "": 6},
        (f"{MIMO}eh_proj", f"{MIMO}enorm", f"{MIMO}hnorm", f"{MIMO}final_layernorm"),
        MIMO,
        {"layer_types": ["sliding_attention"], "mlp_layer_types": ["dense"]},
        ("post_attention_layernorm", "pre_mlp_layernorm"),
        normed=False,
    ),
}


def parts_of(head: Head, tensors: Arrays, config: dict[str, Any]) -> tuple[Arrays, Arrays]:
    """The weights of a head's layer, by what they are called below a layer, and its own."""
    layer: Arrays = {}
    for name in sorted(tensors):
        number, _, below = name.removeprefix("model.layers.").partition(".")
        first = next((like for begin, like in head.like.items() if below.startswith(begin)), None)
        if name.startswith("model.layers.") and int(number) == first:
            layer[below] = np.flip(tensors[name]).copy()  # other weights than that layer's, of the same size
    hidden, random = config["hidden_size"], np.random.default_rng(5)
    own = {"eh_proj": random.standard_normal((hidden, 2 * hidden)) / (2 * hidden) ** 0.5}
    own |= {name: (0 if head.one_more else 1) + 0.3 * random.standard_normal(hidden) for name in PARTS[1:]}
    return layer, {name: values.astype(np.float32) for name, values in own.items()}


def write(folder: Path, config: dict[str, Any], tensors: Arrays) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    raw = {name: ("F32", values.shape, values.astype("<f4").tobytes()) for name, values in tensors.items()}
    write_safetensors(folder / "model.safetensors", raw)
    return folder


def states(model: Model, ids: list[int]) -> tuple[Floats, Floats]:
    """What the last layer gives of each token, and the last logits."""
    seen: list[Floats] = []

    def keep(step: Step, state: Floats) -> None:
        seen.append(state.copy())

    model.decoder.watch[len(model.spec.layers) - 1] = keep
    logits = model.session(256).feed(ids, last=True)[0]
    return np.concatenate(seen), logits


@pytest.fixture(params=HEADS)
def with_head(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], tmp_path: Path
) -> tuple[Path, Callable[[list[int], int], list[int]]]:
    """A checkpoint with a head, and its guesses by the formula: (ids, how many)."""
    case: str = request.param
    head, source = HEADS[case], checkpoint(case)
    tensors, config = stored(source), tiny.load_golden(case).config
    layer, own = parts_of(head, tensors, config)
    files = {f"{head.below}{below.replace(*head.words)}": values for below, values in layer.items()}
    files |= {f"{name}.weight": own[part] for name, part in zip(head.names, PARTS, strict=True)}
    made = write(tmp_path / "made", config | head.says, tensors | files)
    tiny_tokenizer(made, config["vocab_size"])

    def normed(values: Floats, weights: np.ndarray) -> Floats:
        eps = config.get("rms_norm_eps", config.get("layernorm_epsilon"))
        return values / np.sqrt(np.square(values).mean(-1, keepdims=True) + eps) * (weights + head.one_more)

    def guesses(ids: list[int], count: int) -> list[int]:
        embed, found = tensors["model.embed_tokens.weight"], list(ids)
        given, _ = states(load(source), ids[:-1])
        given = normed(given, tensors["model.norm.weight"]) if head.normed else given
        for number in range(count):
            after = normed(embed[found[1:]], own["enorm"])
            joined = np.concatenate([after, normed(given, own["hnorm"])], axis=1) @ own["eh_proj"].T
            one = {f"model.layers.0.{below}": values for below, values in layer.items()}
            one |= {"model.embed_tokens.weight": np.resize(joined, embed.shape), "model.norm.weight": own["norm"]}
            one["lm_head.weight"] = tensors["lm_head.weight"]
            only = config | {"num_hidden_layers": 1, **dict.fromkeys(head.says, 0)} | head.only
            folder = write(tmp_path / f"{len(ids)}.{number}", only, one)
            state, logits = states(load(folder), list(range(len(joined))))
            found.append(int(logits.argmax()))
            last = normed(state[-1:], own["norm"]) if head.normed else state[-1:]
            given = np.concatenate([given, last])
        return found[len(ids) :]

    return made, guesses


def test_guesses_are_those_of_the_formula(with_head: tuple[Path, Callable[[list[int], int], list[int]]]) -> None:
    """In one pass or several, and after going back."""
    path, guesses = with_head
    model = load(path)
    head = load_mtp(model)
    assert head is not None
    ids = list(range(3, 40))
    session = model.session(256)
    session.feed(ids[:20])
    session.feed(ids[20:-1])
    right = guesses(ids, 3)
    assert head.propose(ids, 3) == right
    assert head.propose(ids, 3) == [], "they were read already"
    session.rewind(5)
    session.feed(ids[-6:-1])
    assert head.propose(ids, 3) == right
    session.feed([ids[-1], *right[:2]])
    assert head.propose([*ids, *right], 1) == guesses([*ids, *right], 1)


def test_its_own_sequence_begins_anew_where_its_memory_is_full(
    with_head: tuple[Path, Callable[[list[int], int], list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("numoe.engine.mtp._ROOM", 24)
    model = load(with_head[0])
    head = load_mtp(model)
    assert head is not None
    session = model.session(256)
    session.feed(list(range(3, 40)))
    for token in range(60):
        assert len(head.propose([*session.tokens, token], 4)) == 4
        session.feed([token])


def test_the_text_is_the_same_as_without(with_head: tuple[Path, Callable[[list[int], int], list[int]]]) -> None:
    model = load(with_head[0])
    ids = list(range(3, 30))
    plain, drafted = model.session(256), model.session(256)
    right = "".join(plain.generate(ids, max_tokens=30))
    generation = drafted.generate(ids, max_tokens=30, drafter=load_mtp(model))
    assert "".join(generation) == right
    assert plain.tokens == drafted.tokens and generation.proposed > 20


def test_a_head_of_another_make_is_left_alone(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """One whose parts are missing or of other sizes."""
    head, source, config = HEADS["v3_a"], checkpoint("v3_a"), tiny.load_golden("v3_a").config
    layer, own = parts_of(head, stored(source), config)
    files = {f"{head.below}{below}": values for below, values in layer.items()}
    files |= {f"{name}.weight": own[part] for name, part in zip(head.names, PARTS, strict=True)}
    wide = files | {f"{head.names[0]}.weight": np.zeros((60, 180), np.float32)}
    without = {name: values for name, values in files.items() if not name.endswith("o_proj.weight")}
    for number, tensors in enumerate((wide, without)):
        folder = write(tmp_path / str(number), config | head.says, stored(source) | tensors)
        assert load_mtp(load(folder)) is None


def test_gguf_files_have_them_too(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    head, source, config = HEADS["glm4_moe_a"], checkpoint("glm4_moe_a"), tiny.load_golden("glm4_moe_a").config
    layer, own = parts_of(head, stored(source), config)
    folder = write(tmp_path / "whole", config, stored(source) | {f"model.layers.3.{n}": v for n, v in layer.items()})
    besides = {f"blk.3.nextn.{name}.weight": own[name] for name in PARTS[:3]}
    besides["blk.3.nextn.shared_head_norm.weight"] = own["norm"]
    path = write_gguf(
        folder, config, tmp_path / "model.gguf", "glm4moe", besides, block_count=4, nextn_predict_layers=1
    )
    files = {f"model.layers.3.{below}": values for below, values in layer.items()}
    files |= {f"{name}.weight": own[part] for name, part in zip(head.names, PARTS, strict=True)}
    other = write(tmp_path / "made", config | head.says, stored(source) | files)
    found = []
    for one in (path, other):
        model = load(one)
        drafter = load_mtp(model)
        assert drafter is not None
        model.session(64).feed(list(range(3, 20)))
        found.append(drafter.propose([*range(3, 20), 5], 4))
    assert found[0] == found[1]
