"""AdamW for what the learned rule doesn't take (embeddings, heads, 1-D tensors): torch's own, on any layout.

AdamW is elementwise, so a flat partition is stepped as it lies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..backends.choose import backend_for
from ..groups import decay_of
from ..sharding.layouts import local


def adamw_step(group: dict[str, Any], params: list[Tensor], state: dict[Tensor, dict[str, Any]]) -> None:
    """One bias-corrected, decoupled AdamW step at `adamw_lr_multiplier` × lr, states in float32.

    Parameters of lower precision are stepped as a float32 copy and rounded back, or by a kernel that needs no copy.
    Kernels, torch's own too, read memory from the first element on: tensors that don't lie contiguously are copied.
    """
    local_params = [local(p).detach() for p in params]
    whole = [p.contiguous() for p in local_params]  # p itself where it is that already
    grads = [local(p.grad).resolve_neg().contiguous() for p in params]
    states = [state[p] for p in params]
    backend = backend_for(whole[0].device)
    if backend.name == "triton" and any(p.dtype != torch.float32 for p in whole):
        backend.adamw(group, whole, grads, states)
    else:
        _torch_adamw(group, whole, grads, states)
    for p, x in zip(local_params, whole):
        if x is not p:
            p.copy_(x)


def _torch_adamw(group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]]) -> None:
    masters = [p.to(torch.float32) for p in params]
    beta1, beta2 = group["adamw_betas"]
    fused = all(p.device.type in ("cpu", "cuda") for p in masters)
    adamw(
        masters,
        [g.to(torch.float32) for g in grads],
        [local(s["exp_avg"]) for s in states],
        [local(s["exp_avg_sq"]) for s in states],
        [],
        [s["step"] for s in states],
        fused=fused,
        foreach=False if fused else None,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"] * group["adamw_lr_multiplier"],
        weight_decay=decay_of(group, hidden=False),
        eps=group["adamw_eps"],
        maximize=False,
    )
    for p, master in zip(params, masters):
        if p is not master:
            p.copy_(master)
