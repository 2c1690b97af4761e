"""An error on one rank ends all ranks, and the first error is printed first.

The rank that fails writes its traceback to run_dir/error_rank_N.txt and one line to run_dir/error_first.txt, before its
connections break. Every rank polls error_first.txt while it trains, and reads it when it loses a connection. It then ends
with one line, even if NCCL would wait or the launcher of its node knows of no failure.
"""

import contextlib
import os
import re
import signal
import socket
import threading
import time
import traceback
from pathlib import Path

import torch

from celo2_pretrain.common.console import print_notice
from celo2_pretrain.common.errors import Stopped, UserError
from celo2_pretrain.optimizer.sharding.replicas import DriftError
from celo2_pretrain.train.checkpoints.staging import settle
from celo2_pretrain.train.faults.run_lock import InUse
from celo2_pretrain.train.start.ranks import join_ranks, lost_connection, world_from_environment

FIRST = "error_first.txt"
LOOK_SECONDS = 2.0  # between looks for another rank's error
GRACE_SECONDS = 10  # for the other ranks to notice by themselves
GRACE_AFTER_USER_ERROR = 120  # all ranks may have it: they end in order, and may have a checkpoint to finish
REASON_SECONDS = 3.0  # until the reason of a lost connection must have appeared on a shared file system
FOLLOW_SECONDS = 2.0  # behind the first rank, so that launchers report its exit code
_left_training = threading.Event()


@contextlib.contextmanager
def ending_all_ranks(run_dir: str):
    """End all ranks with code 1 when an exception other than UserError and Stopped leaves the block.

    A single process writes its traceback and raises the exception again.
    """
    rank, world_size = world_from_environment()
    try:
        yield
    except UserError as error:
        if world_size > 1 and torch.distributed.is_initialized() and not isinstance(error, InUse):
            claim(run_dir, f"rank {rank} on {socket.gethostname()}: {error}", GRACE_AFTER_USER_ERROR, code=2)
        raise
    except Stopped:  # on all ranks alike, with a checkpoint
        raise
    except Exception as error:
        if world_size == 1:
            write(run_dir, rank, error)
            raise
        end(run_dir, rank, error)
    finally:
        _left_training.set()


def join_and_look(run_dir: str) -> None:
    """Join the ranks, and from then on end this process when another rank leaves an error in `run_dir`. Once per process."""
    if torch.distributed.is_initialized():
        return
    rank, world_size = world_from_environment()
    if rank == 0:  # remove an earlier run's errors before any rank reads them
        for path in Path(run_dir).glob("error_*.txt"):
            if path.name == FIRST or re.fullmatch(r"error_rank_\d+\.txt", path.name):
                path.unlink()
    join_ranks()
    _left_training.clear()
    if world_size > 1:
        threading.Thread(target=_look, args=(run_dir, rank), name="look for other ranks' errors", daemon=True).start()


def write(run_dir: str, rank: int, error: BaseException) -> Path | None:
    """The traceback as run_dir/error_rank_N.txt; None where there is no run folder yet, or no space in it."""
    path = Path(run_dir, f"error_rank_{rank}.txt")
    try:
        who = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} rank {rank} on {socket.gethostname()}, process {os.getpid()}"
        path.write_text(f"{who}\n" + "".join(traceback.format_exception(error)))
    except OSError:
        return None
    return path


def claim(run_dir: str, line: str, grace: int = GRACE_SECONDS, code: int = 1) -> bool:
    """Whether this rank is the first to fail. Then `line` is written for the other ranks, which have `grace` seconds to
    end by themselves before they exit with `code`."""
    try:
        with open(Path(run_dir, FIRST), "x") as file:
            file.write(f"{' '.join(line.split())[:2000]}\n{grace} {code}\n")
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def first(run_dir: str) -> tuple[str, int, int] | None:
    """The line of the rank that failed first, the seconds that others have, and the exit code; None if no rank has failed."""
    try:
        line, numbers = Path(run_dir, FIRST).read_text().splitlines()
        grace, code = numbers.split()
        return line, int(grace), int(code)
    except (OSError, ValueError):  # missing, or not yet complete
        return None


def end(run_dir: str, rank: int, error: Exception) -> None:
    """Report what this rank knows of the failure and exit at once, without a collective that others must join."""
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher soon terminates the ranks: report first
    lost = lost_connection(error)
    told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    path = write(run_dir, rank, error)
    written = f" (traceback in {path})" if path else ""
    code = 1
    joined = torch.distributed.is_initialized()  # until then the folder may hold an earlier run's errors
    if lost:
        until = time.monotonic() + REASON_SECONDS
        while not first(run_dir) and time.monotonic() < until:
            time.sleep(0.1)
    if joined and not claim(run_dir, f"rank {rank} on {socket.gethostname()}: {told}"):
        reason, _, code = first(run_dir) or ("another rank", 0, 1)
        line = f"rank {rank} ends too, after {reason}"
        text = line if lost else f"{line}; its own error is {told}{written}"
        time.sleep(FOLLOW_SECONDS)
    elif lost:
        text = (
            f"error on rank {rank}: the connection to another rank broke, and that rank left no message: it was killed "
            f"(out of memory? see `dmesg` on its node), or its node is gone. {told}{written}"
        )
    else:
        # The cause of drift or a lack of memory is the machine, so a traceback doesn't help.
        told_whole = isinstance(error, (DriftError, MemoryError))
        where = "" if told_whole else "\n" + "".join(traceback.format_exception(error)).rstrip()
        text = f"error on rank {rank}: {told}{where}"
    leave(text, code)


def leave(text: str, code: int) -> None:
    """Print `text`, let the copy of a checkpoint finish, and end the process without waiting for other threads."""
    print_notice(text)
    settle(print_notice)
    os._exit(code)


def _look(run_dir: str, rank: int) -> None:
    while not _left_training.wait(LOOK_SECONDS):
        found = first(run_dir)
        if found and not _left_training.wait(found[1]):
            leave(f"rank {rank} ends too, after {found[0]}", found[2])
