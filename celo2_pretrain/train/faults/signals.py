"""What a rank and its supervisor both know of stopping: the signals, and the stop file."""

import os
import signal
from pathlib import Path

SINCE = "CELO2_SUPERVISOR_SINCE"  # when the supervisor began: a newer stop file is meant for this run
INTERRUPTED = 130  # what shells give for SIGINT
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def stop_file_is_new(path: Path, since: float) -> bool | None:
    """Whether the stop file was made after `since`, or is an earlier run's; None where there is none."""
    try:
        return path.stat().st_mtime >= since - 1  # file systems count in up to a second
    except OSError:
        return None


def not_ignored() -> list[signal.Signals]:
    """The signals to handle. Ignored ones (under nohup, in a script's background job) stay ignored."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def leave_lost_terminal() -> None:
    """Replace a closed terminal (after SIGHUP) by /dev/null: print would raise and end the run before it has saved."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, descriptor)
            os.close(nothing)
