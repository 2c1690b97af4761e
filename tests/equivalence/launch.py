"""The ranks of one world size: they live for many cells, and are ended and started anew when one crashes or hangs."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from celo2_pretrain.train.start.ranks import free_port

from .cells import Cell
from .limits import allowed

STALL = 180.0  # seconds that a cell may take on a machine that is busy otherwise
START = 240.0  # seconds until the first result: imports, and DeepSpeed's JIT-built communication op
INTERPRETER = 10  # times as long where Triton interprets its kernels
MOST_BREAKDOWNS = 9
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
        return [
            f"{kind} {value:.1e} (allowed {allowed(self.cell, kind):.0e}): {where}"
            for kind, (value, where) in self.errors.items()
            if not value <= allowed(self.cell, kind)
        ]


def run_cells(
    world: int,
    cells: list[Cell],
    *,
    backend: str = "",
    mutation: str = "",
    device: str = "cpu",
    start: float = START,
    stall: float = STALL,
    progress: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """The results of `cells` on one `World`; `progress` is called with each. After MOST_BREAKDOWNS the rest is not run."""
    ranks, results = World(world, backend=backend, mutation=mutation, device=device, start=start, stall=stall), []
    try:
        for cell in cells:
            broken = sum(bool(result.broke) for result in results)
            results.append(
                ranks.run(cell)
                if broken < MOST_BREAKDOWNS
                else Result(cell, broke=f"not run: {broken} sets of processes broke down before it")
            )
            progress(results[-1])
    finally:
        ranks.end()
    return results


class World:
    """Processes, one for each rank, that run cells one after the other.

    Args:
        world: the number of ranks.
        backend: CELO2_BACKEND for them, on the CPU "triton" in Triton's interpreter; "" leaves it as it is.
        mutation: breaks the optimizer (`mutations.py`).
        device: "cpu" or "cuda".
        start, stall: seconds without a word, in the first cell of these processes and later, after which a cell hangs.
    """

    def __init__(
        self,
        world: int,
        *,
        backend: str = "",
        mutation: str = "",
        device: str = "cpu",
        start: float = START,
        stall: float = STALL,
    ) -> None:
        times = INTERPRETER if backend == "triton" and device == "cpu" else 1
        self.start, self.stall = times * start, times * stall
        self.world, self.backend, self.mutation, self.device = world, backend, mutation, device
        self.processes: list[subprocess.Popen] = []
        self.logs: list = []

    def run(self, cell: Cell) -> Result:
        """The result of a cell. One that crashes or hangs ends the processes, and the next gets new ones."""
        limit = self.stall if self.processes else self.start
        if not self.processes:
            self._start()
        result = self._ask(cell, limit)
        if result.broke:
            self._kill()
        return result

    def end(self) -> None:
        """Let the processes end, and end those that don't."""
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                break
        self._kill()

    def _start(self) -> None:
        port, self.lines = free_port(), queue.Queue()
        # The children import what this process imports, wherever it was started.
        path = os.pathsep.join([str(TESTS), *(entry for entry in sys.path if entry)])
        order = json.dumps({"mutation": self.mutation, "timeout": self.stall, "launcher": os.getpid(), "device": self.device})
        for rank in range(self.world):
            env = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank if self.device == "cpu" else 0),
                "WORLD_SIZE": str(self.world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": self.device,
                "PYTHONPATH": path,
            }
            env |= {"CELO2_BACKEND": self.backend} if self.backend else {}
            env |= {"TRITON_INTERPRET": "1"} if self.backend == "triton" and self.device == "cpu" else {}
            self.logs.append(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                [sys.executable, "-m", "equivalence.worker", order],
                env=env,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.logs[-1],
            )
            self.processes.append(process)
            threading.Thread(target=self._read, args=(process, self.lines), daemon=True).start()

    @staticmethod
    def _read(process: subprocess.Popen, lines: queue.Queue) -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put("")  # this rank has nothing more to say

    def _ask(self, cell: Cell, limit: float) -> Result:
        try:
            for process in self.processes:
                process.stdin.write(cell.name + "\n")
                process.stdin.flush()
            line = self.lines.get(timeout=limit)
            if not line:  # a rank ended; another that reports its error is heard first
                time.sleep(1.0)
                line = next(iter([text for text in self._waiting() if text]), "")
        except queue.Empty:
            return Result(cell, broke=f"hangs: nothing for {limit:.0f} s; " + self._tails())
        except BrokenPipeError:
            line = ""
        if not line:
            return Result(cell, broke=f"a rank ended: {self._tails()}")
        record = json.loads(line)
        if record["event"] == "error":
            return Result(cell, broke=record["what"])
        return Result(cell, {kind: tuple(pair) for kind, pair in record["errors"].items()}, seconds=record["seconds"])

    def _waiting(self) -> list[str]:
        found = []
        while not self.lines.empty():
            found.append(self.lines.get())
        return found

    def _tails(self) -> str:
        tails = []
        for rank, log in enumerate(self.logs):
            log.flush()
            log.seek(0)
            lines = [line for line in log.read().splitlines() if line.strip()]
            tails.append(f"rank {rank} (exit {self.processes[rank].poll()}): {lines[-1] if lines else 'silent'}")
        return "; ".join(tails)

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for log in self.logs:
            log.close()
        self.processes, self.logs = [], []
