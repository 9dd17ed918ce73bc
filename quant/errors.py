"""The one error that foreign input raises."""


class InputError(ValueError):
    """A file, key, flag or value was refused.

    The message is one sentence for the person at the terminal: it names what was refused and the next step.
    """
