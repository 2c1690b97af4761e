"""How are many jobs worked through? One process a core, results to a file line by line, and on where it stopped.

The parent alone writes results.jsonl: a line is one write, and a line that a crash cut short is dropped when reading.
Finished results may be compressed, as results.jsonl.gz.
"""

from __future__ import annotations

import gzip
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from celo2_pretrain.common.errors import UserError

from .job import Job, record, run
from .suite.problem import Task
from .suite.tasks import TASKS

RESULTS = "results.jsonl"


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All complete lines of a folder's results.jsonl.gz and results.jsonl, the last of each job; [] where there is none."""
    compressed, path, found = folder / f"{RESULTS}.gz", folder / RESULTS, {}
    text = gzip.decompress(compressed.read_bytes()) if compressed.exists() else b""
    text += path.read_bytes() if path.exists() else b""
    for line in text.split(b"\n"):
        try:
            row = json.loads(line)
            found[row["task"], row["optimizer"], f"{row['lr']:.6g}", row["seed"]] = row
        except (ValueError, KeyError, TypeError):
            continue  # cut short when the machine stopped
    return list(found.values())


def remaining(jobs: list[Job], done: list[dict[str, Any]]) -> list[Job]:
    """Those that still have to run; failed ones are tried again.

    Raises UserError where a finished job had other weights or another number of steps: they wouldn't be comparable.
    """
    finished = {(r["task"], r["optimizer"], f"{r['lr']:.6g}", r["seed"]): r for r in done if r["status"] != "failed"}
    left = []
    for job in jobs:
        row = finished.get(job.key)
        if row is None:
            left.append(job)
        elif row["steps"] != job.steps:
            raise UserError(
                f"the results in --out have {row['steps']} steps of {job.task}, this call {job.steps}: "
                "give the same --steps-scale and --quick, or another --out"
            )
        elif row["theta"] != job.spec.fingerprint:
            raise UserError(
                f"the results of {job.spec.name} in --out were made with other weights "
                f"({row['theta']}, now {job.spec.fingerprint}): give them another name, or another --out"
            )
    return left


def append(folder: Path, row: Mapping[str, Any]) -> None:
    """Add a line in one write, beginning a new one where a crash left half of one."""
    path = folder / RESULTS
    with open(path, "ab+") as file:
        torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _work(connection: Connection, tasks: Mapping[str, Task] | None) -> None:
    """A worker process: jobs in, records out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends us
    import torch

    torch.set_num_threads(1)
    logging.getLogger("celo2_pretrain.optimizer.celo2").setLevel(logging.ERROR)  # the grids have rates that it warns of
    while True:
        try:
            job = connection.recv()
            connection.send(run(job, (tasks or TASKS)[job.task]))
        except (EOFError, OSError):
            return  # the parent is gone


class Worker:
    def __init__(self, context: multiprocessing.context.SpawnContext, tasks: Mapping[str, Task] | None) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, tasks), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None

    def give(self, job: Job) -> None:
        self.job = job
        self.connection.send(job)

    def take(self) -> dict[str, Any]:
        """The record of its job; "failed" where the process died over it (killed for memory, say)."""
        job, self.job = self.job, None
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return record(
                job, "failed", curve=[], seconds=0.0, error=f"the worker process ended with code {self.process.exitcode}"
            )

    def stop(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()


def run_all(
    jobs: list[Job], folder: Path, processes: int, say: Callable[[str], None], tasks: Mapping[str, Task] | None = None
) -> list[dict[str, Any]]:
    """Run the jobs that `folder` has no results of, and return all the results in it.

    Args: `tasks` instead of the suite's. Must be picklable. Raises UserError as `remaining`; KeyboardInterrupt after
    the workers were ended, with all finished jobs on disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    left = remaining(jobs, read_results(folder))
    if len(left) < len(jobs):
        say(f"{len(jobs) - len(left)} of {len(jobs)} jobs were done before")
    os.environ["OMP_NUM_THREADS"] = "1"  # before a worker imports torch
    clock = Clock(left, min(processes, len(left)), tasks or TASKS)
    context = multiprocessing.get_context("spawn")
    workers = [Worker(context, tasks) for _ in range(min(processes, len(left)))]
    queue = list(reversed(left))
    done = 0
    try:
        for worker in workers:
            worker.give(queue.pop())
        while busy := [worker for worker in workers if worker.job]:
            ready = wait([worker.connection for worker in busy])
            for number, worker in enumerate(workers):
                if worker.job is None or worker.connection not in ready:
                    continue
                job, row = worker.job, worker.take()
                append(folder, row)
                done += 1
                clock.finished(job, row["seconds"])
                say(
                    f"[{done:{len(str(len(left)))}d}/{len(left)}] {job}: {outcome(row)} ({row['seconds']:.1f} s); "
                    f"{clock.left()} left"
                )
                if not worker.process.is_alive():
                    worker.stop()
                    worker = workers[number] = Worker(context, tasks)
                if queue:
                    worker.give(queue.pop())
    except KeyboardInterrupt:
        say(f"interrupted: {done} of {len(left)} jobs are done; the same command goes on from there")
        raise
    finally:
        for worker in workers:
            worker.stop()
    return read_results(folder)


def outcome(row: Mapping[str, Any]) -> str:
    if row["status"] == "ok":
        return f"{row['loss']:.4g}"
    return "diverged" if row["status"] == "diverged" else f"FAILED, {row['error']}"


class Clock:
    """How long the rest takes: the tasks' stated times, corrected by those of the finished jobs."""

    def __init__(self, jobs: list[Job], processes: int, tasks: Mapping[str, Task]) -> None:
        self.waiting, self.processes = list(jobs), max(1, processes)
        self.expected = {job.task: tasks[job.task].seconds * job.steps / tasks[job.task].steps for job in jobs}
        self.seen: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.began = time.perf_counter()

    def finished(self, job: Job, seconds: float) -> None:
        self.waiting.remove(job)
        self.seen[job.task, job.spec.name].append(seconds)

    def seconds_left(self) -> float:
        measured = {key: sum(values) / len(values) for key, values in self.seen.items()}
        ratios = [value / self.expected[task] for (task, _), value in measured.items()]
        ratio = sum(ratios) / len(ratios) if ratios else 1.0
        return (
            sum(measured.get((job.task, job.spec.name), ratio * self.expected[job.task]) for job in self.waiting)
            / self.processes
        )

    def left(self) -> str:
        return duration(self.seconds_left())


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def print_line(text: str) -> None:
    print(text, file=sys.stdout, flush=True)
