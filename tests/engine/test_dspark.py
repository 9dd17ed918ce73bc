"""The head that guesses a block of tokens, against mlx-vlm's numbers (`reference/make_dspark.py`), and as a drafter."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspark
import numpy as np
import pytest
import tiny
from helpers import ITEM_BYTES, RawTensor, released_v4_listing, tiny_tokenizer

from numoe.engine import Model, describe, load
from numoe.engine.budget import Budget
from numoe.engine.description import arrange
from numoe.engine.drafting import drafting
from numoe.engine.dspark import DSpark, find_dspark, load_dspark
from numoe.engine.families import family
from numoe.engine.mtp import find_mtp
from numoe.quant.errors import InputError
from numoe.quant.files import TensorInfo
from numoe.quant.stored.checkpoint import Checkpoint as Stored

CASE = "v4_a"
Checkpoint = Callable[[str], Path]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(tiny.GOLDEN / "dspark.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = dspark.config_of(CASE)
    made = dspark.write(checkpoint(CASE), tmp_path_factory.mktemp("dspark") / "made", config, dspark.head(config))
    tiny_tokenizer(made, config["vocab_size"])
    return made


def drafter(model: Model) -> DSpark:
    found = load_dspark(model)
    assert found is not None
    return found


def test_blocks_are_those_of_the_reference(folder: Path, golden: dict[str, np.ndarray]) -> None:
    model = load(folder)
    head = drafter(model)._head
    cache, done = head.cache(64), 0
    means = np.split(golden["targets"], 3, axis=1)
    for number, anchor in enumerate(golden["anchors"].tolist()):
        before = head.read([mean[done:anchor] for mean in means])
        block, logits, likely = head.guess(before, int(golden["ids"][anchor]), cache)
        done = anchor
        assert block == golden["blocks"][number].tolist() and cache.position == anchor
        np.testing.assert_allclose(head.state, golden["hidden"][number], atol=2e-4)
        np.testing.assert_allclose(logits, golden["logits"][number], atol=2e-4)
        reached = np.cumprod(1 / (1 + np.exp(-golden["confidences"][number])))
        np.testing.assert_allclose(likely, reached, atol=2e-4)


@pytest.mark.parametrize("reads", [(44,), (9, 10, 31, 44), (1, 2, 30, 31, 44), tuple(range(1, 45))], ids=len)
def test_it_reads_what_the_layers_give(
    folder: Path, golden: dict[str, np.ndarray], reads: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever passes there were; and after going back, near and far, in one session or in two."""
    monkeypatch.setattr("numoe.engine.dspark._UNLIKELY", 0.0)
    model, ids = load(folder), golden["ids"].tolist()
    head, session = drafter(model), model.session(256)
    right = {int(anchor): block.tolist() for anchor, block in zip(golden["anchors"], golden["blocks"], strict=True)}
    for start, stop in zip((0, *reads), reads, strict=False):
        session.feed(ids[start:stop])
        if stop in right:
            assert head.propose(ids[: stop + 1], 9) == right[stop]
            assert head.propose(ids[: stop + 1], 9) == [], "they were read already"
            assert len(head.propose([*ids[:stop], 3, 4], 9)) == 0, "the model has not read one of them"
    session.feed([ids[44], *right[44][:3]])  # of which none comes
    session.rewind(session.position - 31)
    session.feed(ids[31:44])
    assert head.propose(ids, 9) == right[44]
    session.rewind(session.position - 3)
    session.feed(ids[3:31])
    assert head.propose(ids[:32], 2) == right[31][:2]
    other = model.session(256)
    other.feed(ids[:9])
    assert head.propose(ids[:10], 9) == right[9]
    other.feed(ids[9:10])
    assert head.propose(ids[:11], 9) == right[10]
    session.feed(ids[31:44])
    assert len(head.propose(ids, 9)) == 5, "of a window that lacks what was read before the other session"


def test_what_is_not_likely_to_be_reached_is_not_proposed(folder: Path, golden: dict[str, np.ndarray]) -> None:
    model, ids = load(folder), golden["ids"].tolist()
    head, session = drafter(model), model.session(256)
    done, lengths = 0, []
    for anchor, block, sure in zip(golden["anchors"], golden["blocks"], golden["confidences"], strict=True):
        session.feed(ids[done:anchor])
        done = anchor
        reached = np.cumprod(1 / (1 + np.exp(-sure)))
        assert np.abs(reached - 0.2).min() > 0.01
        worth = max(1, int((reached >= 0.2).sum()))
        lengths.append(worth)
        assert head.propose(ids[: anchor + 1], 9) == block[:worth].tolist()
    assert len(set(lengths)) > 1


def test_its_own_sequence_begins_anew_where_its_memory_is_full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the window that it had: the guesses are the same."""
    guesses = []
    for room in (1024, 12):
        monkeypatch.setattr("numoe.engine.dspark._ROOM", room)
        model = load(folder)
        head, session = drafter(model), model.session(256)
        session.feed(list(range(3, 40)))
        guesses.append([])
        for token in range(30):
            guesses[-1].append(head.propose([*session.tokens, token], 5))
            session.feed([token])
    assert all(guesses[0]) and guesses[0] == guesses[1]


def test_it_goes_back_as_far_as_the_session_does(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Further than its own rows do, of which only the latest are kept: they do not begin where the session's do."""
    config = dspark.config_of(CASE, sliding_window=100)
    model = load(dspark.write(checkpoint(CASE), tmp_path / "made", config, dspark.head(config)))
    head, session = drafter(model), model.session(1100)
    ids = [token % 90 for token in range(1100)]
    read = 0
    for position in (400, *range(470, 980, 100), *range(972, 1000, 5)):
        session.feed(ids[read:position])
        read = position
        assert head.propose(ids[: read + 1], 5)
    session.rewind(90)
    session.feed(ids[read - 90 : read])
    assert head.propose(ids[: read + 1], 5)


@pytest.mark.parametrize("sampled", [{"temperature": 0}, {"temperature": 1, "seed": 3}], ids=["greedy", "sampled"])
def test_the_text_is_the_same_as_without(folder: Path, sampled: dict[str, Any]) -> None:
    """What is drawn for a token is drawn of the model's own logits, whoever guessed it."""
    model = load(folder)
    plain, drafted = model.session(256), model.session(256)
    head = drafter(model)
    for ids in (list(range(3, 30)), list(range(60, 20, -1))):
        for session in (plain, drafted):
            session.rewind(min(5, session.position))
        right = "".join(plain.generate(ids, max_tokens=30, **sampled))
        generation = drafted.generate(ids, max_tokens=30, **sampled, drafter=head)
        assert "".join(generation) == right
        assert plain.tokens == drafted.tokens and generation.proposed > 20


def test_every_tensor_of_a_release_has_its_place() -> None:
    """Of V4-Flash-0731 with fewer experts, from the tensors' listing alone."""
    config = json.loads((Path(__file__).parents[1] / "configs/deepseek-ai__DeepSeek-V4-Flash-0731.json").read_text())
    config["n_routed_experts"] = 8
    infos, end = {}, 0
    for name, (dtype, shape) in released_v4_listing(config).items():
        nbytes = math.prod(shape) * ITEM_BYTES[dtype]
        infos[name] = TensorInfo(name, dtype, shape, Path("model.safetensors"), end, nbytes)
        end += nbytes
    kind = family("deepseek_v4")
    described = arrange(Path("x"), config, kind, kind.spec(config), Stored(Path("x"), infos, {}))
    found = find_dspark(described)
    assert found is not None and find_mtp(described) is None
    (spec, _, places), drafts = found
    assert len(spec.layers) == 3 and (drafts.size, drafts.noise, drafts.window) == (5, 128799, 128)
    stored = {part.name for place in places.values() for part in place.stored.parts}
    assert stored == {name for name in infos if name.startswith("mtp.")}
    assert described.aside == {"drafting": sum(infos[name].nbytes for name in stored)}


def test_released_tensors_are_computed_as_they_are_stored(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """In FP8 and FP4, as those of the layers."""
    config = dspark.config_of("v4_released", dspark_target_layer_ids=[3, 0])
    released = dspark.head(config, "released")
    made = dspark.write(checkpoint("v4_released"), tmp_path / "made", config, released)
    stored = load(made).description.checkpoint
    plain: dict[str, RawTensor] = {}
    for name in released:
        if not name.endswith(".scale"):
            one = stored[name]
            values = one.matrix().dequantize() if len(one.shape) == 2 and one.shape[0] > 1 else one.array()
            plain[name] = "F32", one.shape, values.astype("<f4").tobytes()
    other = dspark.write(checkpoint("v4_released"), tmp_path / "other", config, plain)
    found = []
    for folder in (made, other):
        model = load(folder)
        head, session = drafter(model), model.session(128)
        session.feed(list(range(3, 50)))
        found.append([head.propose([*session.tokens, 7], 5), head._head.state])
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[0][1], found[1][1], atol=2e-4)


def changed(name: str, of: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = of(tensors[name])

    return change


def without(part: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def more(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.update({name: np.ones((4, 80), np.float32)})


DIFFERENT: dict[str, tuple[dict[str, Any], Callable[[dict[str, np.ndarray]], None]]] = {
    **{f"no {key}": ({key: None}, without("nothing")) for key in dspark.SAYS},
    **{
        f"{key} {value}": ({key: value}, without("nothing"))
        for key, values in {
            "dspark_block_size": (0, -1, "5", 10**9, 2.5),
            "dspark_noise_token_id": (96, -1, "x"),
            "dspark_target_layer_ids": ([], [1, 4, 7], [1, 4], [1, 4, -1], [1, "4", 6], 6, [True, 4, 6]),
            "dspark_markov_rank": (11, 0),
            "dspark_n_routed_experts": (5,),
            "dspark_confidence": (True,),
            "compress_ratios": ([0, 4, 128, 4, 128, 0, 4, 0, 4, 0],),
        }.items()
        for value in values
    },
    **{
        f"without {part}": ({}, without(part))
        for part in ("mtp.0.", "mtp.1.", "mtp.2.", "main_proj", "main_norm", "mtp.2.norm", "hc_head_fn", "markov_w1",
                     "markov_w2", "confidence_head", "mtp.1.attn.wkv", "mtp.2.ffn.experts.9.w2", "mtp.0.ffn.gate.bias")
    },
    "narrow": ({}, changed("mtp.0.main_proj.weight", lambda values: values[:, :160].copy())),
    "wide": ({}, changed("mtp.2.markov_head.markov_w1.weight", lambda values: np.concatenate([values, values]))),
    "turned": ({}, changed("mtp.2.markov_head.markov_w2.weight", lambda values: values.T.copy())),
    "one more norm": ({}, more("mtp.1.attn.post_norm.weight")),
    "a gate": ({}, more("mtp.2.markov_head.gate.weight")),
    "a bias": ({}, more("mtp.2.confidence_head.proj.bias")),
    "a compressor": ({}, more("mtp.0.attn.compressor.ape")),
    "one more layer": ({}, more("mtp.3.attn_norm.weight")),
    "no number": ({}, more("mtp.x.attn_norm.weight")),
}  # fmt: skip


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_head_of_another_make_is_left_alone(case: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """And the model is what it is without."""
    says, change = DIFFERENT[case]
    config = dspark.config_of(CASE)
    config = {key: value for key, value in (config | says).items() if value is not None}
    tensors = dspark.values(dspark.head(dspark.config_of(CASE)))
    change(tensors)
    raw = {name: ("F32", values.shape, values.tobytes()) for name, values in tensors.items()}
    folder = dspark.write(checkpoint(CASE), tmp_path / "made", config, raw)
    described = describe(folder)
    assert find_dspark(described) is None and find_mtp(described) is None
    assert described.aside.keys() <= {"drafting"}


def test_one_that_gives_no_numbers_guesses_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = dspark.config_of(CASE)
    tensors = dspark.values(dspark.head(config))
    tensors["mtp.1.attn.wo_b.weight"] = np.full_like(tensors["mtp.1.attn.wo_b.weight"], 3e38)
    raw = {name: ("F32", values.shape, values.tobytes()) for name, values in tensors.items()}
    folder = dspark.write(checkpoint(CASE), tmp_path / "made", config, raw)
    tiny_tokenizer(folder, config["vocab_size"])
    model = load(folder)
    right = "".join(model.session(64).generate([3, 4, 5], max_tokens=9, temperature=0))
    head = drafter(model)
    generation = model.session(64).generate([3, 4, 5], max_tokens=9, temperature=0, drafter=head)
    assert "".join(generation) == right and generation.proposed == 0


def test_it_is_in_memory_where_there_is_room(folder: Path) -> None:
    described = describe(folder)
    budget = Budget(256 << 20)
    model = load(described, ram=budget, ctx=256)
    before = budget.room
    assert drafting(model) is not None
    stored = sum(info.nbytes for name, info in described.checkpoint.tensors.items() if name.startswith("mtp."))
    assert described.aside == {"drafting": stored}
    assert stored < before - budget.room
    rest = budget.reserve("all the rest", budget.room)
    assert load_dspark(model) is None and rest.nbytes


@pytest.mark.parametrize(
    "name", ["Qwen3DSparkModel", "Gemma4DSparkModel", "DFlashDraftModel", "LlamaForCausalLMEagle3"]
)
def test_heads_in_checkpoints_of_their_own_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [name], "model_type": "qwen3"}))
    with pytest.raises(InputError, match=rf"config\.json: {name} is a head that guesses tokens for one other model"):
        describe(tmp_path)
