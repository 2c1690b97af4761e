"""`scale · X Xᵀ + add · X` for a batch of matrices, of which only the tiles on or below the diagonal are computed.

Newton–Schulz in its direct form needs two such products an iteration: A = X Xᵀ, and b A + c A² (A is symmetric, so
A² = A Aᵀ); its Gram form needs one, the first A. The kernel does half of the multiplications of a general product. The
other half of the result is a mirror image, so the result is exactly symmetric.

Off by default: `newton_schulz.py` calls it on GPUs where CELO2_SYMMETRIC_PRODUCT=1. On an H200 it pays with float32
products only (docs/gpu.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def sizes(dtype: torch.dtype, aligned: bool) -> tuple[int, int, int]:
    """(rows of a tile, columns of X that it takes at a time, warps). `aligned`: n and k are multiples of 16."""
    if not aligned:
        return 32, 32, 4  # loads of single elements need more registers
    return (64, 32, 4) if dtype == torch.float32 else (128, 64, 8)


def symmetric_product_twin(x: Tensor, scale: float = 1.0, add: float = 0.0) -> Tensor:
    """The same in plain torch, x of shape (batch, n, k); with `add`, n = k."""
    product = scale * (x @ x.mT)
    return product + add * x if add else product


@triton.jit
def symmetric_product_kernel(
    x, out, n, k, scale, add, ADD: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr
):
    row_block, col_block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if col_block > row_block:
        return
    rows = row_block * BLOCK + tl.arange(0, BLOCK)
    cols = col_block * BLOCK + tl.arange(0, BLOCK)
    x += batch * n * k
    out += batch * n * n
    row_at = x + rows.to(tl.int64)[:, None] * k
    col_at = x + cols.to(tl.int64)[:, None] * k
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, k, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        a = tl.load(row_at + inner[None, :], mask=(rows < n)[:, None] & (inner < k)[None, :], other=0.0)
        b = tl.load(col_at + inner[None, :], mask=(cols < n)[:, None] & (inner < k)[None, :], other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    total *= scale
    inside = (rows < n)[:, None] & (cols < n)[None, :]
    if ADD:
        total += add * tl.load(row_at + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    here = out + rows.to(tl.int64)[:, None] * n + cols[None, :]
    if col_block < row_block:
        tl.store(here, result, mask=inside)
        mirrored = out + cols.to(tl.int64)[:, None] * n + rows[None, :]
        tl.store(mirrored, tl.trans(result), mask=(cols < n)[:, None] & (rows < n)[None, :])
    else:  # the diagonal's own upper half is mirrored too: two roundings of one number could differ
        tl.store(here, result, mask=inside & (rows[:, None] >= cols[None, :]))
        tl.store(out + cols.to(tl.int64)[None, :] * n + rows[:, None], result, mask=inside & (rows[:, None] > cols[None, :]))


def symmetric_product(x: Tensor, scale: float = 1.0, add: float = 0.0) -> Tensor:
    """`scale · x xᵀ + add · x`, (batch, n, n), for x (batch, n, k) of any strides.

    Args:
        x: float32, bfloat16 or float16, which is also the result's; sums are float32. With `add`, symmetric matrices.

    Raises:
        ValueError: an x that isn't a batch of matrices, or with `add` not of square ones.
    """
    if x.ndim != 3 or (add and x.shape[1] != x.shape[2]):
        raise ValueError(f"x must be (batch, n, k){', with add n = k' if add else ''}, got {tuple(x.shape)}")
    batch, n, k = x.shape
    out = torch.empty(batch, n, n, dtype=x.dtype, device=x.device)
    if out.numel():
        x = x.contiguous()
        block, depth, warps = sizes(x.dtype, n % 16 == 0 and k % 16 == 0)
        blocks = triton.cdiv(n, block)
        # NVIDIA's tensor cores take three products of TF32 for one of float32; AMD's have float32.
        precision = "ieee" if x.device.type == "cpu" or torch.version.hip else "tf32x3"
        symmetric_product_kernel[(blocks, blocks, batch)](
            x, out, n, k, scale, add, add != 0, precision, block, depth, num_warps=warps, enable_fp_fusion=True
        )
    return out
