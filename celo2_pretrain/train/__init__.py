"""Training: the loop, and in its rooms what starts, records, saves and ends a run."""

from importlib import import_module
from typing import Any

MOVED = {"checkpoint": "checkpoint", "choose": "select"}  # documented under these names in earlier versions


def __getattr__(name: str) -> Any:
    if name not in MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.checkpoints.{MOVED[name]}")
