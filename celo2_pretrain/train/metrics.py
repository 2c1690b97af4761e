"""What a run tells: metrics.jsonl for programs, a bar or plain lines for people, and a record of its origin."""
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from celo2_pretrain.train.checkpoint import write_atomically


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The records of metrics.jsonl; a last line that a crash cut short is left out."""
    path = Path(run_dir, "metrics.jsonl")
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Metrics:
    """Rank 0's record of the run; on other ranks (active=False) every method does nothing.

    A resumed run drops the records after its checkpoint, so that metrics.jsonl is always one trajectory.
    """

    def __init__(self, run_dir: str, start_step: int, max_steps: int, active: bool):
        self.active, self.max_steps, self.start_step = active, max_steps, start_step
        if not active:
            return
        kept = [record for record in read_metrics(run_dir) if record["step"] <= start_step]
        path = Path(run_dir, "metrics.jsonl")
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self.file = open(path, "a", buffering=1)
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(total=max_steps, initial=start_step, disable=not self.terminal, dynamic_ncols=True, unit="step")
        self.started = time.time()
        self.val_loss = None

    def step(self, step: int) -> None:
        if self.active and self.terminal:
            self.bar.update(step - self.bar.n)

    def log(self, record: dict) -> None:
        """Write a record with "step" and either "loss" (training) or "val_loss"."""
        if not self.active:
            return
        self.file.write(json.dumps(record) + "\n")
        step = record["step"]
        if "val_loss" in record:
            self.val_loss = record["val_loss"]
            self.say(f"step {step:>6}/{self.max_steps}  validation loss {record['val_loss']:.4f}"
                     f"  ({record['val_bits_per_byte']:.3f} bits per byte)")
        elif self.terminal:
            shown = f"loss {record['loss']:.3f}, lr {record['lr']:.1e}, {record['tokens_per_s']:,.0f} tokens/s"
            self.bar.set_postfix_str(shown if self.val_loss is None else f"{shown}, val {self.val_loss:.3f}")
        else:
            left = (time.time() - self.started) / max(1, step - self.start_step) * (self.max_steps - step)
            print(f"step {step:>6}/{self.max_steps}  loss {record['loss']:.4f}  lr {record['lr']:.2e}"
                  f"  {record['tokens_per_s']:>7,.0f} tokens/s  {left // 60:.0f}m{left % 60:02.0f}s left", flush=True)

    def say(self, text: str) -> None:
        if self.active:
            self.bar.clear()
            print(text, flush=True)
            self.bar.refresh()

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.file.close()


def git(*arguments: str) -> str | None:
    """What git says about the source tree this package lies in; None outside a checkout."""
    here = Path(__file__).resolve().parents[2]
    try:
        result = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def origin(world_size: int) -> dict:
    """Versions, git state, command and hardware: what somebody needs to know to repeat the run."""
    import torch

    packages = ("celo2-pretrain", "torch", "deepspeed", "transformers", "sentencepiece", "numpy", "triton")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    changed = git("status", "--porcelain")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": shlex.join(sys.argv), "world_size": world_size,
        "git_commit": git("rev-parse", "HEAD"), "git_changed_files": changed.splitlines() if changed else [],
        "python": platform.python_version(), "versions": versions, "device": device,
    }
