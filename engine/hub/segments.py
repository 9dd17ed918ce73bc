"""A transfer over several connections at once, whose bytes come in order all the same: to be hashed and appended."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Condition

SEGMENT = 32 << 20
"""Bytes that one request asks for: so many are held in memory for each connection."""
_REPORT_S = 0.2

Put = Callable[[bytes], None]
"""Takes a block of a segment; what it raises ends the request."""


@dataclass
class _Segment:
    """What has arrived of a part and not been given on."""

    blocks: list[bytes] = field(default_factory=list)
    nbytes: int = 0
    ended: bool = False
    error: BaseException | None = None

    def has_news(self) -> bool:
        return self.ended or bool(self.blocks)


class _Left(Exception):
    """Nobody waits for the bytes any more."""


def cut(start: int, stop: int) -> Generator[tuple[int, int]]:
    """The first byte of each segment of a range, and that after its last."""
    for first in range(start, stop, SEGMENT):
        yield first, min(first + SEGMENT, stop)


def in_order(
    fetch: Callable[[int, int, Put], None], parts: Iterable[tuple[int, int]], connections: int
) -> Generator[tuple[bytes, int]]:
    """The blocks of all parts in their order, each with how many bytes after it are here already.

    From time to time there is an empty block, to tell how far the others are while one is waited for.

    Args:
        fetch: fetch(first, last, put) has the blocks of a part put in order, and raises what ends the transfer. It is
            called from several threads.
        connections: as many parts are fetched at once, and held in memory.
    """
    change, waiting, arriving, left = Condition(), deque(parts), deque[_Segment](), False

    def get(segment: _Segment, first: int, last: int) -> None:
        def put(block: bytes) -> None:
            with change:
                change.wait_for(lambda: left or segment.nbytes < SEGMENT)  # a disk may be slower than the network
                if left:
                    raise _Left
                segment.blocks.append(block)
                segment.nbytes += len(block)
                change.notify_all()

        try:
            fetch(first, last, put)
        except BaseException as error:  # which is for who waits
            segment.error = error
        with change:
            segment.ended = True
            change.notify_all()

    pool = ThreadPoolExecutor(connections, "numoe-connection")
    try:
        while waiting or arriving:
            while waiting and len(arriving) < connections:
                arriving.append(_Segment())
                pool.submit(get, arriving[-1], *waiting.popleft())
            head = arriving[0]
            with change:
                change.wait_for(head.has_news, _REPORT_S)
                blocks, head.blocks, head.nbytes = head.blocks, [], 0
                ended = head.ended
                ahead = sum(segment.nbytes for segment in arriving)
                change.notify_all()
            rest = sum(map(len, blocks))
            for block in blocks or [b""]:
                rest -= len(block)
                yield block, ahead + rest
            if ended:
                if head.error is not None:
                    raise head.error
                arriving.popleft()
    finally:
        with change:
            left = True
            change.notify_all()
        pool.shutdown(wait=False, cancel_futures=True)  # one may wait to try again, which nobody needs any more
