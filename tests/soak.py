"""Whether numoe stays as it is for hours: `python tests/soak.py [MINUTES]`, an hour by default.

Rounds of all that a long-lived process does: chat turns, cancelled answers, resets, saves, sessions that are restored
or refused, answers of a form, several sequences at once, experts from disk, and a server's: answers to clients that
stay and that leave, what is refused, two models by turns. Told and compared are memory, open files, threads and
processes (which stay the same, memory to 2 %), and the computing of a round (5 %).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import http.client
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from serving import application, on_loopback

from numoe import engine
from numoe.engine import InputError, load
from numoe.engine.batch import Passes
from numoe.engine.chat.answer import Settings
from numoe.engine.chat.conversation import Conversation
from numoe.engine.chat.files import Chat
from numoe.engine.text.grammar import choice_grammar, json_grammar

QUESTIONS = ("What colour is a frog?", "And where does it live?", "Tell me a story about a fox and a lamp.")
TINY = Path(engine.__file__).parent / "tiny"
CHAT = Chat("tiny", settings=Settings(max_tokens=24))
WARMING = 4  # rounds before the first figures count: caches fill, libraries load what they need
MEMORY, SECONDS = 0.02, 0.05
_PR_SET_THP_DISABLE = 41


@dataclass(frozen=True)
class Figures:
    """What a process has: bytes of memory (its children's too), open files, threads, and processes that it began.

    A pool is one thread: how many it begins, up to its bound, depends on how busy the machine is.
    """

    memory: int
    files: int
    threads: int
    processes: int

    @classmethod
    def now(cls) -> Figures:
        gc.collect()
        with contextlib.suppress(AttributeError):  # of C libraries other than glibc, which keeps what is free by thread
            ctypes.CDLL(None).malloc_trim(0)
        process = psutil.Process()
        children = process.children(recursive=True)
        memory = sum(map(memory_of, (process, *children)))
        pooled = sum(re.search("_[1-9][0-9]*$", one.name) is not None for one in threading.enumerate())
        return cls(memory, process.num_fds(), process.num_threads() - pooled, len(children))


def memory_of(process: psutil.Process) -> int:
    """Bytes of a process beside what it maps of files; of pages that several have, its share."""
    if sys.platform != "linux":
        return int(process.memory_full_info().uss)
    rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
    return sum(1024 * int(kb) for kb in re.findall(r"^Pss_(?:Anon|Shmem):\s*(\d+) kB$", rollup, re.MULTILINE))


def by_small_pages() -> None:
    """Have Linux give this process and its children what they touch, and not 2 MB around it where it likes to."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


class Client:
    """Asks a server of two models."""

    def __init__(self, address: str, models: tuple[str, str]) -> None:
        self._place, self._models = urlsplit(address).netloc, models

    def round(self) -> None:
        asked = [{"role": "user", "content": "Hello. " * 30 + QUESTIONS[0]}]  # long enough to be kept on the disk
        for model in self._models:
            chat = {"model": model, "messages": asked, "max_tokens": 8}
            assert self._post("/v1/chat/completions", json.dumps(chat)) == 200
            assert self._post("/v1/messages", json.dumps({**chat, "stream": True})) == 200
            for pieces in range(3):
                self._post("/v1/responses", json.dumps({"model": model, "input": "Hello", "stream": True}), pieces)
        for refused in (b"{", b"[" * 9999, b'{"model": "other", "messages": []}', b'{"model": 1}', b"\xff\xfe"):
            assert self._post("/v1/chat/completions", refused) in (400, 404)

    def _post(self, path: str, body: str | bytes, lines: int | None = None) -> int:
        """The status of a reply that is read to its end, or left after so many lines."""
        connection = http.client.HTTPConnection(self._place)
        with contextlib.closing(connection):
            connection.request("POST", path, body)
            reply = connection.getresponse()
            if lines is None:
                reply.read()
            for _ in range(lines or 0):
                reply.readline()
            return reply.status


class Work:
    """The same in every round."""

    def __init__(self, folder: Path, client: Client) -> None:
        self.folder, self.client = folder, client
        self.model = load("tiny", ram="200MB")
        self.disk = load("tiny", ram=self.model.plan(64).least_bytes + 1000, ctx=64)
        self.conversation = Conversation(self.model, CHAT)

    def round(self) -> None:
        self._talk()
        self._keep()
        self._shape()
        self._together()
        self._from_disk()
        self.client.round()

    def _talk(self) -> None:
        """Turns, of which one is cancelled; then a reset."""
        for question in QUESTIONS:
            "".join(text for _, text in self.conversation.ask(question))
        with contextlib.closing(self.conversation.ask(QUESTIONS[-1])) as answer:
            next(answer)
        list(self.conversation.retry())
        self.conversation.chat.write(self.folder / "chat.json")
        self.conversation.save_cache(self.folder / "chat.kv")
        self.conversation = Conversation(self.model, CHAT)

    def _keep(self) -> None:
        """A chat that is gone on with, from its cache and from a damaged one."""
        chat = Chat.read(self.folder / "chat.json")
        resumed = Conversation(self.model, chat, self.folder / "chat.kv")
        assert resumed.restored
        list(resumed.ask(QUESTIONS[0]))
        damaged = bytearray((self.folder / "chat.kv").read_bytes())
        damaged[-1] ^= 1
        (self.folder / "damaged.kv").write_bytes(damaged)
        assert "damaged" in Conversation(self.model, chat, self.folder / "damaged.kv").reason

    def _shape(self) -> None:
        """Answers of a form, and requests that are refused."""
        session = self.model.session(256)
        for grammar in (choice_grammar(["yes", "no"]), json_grammar({"type": "integer", "maximum": 9, "minimum": 0})):
            list(session.generate("Is it?", max_tokens=8, grammar=grammar))
        for refused in ({"multipleOf": 2147483647}, {"const": 1 << 63}):
            with contextlib.suppress(InputError):
                json_grammar(refused)
        with contextlib.suppress(InputError):
            session.feed([1 << 40])

    def _together(self) -> None:
        """Several sequences in one pass."""
        passes = Passes(self.model.decoder)

        def answer(question: str) -> None:
            with passes.member(), self.model.session(256, passes=passes) as session:
                list(session.generate(question, max_tokens=8))

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(answer, QUESTIONS))

    def _from_disk(self) -> None:
        """Experts that do not fit into memory, which another process takes and gives back."""
        store = self.disk.experts
        assert store is not None
        for free in (0, 1 << 40):
            store.share(lambda free=free: free, 0)  # type: ignore[misc]
            list(self.disk.session(64).generate(QUESTIONS[0], max_tokens=8))


def measured(work: Work, until: float, rounds: int = 0) -> Iterator[tuple[Figures, float]]:
    """The figures after each round and its seconds of computing, until then, and so many rounds at least."""
    done = 0
    while time.monotonic() < until or done < rounds:
        begun = computed()
        work.round()
        seconds = computed() - begun
        yield Figures.now(), seconds
        done += 1


def computed() -> float:
    """Seconds that this process and those it began have computed: what others do does not count."""
    own = os.times()
    living = (one.cpu_times() for one in psutil.Process().children(recursive=True))
    return sum(own[:4]) + sum(times.user + times.system for times in living)


def growth(rounds: list[Figures]) -> list[str]:
    """What is not as it was: the second half of the rounds against the first, as sentences."""
    half = len(rounds) // 2
    faults: list[str] = []
    for name in ("memory", "files", "threads", "processes"):
        # What is lost is never there again; what is, or is not yet given back, comes and goes.
        first, last = (min(getattr(one, name) for one in part) for part in (rounds[:half], rounds[half:]))
        if last > first * (1 + (MEMORY if name == "memory" else 0)):
            faults.append(f"{name} grew from {first:,} to {last:,}")
    return faults


def main(minutes: str = "60") -> int:
    """Run, and return 1 where something grew."""
    by_small_pages()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        os.environ["NUMOE_HOME"] = str(folder / "home")
        other = shutil.copytree(TINY, folder / "other")
        app = application("tiny", str(other), ram="200MB", ctx=512, save=True)
        client = Client(stack.enter_context(on_loopback(app)), ("tiny", other.name))
        work, seen, seconds = Work(folder, client), [], []
        for number, (figures, took) in enumerate(measured(work, time.monotonic() + 60 * float(minutes), WARMING + 8)):
            if number >= WARMING:
                seen.append(figures)
                seconds.append(took)
            if number % 50 == WARMING:
                print(f"round {number}: {took:.2f} s, {figures}", flush=True)
        faults = growth(seen)
        half = len(seconds) // 2
        early, late = min(seconds[:half]), min(seconds[half:])
        print(f"{len(seen)} rounds; {early:.3f} s each at first, {late:.3f} s at last; {seen[0]} to {seen[-1]}")
        if late > early * (1 + SECONDS):
            faults.append(f"rounds became slower, {early:.3f} s to {late:.3f} s")
        for fault in faults:
            print(fault)
        return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
