"""A model from its specification to tokens.

    from numoe.engine import load, plan
    model = load("folder | repo-id | file.gguf")
    session = model.session(ctx=8192)
    logits = session.feed([1, 2, 3])  # float32 (3, vocab)
    for piece in session.generate("Hello", max_tokens=64): ...

The names below are the whole public face.
"""

import warnings

from numoe.engine.description import Description, describe
from numoe.engine.generation import Generation

# `load` and `plan` name modules too: imported here, the functions are what `numoe.engine` gives under these names.
from numoe.engine.layers.spec import ModelSpec
from numoe.engine.load import load
from numoe.engine.model import Model
from numoe.engine.plan import Plan, plan
from numoe.engine.session import Session
from numoe.engine.speculation import PromptLookup
from numoe.engine.text.sample import Sampling
from numoe.quant.errors import InputError

# Damaged weights overflow in many places; where it matters, NaN is found and is an InputError.
warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"numoe\.")

__all__ = [
    "Description",
    "Generation",
    "InputError",
    "Model",
    "ModelSpec",
    "Plan",
    "PromptLookup",
    "Sampling",
    "Session",
    "describe",
    "load",
    "plan",
]
