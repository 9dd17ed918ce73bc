"""`numoe quantize`: a checkpoint written anew with smaller weights."""

from __future__ import annotations

from numoe.cli import options
from numoe.cli.output import Output


def quantize(
    source: options.Source,
    destination: options.Destination,
    quant: options.Quant,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
) -> None:
    """Write a model into a new folder, its weights in fewer bits."""
    with Output(quiet) as output:
        from numoe.engine import describe
        from numoe.engine.plan import format_bytes
        from numoe.quant import threads as kernel_threads
        from numoe.quant.convert import PART_SUFFIX, Folder, convert

        shown = -1

        def progress(done: int, total: int) -> None:
            nonlocal shown
            percent = 100 * done // max(total, 1)
            if percent != shown:
                shown = percent
                bar = "#" * (percent // 5) + "." * (20 - percent // 5)
                output.status(f"writing [{bar}] {format_bytes(done)} of {format_bytes(total)}")

        kernel_threads.use(threads or kernel_threads.usable_cores())
        destination = destination.expanduser()
        description = describe(source)
        origin = Folder(description.path, source)
        try:
            made = convert(description.checkpoint, description.matrices(), destination, quant.value, origin, progress)
        except KeyboardInterrupt:
            if destination.with_name(destination.name + PART_SUFFIX).exists():
                output.note("stopped; the same command goes on from here")
            raise
        before, after = format_bytes(made.source_bytes), format_bytes(made.result_bytes)
        output.note(f"{before} of weights became {after} in {destination}")
