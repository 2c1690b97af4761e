"""Where a run is from: versions, git state, command and hardware, so that somebody can repeat it.

run_dir/origin.jsonl    one line for the start and for each resume
run_dir/git.diff        what differed from the commit at the start (git.2.diff, … at the resumes)
"""

import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from celo2_pretrain.train.record.peak_flops import Peak

PACKAGES = (
    "celo2-pretrain",
    "torch",
    "deepspeed",
    "transformers",
    "sentencepiece",
    "numpy",
    "triton",
    "datasets",
    "safetensors",
    "wandb",
    "tensorboard",
)
# Variables that change what is computed or how it is launched. No others: the environment holds secrets.
VARIABLES = (
    "OMP_NUM_THREADS",
    "DS_ACCELERATOR",
    "LOCAL_WORLD_SIZE",
    "CELO2_",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "CUBLAS_WORKSPACE_CONFIG",
    "NCCL_",
    "TORCH_NCCL_",
    "GLOO_",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "NVIDIA_TF32_OVERRIDE",
    "SLURM_JOB_ID",
    "SLURM_NNODES",
)
PREFIXES = tuple(name for name in VARIABLES if name.endswith("_"))


def write_origin(folder: Path, world_size: int, peak: Peak) -> None:
    """Append a line to origin.jsonl, and save the source tree's changes beside it."""
    path = folder / "origin.jsonl"
    number = len(path.read_text().splitlines()) + 1 if path.exists() else 1
    record = origin(world_size, peak)
    changes = git("diff", "HEAD") if record["git_changed_files"] else None
    if changes:
        record["git_diff"] = "git.diff" if number == 1 else f"git.{number}.diff"
        (folder / record["git_diff"]).write_text(changes + "\n", encoding="utf-8")
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def remove_origin(folder: Path) -> None:
    for path in [folder / "origin.jsonl", folder / "git.diff", *folder.glob("git.*.diff")]:
        path.unlink(missing_ok=True)


def origin(world_size: int, peak: Peak) -> dict:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    changed = git("status", "--porcelain")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "world_size": world_size,
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name in VARIABLES or name.startswith(PREFIXES)
        },
        "git_commit": git("rev-parse", "HEAD"),
        "git_changed_files": changed.splitlines() if changed else [],
        "python": platform.python_version(),
        "versions": versions,
        "system": platform.platform(),
        **hardware(),
        "peak_flops": peak.flops,
        "peak_source": peak.source,
    }


def hardware() -> dict:
    """The device that rank 0 computes on, and the machine around it."""
    out = {
        "device": f"CPU, {os.cpu_count()} cores",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        out |= {
            "device": properties.name,
            "gpus_here": torch.cuda.device_count(),
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda or torch.version.hip,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
        }
    return out


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )


def git(*arguments: str) -> str | None:
    """What git says about the source tree this package lies in; None outside a checkout."""
    here = Path(__file__).resolve().parents[3]
    try:
        result = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, errors="replace", timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.rstrip() if result.returncode == 0 else None
