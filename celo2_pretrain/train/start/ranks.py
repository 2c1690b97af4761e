"""How the processes of a run meet: a launcher's ranks, or one process on its own."""

import contextlib
import io
import logging
import os
import random
import re
import socket
import time
from pathlib import Path

import deepspeed
import torch

from celo2_pretrain.common.errors import UserError, one_line

STALE_LOCK_SECONDS = 600  # a compilation, which another machine with the same home may be at, takes less
STALE_LOAD_SECONDS = 30
LOST = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|gloo/transport|ncclRemoteError|remote process exit|"
    r"recvValue failed|sendBytes failed|failed to (recv|send), got",
    re.IGNORECASE,
)


def world_from_environment() -> tuple[int, int]:
    """(rank, number of ranks) as the launcher set them; (0, 1) without one.

    Raises UserError for the tasks of an `srun` without a launcher in each: every one would take itself for rank 0.
    """
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
        raise UserError(
            f"srun started {os.environ['SLURM_NTASKS']} tasks, but RANK and WORLD_SIZE are not set: start one "
            "task a node (srun --ntasks-per-node=1) with torchrun or deepspeed in it"
        )
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def ranks_here(default: int = 1) -> int:
    """Ranks of this node, as torchrun or DeepSpeed's launcher tell; `default` where neither does."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or default)


def free_port() -> int:
    """A port nobody listens on, below those that systems give to outgoing connections: gloo's own can't take it before the
    ranks meet there."""
    for port in random.SystemRandom().sample(range(15000, 32000), 100):
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise UserError("found no free port between 15000 and 32000 in 100 tries: something holds thousands of them")


def join_ranks() -> None:
    """Start torch.distributed through DeepSpeed, also for a single process without a launcher; once.

    Raises UserError where the ranks don't meet."""
    if deepspeed.comm.is_initialized():
        return
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if "RANK" not in os.environ:
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
    if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
        announce_compilation()
    # Or NCCL would put all of a node's ranks on the first GPU.
    deepspeed.accelerator.get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
    with contextlib.redirect_stdout(io.StringIO()):  # "built successfully", from every rank
        try:
            deepspeed.init_distributed()
        except RuntimeError as error:  # torch's DistError is one
            if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error).lower():
                raise
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(
                f"rank {os.environ['RANK']} can't meet the others at {where}: {one_line(error)}; "
                f"is that the first node's address and a free port there, and did every node start?"
            ) from None
    if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
        forget_shared_memory()


def forget_shared_memory() -> None:
    """Remove the names of DeepSpeed's buffers for the ranks of a CPU, 66 MB a rank, which it leaves in memory for good. Every
    rank calls it when all have opened them; they go with the last process."""
    torch.distributed.barrier()
    mine = f"deepspeed_allreduce_buffer_{os.getuid()}_*_{os.environ['MASTER_PORT']}_{os.environ['RANK']}"
    for path in Path("/dev/shm").glob(mine):
        path.unlink(missing_ok=True)


def announce_compilation() -> None:
    """On a CPU DeepSpeed compiles its communication in the first run. Say so, and clear the lock that a process leaves which
    was killed while it compiled or loaded: torch would wait for it forever."""
    built = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    there = any(built.glob("**/deepspeed_shm_comm*.so"))
    for lock in built.glob("**/deepspeed_shm_comm/lock"):
        with contextlib.suppress(FileNotFoundError):
            old = time.time() - lock.stat().st_mtime > (STALE_LOAD_SECONDS if there else STALE_LOCK_SECONDS)
            if old and not is_open(lock):
                lock.unlink()
            elif os.environ["RANK"] == "0":
                print(
                    "waiting for the process that compiles or loads DeepSpeed's communication; "
                    f"if there is none, remove {lock}",
                    flush=True,
                )
    if not there and os.environ["RANK"] == "0":
        print("first run on this machine: DeepSpeed compiles its communication (about a minute) …", flush=True)


def is_open(path: Path) -> bool:
    """Whether a process of this machine has the file open, as far as this user may see."""
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(handle) == str(path):
                return True
    return False


def lost_connection(error: BaseException) -> bool:
    """Whether `error` says that another rank went away, so that the reason lies elsewhere."""
    kinds = (RuntimeError, ConnectionError)  # torch's DistError is a RuntimeError
    return isinstance(error, kinds) and bool(LOST.search(str(error)))
