"""What is an evaluation task? Something that builds, from a seed, a model with a training loss and a measure of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from torch import Tensor, nn


@dataclass
class Problem:
    """One task with its model initialised from a seed.

    `loss(step)` is the scalar to call backward on in a step; the batch depends on seed and step only (under
    reinforcement learning also on the policy). `measure()` is what optimizers are compared by, lower is better.
    """

    model: nn.Module
    loss: Callable[[int], Tensor]
    measure: Callable[[], float]


@dataclass(frozen=True)
class Task:
    """A task of the suite.

    Args:
        name: as given to --tasks.
        about: one line for --help and the report.
        build: seed → Problem.
        steps: optimizer steps of the full budget.
        unit: of the measure.
        needs: importable modules without which the task is skipped, each with the package that has it.
        lr_scale: every optimizer's grid of learning rates is multiplied by it (reinforcement learning wants less).
        span: what "within 2 %" is of; None: of the measure itself, which must be positive then.
        seconds: of a run on one core, roughly, as the mean of the default optimizers; for the first estimate.
    """

    name: str
    about: str
    build: Callable[[int], Problem]
    steps: int
    unit: str
    needs: tuple[tuple[str, str], ...] = ()
    lr_scale: float = 1.0
    span: float | None = None
    seconds: float = 15.0

    def missing(self) -> str | None:
        """Why it can't run here: the missing package; None where it can."""
        absent = [package for module, package in self.needs if find_spec(module) is None]
        return f"needs {' and '.join(absent)} (pip install 'celo2-pretrain[meta]')" if absent else None
