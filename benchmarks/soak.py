"""Does a long run stay as it began? 20,000 optimizer steps of the driver on two ranks, watched from outside.

    nice python benchmarks/soak.py                    -> results/soak.csv and .png, and a verdict; exit code 1 if it failed
    python benchmarks/soak.py --steps 200 --out /tmp  the short form

A small GPT with validations and checkpoints that rotate. Watched: each rank's resident memory, open files and threads,
and how many checkpoints there are. After the first quarter, in which caches fill, memory and files must not grow; the
ranks compare checksums of all that they hold in common every 50 steps (`optimizer.check_replicas_every`).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from celo2_pretrain.common.figures import new_figure, save_figure
from celo2_pretrain.train.record.metrics import read_metrics
from celo2_pretrain.train.start.ranks import free_port

from report import write_csv

ROOT = Path(__file__).parents[1]
KEEP = 3
WARM = 0.25  # of the steps: until then caches fill
MEMORY_MB = 16  # that the median of the last quarter may be above the second's: the allocator's own ups and downs
SETTINGS = [
    "model.layers=2",
    "model.width=32",
    "model.heads=2",
    "model.context=32",
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
    "eval.sequences=16",
    "eval.prompt=",
    "optimizer.lr=1e-3",
    "optimizer.adamw_lr_multiplier=4",
    "optimizer.check_replicas_every=50",
    f"checkpoint.keep_last={KEEP}",
]


def environment() -> dict[str, str]:
    mine = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return mine | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def ranks_of(launcher: psutil.Process) -> list[psutil.Process]:
    """The launcher's ranks, in order; not their helpers, which don't train."""
    found = []
    for process in launcher.children(recursive=True):
        try:
            if any(part.endswith("launch/pretrain.py") for part in process.cmdline()[:4]):
                found.append((int(process.environ()["LOCAL_RANK"]), process))
        except (psutil.Error, KeyError):
            continue  # it has just ended, or is the launcher's own helper
    return [process for _, process in sorted(found, key=lambda pair: pair[0])]


def count_checkpoints(run: Path) -> int:
    return sum(re.fullmatch(r"step_\d+", path.name) is not None for path in (run / "checkpoints").glob("step_*"))


def sample(run: Path, processes: list[psutil.Process], began: float) -> list[dict]:
    """A row for each rank. Fewer, if one is ending."""
    records = read_metrics(run)
    rows, step = [], records[-1]["step"] if records else 0
    checkpoints = count_checkpoints(run)
    for rank, process in enumerate(processes):
        try:
            with process.oneshot():
                rows.append(
                    {
                        "seconds": round(time.time() - began, 1),
                        "step": step,
                        "rank": rank,
                        "rss_mb": round(process.memory_info().rss / 2**20, 2),
                        "open_files": process.num_fds(),
                        "threads": process.num_threads(),
                        "checkpoints": checkpoints,
                    }
                )
        except psutil.Error:
            continue
    return rows


def train(run: Path, data: str, steps: int, ranks: int, stage: int, log: Path) -> list[dict]:
    """Run the driver and watch it; the samples. Ends the program with the log's end where the driver fails."""
    line = [
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
        str(ROOT / "launch/pretrain.py"),
        *SETTINGS,
        f"data.path={data}",
        f"run_dir={run}",
        f"train.max_steps={steps}",
        f"train.log_every={max(1, steps // 1000)}",
        f"eval.every={max(1, steps // 40)}",
        f"checkpoint.every={max(1, steps // 40)}",
        f"train.zero_stage={stage}",
    ]
    rows, began = [], time.time()
    with open(log, "w") as file:
        launcher = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, env=environment())
        try:
            while launcher.poll() is None:
                processes = ranks_of(psutil.Process(launcher.pid))
                if len(processes) == ranks and (run / "metrics.jsonl").exists():
                    rows += sample(run, processes, began)
                time.sleep(min(5.0, max(0.2, steps / 4000)))
        finally:
            launcher.terminate()
            launcher.wait()
    if launcher.returncode:
        sys.exit(f"the driver failed:\n{log.read_text()[-3000:]}")
    return rows


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def verdict(rows: list[dict], run: Path, steps: int, ranks: int) -> list[tuple[bool, str]]:
    """What was promised, and whether it held."""
    said, allowed = [], MEMORY_MB if steps >= 2000 else 4 * MEMORY_MB  # in a short run the caches are still filling
    for rank in range(ranks):
        mine = [row for row in rows if row["rank"] == rank and 0 < row["step"] < steps]  # not while it starts or ends
        mine = mine or [row for row in rows if row["rank"] == rank]
        early = [row for row in mine if WARM * steps <= row["step"] < 2 * WARM * steps] or mine[:1]
        late = [row for row in mine if row["step"] >= (1 - WARM) * steps] or mine[-1:]
        memory = [median([row["rss_mb"] for row in part]) for part in (early, late)]
        files = [min(row["open_files"] for row in part) for part in (early, late)]  # a save has one more open
        said.append(
            (
                memory[1] - memory[0] <= allowed,
                f"rank {rank}: memory {memory[0]:.1f} MB in the second quarter, "
                f"{memory[1] - memory[0]:+.1f} MB in the last ({allowed} allowed)",
            )
        )
        said.append(
            (
                files[1] <= files[0],
                f"rank {rank}: {files[0]} open files in the second quarter, {files[1]} in the "
                f"last; at most {max(row['threads'] for row in mine)} threads",
            )
        )
    most, left = max(row["checkpoints"] for row in rows), count_checkpoints(run)
    said.append((most <= KEEP + 1 and left == KEEP, f"checkpoints: at most {most}, {left} at the end ({KEEP} to keep)"))
    records = read_metrics(run)
    losses = [record["loss"] for record in records if "loss" in record]
    whole = records[-1]["step"] == steps and not any(record.get("skipped_steps") for record in records)
    said.append(
        (whole and losses[-1] < losses[0], f"{steps:,} steps, none left out; loss {losses[0]:.3f} to {losses[-1]:.3f}")
    )
    said.append((True, f"no drift: the ranks compared what they hold in common {steps // 50:,} times"))  # else it had failed
    return said


def draw(rows: list[dict], ranks: int, path: Path) -> None:
    figure, (memory, files) = new_figure(path, nrows=2, figsize=(7, 5), sharex=True)
    for rank in range(ranks):
        mine = [row for row in rows if row["rank"] == rank]
        steps = [row["step"] for row in mine]
        memory.plot(steps, [row["rss_mb"] for row in mine], linewidth=0.9, label=f"rank {rank}")
        files.plot(steps, [row["open_files"] for row in mine], linewidth=0.9, label=f"open files, rank {rank}")
    files.plot(steps, [row["checkpoints"] for row in mine], linewidth=0.9, color="C3", label="checkpoints")
    memory.set(ylabel="resident memory (MB)", title="A long run, watched from outside", ylim=(0, None))
    files.set(xlabel="step", ylabel="count", ylim=(0, None))
    for axes in (memory, files):
        axes.grid(alpha=0.3)
        axes.legend(loc="center left")
    save_figure(figure, path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--zero-stage", type=int, default=0, help="default 0: the ranks hold everything in common")
    parser.add_argument("--data", help="folder of prepared tokens (default: half a MB of the installed Python)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="soak-"))
    data, run = args.data or str(work / "tokens"), work / "run"
    if not args.data:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "celo2_pretrain.cli",
                "prepare",
                "--stdlib",
                "--max-mb",
                "0.5",
                "--vocab-size",
                "512",
                "--out",
                data,
            ],
            check=True,
            env=environment(),
        )
    began = time.time()
    try:
        rows = train(run, data, args.steps, args.ranks, args.zero_stage, work / "log")
        said = verdict(rows, run, args.steps, args.ranks)
    finally:
        shutil.rmtree(work)
    write_csv(args.out / "soak.csv", rows)
    draw(rows, args.ranks, args.out / "soak.png")
    print(f"wrote {args.out / 'soak.png'}")
    for held, line in said:
        print(f"{'held  ' if held else 'FAILED'}  {line}")
    seconds = time.time() - began
    print(
        f"{seconds / 60:.0f} minutes, {seconds / args.steps * 1e3:.0f} ms a step, checkpoints and validations included; "
        f"ZeRO-{args.zero_stage}, {args.ranks} ranks"
    )
    return 0 if all(held for held, _ in said) else 1


if __name__ == "__main__":
    sys.exit(main())
