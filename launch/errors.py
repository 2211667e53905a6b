"""The exceptions that mean "the user can fix this"."""


class UserError(ValueError):
    """A mistake in an argument, a config or a data file.

    The message says what is wrong, where, and what to do about it; train.py prints it without a traceback.
    """


class RankError(UserError):
    """One that a rank may have alone, such as a full disk: every rank prints its own."""
