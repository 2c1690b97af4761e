"""A run that hangs ends: a thread in each rank dumps all stacks when nothing has moved for train.watchdog_seconds.

run_dir/.hung               written by the rank that found it first; the others dump theirs and end too
run_dir/stacks_rank_N.txt   the Python stacks of all of rank N's threads, where they hang
"""

import faulthandler
import os
import threading
import time
from pathlib import Path

from celo2_pretrain.common.console import print_notice
from celo2_pretrain.common.errors import EXIT_HUNG

FLAG = ".hung"
POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0  # for the other ranks to see .hung: a launcher ends them as soon as one has ended


def flagged(run_dir: Path) -> bool:
    """Whether a rank of this start has found that it hangs. (It opens the file: NFS answers that from the server.)"""
    try:
        return bool((run_dir / FLAG).read_text())
    except OSError:
        return False


def forget(run_dir: Path) -> None:
    """Remove what an earlier start left; rank 0 calls it before any rank's watchdog begins."""
    for path in (run_dir / FLAG, *run_dir.glob("stacks_rank_*.txt")):
        path.unlink(missing_ok=True)


class Watchdog:
    """Ends this process with code 76 unless `beat` is called at least every `seconds`, from `begin` to the end of its context.

    Args:
        run_dir: of the run; all ranks see it.
        rank: of this process.
        seconds: longest time without a beat; 0 turns it off.
    """

    def __init__(self, run_dir: str, rank: int, seconds: float):
        self.run_dir, self.rank, self.seconds = Path(run_dir), rank, seconds
        self.doing, self.last = "starting", time.monotonic()
        self.closed = threading.Event()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.closed.set()

    def begin(self) -> None:
        """Watch from now on. Every rank calls it, after rank 0's `forget`."""
        self.last = time.monotonic()
        if self.seconds:
            threading.Thread(target=self._watch, daemon=True).start()

    def beat(self, doing: str) -> None:
        """Progress was made; `doing` is what comes now, in words that follow "while"."""
        self.doing, self.last = doing, time.monotonic()

    def _watch(self) -> None:
        while not self.closed.wait(min(POLL_SECONDS, self.seconds / 4)):
            silent = time.monotonic() - self.last
            if silent > self.seconds or flagged(self.run_dir):
                self._end(silent)

    def _end(self, silent: float) -> None:
        try:
            with open(self.run_dir / f"stacks_rank_{self.rank}.txt", "w") as file:
                file.write(f"rank {self.rank}, {silent:.0f} s after its last progress, while {self.doing}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            with open(self.run_dir / FLAG, "x") as file:
                file.write(f"rank {self.rank}\n")
        except FileExistsError:  # another rank was first, and has said it
            os._exit(EXIT_HUNG)
        except OSError as error:
            print_notice(f"error: cannot write the stacks: {error}")
        print_notice(
            f"error: rank {self.rank} made no progress in {self.seconds:g} s (train.watchdog_seconds), while "
            f"{self.doing}: {self.run_dir}/stacks_rank_*.txt show where; go on with --resume"
        )
        time.sleep(GRACE_SECONDS)
        os._exit(EXIT_HUNG)
