"""Work that all ranks do together, so that an error on one of them is an error on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ..sharding.layouts import LayoutError
from .files import StateError

T = TypeVar("T")


def this_rank() -> int:
    """0 where there is one process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """1 where there is one process."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(value: T) -> list[T]:
    """Everyone's value."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def together(work: Callable[[], T]) -> T:
    """Do a rank's own part (no collectives in it); where it fails on any rank, raise the same error on all.

    Otherwise the rank that failed would leave the others waiting in their next collective.
    """
    value, failed = None, None
    try:
        value = work()
    except Exception as error:
        failed = error
    message = None if failed is None else str(failed)
    if failed is not None and not isinstance(failed, (StateError, LayoutError)):
        message = f"{type(failed).__name__}: {failed} (on rank {this_rank()})"
    if first := next((text for text in gather(message) if text), None):
        raise StateError(first) from failed
    return value
