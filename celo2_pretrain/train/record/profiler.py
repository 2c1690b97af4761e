"""A trace of some steps on demand: torch.profiler's, as chrome://tracing and ui.perfetto.dev show it.

profile.steps=10-12          steps 10 to 12
echo 3 > run_dir/PROFILE     three steps of a running run, from the next line of metrics on; rank 0 only
"""

import os
import re
from pathlib import Path

import torch

from celo2_pretrain.common.errors import one_line
from celo2_pretrain.config import Config, profiled_steps

REQUEST = "PROFILE"
MOST_REQUESTED = 100  # steps; a trace has some MB a step


class Profiler:
    """Call `before` and `after` around each step, on every rank."""

    def __init__(self, config: Config, rank: int):
        self.folder = Path(config.run_dir, "profile")
        self.request = Path(config.run_dir, REQUEST)
        self.log_every, self.max_steps, self.rank = config.train.log_every, config.train.max_steps, rank
        self.first, self.last = profiled_steps(config.profile.steps) or (0, 0)
        if rank and not config.profile.all_ranks:
            self.first, self.last = 0, 0
        self.running = None

    def before(self, step: int) -> None:
        """Before step `step`, counted from 1."""
        if self.rank == 0 and not self.running and step % self.log_every == 1 % self.log_every:
            self._requested(step)
        if step == self.first and not self.running:  # a rollback may have led back to it
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it writes of its own start and stop between our lines
            self.running = torch.profiler.profile(activities=activities, acc_events=True)
            self.running.start()

    def after(self, step: int) -> str | None:
        """After it; what to tell the user once the trace is written."""
        if not self.running or step < min(self.last, self.max_steps):
            return None
        self.running.stop()
        running, self.running = self.running, None
        path = self.folder / f"steps_{self.first}-{step}_rank{self.rank}.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            return f"warning: no trace of steps {self.first} to {step}: {one_line(error)}"
        return f"trace of steps {self.first} to {step}: {path} (open it in ui.perfetto.dev)"

    def _requested(self, step: int) -> None:
        """Take up run_dir/PROFILE, which holds a number of steps (or nothing: one)."""
        try:
            text = self.request.read_text()
        except OSError:
            return
        self.request.unlink(missing_ok=True)
        number = re.fullmatch(r"\s*(\d{1,3})?\s*", text)
        steps = min(MOST_REQUESTED, int(number[1] or 1)) if number else 1
        self.first, self.last = step, step + max(1, steps) - 1
