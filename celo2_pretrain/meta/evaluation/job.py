"""One training run: a task, an optimizer, a learning rate and a seed → a curve and the measure at the end."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from .optimizers import Spec, build
from .suite.problem import Task

CLIP, WARMUP = 1.0, 0.05
POINTS = 20  # measures along a curve


@dataclass(frozen=True)
class Job:
    """What to run. `key` tells finished jobs from others when a run is resumed."""

    task: str
    spec: Spec
    lr: float
    seed: int
    steps: int

    @property
    def key(self) -> tuple:
        return self.task, self.spec.name, f"{self.lr:.6g}", self.seed

    def __str__(self) -> str:
        return f"{self.task} {self.spec.name} lr {self.lr:.3g} seed {self.seed}"


def lr_factor(step: int, steps: int) -> float:
    """What the peak rates are multiplied by in a step (from 0): linear warm-up, then a cosine to 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def record(job: Job, status: str, loss: float = math.inf, **more: Any) -> dict[str, Any]:
    """A line of results.jsonl. A loss that isn't finite is written as null, for readers that know no Infinity."""
    return {
        "task": job.task,
        "optimizer": job.spec.name,
        "lr": job.lr,
        "seed": job.seed,
        "steps": job.steps,
        "theta": job.spec.fingerprint,
        "status": status,
        "loss": loss if math.isfinite(loss) else None,
        **more,
    }


def run(job: Job, task: Task) -> dict[str, Any]:
    """Train, and return the record: status "ok", "diverged" (NaN or Inf somewhere) or "failed" (an exception).

    Fields beside those of `record`: `curve`, pairs (step, measure) with step counted after the update; `seconds` and
    `cpu_seconds` of the whole run, and `error` of a failed one.
    """
    start, cpu_start, curve, problem = time.perf_counter(), time.process_time(), [], None

    def result(status: str, loss: float = math.inf, **more: Any) -> dict[str, Any]:
        return record(
            job,
            status,
            loss,
            curve=curve,
            seconds=round(time.perf_counter() - start, 3),
            cpu_seconds=round(time.process_time() - cpu_start, 3),
            **more,
        )

    try:
        problem = task.build(job.seed)
        optimizer, step_optimizer = build(job.spec, problem.model, job.lr, job.steps)
        peaks = [group["lr"] for group in optimizer.param_groups]
        every = max(1, job.steps // POINTS)
        for step in range(job.steps):
            factor = lr_factor(step, job.steps)
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * factor
            problem.model.zero_grad(set_to_none=True)
            loss = problem.loss(step)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(problem.model.parameters(), CLIP)
            if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
                return result("diverged")
            step_optimizer(loss)
            if (step + 1) % every == 0 or step + 1 == job.steps:
                with torch.no_grad():
                    measure = problem.measure()
                if not math.isfinite(measure):
                    return result("diverged")
                curve.append((step + 1, round(measure, 6)))
        return result("ok", curve[-1][1])
    except Exception as error:  # whatever a task or an optimizer raises must not stop the other jobs
        if problem is not None and not all(p.isfinite().all() for p in problem.model.parameters()):
            return result("diverged")  # it was the sampling of actions that noticed, say
        return result("failed", error=f"{type(error).__name__}: {error}")
