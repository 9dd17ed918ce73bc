"""What guesses ahead for a model by itself, put together of what there is."""

from __future__ import annotations

from numoe.engine.dspark import load_dspark
from numoe.engine.model import Model
from numoe.engine.mtp import load_mtp
from numoe.engine.speculation import COUNTS, Drafting, Paying, PromptLookup, Sorted
from numoe.engine.text.tokenizer import Tokenizer
from numoe.quant.errors import InputError


def drafting(model: Model, small: Model | None = None, ctx: int | None = None) -> Paying | None:
    """What was said before; where that has nothing, a small model, or the model's own head that guesses tokens.

    None where experts come from disk, for a wrong guess has others read.

    Args:
        ctx: tokens that the small model reads at most, where it can.

    Raises:
        InputError: the small model's vocabulary is another one.
    """
    if model.experts and not model.experts.complete:
        return None
    drafters: list[Sorted] = [PromptLookup(tokens=COUNTS[-1])]
    if small is not None:
        _require_same(model.tokenizer, small.tokenizer)
        drafters.append(Drafting(small.session(ctx and min(ctx, small.spec.context))))
    elif head := load_mtp(model) or load_dspark(model):
        drafters.append(head)
    return Paying(*drafters)


def _require_same(one: Tokenizer, other: Tokenizer) -> None:
    sizes = one.vocab_size, other.vocab_size
    if sizes[0] != sizes[1] or any(one.token_bytes(i) != other.token_bytes(i) for i in range(sizes[0])):
        raise InputError("the model of `draft` has another vocabulary; give a smaller model of the same family")
