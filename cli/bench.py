"""`numoe bench`: how fast a model reads and writes on this machine, and how fast matrices are multiplied."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from numoe.cli import arguments
from numoe.cli.output import Output, decimal
from numoe.cli.reply import SHED
from numoe.cli.settings import Options, takes
from numoe.quant.errors import WrongUsage


@takes("speed", "threads", "ram", "kv", "ray", "check", "replay", "chart", "json")
def bench(model: arguments.Model = "tiny", *, options: Options) -> None:
    """Measure how fast a model reads and writes; `numoe bench kernels`: how fast matrices of each format multiply.

    Examples:
    numoe bench tiny
    numoe bench kernels
    """
    threads, repetitions = options["threads"], options["repetitions"]
    if options["replay"] is not None:
        _replay(options["replay"], options["json"], options["chart"])
        return
    if options["chart"] is not None:
        raise WrongUsage("--chart draws what --replay tells; give both")
    if model == "kernels":
        if options.stated.keys() & {"decode_tokens", "prompt_tokens", "ram", "kv", "ray", "check"}:
            raise WrongUsage("bench kernels has no model; it takes --threads, --repetitions and --json")
        _kernels(threads, repetitions, options["json"])
        return
    with Output() as output:
        from numoe.engine import describe, load
        from numoe.engine.measure.bench import bench as measure
        from numoe.engine.measure.machine import record
        from numoe.engine.plan import format_bytes

        output.status(f"loading {model}")
        begun = time.perf_counter()
        described = describe(model, check=options["check"])
        ctx = min(options["prompt_tokens"] + options["decode_tokens"], described.spec.context)
        loaded = load(described, ram=options.memory, ctx=ctx, tell=output.note, **options.loading)
        load_seconds = time.perf_counter() - begun
        output.status(f"run 1 of {repetitions}")
        result = measure(
            loaded,
            load_seconds=load_seconds,
            prompt_tokens=options["prompt_tokens"],
            decode_tokens=options["decode_tokens"],
            repetitions=repetitions,
            progress=lambda done, total: output.status(f"run {min(done + 1, total)} of {total}"),
        )
        output.clear_status()
        decode = result["decode"]
        record(loaded, decode["tokens"], decode["tokens"] / decode["tokens_per_s"])
        if options["json"]:
            output.document({"model": model, **result})
            return
        output.table(
            [
                ("model", model),
                ("threads", str(result["threads"])),
                ("load", f"{load_seconds:.3g} s"),
                ("prefill", _speed(result["prefill"])),
                ("first token", f"after {result['first_token_s']:.3g} s"),
                ("decode", _speed(decode)),
                ("peak memory", format_bytes(result["peak_rss_bytes"])),
                *_experts(result["experts"]),
            ]
        )


def _kernels(threads: int | None, repetitions: int, json: bool) -> None:
    """Speeds of products, by format, shape and how many tokens the weights are multiplied with."""
    with Output() as output:
        from numoe.engine.measure.bench import bench_kernels

        output.status("measuring")
        result = bench_kernels(
            threads=threads,
            repetitions=repetitions,
            progress=lambda done, total: output.status(f"measuring, {done} of {total} done"),
        )
        if json:
            output.document(result)
            return
        read = decimal(result["read_bytes_per_s"] / 1e9)
        output.text(f"threads: {result['threads']}; memory is read at {read} GB/s; x plain NumPy: of one thread each")
        rows = [("format", "shape", "tokens", "Gw/s", "GB/s", "of read", "x plain NumPy", "x 1 thread")]
        rows += [
            (
                kernel["format"],
                "x".join(map(str, kernel["shape"])),
                str(kernel["tokens"]),
                decimal(kernel["weights_per_s"] / 1e9),
                decimal(kernel["bytes_per_s"] / 1e9),
                f"{kernel['of_read_speed']:.1%}",
                f"{kernel['times_plain']:.1f}",
                f"{kernel['scaling']:.2f}",
            )
            for kernel in result["kernels"]
        ]
        output.table(rows, numbers=range(2, 8))


def _replay(file: Path, json: bool, chart: str | None) -> None:
    """Hit rates of the caches on a trace, by how many of the experts they hold; how often each expert was taken."""
    from numoe.cli.charts import Chart, Heat, Line, check, draw
    from numoe.engine.measure.replay import POLICIES, heat, read_trace, replay

    check(chart, json)
    trace = read_trace(file)
    rows = replay(trace)
    if json:
        Output().document({"replay": str(file), "accesses": len(trace.accesses), "budgets": rows})
    else:
        table: list[tuple[str, ...]] = [("experts in memory", *POLICIES)]
        table += [(f"{row['share']:.0%}, {row['experts']}", *(f"{row[name]:.1%}" for name in POLICIES)) for row in rows]
        Output().table(table, numbers=range(1, len(POLICIES) + 1))
    if chart is not None:
        lines = [Line(name, [(100 * row["share"], 100 * row[name]) for row in rows]) for name in POLICIES]
        found = Chart("requests that find their expert in memory, %", "% of the experts that are there", lines)
        layers = [(f"layer {layer}", counts) for layer, counts in heat(trace).items()]
        draw(Output(), [found, Heat("how often each expert was taken", "experts", layers)], chart)


def _experts(counts: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows about nodes and about reads from disk, if there were any."""
    from numoe.engine.plan import format_bytes

    rows = []
    if "nodes" in counts:
        half, most = (1000 * counts[name] for name in ("call_p50_s", "call_p99_s"))
        rows.append(("nodes", f"{len(counts['nodes'])} beside this process"))
        rows.append(
            ("a layer's experts", f"{half:.3g} ms, 1 of 100 from {most:.3g} ms; {counts['waiting']:.0%} waiting")
        )
    if not counts.get("misses"):
        return rows
    return [
        *rows,
        ("experts", f"{counts['hit_rate']:.1%} found in memory, {format_bytes(counts['resident_bytes'])} there now"),
        ("read", f"{format_bytes(counts['bytes_read'])}, {counts['wait_s']:.3g} s of waiting"),
        *([("memory", SHED)] if counts.get("shed") else []),
    ]


def _speed(figures: dict[str, Any]) -> str:
    """{"tokens": 512, "tokens_per_s": 1234.5} -> "1,234 tok/s (512 tokens)"."""
    rate = figures["tokens_per_s"]
    return f"{rate:{',.0f' if rate >= 100 else '.3g'}} tok/s ({figures['tokens']} tokens)"
