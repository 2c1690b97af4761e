"""Print a message once per node: the rank that creates an empty file named after the message prints it."""

import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path

WAIT_SECONDS = 3.0  # for which the other ranks wait for local rank 0
KEPT_SECONDS = 86400


def may_say(text: str) -> bool:
    """Whether this process is the rank of its node that prints `text`. Without a launcher it always is.

    Local rank 0 takes precedence if it has the same message within WAIT_SECONDS; the message then names no rank.
    """
    if "LOCAL_RANK" not in os.environ:
        return True
    path = _claim(text)
    until = time.monotonic() + WAIT_SECONDS
    while os.environ["LOCAL_RANK"] != "0" and time.monotonic() < until:
        if path.exists():
            return False
        time.sleep(0.05)
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True  # a message printed twice is better than a lost one
    for old in path.parent.glob(f"{path.name[:11]}*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                old.unlink()
    return True


def where_found() -> str:
    """ " (found on rank 3)"; empty for local rank 0, whose messages stand for all ranks of the node."""
    return "" if os.environ.get("LOCAL_RANK", "0") == "0" else f" (found on rank {os.environ.get('RANK', '?')})"


def _claim(text: str) -> Path:
    """The file that stands for `text` in this launch, which is known by the ranks' parent process and rendezvous."""
    parent = os.getppid()
    try:  # its start time in clock ticks, because process ids are reused
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = ""
    launch = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")]
    digest = hashlib.sha256("\0".join([str(os.getuid()), str(parent), started, *launch, text]).encode()).hexdigest()
    return Path(tempfile.gettempdir(), f"celo2-said-{digest[:24]}")
