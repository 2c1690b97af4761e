"""Which tasks does the suite consist of? None is in meta-training, nor is its data."""

from __future__ import annotations

from . import reinforcement, text, vision
from .problem import Task

TASKS: dict[str, Task] = {task.name: task for task in (*text.TASKS, *vision.TASKS, *reinforcement.TASKS)}
QUICK = ("lm-byte-small", "autoencoder-photos")
QUICK_STEPS = 0.2
