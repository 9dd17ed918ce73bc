"""`numoe quantize`: a checkpoint written anew with smaller weights."""

from __future__ import annotations

from typing import Annotated

import typer

from numoe.cli import options
from numoe.cli.output import Output
from numoe.cli.text import read_text

Calibrate = Annotated[
    str | None,
    typer.Option("--calibrate", metavar="FILE", help="For int4: spare the weights that matter for this text."),
]


def quantize(
    source: options.Source,
    destination: options.Destination,
    quant: options.Quant,
    calibrate: Calibrate = None,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
) -> None:
    """Write a model into a new folder, its weights in fewer bits."""
    if calibrate is not None and quant is not options.Recipe.INT4:
        raise typer.BadParameter("only int4 is calibrated; leave --calibrate out, or give --quant int4")
    text = None if calibrate is None else read_text(calibrate)
    with Output(quiet) as output:
        from numoe.engine import describe, load
        from numoe.engine.home import expanded
        from numoe.engine.plan import format_bytes
        from numoe.quant.compute import threads as kernel_threads
        from numoe.quant.convert.convert import Folder, convert
        from numoe.quant.convert.folder import PART_SUFFIX, refuse_existing

        shown = -1

        def progress(done: int, total: int) -> None:
            nonlocal shown
            percent = 100 * done // max(total, 1)
            if percent != shown:
                shown = percent
                bar = "#" * (percent // 5) + "." * (20 - percent // 5)
                output.status(f"writing [{bar}] {format_bytes(done)} of {format_bytes(total)}")

        kernel_threads.use(threads or kernel_threads.usable_cores())
        destination = expanded(str(destination), "the folder to make is")
        refuse_existing(destination)
        description = describe(source)
        origin = Folder(description.path, source)
        inputs, calibration = None, None
        if text is not None:
            from numoe.engine.measure.calibrate import calibrate as measure

            output.status(f"loading {source}")
            tokenizer = description.tokenizer
            measured = measure(
                load(description, threads=threads),
                tokenizer.encode(text),
                bos=tokenizer.bos_id if tokenizer.add_bos else None,
                progress=output.reading,
            )
            inputs, calibration = measured.inputs, measured.text
            output.note(f"calibrated by {measured.tokens} tokens of {calibrate}")
        weights = description.weights(inputs)
        try:
            made = convert(description.checkpoint, weights, destination, quant.value, origin, progress, calibration)
        except KeyboardInterrupt:
            if destination.with_name(destination.name + PART_SUFFIX).exists():
                output.note("stopped; the same command goes on from here")
            raise
        before, after = format_bytes(made.source_bytes), format_bytes(made.result_bytes)
        output.note(f"{before} of weights became {after} in {destination}")
        if made.remark:
            output.note(made.remark)
