"""AdamW for flat slices of many tensors in one launch, in the parameters' dtype with float32 states.

Per element 4 loads and 3 stores, 28 bytes in float32. Parameters of lower precision need no float32 copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from .flat import BLOCK, address, find_chunk, size_of
from .tiles import OPTIONS


def adamw_twin(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One slice by torch's own AdamW, in place; `step` () float32 is counted up first."""
    p32 = p.float()
    torch_adamw(
        [p32],
        [g.float()],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        foreach=False,
        fused=False,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    p.copy_(p32)


@triton.jit
def adamw_kernel(
    chunks,
    slices,
    corrections,
    lr,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
    weight_decay,
    G: tl.constexpr,
    P: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    which, i = find_chunk(chunks, BLOCK)
    this = slices + which * 5
    p_at, g_at = address(this, P, ALIGNED) + i, address(this + 1, G, ALIGNED) + i
    m_at, v_at = address(this + 2, tl.float32, ALIGNED) + i, address(this + 3, tl.float32, ALIGNED) + i
    mask = i < size_of(this + 4, ALIGNED)
    p = tl.load(p_at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_at, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(m_at, mask=mask, other=0.0) * beta1 + g * rest1
    v = tl.load(v_at, mask=mask, other=0.0) * beta2 + g * g * rest2
    tl.store(m_at, m, mask=mask)
    tl.store(v_at, v, mask=mask)
    first, second = tl.load(corrections + which * 2), tl.load(corrections + which * 2 + 1)
    p -= lr * weight_decay * p
    p -= lr * (m / first) / (tl.sqrt(v / second) + eps)
    tl.store(p_at, p.to(P), mask=mask)


def adamw(
    chunks: Tensor,
    slices: Tensor,
    steps: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    g_dtype: tl.dtype,
    p_dtype: tl.dtype,
    aligned: bool,
) -> None:
    """One bias-corrected, decoupled AdamW step of all slices.

    Args: as of `apply`, but
        slices: (slices, 5) int64: addresses of p, g, exp_avg, exp_avg_sq (float32), number of elements.
        steps: (slices,) how many steps this one makes, the first being 1.
    """
    if not len(chunks):
        return
    beta1, beta2 = betas
    # In float64: 1 − β^t cancels, and its error would be the step's.
    count = steps.to(torch.float64)
    corrections = torch.stack([1 - beta1**count, 1 - beta2**count], 1).to(torch.float32)
    adamw_kernel[(len(chunks),)](
        chunks,
        slices,
        corrections,
        lr,
        beta1,
        beta2,
        1 - beta1,
        1 - beta2,
        eps,
        weight_decay,
        g_dtype,
        p_dtype,
        aligned,
        BLOCK,
        **OPTIONS,
    )
