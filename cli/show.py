"""`numoe show`: what a model is and what it takes, from its configuration and headers alone."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from numoe.cli import options
from numoe.cli.output import Output
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from numoe.engine import Description, ModelSpec, Plan
    from numoe.engine.spec import Attention, FeedForward


def show(model: options.Model, ctx: options.Context = None, json: options.Json = False) -> None:
    """Tell what a model is made of, without reading its weights."""
    from numoe.engine import describe

    description = describe(model)
    plan = description.plan(ctx)
    if json:
        Output().document({"model": model, **_document(description, plan)})
    else:
        _print(model, description, plan)


def _document(description: Description, plan: Plan) -> dict[str, Any]:
    spec = description.spec
    return {
        "family": spec.family,
        "layers": len(spec.layers),
        "attention": _count(_attention(layer.attention) for layer in spec.layers),
        "ffn": _count(_ffn(layer.ffn) for layer in spec.layers),
        "hidden": spec.hidden,
        "vocab": spec.vocab,
        "parameters": plan.parameters,
        "active_parameters": plan.active_parameters,
        "weights": [
            {"role": role, "format": kind, "bytes": nbytes} for (role, kind), nbytes in sorted(plan.weights.items())
        ],
        "weight_bytes": plan.weight_bytes,
        "context": spec.context,
        "kv_bytes": {str(plan.context): plan.kv_bytes},
        "tokenizer": _has(description, "tokenizer"),
        "chat_format": _has(description, "chat_format"),
    }
