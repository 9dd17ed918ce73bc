"""`numoe pull`: a model downloaded from the hub, its weights in the formats of a recipe."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from numoe.cli import arguments
from numoe.cli.output import Output, duration
from numoe.cli.settings import Options, Recipe, takes

if TYPE_CHECKING:
    from numoe.engine.pull import Progress

_PAUSE = 0.1  # seconds between two status lines


@takes("quant", "keep", "revision", "threads", "quiet", quant=Recipe.NATIVE)
def pull(model: arguments.HubId, options: Options) -> None:
    """Download a model. After an interruption the same command goes on where it was.

    Examples:
    numoe pull Qwen/Qwen3-30B-A3B --quant int4
    """
    with Output(options["quiet"]) as output:
        from numoe.engine.plan import format_bytes
        from numoe.engine.pull import pull as fetch
        from numoe.quant.compute import threads as kernel_threads

        kernel_threads.use(options["threads"] or kernel_threads.usable_cores())
        output.status(f"asking the hub for {model}")
        display = _Display(output)
        try:
            pulled = fetch(
                model,
                options["quant"].value,
                options["revision"],
                options["keep"],
                display.show,
                tell=display.tell,
            )
        except KeyboardInterrupt:
            output.note("stopped; the same command goes on from here")
            raise
        if pulled.conversion is None:
            output.note(f"{model} is complete already, in {pulled.path}")
        else:
            before, after = format_bytes(pulled.conversion.source_bytes), format_bytes(pulled.conversion.result_bytes)
            output.note(f"{before} of weights became {after} in {pulled.path}")
            if pulled.conversion.remark:
                output.note(pulled.conversion.remark)


class _Display:
    """Progress on one status line; where there is none, a line a shard."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._first: Progress | None = None
        self._since = self._shown = time.monotonic()
        self._noted = 0
        self._trouble: str | None = None
        self._received = 0

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
        seconds = max(now - self._since, 1e-3)
        speed = (at.received - self._first.received) / seconds
        steps = (
            (at.received - self._first.received, at.to_receive - at.received),
            (at.written - self._first.written, at.to_write - at.written),
        )
        left = [todo * seconds / done for done, todo in steps if done]
        shard = min(at.shards + 1, at.of_shards)
        parts = [f"shard {shard} of {at.of_shards}", received, f"{format_bytes(int(speed))}/s"]
        self._output.status(", ".join(parts + ([f"{duration(max(left))} left"] if left else [])))
