"""What a rank and its supervisor both know of stopping: the signals, and the stop file."""

import os
import signal
from pathlib import Path

SINCE = "CELO2_SUPERVISOR_SINCE"  # when it began: a stop file that is newer is for the run, whichever start is under way
INTERRUPTED = 130  # what shells give for SIGINT
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def stop_file_is_new(path: Path, since: float) -> bool | None:
    """Whether the stop file was made after `since`, or is an earlier run's; None where there is none."""
    try:
        return path.stat().st_mtime >= since - 1  # file systems count in up to a second
    except OSError:
        return None


def not_ignored() -> list[signal.Signals]:
    """The signals to hear: what is ignored (by nohup, in a background job of a script) stays so."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def leave_lost_terminal() -> None:
    """Where the terminal is gone, as after SIGHUP, write to nothing: print would raise, and end a run before it has saved."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, descriptor)
            os.close(nothing)
