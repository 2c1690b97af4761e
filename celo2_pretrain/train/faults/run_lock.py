"""One run at a time in a run folder: rank 0 holds run_dir/.lock from before it changes anything there to the end.

The kernel lets go of it when the process ends, however that is. The file stays: who removed it could let two runs in.
"""

import fcntl
import os
import socket
import time
from pathlib import Path

from celo2_pretrain.common.console import print_notice
from celo2_pretrain.common.errors import Stopped, UserError
from celo2_pretrain.train.checkpoints.staging import Copy

NAME = ".lock"
LEASE_SECONDS, LOOK_SECONDS = 120.0, 10.0  # an NFS server keeps the lock of a node that is gone for some 90 s


class InUse(UserError):
    """Another run is at work in the folder, which must not hear of this one's end (failures.py)."""


def _held(file: int) -> bool:
    """Take the lock, or find that another process holds it. A file system without locks takes any for granted."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


class RunLock:
    """A context manager, on every rank; only rank 0 takes the lock.

    A copy that is under way, and an error other than UserError and Stopped, leave it to the end of the process.
    """

    def __init__(self, run_dir: str, rank: int):
        self.run_dir, self.rank, self.file = Path(run_dir), rank, None

    def take(self) -> None:
        """Take it, if the folder is there. Raises InUse when another process has it; a file system without locks is passed
        over."""
        if self.rank or self.file or not self.run_dir.is_dir():
            return
        try:
            file = os.open(self.run_dir / NAME, os.O_RDWR | os.O_CREAT, 0o666)  # not for programs that are started from here
        except OSError:
            return
        until, told = time.monotonic() + LEASE_SECONDS, False
        while _held(file):
            holder = os.pread(file, 300, 0).decode(errors="replace").strip() or "of unknown number"
            here = holder.endswith(f" on {socket.gethostname()}")
            if here or time.monotonic() >= until:
                os.close(file)
                raise InUse(
                    f"run_dir {str(self.run_dir)!r} is in use by another run (process {holder}): wait for its end or "
                    f"stop it (touch {self.run_dir}/STOP), or choose another run_dir=…"
                )
            if not told:
                print_notice(
                    f"waiting up to {LEASE_SECONDS:g} s for process {holder} to let go of {self.run_dir}: its node may be gone"
                )
            told = True
            time.sleep(LOOK_SECONDS)
        self.file = file
        os.register_at_fork(after_in_child=self._close)  # or a child that outlives this process would hold it
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_) -> None:
        copying = Copy.under_way and Copy.under_way.thread.is_alive()
        if not copying and (kind is None or issubclass(kind, (UserError, Stopped))):
            self._close()
