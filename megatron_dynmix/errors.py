"""The one exception that means: the user can mend this."""


class InputError(ValueError):
    """A user's mistake: wrong path, number, name or combination.

    The message says what was given, why it cannot work and what would. The command line prints it
    without a traceback and exits with 2; every other exception is a fault of ours.
    """
