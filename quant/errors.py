"""The one error that foreign input raises, and the kind of it that has an exit code of its own."""


class InputError(ValueError):
    """A file, key, flag or value was refused.

    The message is one sentence for the person at the terminal: it names what was refused and the next step.
    """


class DoesNotFit(InputError):
    """A model, or a context, takes more memory than there is or is allowed."""
