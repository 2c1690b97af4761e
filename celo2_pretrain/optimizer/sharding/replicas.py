"""Do the ranks still hold the same where they must? A cheap checksum of everything that is replicated.

Whole tensors (DDP, ZeRO-0) are replicated with all their states; under ZeRO-1/2/3 and FSDP2 only v_row and v_col are.
Hybrid sharding (HSDP) replicates each slice, with its states, over an axis of the mesh.
Ranks that drift apart train on without an error; DeepSpeed had such bugs (issues 7807, 8090).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def replicated(layout: Layout, state: Mapping[Tensor, dict[str, Any]], everything: bool) -> dict[str, Tensor]:
    """By "tensor: key" what the ranks of a layout hold alike: `everything`, or the factored second moments only."""
    found = {}
    for storage in {id(shard.storage): shard.storage for shard in layout.slices}.values():
        name = ", ".join(shard.name for shard in layout.slices if shard.storage is storage)
        if everything:
            found[f"{name}: parameter"] = storage
        for key, value in state[storage].items():
            if isinstance(value, Tensor) and (everything or key in ("v_row", "v_col")):
                found[f"{name}: {key}"] = value
    return found


def check_replicas(layout: Layout, state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Compare checksums over the ranks; every rank must call it. Raises DriftError, on all ranks alike, naming the values.

    Whole tensors are compared over all processes, which presumes that they train one model. Under hybrid sharding each
    slice is compared over its replicas, too.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    alike = [(replicated(layout, state, everything=layout.process_group is None), layout.process_group)]
    alike += [(replicated(layout, state, everything=True), group) for group in layout.replicas]
    names = list(dict.fromkeys(name for values, _ in alike for name in values))
    differs = dict.fromkeys(names, 0)
    for values, group in alike:
        if values and dist.get_world_size(group) > 1:
            sums = torch.stack([checksum(value).cpu() for value in values.values()])
            largest, smallest = _most(sums, group), -_most(-sums, group)
            differs |= {name: 1 for name, same in zip(values, (largest == smallest).tolist()) if not same}
    for _, group in alike if layout.replicas else ():  # ranks whose own slices agree must raise, too
        differs = dict(zip(names, _most(torch.tensor(list(differs.values())), group).tolist()))
    differing = [name for name, flag in differs.items() if flag]
    if differing:
        raise DriftError(
            f"ranks have drifted apart: {'; '.join(differing[:3])}"
            + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
            + " differ between ranks; go back to the last checkpoint"
        )


def _most(x: Tensor, group: Any) -> Tensor:
    """The elementwise maximum over the ranks of a group (None: all processes) of an int64 tensor on the CPU."""
    moved = x.to(collective_device(group if group is not None else dist.group.WORLD, x.device), copy=True)
    dist.all_reduce(moved, op=dist.ReduceOp.MAX, group=group)
    return moved.cpu()
