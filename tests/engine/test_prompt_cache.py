"""A prompt that is read into a file: what is interrupted or killed goes on, to the same digits."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import tiny

from numoe.engine import InputError, Model, Session, load
from numoe.engine import prompt_cache as module
from numoe.engine.chat.conversation import Conversation
from numoe.engine.chat.files import Chat, Settings
from numoe.engine.chat.prompt import encode
from numoe.engine.prompt_cache import PromptCache

Models = Callable[[str], Model]
Checkpoints = Callable[[str], Path]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("numoe.engine.session", "numoe.engine.prompt_cache"):
        monkeypatch.setattr(f"{name}.CHUNK", 16)


def read(model: Model, path: Path, ids: list[int]) -> tuple[np.ndarray, int]:
    """The last logits, and how many tokens were read for them."""
    cache = PromptCache(path)
    session = cache.open(model, 256)
    try:
        unread = cache.begin(session, ids)
        return session.feed(unread, last=True, progress=cache.reading())[0], len(unread)
    finally:
        cache.close()


@pytest.mark.parametrize("case", ["v4_a", "llama_a", "gpt_oss_a", "qwen3_5_moe_a"])
@pytest.mark.parametrize("killed", [False, True])
def test_reading_that_ends_anywhere_goes_on_to_the_same_logits(
    case: str, killed: bool, model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C keeps the chunks that were read, and a kill those that were last written."""
    loaded, ids = model(case), tiny.load_golden(case).ids[:150].tolist()
    right, count = read(loaded, tmp_path / "whole", ids)
    assert count == 150
    blocks, random = loaded.decoder.blocks, Random(1)
    if killed:
        monkeypatch.setattr(module, "_LEAST_SECONDS", 0.0)
        monkeypatch.setattr(module, "SHARE", float("inf"))
    for number in range(5):
        path, block, after = tmp_path / str(number), random.choice(blocks), random.randrange(10)
        compute, calls = block.compute, []

        def interrupt(*given: object, compute=compute, calls=calls, after=after) -> np.ndarray:  # type: ignore[no-untyped-def]
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return compute(*given)

        with monkeypatch.context() as patch:
            patch.setattr(block, "compute", interrupt)
            if killed:
                patch.setattr(PromptCache, "close", lambda cache: None)
            with pytest.raises(KeyboardInterrupt):
                read(loaded, path, ids)
        assert path.exists() == (after > 0)
        made, left = read(loaded, path, ids)
        assert left == 150 - 16 * after
        np.testing.assert_array_equal(made, right)


KILLED = """
import os, random, signal, sys
from pathlib import Path
import numpy as np
import test_prompt_cache as test
from numoe.engine import load, prompt_cache, session

session.CHUNK = prompt_cache.CHUNK = 16
prompt_cache._LEAST_SECONDS, prompt_cache.SHARE = 0.0, float("inf")
folder, places = Path(sys.argv[2]), random.Random(20)
model, ids = load(sys.argv[1], threads=1), test.tiny.load_golden("v4_a").ids[:150].tolist()

def dying(steps):
    def count(event, arguments):
        nonlocal steps
        if event in ("computed", "open", "os.rename"):
            steps -= 1
            if not steps:
                os.kill(os.getpid(), signal.SIGKILL)
    def counted(compute):
        return lambda *given: (count("computed", ()), compute(*given))[1]
    for block in model.decoder.blocks:
        block.compute = counted(block.compute)
    sys.addaudithook(count)
    test.read(model, folder / "kept", ids)

rights, _ = test.read(model, folder / "whole", ids)
for number in range(20):
    steps = places.randrange(1, 130)
    if not os.fork():
        dying(steps)
    print(os.waitpid(-1, 0)[1], end=" ")
    made, left = test.read(model, folder / "kept", ids)
    print(left, np.array_equal(made, rights), sorted(path.name for path in folder.iterdir()) == ["kept", "whole"])
    (folder / "kept").unlink()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows ends no process at a step of its own")
def test_reading_that_is_killed_anywhere_goes_on_to_the_same_logits(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """At twenty of the steps that it computes or is on disk."""
    command = [sys.executable, "-c", KILLED, checkpoint("v4_a"), tmp_path]
    tests = os.pathsep.join((*map(str, (Path(__file__).parent, Path(__file__).parents[1])), *sys.path))
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": tests}, stdout=subprocess.PIPE, text=True, check=True
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 20
    assert [line[2:] for line in lines] == [["True", "True"]] * 20, done.stdout
    assert all(status == "9" for status, *_ in lines), done.stdout
    assert len({left for _, left, *_ in lines}) > 5, "what was read before is not read again"


@pytest.mark.parametrize("case", ["v4_a", "gpt_oss_a", "qwen3_5_moe_a"])
def test_prompts_that_begin_alike_read_the_beginning_once(case: str, model: Models, tmp_path: Path) -> None:
    """Also where caches cannot go back to where they differ, from the third on."""
    loaded, ids = model(case), tiny.load_golden(case).ids[:150].tolist()
    path, tails = tmp_path / "kept", [[1] * 100, [2] * 100, [3] * 9, [4] * 9]
    counts = [read(loaded, path, ids + tail)[1] for tail in tails]
    assert counts == [250, 250, 150 % 16 + 9, 150 % 16 + 9]
    made = read(loaded, path, ids + tails[3])[0]
    fresh = loaded.session(256)
    fresh.feed(ids[: 150 // 16 * 16])
    np.testing.assert_array_equal(made, fresh.feed([*ids, *tails[3]][150 // 16 * 16 :], last=True)[0])
    assert read(loaded, path, [9] * 40)[1] == 40, "another prompt takes its place"
    assert read(loaded, path, [*[9] * 40, *[8] * 40])[1] == 40


def test_chats_begin_with_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, system = load("tiny"), "Tim has a red key. " * 30
    ids, _ = encode(
        model.description.chat_format,
        model.tokenizer,
        [{"role": "system", "content": system}, {"role": "user", "content": "Hello!"}],
        thinking=False,
    )
    read(model, tmp_path / "kept", ids[:200])
    conversation = Conversation(model, Chat("tiny", Settings(system=system, context=512)), None, tmp_path / "kept")
    fed: list[int] = []
    feed = Session.feed
    monkeypatch.setattr(Session, "feed", lambda self, ids, **more: (fed.append(len(ids)), feed(self, ids, **more))[1])
    "".join(text for _, text in conversation.ask("What does Tim have?"))
    assert 0 < fed[0] < 60
    with pytest.raises(InputError, match="there is no file"):
        Conversation(model, Chat("tiny", Settings()), None, tmp_path / "none")


def test_what_is_no_file_of_this_model_is_left_alone(model: Models, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("mine")
    with pytest.raises(InputError, match="is not a session file"):
        read(model("llama_a"), path, [1, 2, 3])
    assert path.read_text() == "mine"
    read(model("llama_a"), tmp_path / "kept", [1, 2, 3])
    with pytest.raises(InputError, match="holds float32 rows; give `kv` float32, or another file"):
        read(load(model("llama_a").path, kv="int8"), tmp_path / "kept", [1, 2, 3])
