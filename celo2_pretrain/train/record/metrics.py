"""What a run tells: metrics.jsonl for programs (docs/insight.md lists its fields), a bar or plain lines for people."""

import json
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from celo2_pretrain.common.console import print_line
from celo2_pretrain.common.durable import write_atomically
from celo2_pretrain.common.errors import one_line
from celo2_pretrain.common.json_file import parse_json

NUMBERS = re.compile(
    r"loss|val_loss|val_bits_per_byte|lr|grad_norm|tokens|tokens_per_s|seconds|"
    r"(time|update_norm|weight_norm)/.*"
)


def is_record(tree) -> bool:
    """Is it a line of metrics.jsonl: a step, and numbers (or null) where there must be some?"""
    if not isinstance(tree, dict) or type(tree.get("step")) is not int or not 0 <= tree["step"] < 2**53:
        return False
    return all(
        isinstance(value, float) or (type(value) is int and abs(value) < 2**53)
        for name, value in tree.items()
        if NUMBERS.fullmatch(name) and (value is not None or name == "val_loss")
    )


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The records of metrics.jsonl; lines that a crash cut short, or that are damaged, are left out."""
    path = Path(run_dir, "metrics.jsonl")
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if is_record(record):
            records.append(record)
    return records


def _keep(path: Path, kept: Callable[[dict], bool]) -> Path:
    """Rewrite the file with those of its records that are `kept`."""
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in read_metrics(path.parent) if kept(record)))
    return path


def finite(value):
    """A record, or what is in it, with null for each number that JSON has no word for."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Metrics:
    """Rank 0's record of the run; on other ranks (active=False) every method does nothing.

    A resumed run drops the records after its checkpoint, so that metrics.jsonl is always one trajectory. A full disk or
    a tracker that fails ends no run: it is told once, and what can't be written is left out.
    """

    def __init__(self, run_dir: str, start_step: int, max_steps: int, active: bool, trackers: list = ()):
        """`trackers`: get every record too (trackers.py)."""
        self.trackers = trackers
        self.active, self.max_steps, self.start_step = active, max_steps, start_step
        if not active:
            return
        self.warned: set[str] = set()
        self.cut = False  # the last line may be half written
        self.path = Path(run_dir, "metrics.jsonl")
        _keep(self.path, lambda record: record["step"] <= start_step)
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(total=max_steps, initial=start_step, disable=not self.terminal, dynamic_ncols=True, unit="step")
        self.started = time.monotonic()
        self.val_loss = None

    def step(self, step: int) -> None:
        if self.active and self.terminal:
            self.bar.update(step - self.bar.n)

    def log(self, record: dict) -> None:
        """Write a record with "step" and either "loss" (training) or "val_loss"."""
        if not self.active:
            return
        written = finite(record)
        self._try(str(self.path), lambda: self._write(written))
        for tracker in self.trackers:
            self._try(type(tracker).__name__, lambda tracker=tracker: tracker.log(written))
        step = record["step"]
        if "val_loss" in record:
            self.val_loss = record["val_loss"]
            self.print_line(
                f"step {step:>6}/{self.max_steps}  validation loss {record['val_loss']:.4f}"
                f"  ({record['val_bits_per_byte']:.3f} bits per byte)"
            )
        elif self.terminal:
            shown = f"loss {record['loss']:.3f}, lr {record['lr']:.1e}, {record['tokens_per_s']:,.0f} tokens/s"
            self.bar.set_postfix_str(shown if self.val_loss is None else f"{shown}, val {self.val_loss:.3f}")
        else:
            left = round((time.monotonic() - self.started) / max(1, step - self.start_step) * (self.max_steps - step))
            mfu = f"  mfu {record['mfu']:.1%}" if "mfu" in record else ""
            print_line(
                f"step {step:>6}/{self.max_steps}  loss {record['loss']:.4f}  lr {record['lr']:.2e}"
                f"  {record['tokens_per_s']:>7,.0f} tokens/s{mfu}  {left // 60}m{left % 60:02}s left"
            )

    def event(self, record: dict) -> None:
        """Write a record with "step" and "event" (docs/bad_numbers.md), and say its "why"."""
        if self.active:
            self._try(str(self.path), lambda: self._write(finite(record)))
            self.print_line(f"step {record['step']:>6}/{self.max_steps}  {record['event']}: {record['why']}")

    def rewind(self, step: int) -> None:
        """Drop the records after `step`, but for events: the run goes on from there."""
        if self.active:
            self.started, self.start_step = time.monotonic(), step  # for the time that is left
            self._try(str(self.path), lambda: _keep(self.path, lambda record: record["step"] <= step or "event" in record))
            self.bar.update(step - self.bar.n)

    def print_line(self, text: str) -> None:
        if self.active:
            self.bar.clear()
            print_line(text)
            self.bar.refresh()

    def close(self) -> None:
        if self.active:
            self.bar.close()
            for tracker in self.trackers:
                self._try(type(tracker).__name__, tracker.close)

    def _write(self, record: dict) -> None:
        line = ("\n" if self.cut else "") + json.dumps(record, allow_nan=False) + "\n"
        self.cut = True
        with open(self.path, "a") as file:  # anew for each: an open file would keep what a full disk has refused
            file.write(line)
        self.cut = False

    def _try(self, what: str, work: Callable[[], object]) -> None:
        """Do it, or warn, once of each `what`: the run is worth more than its record."""
        try:
            work()
        except Exception as error:
            if what not in self.warned:
                self.warned.add(what)
                self.print_line(f"warning: {what} gets no record: {one_line(error)}; training goes on without")
