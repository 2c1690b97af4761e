"""Which gradients no step can be taken with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max ** 0.5  # gradients from here on have no square, and their norm is infinite


def nonfinite(tensors: Sequence[Tensor]) -> Tensor:
    """Which tensors (on one device) have a NaN or Inf, or a value whose square is none of float32's: (tensors,) bool.

    One pass over them; on a GPU a few launches for all.
    """
    nonempty = [k for k, x in enumerate(tensors) if x.numel()]
    flags = torch.zeros(len(tensors), dtype=torch.bool, device=tensors[0].device)
    if not nonempty:
        return flags
    some = [tensors[k] for k in nonempty]
    if flags.device.type == "cpu":
        largest = torch.stack([torch.stack(torch.aminmax(x)).abs().amax() for x in some])
    else:
        largest = torch.stack(torch._foreach_norm(some, float("inf")))
    bad = ~(largest < LARGEST)  # NaN isn't smaller than anything
    if len(nonempty) == len(tensors):
        return bad
    flags[nonempty] = bad
    return flags
