"""The 18 elementwise features (docs/how_it_works.md, step 4) of one tile, for passes B and C.

Plain twin: `elementwise_features` in celo2_pretrain/optimizer/backends/passes.py.
"""

import triton
import triton.language as tl

from .packed_triton import unpack
from .tiles import COL_SCALE_AT, G_AT, M0_AT, M1_AT, M2_AT, P_AT, ROW_SCALE_AT, V_AT, pointer

FEATURES = tl.constexpr(18)
NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def element_pointers(pointers, part, at, G: tl.constexpr, P: tl.constexpr, S: tl.constexpr, ALIGNED: tl.constexpr):
    """g, p, m0, m1, m2, v at the tile's corner. Packed (S is int32), the last four are the same words."""
    return (
        pointer(pointers, part, G_AT, G, ALIGNED) + at,
        pointer(pointers, part, P_AT, P, ALIGNED) + at,
        pointer(pointers, part, M0_AT, S, ALIGNED) + at,
        pointer(pointers, part, M1_AT, S, ALIGNED) + at,
        pointer(pointers, part, M2_AT, S, ALIGNED) + at,
        pointer(pointers, part, V_AT, S, ALIGNED) + at,
    )


@triton.jit
def load_three(at, pitch, mask):
    """The three factors of some rows or columns; a part's are (matrices, 3, height or width)."""
    return (
        tl.load(at, mask=mask, other=0.0),
        tl.load(at + pitch, mask=mask, other=0.0),
        tl.load(at + 2 * pitch, mask=mask, other=0.0),
    )


@triton.jit
def load_states(elements, place, mask, row_scale, col_scale, S: tl.constexpr):
    """m0, m1, m2, v, (STEP, COLS) each; packed, by the scales 3 × (STEP,) and 3 × (COLS,)."""
    if S == tl.int32:
        return unpack(tl.load(elements[5] + place, mask=mask, other=0), row_scale, col_scale)
    else:
        return (
            tl.load(elements[2] + place, mask=mask, other=0.0).to(tl.float32),
            tl.load(elements[3] + place, mask=mask, other=0.0).to(tl.float32),
            tl.load(elements[4] + place, mask=mask, other=0.0).to(tl.float32),
            tl.load(elements[5] + place, mask=mask, other=0.0).to(tl.float32),
        )


@triton.jit
def col_scales(pointers, part, matrix, columns, col_mask, width, S: tl.constexpr, other):
    """Of packed accumulators the columns' scales, 3 × (COLS,); of others `other`, as a stand-in of the same type."""
    if S == tl.int32:
        at = pointer(pointers, part, COL_SCALE_AT, tl.float32, False) + matrix * 3 * width + columns
        return load_three(at, width, col_mask)
    else:
        return other


@triton.jit
def row_scales(pointers, part, matrix, rows, row_mask, height, S: tl.constexpr, other):
    """The same of the rows, 3 × (STEP,)."""
    if S == tl.int32:
        at = pointer(pointers, part, ROW_SCALE_AT, tl.float32, False) + matrix * 3 * height + rows
        return load_three(at, height, row_mask)
    else:
        return other


@triton.jit
def load_features(elements, place, mask, row_factor, col_factor, states):
    """The features in ascending order of their index, (STEP, COLS) each; where the mask is off they are 0, but for
    rsqrt(v + 1e-8). `row_factor`: 3 × (STEP,), `col_factor`: 3 × (COLS,), `states` from `load_states`."""
    g = tl.load(elements[0] + place, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(elements[1] + place, mask=mask, other=0.0).to(tl.float32)
    m0, m1, m2, v = states
    f0 = row_factor[0][:, None] * col_factor[0][None, :]
    f1 = row_factor[1][:, None] * col_factor[1][None, :]
    f2 = row_factor[2][:, None] * col_factor[2][None, :]
    g = tl.clamp(g, -1000.0, 1000.0, propagate_nan=NAN)
    inverse = tl.rsqrt(v + 1e-8)
    return (
        g,
        tl.clamp(g, -0.1, 0.1, propagate_nan=NAN),
        p,
        m0,
        m1,
        m2,
        v,
        m0 * inverse,
        m1 * inverse,
        m2 * inverse,
        inverse,
        g * f0,
        g * f1,
        g * f2,
        g * inverse,
        m0 * f0,
        m1 * f1,
        m2 * f2,
    )
