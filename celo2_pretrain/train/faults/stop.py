"""When a run has to stop: a signal or a file asks for it, all ranks agree on it, and the run saves and exits with code 75.

SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, the first SIGINT   finish the step, save, exit 75; before the first step: exit 75 at once
the second SIGINT                                     end at once, with code 130
the file train.stop_file (run_dir/STOP)               as SIGTERM, without any signal that a launcher could get wrong
"""

import contextlib
import os
import signal
import threading
from pathlib import Path

import psutil
import torch

from celo2_pretrain.common.console import print_notice
from celo2_pretrain.common.errors import EXIT_STOPPED, Stopped
from celo2_pretrain.train.faults.exit_code import record_exit_code
from celo2_pretrain.train.faults.signals import INTERRUPTED, SIGNALS, SINCE, leave_lost_terminal, not_ignored, stop_file_is_new


class StopRequests:
    """What this rank has been asked, from construction to `close`; a context manager.

    Python runs signal handlers between two instructions of the main thread, so one that waits in a collective would not
    hear. Therefore C writes the signal's number to a pipe, and a thread reads it.

    Args:
        file: asked for by its existence; one that is older than this process, or than the supervisor that started it, is
            an earlier run's, and is removed.
        rank: 0 reads the file and speaks.
    """

    def __init__(self, file: Path, rank: int):
        self.file, self.rank = file, rank
        self.reason: str | None = None
        self.at_boundaries = False  # whether somebody looks at `reason` in bounded time
        self.began = float(os.environ.get(SINCE) or psutil.Process().create_time())
        self.old_handlers, self.pipe = {}, ()

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
            return self
        self.pipe = os.pipe()
        os.set_blocking(self.pipe[1], False)
        self.old_wakeup = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
        self.old_handlers = {number: signal.signal(number, lambda *_: None) for number in not_ignored()}
        threading.Thread(target=self._listen, args=(self.pipe[0],), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if not self.pipe:
            return
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.old_wakeup)
        os.close(self.pipe[1])  # ends the thread

    def _listen(self, pipe: int) -> None:
        interrupts = 0
        while byte := os.read(pipe, 1):
            interrupts += byte[0] == signal.SIGINT
            if byte[0] not in SIGNALS:
                continue
            leave_lost_terminal()
            name = signal.Signals(byte[0]).name
            if interrupts > 1:
                self._leave(
                    INTERRUPTED, "interrupted a second time: ended at once, nothing was saved since the last checkpoint"
                )
            if not self.at_boundaries:
                self._leave(
                    EXIT_STOPPED,
                    f"stopped by {name} before the first step: nothing to save; start again with the same command",
                )
            if self.reason is None:
                self.reason = name
                self._say(f"{name}: finishing the step, then saving")
        os.close(pipe)

    def _leave(self, code: int, why: str) -> None:
        self._say(why)
        os._exit(record_exit_code(code))  # the main thread may wait in a collective, for ever

    def _say(self, text: str) -> None:
        if self.rank == 0:
            print_notice(text)

    def asked(self) -> bool:
        """Whether this rank has been asked to stop."""
        if self.rank == 0 and self.reason is None:
            asks = stop_file_is_new(self.file, self.began)
            if asks:
                self.reason = f"the file {self.file}"
            elif asks is False:
                with contextlib.suppress(OSError):
                    self.file.unlink()
                    self._say(f"removed {self.file}, which is older than this run: to stop it, make the file again")
        return self.reason is not None

    def remove_file(self) -> None:
        """Rank 0's; where it can't, it says so: all is saved, and a later run takes the file for an old one."""
        if self.rank == 0:
            try:
                self.file.unlink(missing_ok=True)
            except OSError as error:
                self._say(f"cannot remove {self.file}: {error.strerror}; the next run ignores it, if it isn't made again")


class Agreement:
    """What the ranks tell each other at the end of a step, in one reduction of two numbers on the CPU."""

    def __init__(self, requests: StopRequests, world_size: int):
        self.requests, self.world_size = requests, world_size
        # The main group's backend may be NCCL, whose reductions would wait for all that was queued on the GPU.
        self.group = torch.distributed.new_group(backend="gloo") if world_size > 1 else None

    def exchange(self, loss: float = 0.0) -> tuple[float, bool]:
        """(mean of `loss` over the ranks, whether any rank was asked to stop), the same on every rank."""
        told = torch.tensor([loss, float(self.requests.asked())], dtype=torch.float64)
        if self.world_size > 1:
            torch.distributed.all_reduce(told, group=self.group)
        return float(told[0]) / self.world_size, bool(told[1] > 0)

    def stop(self, where: str) -> None:
        """Raise Stopped, and remove the file that asked for it, so that it is not found again."""
        self.requests.remove_file()
        raise Stopped(f"stopped on request ({self.requests.reason or 'of another rank'}) {where}")
