"""The chat formats: one file each, found by itself. A new one is a new file here."""

import pkgutil
from importlib import import_module

from numoe.engine.chat.format import ChatFormat
from numoe.engine.text.tokenizer import Tokenizer
from numoe.quant.errors import InputError


def found() -> list[type[ChatFormat]]:
    """What the files of this folder call FORMAT; those that are derived from another come before it."""
    modules = (import_module(module.name) for module in pkgutil.iter_modules(__path__, f"{__name__}."))
    return sorted((module.FORMAT for module in modules), key=lambda kind: -len(kind.__mro__))


FORMATS = found()


def chat_format(model_type: str, tokenizer: Tokenizer) -> ChatFormat:
    """The first format that the model speaks: one of its own, else its chat template.

    Raises InputError for a model that speaks none, and for a template that is not valid Jinja.
    """
    template = (tokenizer.chat_template or "").removeprefix("\ufeff")
    for kind in FORMATS:
        if chat := kind.of(model_type, template, tokenizer):
            return chat
    raise InputError(
        "The model has no chat template, so it may be a base model; continue plain text with `numoe run raw=true`."
    )
