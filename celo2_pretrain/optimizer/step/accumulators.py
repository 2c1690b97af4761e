"""What Celo2 keeps of a tensor from step to step: names, shapes, and zeros to begin with."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ...kernels.packed import WORD
from ..sharding.layouts import local
from ..sharding.plan import Part

MOMENTA = ("momentum_0", "momentum_1", "momentum_2")
V_FULL = ("v_full_0", "v_full_1", "v_full_2")
ACCUMULATORS = (*MOMENTA, "rms")


def element_keys(rule: str, vector: bool) -> tuple[str, ...]:
    """What is stored for each element of a tensor: the float32 parameter and its accumulators."""
    if rule == "adamw":
        return ("param", "exp_avg", "exp_avg_sq")
    return ("param", *MOMENTA, "rms", *(V_FULL if vector else ()))


def init_state(param: Tensor, parts: list[Part], zeros_like: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Zero accumulators for a storage (a tensor, or a flat partition of several) that consists of `parts`.

    momentum_0, _1, _2 (decays 0.9, 0.99, 0.999) and rms are of the storage's shape and lie like it; of `dtype`, or,
    where that is kernels.packed.WORD, one tensor `packed` holds all four. Unless they are float32 there is a step
    count, which stochastic rounding needs. v_row and v_col are (3, n): the factored second moments of all its matrices,
    replicated over the ranks, float32. Vectors have v_full_0, _1, _2, all float32.
    """
    vectors = any(not part.shape.matrix for part in parts)
    if vectors:
        dtype = torch.float32
    state = {key: zeros_like(param, dtype) for key in (("packed",) if dtype == WORD else ACCUMULATORS)}
    if dtype != torch.float32:
        state["step"] = torch.zeros((), dtype=torch.float32)
    if vectors:
        return {**state, **{f"v_full_{k}": zeros_like(param, dtype) for k in range(3)}}
    device = local(param).device
    return {
        **state,
        "v_row": torch.zeros(3, sum(prod(part.shape.row) for part in parts), device=device),
        "v_col": torch.zeros(3, sum(prod(part.shape.col) for part in parts), device=device),
    }


def row_col(part: Part, v_row: Tensor, v_col: Tensor) -> tuple[Tensor, Tensor]:
    """A block's views (3, *row), (3, *col) of what holds the factored second moments of its storage."""
    shape = part.shape
    return (
        v_row[:, part.row_at : part.row_at + prod(shape.row)].unflatten(1, shape.row),
        v_col[:, part.col_at : part.col_at + prod(shape.col)].unflatten(1, shape.col),
    )
