"""The one error type for bad input: its message is all that the user needs to see."""
import reprlib

SHOWN = reprlib.Repr()
SHOWN.maxstring = SHOWN.maxother = 120
SHOWN.maxlong = 60


class UserError(Exception):
    """What was wrong, the value, and what to do, in one line. The command line prints it and exits with code 2."""


def shown(value) -> str:
    """A value for an error message: its repr, cut where that would be long."""
    try:
        return SHOWN.repr(value)
    except ValueError:  # a number of more digits than Python writes
        return f"a number of {value.bit_length():,} bits" if isinstance(value, int) else f"a {type(value).__name__}"
