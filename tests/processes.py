"""How tests start processes: the driver in one process or under a launcher, and a worker script on each rank of a world."""
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from celo2_pretrain.train.start.ranks import free_port

ROOT = Path(__file__).parents[1]


def environment(**more: str) -> dict[str, str]:
    """A process's environment: this source tree, one thread, no launcher's variables; then `more`."""
    mine = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    mine |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    mine.setdefault("GLOO_SOCKET_IFNAME", "lo")  # not the address that the machine's name stands for, if any
    if not torch.cuda.is_available():
        mine["DS_ACCELERATOR"] = "cpu"
    return mine | more


def command(*arguments: str) -> list[str]:
    """`celo2-pretrain` with these arguments."""
    return [sys.executable, "-m", "celo2_pretrain.cli", *arguments]


def deepspeed(*arguments: str, ranks: int, script: Path = ROOT / "launch/pretrain.py") -> list[str]:
    """`deepspeed launch/pretrain.py` (or another script) on so many ranks, with these arguments."""
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--log_level", "critical", "--num_gpus",
            str(ranks), "--master_port", str(free_port()), str(script), *arguments]


def torchrun(*arguments: str, ranks: int, script: Path = ROOT / "launch/pretrain.py") -> list[str]:
    """The same under torchrun."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port()),
            str(script), *arguments]


def drive(*arguments: str, ranks: int = 1, timeout: float = 1500, **more: str) -> subprocess.CompletedProcess:
    """Run `train` with these arguments, under DeepSpeed's launcher where there are several ranks, and wait for its end."""
    line = command("train", *arguments) if ranks == 1 else deepspeed(*arguments, ranks=ranks)
    return subprocess.run(line, env=environment(**more), capture_output=True, text=True, timeout=timeout)


def on_ranks(world: int, worker: Path, *arguments: str, timeout: float = 1500) -> list[str]:
    """Run the script `worker` once for each rank of a world; what each printed. Fails with the output of one that failed."""
    shared = environment(WORLD_SIZE=str(world), LOCAL_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    with contextlib.ExitStack() as files:  # pipes would fill up while another rank's is read
        printed = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(world)]
        ranks = [subprocess.Popen([sys.executable, str(worker), *arguments], stdout=printed[rank], stderr=subprocess.STDOUT,
                                  env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)]
        until = time.monotonic() + timeout
        try:
            while None in (codes := [rank.poll() for rank in ranks]) and time.monotonic() < until:
                if any(codes):  # the others may wait for it for ever
                    until = min(until, time.monotonic() + 30)
                time.sleep(0.05)
        finally:
            for rank in ranks:
                rank.kill()
        outputs = []
        for file in printed:
            file.seek(0)
            outputs.append(file.read())
    failed = [(code, text[-4000:]) for code, text in zip(codes, outputs) if code]
    assert not failed, failed
    assert None not in codes, f"not done after {timeout} s: {[text[-2000:] for text in outputs]}"
    return outputs


def spawn(run: Callable[..., None], world: int, folder: Path) -> None:
    """`run(rank, port, world, folder)` in so many processes; it calls `join` first and `leave` last."""
    mp.spawn(run, args=(free_port(), world, str(folder)), nprocs=world)


def join(rank: int, port: int, world: int) -> None:
    """Make this process a rank of a gloo world, with one thread and the seed 0."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)


def leave() -> None:
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # torch's own threads (FSDP2 over gloo) now and then abort the interpreter's exit
