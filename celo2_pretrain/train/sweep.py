"""A sweep of learning rates: one training run for each, the best chosen by the last validation loss.

OUT/lr=0.001/   a run like any other (metrics, checkpoints, loss.png), with all it printed in OUT/lr=0.001.log
OUT/sweep.csv   a line for each rate;  OUT/sweep.png  the validation loss against the rate
"""

import contextlib
import csv
import io
import math
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from celo2_pretrain.common.durable import write_atomically
from celo2_pretrain.common.errors import EXIT_STOPPED, Stopped, UserError
from celo2_pretrain.common.figures import new_figure, save_figure
from celo2_pretrain.config import READER, Config, load_config
from celo2_pretrain.train.record.metrics import read_metrics

PAPER_GRID = [float(f"{lr:.3g}") for lr in np.geomspace(1e-5, 1e-3, 5)]  # arXiv 2602.19142: [1e-5, 1e-3], log-spaced
DIVERGED = "diverged.txt"  # in the folder of a run that the loop ended for its loss or gradients


@dataclass
class Run:
    lr: float
    folder: Path
    config: Config

    def status(self) -> str:
        """finished, diverged, begun (there is a checkpoint to go on from), or new. Raises UserError when the folder
        holds a run with another configuration."""
        if not (self.folder / "config.yaml").is_file():
            return "new"
        theirs = READER.values(load_config(str(self.folder / "config.yaml")))
        for name, ours in READER.values(self.config).items():
            if theirs[name] != ours and name != "run_dir":
                raise UserError(
                    f"{self.folder} was run with {name} = {theirs[name]}, this sweep has {ours}: give the "
                    f"same arguments to go on, or another --out"
                )
        if (self.folder / DIVERGED).is_file():
            return "diverged"
        latest = self.folder / "checkpoints" / "latest"
        if not latest.is_file():
            return "new"
        if latest.read_text().strip() != f"step_{self.config.train.max_steps:08d}":
            return "begun"
        return "finished" if self.last() else "diverged"  # a loss that is no number is none in the metrics

    def last(self) -> dict | None:
        """The validation after the last step."""
        found = [record for record in read_metrics(self.folder) if "val_loss" in record]
        return found[-1] if found and found[-1]["step"] == self.config.train.max_steps else None

    def row(self) -> dict:
        status, records = self.status(), read_metrics(self.folder)
        last = self.last() if status == "finished" else None
        return {
            "lr": self.lr,
            "status": status,
            "val_loss": last and last["val_loss"],
            "val_bits_per_byte": last and last["val_bits_per_byte"],
            "step": records[-1]["step"] if records else 0,
            "seconds": round(sum(record.get("seconds", 0) for record in records), 1),
        }


def parse_rates(text: str) -> list[float]:
    """Learning rates separated by commas, in rising order. Raises UserError."""
    try:
        rates = sorted(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--lrs {text}: give numbers separated by commas, for example --lrs 1e-4,3e-4,1e-3") from None
    if not all(0 < lr < math.inf for lr in rates):
        raise UserError(f"--lrs {text}: learning rates must be above 0 and finite")
    if len({f"{lr:g}" for lr in rates}) < len(rates):
        raise UserError(f"--lrs {text}: one of them is there twice")
    return rates


def sweep(out: str, config: str | None, overrides: list[str], rates: list[float], launch: list[str]) -> list[dict]:
    """Train with each of `rates` that isn't done yet, one after the other, and write sweep.csv and sweep.png.

    Args:
        config, overrides: as for `train`, without optimizer.lr and run_dir.
        launch: the command of a driver, to which train's arguments are added.

    Returns: the rows of sweep.csv. Raises UserError for a configuration that cannot run, and when a run fails other
    than by diverging; Stopped when a run was asked to stop; KeyboardInterrupt when the run has saved after Ctrl-C.
    """
    for override in overrides:
        if override.partition("=")[0] in ("optimizer.lr", "run_dir"):
            raise UserError(f"{override}: a sweep sets this itself; give learning rates by --lrs, the folder by --out")
    runs = []
    for lr in rates:
        folder = Path(out, f"lr={lr:g}")
        runs.append(Run(lr, folder, load_config(config, [*overrides, f"optimizer.lr={lr!r}", f"run_dir={folder}"])))
    for run in runs:  # whatever is refused is refused before hours of training
        run.status()
    for run in runs:
        status = run.status()
        if status in ("new", "begun"):
            train(run, status, config, overrides, launch)
        else:
            print(f"lr={run.lr:g}: {status} already", flush=True)
        write_csv(Path(out, "sweep.csv"), [other.row() for other in runs])
    rows = [run.row() for run in runs]
    draw(Path(out, "sweep.png"), rows)
    return rows


def train(run: Run, status: str, config: str | None, overrides: list[str], launch: list[str]) -> None:
    """One run in a process of its own, its output shown and kept in a log file."""
    if status == "begun":
        arguments = ["--resume", str(run.folder)]
    else:
        arguments = [
            *(["--config", config] if config else []),
            "--overwrite",
            *overrides,
            f"optimizer.lr={run.lr!r}",
            f"run_dir={run.folder}",
        ]
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    log = run.folder.parent / f"{run.folder.name}.log"
    print(f"lr={run.lr:g}: {shlex.join([*launch, *arguments])}", flush=True)
    errors = []
    try:
        process = subprocess.Popen(
            [*launch, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
        )
    except OSError as error:
        raise UserError(f"--launch {shlex.join(launch)!r}: {error.strerror}: give the command of a driver") from None
    with first_interrupt_noted() as interrupted, process, open(log, "a", encoding="utf-8") as file:
        for line in process.stdout:
            print(f"lr={run.lr:g} | {line}", end="", flush=True)
            file.write(line)
            if "error: " in line:
                errors.append(line.split("error: ", 1)[1].strip())
    stopped = f"stopped in the run with lr={run.lr:g}: the same command goes on"
    if interrupted:
        print(stopped, flush=True)
        raise KeyboardInterrupt
    if process.returncode == 0:
        return
    if process.returncode == EXIT_STOPPED:
        raise Stopped(stopped)
    diverged = [error for error in errors if error.startswith("training diverged")]
    if not diverged:
        reason = errors[-1] if errors else f"exit status {process.returncode}"
        raise UserError(f"the run with lr={run.lr:g} failed ({reason}); its output is in {log}; the same command goes on")
    write_atomically(run.folder / DIVERGED, diverged[0] + "\n")


@contextlib.contextmanager
def first_interrupt_noted() -> Iterator[list[int]]:
    """While a run trains: Ctrl-C only puts its number into the list, for the run has heard it too, and saves as long as its
    output is read. A second one raises KeyboardInterrupt."""
    heard = []

    def hear(number: int, _) -> None:
        heard.append(number)
        if len(heard) > 1:
            raise KeyboardInterrupt
        print("interrupted: waiting for the run to save; a second time ends at once", file=sys.stderr, flush=True)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, hear)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, before)


def write_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def draw(path: Path, rows: list[dict]) -> None:
    figure, axes = new_figure(path, figsize=(6, 4))
    finished = [(row["lr"], row["val_loss"]) for row in rows if row["status"] == "finished"]
    if finished:
        axes.plot(*zip(*finished), marker="o")
        axes.plot(*min(finished, key=lambda point: point[1]), marker="o", markersize=10, fillstyle="none", color="C3")
    for row in rows:
        if row["status"] == "diverged":
            axes.axvline(row["lr"], color="C3", linestyle=":", label="diverged")
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def verdict(rows: list[dict]) -> str:
    """A table, the chosen learning rate, and a warning when it lies at an end of the grid. Raises UserError when every
    run diverged."""
    finished = [row for row in rows if row["status"] == "finished"]
    if not finished:
        raise UserError(
            f"every run diverged, at learning rates from {rows[0]['lr']:g} to {rows[-1]['lr']:g}: give smaller ones by --lrs"
        )
    best = min(finished, key=lambda row: row["val_loss"])
    lines = ["learning rate  validation loss"]
    for row in rows:
        shown = f"{row['val_loss']:.4f}" if row["status"] == "finished" else row["status"]
        lines.append(f"{row['lr']:>13g}  {shown:>15}{'  <- best' if row is best else ''}")
    lines.append(f"best learning rate: optimizer.lr={best['lr']:g} (validation loss {best['val_loss']:.4f})")
    if best is rows[0]:
        lines.append(f"warning: it is the smallest of the grid, a smaller one may be better: add --lrs {best['lr'] / 3:.1g}")
    if best is rows[-1]:
        lines.append(f"warning: it is the largest of the grid, a larger one may be better: add --lrs {best['lr'] * 3:.1g}")
    return "\n".join(lines)
