"""Every family against transformers' float32 logits, however the tokens are fed.

All golden cases are run for their logits, greedy tokens and shared passes; the other ways of feeding on one of each
combination of states, and with `-m slow` on the rest.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from cases import STATES
from helpers import of_company

from numoe.engine import InputError, Model, Session
from numoe.engine.layers.cache import Cache
from numoe.quant.stored.safetensors import read_header

Models = Callable[[str], Model]

# V4's prompts close three windows of 128 tokens and make the indexer choose.
CASES = tiny.cases()


def bound(case: str, usual: float) -> float:
    """How far logits may be off. Recurrent states carry every rounding on: noise in the weights moves those more."""
    return max(usual, 1e-3) if case.startswith(tiny.RECURRENT) else usual


def feed_all(session: Session, ids: list[int], sizes: list[int]) -> np.ndarray:
    """Feed ids in chunks of these sizes, in turn."""
    parts, at = [], 0
    while at < len(ids):
        size = sizes[len(parts) % len(sizes)]
        parts.append(session.feed(ids[at : at + size]))
        at += size
    return np.concatenate(parts)


@pytest.mark.parametrize("case", CASES)
def test_logits_match_the_reference_at_every_position(model: Models, case: str) -> None:
    golden = tiny.load_golden(case)
    logits = model(case).session(1024).feed(golden.ids)
    assert logits.dtype == np.float32
    assert np.abs(logits - golden.logits).max() < bound(case, 2e-4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("case", "name", "named"),
    [
        ("llama_a", "layers.2.ffn_norm", r"layer 2 \(dense\)"),
        ("qwen3_moe_a", "layers.1.ffn_norm", r"layer 1 \(routed\)"),  # in scores of experts first
        ("v3_a", "layers.2.attention_norm", r"layer 2 \("),
        ("v4_a", "layers.2.attention_norm", r"layer 2 \("),
        ("granitemoehybrid_a", "layers.0.attention_norm", r"layer 0 \("),
        ("llama_a", "norm", "the head"),
    ],
)
def test_a_layer_that_computes_no_numbers_is_named(model: Models, case: str, name: str, named: str) -> None:
    made = model(case)
    weights = made.weights.arrays[name]
    kept = weights.copy()
    ids = tiny.load_golden(case).ids[:30].tolist()
    session, other = made.session(64), made.session(64)
    session.feed(ids[:5])
    other.feed(ids[:5])
    weights[:] = 3e38
    try:
        with pytest.raises(InputError, match=f"{named}.* computes to NaN or infinity"):
            session.feed(ids[5:])
    finally:
        weights[:] = kept
    assert session.position == 5
    np.testing.assert_array_equal(session.feed(ids[5:]), other.feed(ids[5:]))


@pytest.mark.parametrize("case", CASES)
def test_greedy_continuation_matches_token_for_token(model: Models, case: str) -> None:
    golden = tiny.load_golden(case)
    session = model(case).session(1024)
    logits, made = session.feed(golden.ids, last=True), []
    for _ in golden.greedy:
        made.append(int(logits[0].argmax()))
        logits = session.feed([made[-1]], last=True)
    assert made == golden.greedy.tolist()


@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("sizes", [[1], [3, 1, 50, 129, 2, 17]], ids=["one by one", "uneven"])
def test_chunking_does_not_matter(model: Models, case: str, sizes: list[int]) -> None:
    ids = tiny.load_golden(case).ids.tolist()
    whole = model(case).session(1024).feed(ids)
    chunked = feed_all(model(case).session(1024), ids, sizes)
    assert np.abs(chunked - whole).max() < bound(case, 1e-4)


@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("back", [1, 2, 40, 150], ids=lambda n: f"back {n}")
def test_rewinding_leads_to_the_logits_of_a_fresh_run(model: Models, case: str, back: int) -> None:
    ids = tiny.load_golden(case).ids.tolist()
    back = min(back, len(ids) - 1)
    session = model(case).session(1024)
    fresh = session.feed(ids)
    session.rewind(back)
    assert session.position == len(ids) - back
    session.feed([(t + 1) % model(case).spec.vocab for t in ids[-back:]])  # other tokens overwrite the rows
    session.rewind(back)
    assert np.abs(session.feed(ids[-back:]) - fresh[-back:]).max() < bound(case, 1e-4)


@pytest.mark.parametrize("case", STATES)
def test_restoring_a_snapshot_leads_to_the_logits_of_a_fresh_run(model: Models, case: str) -> None:
    ids = tiny.load_golden(case).ids.tolist()
    session = model(case).session(1024)
    fresh = session.feed(ids)
    session.rewind(session.position)
    session.feed(ids[:100])
    snapshot = session.snapshot()
    session.feed(ids[100:])
    session.restore(snapshot)
    assert session.tokens == ids[:100]
    assert np.abs(session.feed(ids[100:]) - fresh[100:]).max() < 1e-4


@pytest.mark.parametrize(
    "case", ["v4_b", "mixtral_b", *(pytest.param(case, marks=pytest.mark.slow) for case in ("v4_a", "v3_a", "llama_a"))]
)
def test_long_inputs_pass_through_moved_caches(model: Models, case: str) -> None:
    """Streams of latest rows are moved to the front of their memory when it is full: feed well beyond it."""
    loaded = model(case)
    ids = tiny.random_ids("long", 1500, loaded.spec.vocab).tolist()
    context = min(1500, loaded.spec.context)
    ids = ids[:context]
    whole = loaded.session(context).feed(ids)
    session = loaded.session(context)
    chunked = feed_all(session, ids, [211, 64, 400])
    assert np.abs(chunked - whole).max() < bound(case, 1e-4)
    session.rewind(33)
    assert np.abs(session.feed(ids[-33:]) - whole[-33:]).max() < 1e-4


def shared_pass(model: Model, golden: tiny.Golden) -> tuple[list[tuple[np.ndarray, Cache]], np.ndarray]:
    """Three sequences with the tokens that each reads next, and their logits where each is read alone."""
    decoder, ids = model.decoder, golden.ids
    parts, alone = [], []
    for before, after in ((ids[:37], ids[37:48]), (ids[60:61], ids[61:62]), (ids[:2], ids[:9])):
        single, shared = decoder.cache(64), decoder.cache(64)
        for cache in (single, shared):
            decoder.forward(before, cache)
        alone.append(decoder.forward(after, single))
        parts.append((after, shared))
    return parts, np.concatenate(alone)


@pytest.mark.parametrize("case", CASES)
def test_sequences_that_share_a_pass_are_computed_as_if_alone(model: Models, case: str) -> None:
    decoder = model(case).decoder
    parts, alone = shared_pass(model(case), tiny.load_golden(case))
    together = decoder.forward_all(parts, "all")
    assert np.abs(together - alone).max() < of_company(5e-5 if case.startswith(tiny.RECURRENT) else 1e-5)
    assert [cache.position for _, cache in parts] == [48, 2, 11]
    last = decoder.forward_all([(after[:1], cache) for after, cache in parts])
    assert last.shape == (3, decoder.spec.vocab)


@pytest.mark.parametrize("case", STATES)
def test_sessions_of_several_threads_share_a_model(model: Models, case: str) -> None:
    """What a pass keeps for its layers, as the angles of its positions, is its own."""
    shared, ids = model(case), tiny.load_golden(case).ids

    def read(first: int) -> np.ndarray:
        return feed_all(shared.session(64), ids[first : first + 30], [3])

    alone = [read(first) for first in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for ours, right in zip(pool.map(read, range(4)), alone, strict=True):
            assert np.array_equal(ours, right)


@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("block", [1, -1], ids=["first layer", "last layer"])
def test_an_interrupted_pass_leaves_every_sequence_of_it_as_it_was(
    model: Models, case: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = model(case).decoder
    parts, alone = shared_pass(model(case), tiny.load_golden(case))
    compute, passes = decoder.blocks[block].compute, []

    def interrupt(*arguments: Any) -> Any:
        compute(*arguments)
        passes.append(arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decoder.blocks[block], "compute", interrupt)
        with pytest.raises(KeyboardInterrupt):
            decoder.forward_all(parts)
    assert len(passes) == 1 and [cache.position for _, cache in parts] == [37, 1, 2]
    assert np.abs(decoder.forward_all(parts, "all") - alone).max() < bound(case, 1e-4)


READ = """
import sys
from numoe.engine import InputError, Sampling, load
from numoe.engine.text.sample import Sampler
try:
    logits = load(sys.argv[1]).session(256).feed([token % 60 for token in range(200)], last=True)
    Sampler(Sampling()).choose(logits[0])
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("case", "part"),
    [("mixtral_a", "gate.weight"), ("llama_a", "q_proj"), ("v3_a", "o_proj"), ("v4_a", "indexer")],
)
def test_weights_that_overflow_are_one_sentence(
    case: str, part: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """NaN in routers, indexers and logits, and no warning of NumPy's."""
    folder = Path(shutil.copytree(checkpoint(case), tmp_path / "model"))
    tensors, _ = read_header(folder / "model.safetensors")
    damaged = bytearray((folder / "model.safetensors").read_bytes())
    for info in tensors.values():
        if part in info.name and info.dtype in ("F32", "BF16"):  # to 3e38 with the sign it has
            for byte in range(info.offset, info.offset + info.nbytes, 2 if info.dtype == "BF16" else 4):
                high = byte + (0 if info.dtype == "BF16" else 2)
                damaged[high], damaged[high + 1] = 0x7F, damaged[high + 1] & 0x80 | 0x7F
    (folder / "model.safetensors").write_bytes(damaged)
    done = subprocess.run([sys.executable, "-P", "-c", READ, folder], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("layer ") and done.stdout.count("\n") == 1
    assert " computes to NaN or infinity, as damaged weights make it" in done.stdout
