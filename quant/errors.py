"""The one error that foreign input raises, and the kinds of it that have an exit code of their own."""

from typing import Any


class InputError(ValueError):
    """A file, key, parameter or value was refused.

    The message is one sentence for the person who asked: it names what was refused and the next step. Parameters stand
    in backquotes, as `ram`, and in commands that are a next step, as `numoe pull NAME quant=int8`, as assignments: the
    terminal makes flags of them. What it quotes may be long: of more than 1500 characters the middle is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= 1500 else f"{message[:1000]} ... {message[-400:]}")


class WrongUsage(InputError):
    """A parameter has a value that it cannot have, or a name that means nothing: it is to be asked otherwise."""


class DoesNotFit(InputError):
    """A model, or a context, takes more memory than there is or is allowed."""


def shown(value: Any) -> str:
    """A value as errors quote it: in one line of bounded length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def word(value: Any) -> str:
    """A value as errors quote a name: as it is if it could be one."""
    return value if isinstance(value, str) and value.isprintable() and len(value) <= 60 else shown(value)
