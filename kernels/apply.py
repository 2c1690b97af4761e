"""The update of all slices of a bucket in one launch: `p ← p − lr · (step + weight_decay · p)`, in p's dtype.

Per element 2 loads and 1 store, 12 bytes in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .flat import BLOCK, address, find_chunk, size_of
from .tiles import OPTIONS


def apply_twin(p: Tensor, step: Tensor, lr: float, weight_decay: float) -> None:
    """One slice in plain torch, in place; computed in float32 and rounded back."""
    p32 = p.float()
    p.copy_(p32 - lr * (step + weight_decay * p32))


@triton.jit
def apply_kernel(chunks, slices, lr, weight_decay, P: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    which, i = find_chunk(chunks, BLOCK)
    this = slices + which * 3
    p_at = address(this, P, ALIGNED) + i
    mask = i < size_of(this + 2, ALIGNED)
    p = tl.load(p_at, mask=mask, other=0.0).to(tl.float32)
    step = tl.load(address(this + 1, tl.float32, ALIGNED) + i, mask=mask, other=0.0)
    tl.store(p_at, (p - lr * (step + weight_decay * p)).to(P), mask=mask)


def apply(chunks: Tensor, slices: Tensor, lr: float, weight_decay: float, p_dtype: tl.dtype, aligned: bool) -> None:
    """Update the parameters of all slices.

    Args:
        chunks: from `make_chunks`.
        slices: (slices, 3) int64: addresses of p and of the step (float32), number of elements.
        p_dtype: of all parameters.
        aligned: all addresses are multiples of 16 bytes and all sizes of 4.
    """
    if len(chunks):
        apply_kernel[(len(chunks),)](chunks, slices, lr, weight_decay, p_dtype, aligned, BLOCK, **OPTIONS)
