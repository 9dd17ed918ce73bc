"""`numoe quantize`: a checkpoint written anew with smaller weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from numoe.cli import arguments
from numoe.cli.output import Output
from numoe.cli.settings import Options, takes
from numoe.cli.text import read_text
from numoe.quant.convert.recipes import roles
from numoe.quant.errors import WrongUsage

if TYPE_CHECKING:
    from numoe.engine import Description
    from numoe.engine.measure.calibrate import Calibration


@takes("quant", "calibrate", "threads", "ram", "quiet")
def quantize(source: arguments.Source, destination: arguments.Destination, options: Options) -> None:
    """Write a model into a new folder, its weights in fewer bits.

    Examples:
    numoe quantize MODEL small --quant int4
    numoe quantize MODEL small --quant int4 --calibrate text.txt
    numoe quantize model-BF16.gguf small --quant experts=int4,attention=int8
    """
    calibrate, threads = options["calibrate"], options["threads"]
    if calibrate is not None and "int4" not in roles(options["quant"]).values():
        raise WrongUsage("only int4 is calibrated; leave --calibrate out, or give --quant int4")
    text = None if calibrate is None else read_text(calibrate)
    with Output(options["quiet"]) as output:
        from numoe.engine import describe
        from numoe.engine.home import expanded
        from numoe.engine.plan import format_bytes
        from numoe.quant.compute import threads as kernel_threads
        from numoe.quant.convert.convert import Folder, GgufFile, convert
        from numoe.quant.convert.folder import PART_SUFFIX, refuse_existing

        kernel_threads.use(threads or kernel_threads.usable_cores())
        destination = expanded(str(destination), "the folder to make is")
        refuse_existing(destination)
        description = describe(source)
        origin = (GgufFile if description.path.is_file() else Folder)(description.path, source)
        inputs, calibration = None, None
        if text is not None:
            output.status(f"loading {source}")
            measured = _measured(description, text, options, output)
            inputs, calibration = measured.inputs, measured.text
            output.note(f"calibrated by {measured.tokens} tokens of {calibrate}")
        weights, quant = description.weights(inputs), options["quant"]
        try:
            made = convert(description.checkpoint, weights, destination, quant, origin, _bar(output), calibration)
        except KeyboardInterrupt:
            if destination.with_name(destination.name + PART_SUFFIX).exists():
                output.note("stopped; the same command goes on from here")
            raise
        before, after = format_bytes(made.source_bytes), format_bytes(made.result_bytes)
        output.note(f"{before} of weights became {after} in {destination}")
        if made.remark:
            output.note(made.remark)


def _measured(description: Description, text: str, options: Options, output: Output) -> Calibration:
    """What a model reads of a text, by which its weights are rounded."""
    from numoe.engine import load
    from numoe.engine.layers.state import CHUNK
    from numoe.engine.measure.calibrate import calibrate

    tokenizer = description.tokenizer
    return calibrate(
        load(description, ram=options.memory, threads=options["threads"], ctx=min(CHUNK, description.spec.context)),
        tokenizer.encode(text),
        bos=tokenizer.bos_id if tokenizer.add_bos else None,
        progress=output.reading,
    )


def _bar(output: Output) -> Callable[[int, int], None]:
    """Progress in bytes, shown where it is another percent."""
    from numoe.engine.plan import format_bytes

    shown = -1

    def progress(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // max(total, 1)
        if percent != shown:
            shown = percent
            bar = "#" * (percent // 5) + "." * (20 - percent // 5)
            output.status(f"writing [{bar}] {format_bytes(done)} of {format_bytes(total)}")

    return progress
