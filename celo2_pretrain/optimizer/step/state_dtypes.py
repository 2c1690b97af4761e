"""In which form the accumulators of matrices are kept (`state_dtype`), and how one form becomes another.

float32 and bfloat16 are casts. Packed words (kernels/packed.py) need the factored second moments, which say what a
word's fields are multiples of; what they give as float32 is packed again into the very same words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...kernels.packed import NEAREST, WORD, pack, unpack
from ..backends import passes
from ..matrices.views import pieces
from ..sharding.layouts import Slice, local
from ..sharding.plan import Part, Plan
from ..sharding.shape import BlockShape
from .accumulators import ACCUMULATORS, row_col

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": WORD}


def dtype_of(state: Mapping[str, Tensor]) -> torch.dtype:
    """Of the accumulators of a storage under the learned rule; WORD where they are packed."""
    return WORD if "packed" in state else state["rms"].dtype


def unpack_range(words: Tensor, shard: Slice, start: int, v_row: Tensor, v_col: Tensor) -> dict[str, Tensor]:
    """The accumulators in words: 1-D float32 each.

    Args: words: 1-D, those of the elements from `start` of the flattened tensor. shard: any slice of the tensor.
        v_row, v_col: (3, n), the tensor's own.
    """
    values = {key: torch.zeros(words.numel(), device=words.device) for key in ACCUMULATORS}
    for part in _parts(shard, start, start + words.numel()):
        scale = passes.scales(*row_col(part, v_row, v_col), part.shape)
        for piece in part.pieces:
            for x, value in zip(unpack(piece.of(words), scale.of(piece)), values.values()):
                piece.of(value).copy_(x)
    return values


def pack_range(values: Mapping[str, Tensor], shard: Slice, start: int, v_row: Tensor, v_col: Tensor) -> Tensor:
    """The inverse of `unpack_range`, rounding to the nearest; values may have any float dtype."""
    flat = [values[key].reshape(-1).float() for key in ACCUMULATORS]
    words = torch.zeros(flat[0].numel(), dtype=WORD, device=v_row.device)
    for part in _parts(shard, start, start + words.numel()):
        scale = passes.scales(*row_col(part, v_row, v_col), part.shape)
        for piece in part.pieces:
            piece.of(words).copy_(pack([piece.of(x.to(words.device)) for x in flat], scale.of(piece), NEAREST))
    return words


def set_state_dtype(
    state: dict[str, Any], dtype: torch.dtype, storage: Tensor, plans: list[Plan], zeros_like: Callable[..., Tensor]
) -> None:
    """Convert the accumulators of a storage of matrices, in place of what they were saved in."""
    if dtype_of(state) != dtype:
        if WORD in (dtype, dtype_of(state)):
            _repack(state, dtype, storage, plans, zeros_like)
        else:
            state.update({key: state[key].to(dtype) for key in ACCUMULATORS})
    if dtype == torch.float32:
        state.pop("step", None)
    else:  # read in every step: it must not lie on a GPU
        state["step"] = state.get("step", torch.zeros(())).to("cpu", torch.float32)


def _repack(
    state: dict[str, Any], dtype: torch.dtype, storage: Tensor, plans: list[Plan], zeros_like: Callable[..., Tensor]
) -> None:
    """To or from packed words, one tensor's slice after the other."""
    old = {key: local(state.pop(key)).detach().reshape(-1) for key in (*ACCUMULATORS, "packed") if key in state}
    new = {key: zeros_like(storage, dtype) for key in (("packed",) if dtype == WORD else ACCUMULATORS)}
    flat = {key: torch.zeros(local(x).numel(), dtype=dtype, device=local(x).device) for key, x in new.items()}
    for plan in plans:
        for number, shard in enumerate(plan.layout.slices):
            if shard.storage is not storage:
                continue
            rows, cols = plan.columns(number)
            vectors = state["v_row"][:, slice(*rows)], state["v_col"][:, slice(*cols)]
            if dtype == WORD:
                made = {"packed": pack_range({key: shard.of(x) for key, x in old.items()}, shard, shard.start, *vectors)}
            else:
                made = unpack_range(shard.of(old["packed"]), shard, shard.start, *vectors)
            for key, x in made.items():
                shard.of(flat[key]).copy_(x)
    for key, x in new.items():
        local(x).copy_(flat[key].view(local(x).shape))
    state.update(new)


def _parts(shard: Slice, start: int, stop: int) -> list[Part]:
    """The blocks of a tensor, and what of them the flat range [start, stop) holds."""
    parts, rows, cols = [], 0, 0
    for block in shard.original.view.blocks(shard.shape):
        shape = BlockShape(block)
        parts.append(Part(0, shape, pieces(block, start, stop), rows, cols))
        rows, cols = rows + prod(shape.row), cols + prod(shape.col)
    return parts
