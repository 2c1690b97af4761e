"""Print lines for the user: a run's own lines to standard output, notices and errors to standard error.

If a stream is closed (an interrupted `| tee`) or full, the line is lost and the run continues.
"""

import contextlib
import sys


def print_line(text: str) -> None:
    """Print a line of a run."""
    _write(sys.stdout, f"{text}\n")


def print_notice(text: str) -> None:
    """Print a warning or the reason of the program's end, after all that was printed before."""
    flush(sys.stdout)
    _write(sys.stderr, f"celo2-pretrain: {text}\n")


def flush(stream) -> None:
    with contextlib.suppress(OSError, ValueError):
        stream.flush()


def _write(stream, text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        stream.write(text)
    flush(stream)
