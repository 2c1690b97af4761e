"""Pass B for all tensors of a plan in one launch: sums of squares of the elementwise features, 18 a matrix.

Plain twin: `norms` in celo2_pretrain/optimizer/backends/passes.py. Per element 6 loads, 24 bytes in float32. Sums are made in
a fixed order, as in pass A.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .features import FEATURES, col_scales, element_pointers, load_features, load_states, load_three, row_scales
from .tiles import COL_FACTOR_AT, OPTIONS, ROW_FACTOR_AT, Tiles, add_sums, find_tile, pointer

STEP = 2  # rows at a time: with 4, a compute unit holds fewer programs and some targets spill
PITCH = tl.constexpr(32)  # of the scratch buffer: FEATURES, rounded up to a power of two


@triton.jit
def norms_kernel(
    tiles,
    boxes,
    pointers,
    squares,
    G: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
):
    part, matrix, first, low, high, columns, col_mask, height, width, at, stride = find_tile(tiles, boxes, ROWS, COLS, ALIGNED)
    elements = element_pointers(pointers, part, at, G, P, S, ALIGNED)
    row_factor = pointer(pointers, part, ROW_FACTOR_AT, tl.float32, False) + matrix * 3 * height
    col_factor_at = pointer(pointers, part, COL_FACTOR_AT, tl.float32, False) + matrix * 3 * width + columns
    col_factor = load_three(col_factor_at, width, col_mask)
    col_scale = col_scales(pointers, part, matrix, columns, col_mask, width, S, col_factor)
    total = (tl.zeros([STEP, COLS], tl.float32),) * FEATURES
    stop = tl.minimum(high - first, ROWS).to(tl.int32)  # not known at compile time, or some compilers unroll and spill
    for down in range(0, stop, STEP):
        i = down + tl.arange(0, STEP)
        rows = first + i
        row_mask = (rows >= low) & (rows < high)
        mask = row_mask[:, None] & col_mask[None, :]
        place = i[:, None] * stride + tl.arange(0, COLS)[None, :]
        factor = load_three(row_factor + rows, height, row_mask)
        row_scale = row_scales(pointers, part, matrix, rows, row_mask, height, S, factor)
        states = load_states(elements, place, mask, row_scale, col_scale, S)
        x = load_features(elements, place, mask, factor, col_factor, states)
        new = ()
        for k in tl.static_range(FEATURES):
            # Only rsqrt(v + 1e-8) isn't zero where the mask is off.
            here = tl.where(mask, x[k], 0.0) if k == 10 else x[k]
            new = new + (total[k] + here * here,)
        total = new
    to = squares + tl.program_id(0).to(tl.int64) * PITCH
    for k in tl.static_range(FEATURES):
        tl.store(to + k, tl.sum(total[k]))


def norms(
    tiles: Tiles, pointers: Tensor, totals: Tensor, g_dtype: tl.dtype, p_dtype: tl.dtype, s_dtype: tl.dtype, aligned: bool
) -> None:
    """Add the sums of squares of all parts' features to their totals.

    Args: as of `accumulate`; `pointers` also has row_factor (matrices, 3, height) and col_factor (matrices, 3, width).
        totals: (parts, 2) int64, address of the (18, matrices) sums, and the number of matrices.
    """
    if not len(tiles):
        return
    squares = torch.empty(len(tiles), PITCH.value, device=pointers.device)
    norms_kernel[(len(tiles),)](
        tiles.tiles,
        tiles.boxes,
        pointers,
        squares,
        g_dtype,
        p_dtype,
        s_dtype,
        aligned,
        *tiles.size,
        min(STEP, tiles.size.rows),
        **OPTIONS,
    )
    add_sums(tiles.matrices, totals, 0, squares, FEATURES.value)
