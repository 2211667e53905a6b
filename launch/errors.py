"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """A mistake in an argument, a config or a data file.

    The message says what is wrong, where, and what to do about it; train.py prints it without a traceback.
    """
