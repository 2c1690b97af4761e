"""Starts the ranks of one world size, collects their results, and ends them when they hang."""
from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

from celo2_pretrain.train.start.ranks import free_port

from .cells import Cell
from .limits import allowed

STALL = 180.0  # seconds that a cell may take on a machine that is busy otherwise
START = 240.0  # seconds until the first result: imports, and DeepSpeed's JIT-built communication op
INTERPRETER = 10  # times as long where Triton interprets its kernels
MOST_RESTARTS = 8
TESTS = Path(__file__).parent.parent


@dataclass
class Result:
    """What came out of a cell: the largest error of each kind and where it was, or why it has no numbers."""

    cell: Cell
    errors: dict[str, tuple[float, str]] = field(default_factory=dict)
    broke: str = ""
    seconds: float = 0.0

    def failures(self) -> list[str]:
        """One line for each thing that is wrong; empty where the cell holds."""
        if self.broke:
            return [self.broke]
        return [f"{kind} {value:.1e} (allowed {allowed(self.cell, kind):.0e}): {where}"
                for kind, (value, where) in self.errors.items() if not value <= allowed(self.cell, kind)]


def run_cells(world: int, cells: list[Cell], *, backend: str = "", mutation: str = "", device: str = "cpu",
              start: float = START, stall: float = STALL, progress: Callable[[Result], None] = lambda result: None) -> list[Result]:
    """Run `cells` on `world` ranks, each in a process of its own that lives for all of them.

    After a crash or a hang the rest goes on in new processes; a hang is nothing for `start` (the first cell) or `stall`
    seconds. `backend`: CELO2_BACKEND for them, on the CPU "triton" in Triton's interpreter; "" leaves it as it is.
    `mutation` breaks the optimizer (`mutations.py`).
    """
    if backend == "triton" and device == "cpu":
        start, stall = INTERPRETER * start, INTERPRETER * stall
    results: list[Result] = []
    left = list(cells)
    for _ in range(MOST_RESTARTS + 1):
        if not left:
            break
        ranks = Ranks(world, left, backend, mutation, device, start, stall)
        try:
            for result in ranks.results():
                results.append(result)
                progress(result)
        finally:
            ranks.end()
        done = {result.cell for result in results}
        left = [cell for cell in left if cell not in done]
    for cell in left:
        results.append(Result(cell, broke=f"not run: {MOST_RESTARTS + 1} sets of processes broke down before it"))
        progress(results[-1])
    return results


class Ranks:
    """The processes of one world."""

    def __init__(self, world: int, cells: list[Cell], backend: str, mutation: str, device: str, start: float, stall: float
                 ) -> None:
        self.cells, self.lines, self.start, self.stall = cells, queue.Queue(), start, stall
        order = json.dumps({"cells": [cell.name for cell in cells], "mutation": mutation, "timeout": stall,
                            "launcher": os.getpid(), "device": device})
        port = free_port()
        # The children import what this process imports, wherever it was started.
        path = os.pathsep.join([str(TESTS), *(entry for entry in sys.path if entry)])
        self.logs, self.processes = [], []
        for rank in range(world):
            env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank if device == "cpu" else 0), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                   "DS_ACCELERATOR": device, "PYTHONPATH": path}
            env |= {"CELO2_BACKEND": backend} if backend else {}
            env |= {"TRITON_INTERPRET": "1"} if backend == "triton" and device == "cpu" else {}
            self.logs.append(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen([sys.executable, "-m", "equivalence.worker"], env=env, text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.logs[-1])
            self.processes.append(process)
            process.stdin.write(order)
            process.stdin.close()
            threading.Thread(target=self._read, args=(process,), daemon=True).start()

    def _read(self, process: subprocess.Popen) -> None:
        for line in process.stdout:
            self.lines.put(line)
        self.lines.put("")  # this rank has nothing more to say

    def results(self) -> Any:
        """Yield the result of each cell that comes to an end, and one for the cell that breaks the ranks."""
        running, limit = self.cells[0], self.start
        number, talking = 0, len(self.processes)
        while number < len(self.cells):
            try:
                line = self.lines.get(timeout=limit)
            except queue.Empty:
                yield Result(running, broke=f"hangs: nothing for {limit:.0f} s; " + self._tails())
                return
            if not line:
                talking -= 1
                if talking == 0 or self._crashed():
                    yield Result(running, broke=f"a rank ended: {self._tails()}")
                    return
                continue
            record = json.loads(line)
            if record["event"] == "error":
                yield Result(running, broke=record["what"])
                return
            if record["event"] == "start":
                running = self.cells[number]
                continue
            limit = self.stall
            number += 1
            yield Result(running, {kind: tuple(pair) for kind, pair in record["errors"].items()},
                         seconds=record["seconds"])

    def _crashed(self) -> bool:
        time.sleep(1.0)  # a rank that reports its error is heard first
        return self.lines.empty() and any(process.poll() not in (None, 0) for process in self.processes)

    def _tails(self) -> str:
        tails = []
        for rank, log in enumerate(self.logs):
            log.flush()
            log.seek(0)
            lines = [line for line in log.read().splitlines() if line.strip()]
            tails.append(f"rank {rank} (exit {self.processes[rank].poll()}): {lines[-1] if lines else 'silent'}")
        return "; ".join(tails)

    def end(self) -> None:
        for process in self.processes:
            try:
                process.wait(timeout=10 if process.poll() is None and not self._unfinished() else 0.1)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for log in self.logs:
            log.close()

    def _unfinished(self) -> bool:
        return any(process.poll() not in (None, 0) for process in self.processes)
