"""Is every tensor of a step as large as the others say? Compiled passes and kernels get addresses, and trust the answer.

`check_step` looks before every step, whatever happened to the tensors since the last one; `check_state` also at a state
that is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.packed import WORD
from ..matrices.views import whole
from ..sharding.layouts import local
from ..sharding.plan import Plan
from .accumulators import element_keys

# What there is for each element, behind the parameter.
ADAMW = element_keys("adamw", vector=False)[1:]
MATRIX = element_keys("celo2", vector=False)[1:]
VECTOR = element_keys("celo2", vector=True)[1:]
WORDS = ("packed",)
SINGLE, FLOATS, PACKED = (torch.float32,), (torch.float32, torch.bfloat16), (WORD,)


def check_step(plans: Sequence[Plan], rule: str, state: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Compare the sizes of parameters, gradients and states of these plans. Raises ValueError before anything is changed."""
    for plan in plans:
        checked: set[int] = set()
        for shard in plan.layout.slices:
            storage, there = shard.storage, local(shard.storage)
            if plan.layout.kind in ("whole", "DTensor") and whole(tuple(storage.shape)) != shard.shape:
                raise ValueError(
                    f"{shard.name!r} has shape {tuple(storage.shape)} now, but the optimizer was made for "
                    f"{shard.shape}: make a new optimizer when a parameter changes its shape"
                )
            if shard.start < shard.stop and shard.offset + shard.stop - shard.start > there.numel():
                raise ValueError(
                    f"{shard.name!r}: its elements end at {shard.offset + shard.stop - shard.start} of a tensor that has "
                    f"only {there.numel()} now: make a new optimizer when a parameter changes its shape"
                )
            if id(storage) not in checked:
                checked.add(id(storage))
                grad = local(storage.grad)
                if grad.shape != there.shape or grad.device != there.device:
                    raise ValueError(
                        f"{shard.name!r} has a gradient of shape {tuple(grad.shape)} on {grad.device}, but is of "
                        f"shape {tuple(there.shape)} on {there.device}"
                    )
                check_state(shard.name, state[storage], storage, rule, plan.factored.get(id(storage)))


def check_state(name: str, state: Mapping[str, Any], param: Tensor, rule: str, factored: tuple[int, int] | None) -> None:
    """Raises ValueError naming the tensor, the state and both shapes where a state isn't one of this parameter.

    Args:
        param: what the optimizer steps: a tensor, or a flat partition of several.
        factored: columns of v_row and of v_col under the learned rule, (0, 0) for vectors; None where that isn't known.
    """
    there = local(param)
    vector = rule == "celo2" and (not any(factored) if factored else "v_row" not in state)
    if rule == "adamw":
        keys = ADAMW
    else:
        keys = WORDS if "packed" in state else VECTOR if vector else MATRIX
    dtype = None
    for key in keys:
        value = _expect(name, key, state, there.shape, there.device)
        dtype = dtype or value.dtype
        if value.dtype != dtype or dtype not in (PACKED if keys is WORDS else FLOATS if rule == "celo2" else SINGLE):
            raise ValueError(
                f"the state {key!r} of {name!r} has dtype {value.dtype}, which Celo2 does not write there: load a "
                "state that Celo2 saved"
            )
    if rule == "adamw" and not (isinstance(state.get("step"), Tensor) and state["step"].numel() == 1):
        raise ValueError(
            f"the state of {name!r} has step={state.get('step')!r}, which must be a tensor of one element: load a "
            "state that Celo2 saved"
        )
    if rule == "celo2" and not vector:
        for key, columns in zip(("v_row", "v_col"), factored or (None, None)):
            if columns is None:
                columns = getattr(state.get(key), "shape", (0,))[-1]
            if _expect(name, key, state, (3, columns), there.device).dtype != torch.float32:
                raise ValueError(f"the state {key!r} of {name!r} has dtype {state[key].dtype}, which must be float32")


def _expect(name: str, key: str, state: Mapping[str, Any], shape: Sequence[int], device: torch.device) -> Tensor:
    """The local part of a state, which has this shape and lies contiguously on this device."""
    value = state.get(key)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"the state of {name!r} has no {key!r}, but {sorted(map(str, state))}: it is another optimizer's, or "
            "was saved under another rule; load a state of the same groups (from_adamw converts AdamW's)"
        )
    value = local(value)
    if value.shape != shape:
        raise ValueError(
            f"the state {key!r} of {name!r} has shape {tuple(value.shape)}, but the tensor needs "
            f"{tuple(shape)}: load a state of the same model, made with the same param groups"
        )
    if value.device != device:
        raise ValueError(
            f"the state {key!r} of {name!r} is on {value.device}, the parameter on {device}: move the model before "
            "the optimizer takes a step, or load the state again"
        )
    if not value.is_contiguous():
        raise ValueError(
            f"the state {key!r} of {name!r} does not lie contiguously (strides {value.stride()}): make it contiguous"
        )
    return value
