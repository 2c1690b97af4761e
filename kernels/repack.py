"""Packed accumulators (kernels/packed.py) updated in place, for all tensors of a plan in one launch.

Plain twin: `repack` in celo2_pretrain/optimizer/backends/passes.py. Runs after pass A, which sums g² only: the sums
make the new scales. Per element 2 loads and 1 store, 12 bytes in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .accumulate import CLAMP, NAN, ONE_MINUS_DECAY_0, ONE_MINUS_DECAY_1, ONE_MINUS_DECAY_2
from .features import load_three
from .packed_triton import M0, M1, M2, V, encode, scale_of, unpack
from .tiles import (
    COL_SCALE_AT,
    G_AT,
    M0_KEY_AT,
    M1_KEY_AT,
    M2_KEY_AT,
    OLD_COL_SCALE_AT,
    OLD_ROW_SCALE_AT,
    OPTIONS,
    PTR,
    ROW_SCALE_AT,
    START_AT,
    STEP_OFFSET_AT,
    V_AT,
    V_KEY_AT,
    Tiles,
    find_tile,
    pointer,
)

STEP = 2  # rows at a time


@triton.jit
def repack_kernel(
    tiles, boxes, pointers, G: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr
):
    part, matrix, first, low, high, columns, col_mask, height, width, at, stride = find_tile(tiles, boxes, ROWS, COLS, ALIGNED)
    g_at = pointer(pointers, part, G_AT, G, ALIGNED) + at
    words_at = pointer(pointers, part, V_AT, tl.int32, ALIGNED) + at
    start = tl.load(pointers + part * PTR + START_AT) + at
    row = pointers + part * PTR
    m0_key, m1_key = tl.load(row + M0_KEY_AT).to(tl.uint32), tl.load(row + M1_KEY_AT).to(tl.uint32)
    m2_key, v_key = tl.load(row + M2_KEY_AT).to(tl.uint32), tl.load(row + V_KEY_AT).to(tl.uint32)
    step_offset = tl.load(row + STEP_OFFSET_AT).to(tl.uint32)
    new_row = pointer(pointers, part, ROW_SCALE_AT, tl.float32, False) + matrix * 3 * height
    new_col_at = pointer(pointers, part, COL_SCALE_AT, tl.float32, False) + matrix * 3 * width + columns
    old_row = pointer(pointers, part, OLD_ROW_SCALE_AT, tl.float32, False) + matrix * 3 * height
    old_col_at = pointer(pointers, part, OLD_COL_SCALE_AT, tl.float32, False) + matrix * 3 * width + columns
    new_col, old_col = load_three(new_col_at, width, col_mask), load_three(old_col_at, width, col_mask)
    stop = tl.minimum(high - first, ROWS).to(tl.int32)  # not known at compile time, or some compilers unroll and spill
    for down in range(0, stop, STEP):
        i = down + tl.arange(0, STEP)
        rows = first + i
        row_mask = (rows >= low) & (rows < high)
        mask = row_mask[:, None] & col_mask[None, :]
        place = i[:, None] * stride + tl.arange(0, COLS)[None, :]
        g = tl.load(g_at + place, mask=mask, other=0.0).to(tl.float32)
        g = tl.clamp(g, -CLAMP, CLAMP, propagate_nan=NAN)
        words = tl.load(words_at + place, mask=mask, other=0)
        m0, m1, m2, v = unpack(words, load_three(old_row + rows, height, row_mask), old_col)
        new = load_three(new_row + rows, height, row_mask)
        middle, index = scale_of(new, new_col, 1), start + place
        made = (
            encode(m0 * 0.9 + g * ONE_MINUS_DECAY_0, scale_of(new, new_col, 0), index, m0_key, step_offset, M0, True)
            | encode(m1 * 0.99 + g * ONE_MINUS_DECAY_1, middle, index, m1_key, step_offset, M1, True)
            | encode(m2 * 0.999 + g * ONE_MINUS_DECAY_2, scale_of(new, new_col, 2), index, m2_key, step_offset, M2, True)
            | encode(v * 0.95 + g * g * 0.05, middle, index, v_key, step_offset, V, False)
        )
        tl.store(words_at + place, made.to(tl.int32, bitcast=True), mask=mask)


def repack(tiles: Tiles, pointers: Tensor, g_dtype: tl.dtype, aligned: bool) -> None:
    """Update the packed m0, m1, m2, v of all parts.

    Args: as of `accumulate`; `pointers` also has the scales by which they are read (old_…) and written: row_scale
        (matrices, 3, height), col_scale (matrices, 3, width), powers of two.
    """
    if len(tiles):
        repack_kernel[(len(tiles),)](
            tiles.tiles, tiles.boxes, pointers, g_dtype, aligned, *tiles.size, min(STEP, tiles.size.rows), **OPTIONS
        )
