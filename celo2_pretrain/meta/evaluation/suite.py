"""Which tasks does the suite consist of? None is in meta-training, nor is its data."""
from __future__ import annotations

from . import tasks_rl, tasks_text, tasks_vision
from .problem import Task

TASKS: dict[str, Task] = {task.name: task for task in (*tasks_text.TASKS, *tasks_vision.TASKS, *tasks_rl.TASKS)}
QUICK = ("lm-byte-small", "autoencoder-photos")
QUICK_STEPS = 0.2
