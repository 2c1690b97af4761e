"""How tests start processes: the driver in one process or under a launcher, and a worker script on each rank of a world."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from celo2_pretrain.train.start.ranks import free_port

from support import warm
from support.paths import ROOT


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
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--no_local_rank",
        "--log_level",
        "critical",
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(free_port()),
        str(script),
        *arguments,
    ]


def torchrun(*arguments: str, ranks: int, script: Path = ROOT / "launch/pretrain.py") -> list[str]:
    """The same under torchrun."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(ranks),
        "--master_port",
        str(free_port()),
        str(script),
        *arguments,
    ]


def drive(*arguments: str, ranks: int = 1, timeout: float = 600, **more: str) -> subprocess.CompletedProcess:
    """Run `train` with these arguments on so many ranks, and wait for its end."""
    return finish([(warm.cli, "train", *arguments)] * ranks, timeout, **more)


def on_ranks(world: int, worker: Path, *arguments: str, timeout: float = 600) -> list[str]:
    """Run the script `worker` once for each rank of a world; what each printed. Fails with the output of one that failed."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(world)]
        codes = wait(
            [(warm.script, worker, *arguments)] * world,
            [(output, output) for output in outputs],
            timeout,
            WORLD_SIZE=str(world),
        )
        printed = [output.read_text() for output in outputs]
    failed = [(code, text[-4000:]) for code, text in zip(codes, printed) if code]
    assert not failed, failed
    return printed


def run_script(path: Path, *arguments: str, folder: Path | None = None, timeout: float = 600) -> subprocess.CompletedProcess:
    """Run `python path` with these arguments, in `folder`, to its end."""
    return finish([(warm.script, path, *arguments)], timeout, folder)


def finish(calls: list[tuple], timeout: float, start_in: Path | None = None, **more: str) -> subprocess.CompletedProcess:
    """Run these calls as the ranks of a world, or as a process without a launcher where there is one, to their end."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        codes = wait(calls, [(output, errors)] * len(calls), timeout, start_in, **more)
        return subprocess.CompletedProcess(calls[0][1:], next(filter(None, codes), 0), output.read_text(), errors.read_text())


def wait(
    calls: list[tuple], outputs: list[tuple[Path, Path]], timeout: float, start_in: Path | None = None, **more: str
) -> list[int]:
    """Start a process for each call, and wait for all; their exit codes. Fails where one doesn't end in time.

    One that fails leaves the others 30 seconds, in which they should notice; then they are killed, as by a launcher."""
    world, port, processes = len(calls), str(free_port()), []
    for rank, (call, *arguments) in enumerate(calls):
        place = (
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            if world > 1 or more.get("WORLD_SIZE")
            else {}
        )
        processes.append(
            warm.fork(
                call,
                *arguments,
                environment=environment(**place | more),
                output=outputs[rank][0],
                errors=outputs[rank][1],
                folder=start_in,
            )
        )
    until = time.monotonic() + timeout
    try:
        while None in (codes := [process.exitcode for process in processes]) and time.monotonic() < until:
            if any(codes):
                until = min(until, time.monotonic() + 30)
            warm.watch(processes)
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
    ended = [process.join() or process.exitcode for process in processes]
    assert any(codes) or None not in codes, f"not done after {timeout} s: {[file.read_text()[-2000:] for file in outputs[0]]}"
    return ended


def spawn(run: Callable[..., None], world: int, folder: Path) -> None:
    """`run(rank, port, world, folder)` in so many processes; it calls `join` first and `leave` last."""
    port, outputs = free_port(), [Path(folder, f"output-{rank}") for rank in range(world)]
    codes = wait(
        [(run, rank, port, world, str(folder)) for rank in range(world)], [(output, output) for output in outputs], 600
    )
    assert not any(codes), [output.read_text()[-4000:] for output in outputs]


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
