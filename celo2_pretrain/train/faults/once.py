"""How the ranks of a node say a thing once: whoever makes an empty file named after the words says them."""

import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path

WAIT_SECONDS = 3.0  # that other ranks leave to local rank 0
KEPT_SECONDS = 86400


def may_say(text: str) -> bool:
    """Whether this process is the one of its node's ranks that says `text`; without a launcher it always is.

    Local rank 0 comes first if it has the same to say within some seconds: it is not told apart then.
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
        return True  # said twice is better than not at all
    for old in path.parent.glob(f"{path.name[:11]}*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                old.unlink()
    return True


def where_found() -> str:
    """ " (found on rank 3)" for all but the first rank of a node, which speaks for the others too."""
    return "" if os.environ.get("LOCAL_RANK", "0") == "0" else f" (found on rank {os.environ.get('RANK', '?')})"


def _claim(text: str) -> Path:
    """The file that stands for `text` in this launch: the ranks of a node have one parent and one meeting point."""
    parent = os.getppid()
    try:  # when it started, in clock ticks: process ids come again
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = ""
    launch = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")]
    digest = hashlib.sha256("\0".join([str(os.getuid()), str(parent), started, *launch, text]).encode()).hexdigest()
    return Path(tempfile.gettempdir(), f"celo2-said-{digest[:24]}")
