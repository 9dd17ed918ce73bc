"""`numoe perplexity`: how well a model predicts a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numoe.cli import arguments
from numoe.cli.output import Output
from numoe.cli.settings import Options, takes
from numoe.cli.text import read_text
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from numoe.engine.measure.perplexity import Result


@takes("against", "window", "stride", "limit", "threads", "ram", "kv", "json")
def perplexity(model: arguments.Model, file: arguments.File, options: Options) -> None:
    """Measure how well a model predicts a text.

    Examples:
    numoe perplexity tiny text.txt
    numoe perplexity small text.txt --against MODEL
    """
    text = read_text(file)
    if not text.strip():
        raise InputError(f"{'standard input' if file == '-' else file} is empty; give a text to predict")
    with Output() as output:
        from numoe.engine import describe, load
        from numoe.engine.measure.perplexity import DEFAULT_WINDOW
        from numoe.engine.measure.perplexity import perplexity as measure

        output.status(f"loading {model}")
        memory, threads = options.memory, options["threads"]  # of both models together
        described, against, reference = describe(model), options["against"], None
        ctx = min(options["window"] or DEFAULT_WINDOW, described.spec.context)
        loaded = load(described, ram=memory, threads=threads, ctx=ctx, kv=options["kv"])
        tokenizer = loaded.tokenizer
        ids = tokenizer.encode(text)
        if against is not None:
            output.status(f"loading {against}")
            described = describe(against)
            reference = load(described, ram=memory, threads=threads, ctx=min(ctx, described.spec.context))
            if reference.tokenizer.encode(text) != ids:
                raise InputError(
                    f"{against} splits the text into other tokens than {model} does; "
                    "--against needs a model with the same tokenizer"
                )
        result = measure(
            loaded,
            ids[: options["limit"]],
            window=options["window"],
            stride=options["stride"],
            bos=tokenizer.bos_id if tokenizer.add_bos else None,
            against=reference,
            progress=output.reading,
        )
        if options["json"]:
            output.document({"model": model, "file": file, **_document(result, against)})
        else:
            output.table(_rows(result, against))


def _document(result: Result, against: str | None) -> dict[str, Any]:
    return {
        "tokens": result.tokens,
        "window": result.window,
        "stride": result.stride,
        "perplexity": result.perplexity,
        "nll": result.nll,
        "against": against,
        "kl": result.kl_mean,
        "top1_agreement": result.top1_agreement,
        "seconds": result.seconds,
    }


def _rows(result: Result, against: str | None) -> list[tuple[str, str]]:
    read = f"{result.tokens}, in windows of {result.window} that move by {result.stride}; {result.seconds:.1f} s"
    rows = [("perplexity", f"{result.perplexity:.4f} ({result.nll:.5f} nats a token)"), ("tokens", read)]
    if result.kl_mean is not None and result.top1_agreement is not None:
        agreed = f"KL divergence {result.kl_mean:.3g} nats a token, top-1 agreement {result.top1_agreement:.2%}"
        rows.append(("against", f"{against}: {agreed}"))
    return rows
