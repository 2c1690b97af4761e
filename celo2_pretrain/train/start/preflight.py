"""What is checked at the start of a run, before hours depend on it: this node for itself, then the ranks among each other.

An error is raised alike on all ranks that can know of it, and told once; what may still go well is a warning.
"""

import hashlib
import importlib.metadata
import os
import resource
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from celo2_pretrain import param_groups
from celo2_pretrain.common.console import print_notice
from celo2_pretrain.common.errors import UserError, one_line, shown
from celo2_pretrain.config import Config, dump_config
from celo2_pretrain.model.build import build_model
from celo2_pretrain.train.start.ranks import ranks_here, world_from_environment

MIB, GB = 1 << 20, 1e9
STATE_BYTES = {"fp32": 16, "bf16": 8, "fp8": 4}  # Celo2's accumulators, each parameter; AdamW has 8
SHM_CPU_RANK = 66 * MIB  # what DeepSpeed's communication on the CPU maps for each rank
SHM_GPU_NODE = 1024 * MIB  # what NVIDIA advises for NCCL in a container
OPEN_FILES = 4096  # sockets to all ranks, shards, libraries; many systems begin with 1024
CLOCK_SECONDS = 5.0
PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "safetensors")


def warn(text: str) -> None:
    print_notice(f"warning: {text}")


def check_run_dir(run_dir: str) -> None:
    """Raises UserError where this process could not make `run_dir`, or write into it; nothing is left there."""
    folder = Path(run_dir).absolute()
    try:
        while not folder.exists() and not folder.is_symlink():
            folder = folder.parent
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"run_dir {shown(run_dir)} can't be {'written' if folder == Path(run_dir).absolute() else 'made'} "
            f"({shown(str(folder))}: {error.strerror}): choose another run_dir=…"
        ) from None


def check_node(config: Config, index: dict, replaced: bool) -> None:
    """GPUs, memory, disk, shared memory and open files of this node, before the model is built and the ranks meet.

    Args:
        index: of the data, for the size of the vocabulary.
        replaced: whether the checkpoints that are in run_dir will go before new ones are written.

    Raises UserError for what is sure to fail.
    """
    check_gpus()
    raise_open_files()
    with torch.device("meta"):
        model = build_model(config.model, index["vocab_size"], index["eos_id"], pretrained=False)
    parameters = sum(p.numel() for p in model.parameters())
    rank, world_size = world_from_environment()
    warnings = [check_memory(config, parameters, world_size), check_shared_memory()]
    free = free_bytes(config.run_dir) + (folder_bytes(Path(config.run_dir, "checkpoints")) if replaced else 0)
    hidden = sum(p.numel() for group in param_groups(model) if group["rule"] == "celo2" for p in group["params"])
    warning = check_disk(config, parameters, hidden, free)
    warnings.append(warning if rank == 0 else None)  # one folder for all nodes
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for text in filter(None, warnings):
            warn(text)


def check_gpus() -> None:
    """Raises UserError when this node has more ranks than GPUs."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return
    local, count = int(os.environ.get("LOCAL_RANK", 0)), accelerator.device_count()
    if local >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise UserError(
            f"{ranks_here()} ranks on {socket.gethostname()}, but {count} GPU(s) are visible there "
            f"(CUDA_VISIBLE_DEVICES={visible}): start {count} ranks a node"
        )


def raise_open_files() -> None:
    """Take as many open files as this process may have, up to OPEN_FILES; warn where that is less."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < OPEN_FILES and os.environ.get("LOCAL_RANK", "0") == "0":
        warn(
            f"{socket.gethostname()} allows {most} open files a process: with many ranks or shards {OPEN_FILES} are better "
            f"(ulimit -n)"
        )


def state_bytes(config: Config) -> int:
    """Bytes of the optimizer's accumulators for one parameter; embeddings, heads and 1-D tensors may have fewer."""
    return 8 if config.optimizer.name == "adamw" else STATE_BYTES[config.optimizer.state_dtype]


def checkpoint_bytes(config: Config, parameters: int, hidden: int) -> tuple[int, int]:
    """Bytes of one checkpoint, at least and at most: DeepSpeed's model and optimizer files, and the copy for any world.

    Args:
        hidden: how many of the parameters are in hidden matrices; embeddings, heads and 1-D tensors may have AdamW's states.
    """
    states = [state_bytes(config)]
    if config.checkpoint.any_world:  # there they are float32 always
        states.append(8 if config.optimizer.name == "adamw" else STATE_BYTES["fp32"])
    least, most = (
        sum(4 * parameters + hidden * each + (parameters - hidden) * bound(8, each) for each in states) for bound in (min, max)
    )  # 4: float32 weights
    # The model's own file holds the weights again, but for those that are split or need no copy in float32.
    weights = 4 if config.train.precision == "fp32" else 2
    return least + parameters * (weights if config.train.zero_stage in (1, 2) else 0), most + 4 * parameters


def check_disk(config: Config, parameters: int, hidden: int, free: int) -> str | None:
    """A warning when `free` bytes may be less than two checkpoints. Raises UserError when not even one fits, unless the run
    is to go on without."""
    least, most = checkpoint_bytes(config, parameters, hidden)
    has = (
        f"run_dir {config.run_dir!r} has {free / GB:.2f} GB free, and a checkpoint of {parameters / 1e6:,.0f} M parameters "
        "takes"
    )
    if free < least:
        text = f"{has} at least {least / GB:.2f} GB: free some, or choose another run_dir" + (
            "; checkpoint.any_world=false halves it" if config.checkpoint.any_world else ""
        )
        if config.checkpoint.on_error == "continue":
            return text
        raise UserError(text)
    if free < most:
        return f"{has} {least / GB:.2f} to {most / GB:.2f} GB: it may not fit"
    if free < 2 * most:
        return f"{has} up to {most / GB:.2f} GB: there may be no room for two, and a new one is written before an old one goes"
    return None


def free_bytes(path: str) -> int:
    """Free bytes where `path` is, or will be made."""
    folder = Path(path).resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_memory(config: Config, parameters: int, world_size: int) -> str | None:
    """A warning when what this node's ranks hold in its memory is more than is free. Raises UserError when it is more than
    there is: the kernel would kill a rank without a word. `celo2-pretrain plan` knows more, about GPUs."""
    each = 4.0 * parameters  # every rank builds the whole model in float32 first
    if get_accelerator().device_name() == "cpu":
        shards = world_size if config.train.zero_stage else 1
        each += parameters * (4 + (4 + state_bytes(config)) / shards)  # gradients; master weights and accumulators
    need, limit, free = each * ranks_here(), *host_memory()
    text = (
        f"{ranks_here()} rank(s) on {socket.gethostname()} need at least {need / GB:.2f} GB of its memory for "
        f"{parameters / 1e6:,.0f} M parameters"
    )
    if need > limit:
        raise UserError(
            f"{text}, and it has {limit / GB:.2f} GB (or its container may use no more): take fewer ranks a "
            f"node, or a smaller model"
        )
    return f"{text}, and {free / GB:.2f} GB are free" if need > free else None


def host_memory() -> tuple[int, int]:
    """(bytes of memory, bytes free) for this process: the machine's, or its control group's where that has less."""
    total = free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = int(Path(limit).read_text()), int(Path(used).read_text())
        except (OSError, ValueError):  # none, or "max"
            continue
        if most < total:
            total, free = most, min(free, most - now)
    return total, max(0, free)


def check_shared_memory(path: str = "/dev/shm") -> str | None:
    """A warning when the ranks of this node may run out of shared memory: they die of SIGBUS then, without a word."""
    ranks = ranks_here()
    if ranks == 1 or not Path(path).is_dir():
        return None
    size = shutil.disk_usage(path).total
    need = SHM_CPU_RANK * ranks if get_accelerator().device_name() == "cpu" else SHM_GPU_NODE
    if size >= need:
        return None
    return (
        f"{path} has {size / MIB:,.0f} MiB, and {ranks} ranks may use {need / MIB:,.0f} MiB of it: give the container "
        f"more (docker run --shm-size=1g)"
    )


def facts(config: Config, index: dict) -> dict[str, str]:
    """What must be the same on every rank, by name."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    tokens = {name: index.get(name) for name in ("vocab_size", "tokenizer", "splits")}
    return {
        "python": sys.version.split()[0],
        **found,
        "this package's code": code_digest(),
        "the configuration": digest(dump_config(config)),
        "the data": digest(repr(tokens)),
        "the backend": torch.distributed.get_backend(),
    }


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def code_digest() -> str:
    """Of all Python files of this package: an installed one has no git commit, and a checkout may be changed."""
    import celo2_pretrain.kernels

    whole = hashlib.sha256()
    for folder in (Path(__file__).parents[2], Path(celo2_pretrain.kernels.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            whole.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return whole.hexdigest()[:12]


def differences(found: list[dict[str, str]], hosts: list[str]) -> list[str]:
    """One line for each fact that isn't the same on all ranks: its values, with the first rank that has each."""
    lines = []
    for name in found[0]:
        first = defaultdict(list)
        for rank, of_rank in enumerate(found):
            first[of_rank[name]].append(rank)
        if len(first) > 1:
            lines.append(
                f"{name} is "
                + ", ".join(
                    f"{value} on rank {ranks[0]} ({hosts[ranks[0]]}" + (f" and {len(ranks) - 1} more)" if ranks[1:] else ")")
                    for value, ranks in first.items()
                )
            )
    return lines


def check_ranks(config: Config, index: dict) -> None:
    """That the joined ranks can talk, run the same code with the same configuration and data, and see one run_dir.

    Raises UserError on all ranks alike; rank 0 warns of clocks that differ and of different GPUs.
    """
    rank, world_size = world_from_environment()
    if world_size == 1:
        return
    accelerator = get_accelerator()
    try:
        torch.distributed.all_reduce(torch.ones((), device=accelerator.current_device_name()))
    except RuntimeError as error:
        raise UserError(
            f"the ranks met, but can't exchange data by {torch.distributed.get_backend()}: {one_line(error)}; "
            f"NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME name the interface to take, NCCL_DEBUG=INFO tells more"
        ) from None
    device = "CPU" if accelerator.device_name() == "cpu" else torch.cuda.get_device_name()
    gathered: list = [None] * world_size
    torch.distributed.barrier()  # so that the clocks are read at one time
    mine = (facts(config, index), socket.gethostname(), time.time(), device, uuid.uuid4().hex)
    torch.distributed.all_gather_object(gathered, mine)
    found, hosts, clocks, devices, tokens = zip(*gathered)
    if wrong := differences(found, hosts):
        raise UserError("the ranks don't agree: " + "; ".join(wrong) + ": install and give the same on every node")
    if blind := ranks_without_folder(config.run_dir, tokens[0], rank, world_size):
        raise UserError(
            f"run_dir {config.run_dir!r} is not the same folder on rank {blind[0]} ({hosts[blind[0]]}) as on "
            f"rank 0 ({hosts[0]}): give a path that all nodes share"
        )
    late = max(range(world_size), key=lambda other: abs(clocks[other] - clocks[0]))
    if rank == 0 and abs(clocks[late] - clocks[0]) > CLOCK_SECONDS:
        warn(
            f"the clocks of {hosts[0]} and {hosts[late]} differ by {abs(clocks[late] - clocks[0]):.0f} s: times in logs "
            f"and files will mislead; start a time service (chrony, ntpd) on every node"
        )
    if rank == 0 and len(set(devices)) > 1:
        warn(f"the ranks have different devices ({', '.join(sorted(set(devices)))}): the slowest sets the pace")


def ranks_without_folder(run_dir: str, token: str, rank: int, world_size: int) -> list[int]:
    """The ranks that don't see a file that rank 0 makes in `run_dir`."""
    path, made = Path(run_dir, f".seen-{token}"), False
    if rank == 0:
        made = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    torch.distributed.barrier()
    until = time.monotonic() + 5  # a network file system may remember for a while that it wasn't there
    while not (seen := path.exists()) and time.monotonic() < until:
        time.sleep(0.2)
    all_seen: list = [None] * world_size
    torch.distributed.all_gather_object(all_seen, seen)
    if rank == 0:
        path.unlink()
        if made and not all(all_seen):
            path.parent.rmdir()
    return [other for other, saw in enumerate(all_seen) if not saw]
