"""What the benchmark scripts share: where results go, how a table is written, a ratio's spread, this machine's name."""

from __future__ import annotations

import csv
import platform
import statistics
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def write_csv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


def quartiles(ratios: list[float]) -> tuple[float, float, float]:
    """The lower one, the median, the upper one; of a single ratio three times itself."""
    return tuple(statistics.quantiles(ratios, n=4)) if len(ratios) > 1 else (ratios[0],) * 3


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
