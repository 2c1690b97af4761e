"""The one error type for bad input: its message is all that the user needs to see."""


class UserError(Exception):
    """What was wrong, the value, and what to do, in one line. The command line prints it and exits with code 2."""
