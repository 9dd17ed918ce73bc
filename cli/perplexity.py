"""`numoe perplexity`: how well a model predicts a text."""

from __future__ import annotations

from typing import Annotated

import typer

from numoe.cli import options
from numoe.cli.output import Output
from numoe.cli.text import read_text
from numoe.quant.errors import InputError

File = Annotated[str, typer.Argument(metavar="FILE", help="A text in UTF-8; - reads what is piped in.")]
Against = Annotated[
    str | None,
    typer.Option("--against", metavar="MODEL2", help="Compare with this model: KL divergence, top-1 agreement."),
]
Window = Annotated[
    int | None,
    typer.Option("--window", metavar="N", min=2, help="Tokens read at once; else 2048 or the model's limit, if lower."),
]
Stride = Annotated[
    int | None,
    typer.Option("--stride", metavar="N", min=1, help="Tokens from one window to the next; else half a window."),
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Read only so many tokens of the text.")]


def perplexity(
    model: options.Model,
    file: File,
    against: Against = None,
    window: Window = None,
    stride: Stride = None,
    limit: Limit = None,
    json: options.Json = False,
) -> None:
    """Measure how well a model predicts a text."""
    text = read_text(file)
    if not text.strip():
        raise InputError(f"{'standard input' if file == '-' else file} is empty; give a text to predict")
    with Output() as output:
        from numoe.engine import load
        from numoe.engine.budget import Budget
        from numoe.engine.measure.perplexity import perplexity as measure

        output.status(f"loading {model}")
        memory = Budget()  # of both models together
        loaded, reference = load(model, ram=memory), None
        tokenizer = loaded.tokenizer
        ids = tokenizer.encode(text)
        if against is not None:
            output.status(f"loading {against}")
            reference = load(against, ram=memory)
            if reference.tokenizer.encode(text) != ids:
                raise InputError(
                    f"{against} splits the text into other tokens than {model} does; "
                    "--against needs a model with the same tokenizer"
                )
        result = measure(
            loaded,
            ids[:limit],
            window=window,
            stride=stride,
            bos=tokenizer.bos_id if tokenizer.add_bos else None,
            against=reference,
            progress=output.reading,
        )
        if json:
            output.document(
                {
                    "model": model,
                    "file": file,
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
            )
            return
        read = f"{result.tokens}, in windows of {result.window} that move by {result.stride}; {result.seconds:.1f} s"
        rows = [("perplexity", f"{result.perplexity:.4f} ({result.nll:.5f} nats a token)"), ("tokens", read)]
        if result.kl_mean is not None and result.top1_agreement is not None:
            agreed = f"KL divergence {result.kl_mean:.3g} nats a token, top-1 agreement {result.top1_agreement:.2%}"
            rows.append(("against", f"{against}: {agreed}"))
        output.table(rows)
