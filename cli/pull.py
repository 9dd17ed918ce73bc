"""`numoe pull`: a model downloaded from the hub, its weights in the formats of a recipe."""

from __future__ import annotations

import shutil
import time
from collections import deque
from typing import TYPE_CHECKING

from numoe.cli import arguments
from numoe.cli.output import Output, duration
from numoe.cli.settings import Options, takes

if TYPE_CHECKING:
    from numoe.engine.pull import Progress

_PAUSE = 0.1  # seconds between two status lines
_LATELY = 10  # seconds that a speed is taken over
_LONGEST_BAR, _SHORTEST_BAR = 30, 6


@takes("quant", "keep", "revision", "connections", "threads", "quiet", quant="native")
def pull(model: arguments.HubId, options: Options) -> None:
    """Download a model. After an interruption the same command goes on where it was.

    Examples:
    numoe pull Qwen/Qwen3-30B-A3B --quant int4
    """
    with Output(options["quiet"]) as output:
        from numoe.engine.home import shortest_name
        from numoe.engine.hub.hub_id import named
        from numoe.engine.plan import format_bytes
        from numoe.engine.pull import CONNECTIONS
        from numoe.engine.pull import pull as fetch
        from numoe.quant.compute import threads as kernel_threads

        kernel_threads.use(options["threads"] or kernel_threads.usable_cores())
        model, revision = named(model)
        output.status(f"asking the hub for {model}")
        display = _Display(output)
        try:
            pulled = fetch(
                model,
                options["quant"],
                options["revision"] or revision,
                options["keep"],
                display.show,
                tell=display.tell,
                connections=options["connections"] or CONNECTIONS,
            )
        except KeyboardInterrupt:
            output.note("stopped; the same command goes on from here")
            raise
        if pulled.conversion is None:
            output.note(f"{model} is complete already, in {pulled.path}")
        elif pulled.conversion.as_it_was:
            output.note(f"{format_bytes(pulled.conversion.result_bytes)} in {pulled.path}")
        else:
            before, after = format_bytes(pulled.conversion.source_bytes), format_bytes(pulled.conversion.result_bytes)
            output.note(f"{before} of weights became {after} in {pulled.path}")
            if pulled.conversion.remark:
                output.note(pulled.conversion.remark)
        output.note(f"numoe chat {shortest_name(pulled.path)}")


class _Display:
    """Progress on one status line; where there is none, a line a shard."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._first: Progress | None = None
        self._since = self._shown = time.monotonic()
        self._noted = 0
        self._trouble: str | None = None
        self._received = 0
        self._lately: deque[tuple[float, int]] = deque()

    def tell(self, trouble: str) -> None:
        """What goes wrong, for as long as nothing more arrives."""
        if trouble != self._trouble:
            self._output.milestone(trouble)
        self._output.status(trouble)
        self._trouble = trouble

    def show(self, at: Progress) -> None:
        from numoe.engine.plan import format_bytes

        now = time.monotonic()
        if self._first is None:
            self._first, self._since, self._noted = at, now, at.shards
        received = f"{format_bytes(at.received)} of {format_bytes(at.to_receive)}"
        if at.shards > self._noted:
            self._noted = at.shards
            written = format_bytes(at.written)
            self._output.milestone(f"shard {at.shards} of {at.of_shards}: {received} received, {written} written")
        if now - self._shown < _PAUSE:
            return
        self._shown = now
        if at.received > self._received:
            self._trouble, self._received = None, at.received
        if self._trouble:
            self._output.status(self._trouble)
            return
        self._output.status(self._line(at, now, shutil.get_terminal_size().columns - 1))

    def _line(self, at: Progress, now: float, width: int) -> str:
        """How far it is, with as much of it as so many columns hold, and a bar in what is left of them."""
        from numoe.engine.plan import format_bytes

        assert self._first is not None
        seconds = max(now - self._since, 1e-3)
        done, todo = at.received - self._first.received, at.to_receive - at.received
        if not todo:  # until then what is written keeps pace, as no more than two shards are ahead
            done, todo = at.written - self._first.written, at.to_write - at.written
        left = [f"{duration(todo * seconds / done)} left"] if done else []
        received, whole = format_bytes(at.received), format_bytes(at.to_receive)
        number, unit = received.split(" ")
        amounts = f"{number if whole.endswith(f' {unit}') else received} of {whole}"
        speed = self._speed(at, now)
        known = [f"{format_bytes(int(speed))}/s"] if speed is not None else []
        parts = [amounts, *(known if at.arriving else ["all received"]), *left]
        shard = f"shard {at.arriving or at.of_shards}/{at.of_shards}"
        ways = [[shard, *parts], [shard, amounts, *left], [amounts, *left], [amounts]]
        if at.converting:
            ways.insert(0, [*ways[0], f"converting {at.converting}"])
        longest = width - _SHORTEST_BAR - 1
        text = next((text for way in ways if len(text := ", ".join(way)) <= longest), amounts)
        room = min(_LONGEST_BAR, width - len(text) - 1)
        done = at.received + at.written
        return f"{self._output.gauge(done, at.to_receive + at.to_write, max(0, room))} {text}"

    def _speed(self, at: Progress, now: float) -> float | None:
        """Bytes a second that came lately; None: nothing was seen to come yet."""
        self._lately.append((now, at.received))
        while len(self._lately) > 2 and now - self._lately[1][0] > _LATELY:
            self._lately.popleft()
        since, before = self._lately[0]
        if len(self._lately) == 1:
            return None
        return (at.received - before) / max(now - since, _PAUSE)
