"""Pass C for all tensors of a bucket in one launch: the MLP, with the input normalisation folded into its first layer.

Plain twin: `direction` in celo2_pretrain/optimizer/backends/passes.py. Per element 6 loads and 1 store, 28 bytes in
float32. The features that differ by row or column only have been folded into an 8-vector for each row and each column
(fold.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .features import FEATURES, col_scales, element_pointers, load_features, load_states, load_three, row_scales
from .fold import HIDDEN, THETA_SECOND
from .tiles import (
    COL_BIAS_AT,
    COL_FACTOR_AT,
    OPTIONS,
    OUT_AT,
    ROW_BIAS_AT,
    ROW_FACTOR_AT,
    WEIGHT_AT,
    Tiles,
    find_tile,
    pointer,
)

STEP = 2  # rows at a time: 128 registers; with 4, twice as many
NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def pair(at):
    """Two weights by one load: the weights are so many that single loads would take longer than the arithmetic."""
    both = tl.load(at.to(tl.pointer_type(tl.int64)))
    return both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def add_products(y, x, weights):
    """y[k] += x · weights[k] for the 8 hidden units."""
    new = ()
    for k in tl.static_range(0, HIDDEN, 2):
        one, two = pair(weights + k)
        new = new + (y[k] + x * one, y[k + 1] + x * two)
    return new


@triton.jit
def output(h, w1, b2):
    """Output 0 of the MLP for its first layer's sums; behind w1 lie b1 and the output's weights."""
    b1, w2 = w1 + HIDDEN * HIDDEN, w1 + HIDDEN * (HIDDEN + 1)
    y = ()
    for k in tl.static_range(HIDDEN):
        y = y + (tl.zeros_like(h[0]) + tl.load(b1 + k),)
    for j in tl.static_range(HIDDEN):
        y = add_products(y, tl.maximum(h[j], 0.0, propagate_nan=NAN), w1 + j * HIDDEN)
    result = tl.zeros_like(h[0]) + b2
    for k in tl.static_range(HIDDEN):
        result += tl.maximum(y[k], 0.0, propagate_nan=NAN) * tl.load(w2 + k)
    return result


@triton.jit
def direction_kernel(
    tiles,
    boxes,
    pointers,
    theta,
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
    out = pointer(pointers, part, OUT_AT, tl.float32, ALIGNED) + at
    row_factor = pointer(pointers, part, ROW_FACTOR_AT, tl.float32, False) + matrix * 3 * height
    col_factor_at = pointer(pointers, part, COL_FACTOR_AT, tl.float32, False) + matrix * 3 * width + columns
    col_factor = load_three(col_factor_at, width, col_mask)
    col_scale = col_scales(pointers, part, matrix, columns, col_mask, width, S, col_factor)
    w0 = pointer(pointers, part, WEIGHT_AT, tl.float32, False) + matrix * FEATURES * HIDDEN
    row_bias = pointer(pointers, part, ROW_BIAS_AT, tl.float32, False) + matrix * HIDDEN * height
    col_bias_at = pointer(pointers, part, COL_BIAS_AT, tl.float32, False) + matrix * HIDDEN * width + columns
    col_bias = ()
    for k in tl.static_range(HIDDEN):
        col_bias = col_bias + (tl.load(col_bias_at + k * width, mask=col_mask, other=0.0),)
    w1 = theta + THETA_SECOND
    b2 = tl.load(w1 + HIDDEN * (HIDDEN + 2))
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
        h = ()
        for k in tl.static_range(HIDDEN):
            h = h + (tl.load(row_bias + k * height + rows, mask=row_mask, other=0.0)[:, None] + col_bias[k][None, :],)
        for f in tl.static_range(FEATURES):
            h = add_products(h, x[f], w0 + f * HIDDEN)
        result = output(h, w1, b2)
        tl.store(out + place, result, mask=mask)


def direction(
    tiles: Tiles, pointers: Tensor, theta: Tensor, g_dtype: tl.dtype, p_dtype: tl.dtype, s_dtype: tl.dtype, aligned: bool
) -> None:
    """Write all parts' directions, float32, to their `out`.

    Args: as of `norms`; `pointers` also has out, and what `fold` made: weight (matrices, 18, 8), row_bias
        (matrices, 8, height), col_bias (matrices, 8, width).
        theta: the MLP's weights as `flat_theta` lays them out.
    """
    if len(tiles):
        direction_kernel[(len(tiles),)](
            tiles.tiles,
            tiles.boxes,
            pointers,
            theta,
            g_dtype,
            p_dtype,
            s_dtype,
            aligned,
            *tiles.size,
            min(STEP, tiles.size.rows),
            **OPTIONS,
        )
