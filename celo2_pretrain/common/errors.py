"""Errors that end a run, and their exit codes. docs/faults.md says what to do about each."""

import reprlib

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped on request, can be resumed
EXIT_HUNG = 76  # no progress in train.watchdog_seconds
LONGEST = 1000  # characters of an error; a value in a file can be of any length

SHOWN = reprlib.Repr()
SHOWN.maxstring = SHOWN.maxother = 120
SHOWN.maxlong = 60


class UserError(Exception):
    """What was wrong, the value, and what to do, in one line. The command line prints it and exits with code 2."""

    def __init__(self, message: str):
        message = " ".join(line.strip() for line in message.splitlines() if line.strip())  # a library's may have several
        half = LONGEST // 2 - 2
        super().__init__(message if len(message) <= LONGEST else f"{message[:half]} … {message[-half:]}")


class Stopped(Exception):
    """The run was asked to stop and has saved: why, and how to go on, in one line. The command line exits with code 75."""


def shown(value) -> str:
    """A value for an error message: its repr, shortened if it is long."""
    try:
        return SHOWN.repr(value)
    except ValueError:  # a number of more digits than Python writes
        return f"a number of {value.bit_length():,} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def one_line(error: BaseException) -> str:
    """The message of a library's error as a part of one line: printable, at most 400 characters."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]} …"
