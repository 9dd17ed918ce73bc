"""`numoe bench`: how fast a model reads and writes on this machine."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from numoe.cli import options
from numoe.cli.output import Output

DecodeTokens = Annotated[int, typer.Option("-n", "--max-tokens", metavar="N", min=1, help="Tokens to decode.")]
PromptTokens = Annotated[int, typer.Option("--prompt-tokens", metavar="N", min=1, help="Tokens to read before them.")]
Repetitions = Annotated[
    int, typer.Option("--repetitions", metavar="N", min=1, help="Runs; the figures are their medians.")
]


def bench(
    model: options.Model,
    decode_tokens: DecodeTokens = 32,
    prompt_tokens: PromptTokens = 512,
    repetitions: Repetitions = 3,
    threads: options.Threads = None,
    ram: options.Ram = None,
    json: options.Json = False,
) -> None:
    """Measure how fast a model reads and writes."""
    with Output() as output:
        from numoe.engine import load
        from numoe.engine.bench import bench as measure
        from numoe.engine.plan import format_bytes

        output.status(f"loading {model}")
        begun = time.perf_counter()
        loaded = load(model, ram=ram, threads=threads)
        load_seconds = time.perf_counter() - begun
        output.status(f"run 1 of {repetitions}")
        result = measure(
            loaded,
            load_seconds=load_seconds,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            repetitions=repetitions,
            progress=lambda done, total: output.status(f"run {min(done + 1, total)} of {total}"),
        )
        output.clear_status()
        if json:
            output.document({"model": model, **result})
            return
        output.table(
            [
                ("model", model),
                ("threads", str(result["threads"])),
                ("load", f"{load_seconds:.3g} s"),
                ("prefill", _speed(result["prefill"])),
                ("first token", f"after {result['first_token_s']:.3g} s"),
                ("decode", _speed(result["decode"])),
                ("peak memory", format_bytes(result["peak_rss_bytes"])),
            ]
        )


def _speed(figures: dict[str, Any]) -> str:
    """{"tokens": 512, "tokens_per_s": 1234.5} -> "1,234 tok/s (512 tokens)"."""
    rate = figures["tokens_per_s"]
    return f"{rate:{',.0f' if rate >= 100 else '.3g'}} tok/s ({figures['tokens']} tokens)"
