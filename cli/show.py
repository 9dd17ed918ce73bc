"""`numoe show`: what a model is and what it takes, from its configuration and headers alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from numoe.cli import arguments
from numoe.cli.output import Output
from numoe.cli.settings import Options, takes
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from numoe.engine import Description, ModelSpec, Plan


@takes("ctx", "kv", "json")
def show(model: arguments.Model, options: Options) -> None:
    """Tell what a model is made of, without reading its weights.

    Examples:
    numoe show tiny
    numoe show model.gguf --json
    """
    from numoe.engine import describe

    description = describe(model)
    plan = description.plan(options["ctx"], kv=options["kv"])
    if options["json"]:
        Output().document({"model": model, **_document(description, plan)})
    else:
        _print(model, description, plan)


def _document(description: Description, plan: Plan) -> dict[str, Any]:
    from numoe.engine.disk import disk, license_of

    spec, on_disk = description.spec, disk(description)
    return {
        "family": spec.family,
        "layers": len(spec.layers),
        "attention": _labels(spec, "attention"),
        "ffn": _labels(spec, "ffn"),
        "hidden": spec.hidden,
        "vocab": spec.vocab,
        "parameters": plan.parameters,
        "active_parameters": plan.active_parameters,
        "weights": [
            {"role": role, "format": label, "bytes": nbytes, "parameters": parameters}
            for (role, label), (nbytes, parameters) in sorted(_weights(plan).items())
        ],
        "weight_bytes": plan.stored_bytes,
        "aside": description.aside,
        "disk_bytes": asdict(on_disk) | {"total": on_disk.total},
        "license": license_of(description) or None,
        "context": spec.context,
        "kv_bytes": {str(plan.context): plan.kv_bytes},
        "tokenizer": _has(description, "tokenizer"),
        "chat_format": _has(description, "chat_format"),
    }


def _print(model: str, description: Description, plan: Plan) -> None:
    from numoe.engine.disk import disk, license_of
    from numoe.engine.plan import format_bytes, format_count

    spec, on_disk = description.spec, disk(description)
    aside = ", ".join(f"{part} {format_bytes(nbytes)}" for part, nbytes in description.aside.items())
    attention = _labels(spec, "attention")
    ffn = _labels(spec, "ffn")
    active = (
        f"{format_count(plan.active_parameters)} active" if plan.active_parameters < plan.parameters else "all active"
    )
    template = "yes" if _has(description, "chat_format") else "none, so run it with --raw"
    output = Output()
    output.table(
        [
            ("model", model),
            ("family", spec.family),
            ("layers", f"{len(spec.layers)}, hidden {spec.hidden}, vocabulary {spec.vocab}"),
            ("attention", _listed(attention)),
            ("ffn", _listed(ffn)),
            *([("experts", experts)] if (experts := _experts(spec)) else []),
            ("parameters", f"{format_count(plan.parameters)}, {active}"),
            *([("left aside", aside)] if aside else []),
            ("context", f"up to {spec.context} tokens; {plan.context} take {format_bytes(plan.kv_bytes)}"),
            ("tokenizer", "yes" if _has(description, "tokenizer") else "none"),
            ("chat format", template),
            ("license", license_of(description) or "its files do not say"),
            ("", ""),
        ]
    )
    weights = sorted(_weights(plan).items(), key=lambda entry: -entry[1][0])
    rows = [(*key, format_bytes(nbytes), _bits(nbytes, parameters)) for key, (nbytes, parameters) in weights]
    everything = "all", "", format_bytes(plan.stored_bytes), _bits(plan.stored_bytes, plan.parameters)
    beside = [
        ("left aside (drafting heads, eyes)", on_disk.aside),
        ("headers", on_disk.headers),
        ("vocabulary, configuration, texts", on_disk.others),
        ("on disk", on_disk.total),
    ]
    more = [(what, "", format_bytes(nbytes), "") for what, nbytes in beside if nbytes]
    if less := plan.stored_bytes - on_disk.weights:  # weights that are used in two places, numbers that are held wider
        more.insert(0, ("stored once, or narrower", "", f"{'-' * (less > 0)}{format_bytes(abs(less))}", ""))
    output.table([("weights", "format", "size", "bits each"), *rows, everything, *more], numbers=[2, 3])


def _weights(plan: Plan) -> dict[tuple[str, str], tuple[int, int]]:
    """Bytes and parameters by role and the name of the format, which several have in common."""
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for (role, stored), nbytes in plan.weights.items():
        more = sums.get((role, str(stored)), (0, 0))
        sums[role, str(stored)] = more[0] + nbytes, more[1] + plan.sizes[role, stored]
    return sums


def _experts(spec: ModelSpec) -> str:
    """How many experts a token takes, of the layers that have them."""
    return "; ".join(sorted({kind.details for _, kind in spec.parts()} - {""}))


def _labels(spec: ModelSpec, part: str) -> dict[str, int]:
    """How many layers have which kind of attention, or of feed-forward, which is all else."""
    return dict(Counter(kind.label for name, kind in spec.parts() if (name == "attention") == (part == "attention")))


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _bits(nbytes: int, weights: int) -> str:
    """What one weight takes, its share of the scales included."""
    return f"{8 * nbytes / weights:.3g}"


def _has(description: Description, part: str) -> bool:
    """Whether the model comes with a part that `Description` refuses to give when it is absent."""
    try:
        getattr(description, part)
    except InputError:
        return False
    return True
