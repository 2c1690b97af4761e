"""Pass A for all tensors of a plan in one launch: momenta and second moment in place, row and column sums of g².

Plain twin: `accumulate` in celo2_pretrain/optimizer/backends/passes.py. Per element 5 loads and 4 stores, 36 bytes in float32.
Accumulators in bfloat16 are written with stochastic rounding, whose twin is kernels/rounding.py.
Every tile writes its partial sums to a scratch buffer, which a second kernel adds up in a fixed order: no atomics,
so a step can be repeated bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packed_triton import random_bits
from .tiles import (
    G_AT,
    M0_AT,
    M0_KEY_AT,
    M1_AT,
    M1_KEY_AT,
    M2_AT,
    M2_KEY_AT,
    OPTIONS,
    PTR,
    START_AT,
    V_AT,
    V_KEY_AT,
    Tiles,
    add_sums,
    find_tile,
    pointer,
)

STEP = 4  # rows at a time
CLAMP = tl.constexpr(1000.0)
# 1 − β in float32 arithmetic, as the authors have it: 1.3e-5 relative less than 0.001 in the last one.
ONE_MINUS_DECAY_0, ONE_MINUS_DECAY_1, ONE_MINUS_DECAY_2 = (
    tl.constexpr(float(1 - torch.tensor(decay))) for decay in (0.9, 0.99, 0.999)
)
NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def store_rounded(at, x, index, key, mask, S: tl.constexpr):
    """Store float32 `x` in dtype S: as it is, or rounded to bfloat16 by bits that depend on index and key alone."""
    if S == tl.float32:
        tl.store(at, x, mask=mask)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        r = random_bits(index, key)
        finite = (bits & 0x7F800000) != 0x7F800000
        bits = tl.where(finite, bits + r, tl.where(x != x, bits | 0x400000, bits))
        tl.store(at, (bits >> 16).to(tl.uint16).to(S, bitcast=True), mask=mask)


@triton.jit
def accumulate_kernel(
    tiles,
    boxes,
    pointers,
    row_sums,
    col_sums,
    G: tl.constexpr,
    S: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
):
    part, _, first, low, high, _, col_mask, _, _, at, stride = find_tile(tiles, boxes, ROWS, COLS, ALIGNED)
    g_at = pointer(pointers, part, G_AT, G, ALIGNED) + at
    m0_at = pointer(pointers, part, M0_AT, S, ALIGNED) + at
    m1_at = pointer(pointers, part, M1_AT, S, ALIGNED) + at
    m2_at = pointer(pointers, part, M2_AT, S, ALIGNED) + at
    v_at = pointer(pointers, part, V_AT, S, ALIGNED) + at
    start = tl.load(pointers + part * PTR + START_AT) + at  # of the tile's corner in the whole tensor
    row = pointers + part * PTR
    m0_key, m1_key = tl.load(row + M0_KEY_AT).to(tl.uint32), tl.load(row + M1_KEY_AT).to(tl.uint32)
    m2_key, v_key = tl.load(row + M2_KEY_AT).to(tl.uint32), tl.load(row + V_KEY_AT).to(tl.uint32)
    tile = tl.program_id(0).to(tl.int64)
    col_total = tl.zeros([STEP, COLS], tl.float32)
    for down in range(0, ROWS, STEP):
        i = down + tl.arange(0, STEP)
        rows = first + i
        mask = ((rows >= low) & (rows < high))[:, None] & col_mask[None, :]
        place = i[:, None] * stride + tl.arange(0, COLS)[None, :]
        g = tl.load(g_at + place, mask=mask, other=0.0).to(tl.float32)
        g = tl.clamp(g, -CLAMP, CLAMP, propagate_nan=NAN)
        square = g * g
        if S != tl.int32:
            m0 = tl.load(m0_at + place, mask=mask, other=0.0).to(tl.float32)
            m1 = tl.load(m1_at + place, mask=mask, other=0.0).to(tl.float32)
            m2 = tl.load(m2_at + place, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(v_at + place, mask=mask, other=0.0).to(tl.float32)
            store_rounded(m0_at + place, m0 * 0.9 + g * ONE_MINUS_DECAY_0, start + place, m0_key, mask, S)
            store_rounded(m1_at + place, m1 * 0.99 + g * ONE_MINUS_DECAY_1, start + place, m1_key, mask, S)
            store_rounded(m2_at + place, m2 * 0.999 + g * ONE_MINUS_DECAY_2, start + place, m2_key, mask, S)
            store_rounded(v_at + place, v * 0.95 + square * 0.05, start + place, v_key, mask, S)
        s = tl.where(mask, square + 1e-30, 0.0)
        col_total += s
        tl.store(row_sums + tile * ROWS + i, tl.sum(s, 1))
    tl.store(col_sums + tile * COLS + tl.arange(0, COLS), tl.sum(col_total, 0))


def accumulate(tiles: Tiles, pointers: Tensor, totals: Tensor, g_dtype: tl.dtype, s_dtype: tl.dtype, aligned: bool) -> None:
    """Update m0, m1, m2, v of all parts (packed ones: `repack` does), and add the sums of g² + 1e-30 to their row and
    column totals.

    Args:
        tiles: from `make_tiles`.
        pointers: (parts, 22) int64, a PointerRow each.
        totals: (parts, 2) int64, addresses of the (matrices, height) row sums and (matrices, width) column sums.
        g_dtype: of all parts' gradients.
        s_dtype: of all parts' m0, m1, m2, v: float32, bfloat16, or int32: packed.
        aligned: all addresses are multiples of 16 bytes; offsets, strides, columns and widths multiples of 4.
    """
    if not len(tiles):
        return
    size = tiles.size
    row_sums = torch.empty(len(tiles), size.rows, device=pointers.device)
    col_sums = torch.empty(len(tiles), size.cols, device=pointers.device)
    accumulate_kernel[(len(tiles),)](
        tiles.tiles,
        tiles.boxes,
        pointers,
        row_sums,
        col_sums,
        g_dtype,
        s_dtype,
        aligned,
        *size,
        min(STEP, size.rows),
        **OPTIONS,
    )
    add_sums(tiles.rows, totals, 0, row_sums)
    add_sums(tiles.cols, totals, 1, col_sums)
