"""Do the ranks still hold the same where they must? A cheap checksum of everything that is replicated.

Whole tensors (DDP, ZeRO-0) are replicated with all their states; under ZeRO-1/2/3 and FSDP2 only v_row and v_col are.
Ranks that drift apart train on without an error; DeepSpeed had such bugs (issues 7807, 8090).
"""
from __future__ import annotations

from typing import Any, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from .layouts import Layout, collective_device, local


class DriftError(RuntimeError):
    """Replicated values differ between ranks."""


def checksum(x: Tensor) -> Tensor:
    """A sum of the bits, exact and independent of the order: () int64."""
    x = local(x).detach().contiguous().view(-1)
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32).sum(dtype=torch.int64)


def replicated(layout: Layout, state: Mapping[Tensor, dict[str, Any]]) -> dict[str, Tensor]:
    """What must be the same on every rank of this layout, by "tensor: key"."""
    found = {}
    for storage in {id(held.storage): held.storage for held in layout.slices}.values():
        name = ", ".join(held.name for held in layout.slices if held.storage is storage)
        if layout.process_group is None:
            found[f"{name}: parameter"] = storage
        for key, value in state[storage].items():
            if isinstance(value, Tensor) and (layout.process_group is None or key in ("v_row", "v_col")):
                found[f"{name}: {key}"] = value
    return found


def check_replicas(layout: Layout, state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Compare checksums over the ranks; every rank must call it. Raises DriftError, on all ranks alike, naming the values.

    Whole tensors are compared over all processes, which presumes that they train one model.
    """
    group = layout.process_group
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    values = replicated(layout, state)
    if not values:
        return
    sums = torch.stack([checksum(value).cpu() for value in values.values()])
    extremes = torch.stack([sums, -sums])  # the largest of both: all the same only where max = −max(−x)
    extremes = extremes.to(collective_device(group if group is not None else dist.group.WORLD, extremes.device))
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    differing = [name for name, same in zip(values, (extremes[0] == -extremes[1]).tolist()) if not same]
    if differing:
        raise DriftError(f"ranks have drifted apart: {'; '.join(differing[:3])}"
                         + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
                         + " differ between ranks; go back to the last checkpoint")
