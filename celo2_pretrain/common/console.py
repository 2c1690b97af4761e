"""Lines for the user, each in one piece: a run's own on standard output, notices and errors on standard error.

Where a stream is gone (`| tee` that was interrupted) or full, nobody is told, and the run goes on.
"""

import contextlib
import sys


def print_line(text: str) -> None:
    """Print a line of a run."""
    _write(sys.stdout, f"{text}\n")


def print_notice(text: str) -> None:
    """Print a line about the program's end, or a warning, after what was printed before."""
    flush(sys.stdout)
    _write(sys.stderr, f"celo2-pretrain: {text}\n")


def flush(stream) -> None:
    with contextlib.suppress(OSError, ValueError):
        stream.flush()


def _write(stream, text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        stream.write(text)
    flush(stream)
