"""Between passes A and B, for all matrices in one launch each: the factored second moments, and the factors from them.

Plain twins: `update_factored`, `factors` and `scales` in celo2_pretrain/optimizer/backends/passes.py. These are vectors, small
beside the tensors, but several a tensor: one by one their launches would take longer than the passes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .accumulate import REST_0, REST_1, REST_2
from .packed_triton import power_near_root
from .tiles import OPTIONS

# What a part's vectors are: a row of the vector table. Addresses, but for the pitches (elements from one decay to the
# next in v_row and v_col), sizes, and counts. v_row has row_size elements a matrix and decay, v_col col_size.
VECTORS = (
    "v_row",
    "v_col",
    "row_pitch",
    "col_pitch",
    "row_size",
    "col_size",
    "row_total",
    "col_total",
    "row_factor",
    "col_factor",
    "weight",
    "row_bias",
    "col_bias",
    "squares",
    "matrices",
    "row_scale",
    "col_scale",
)
VEC = tl.constexpr(len(VECTORS))
BLOCK = 512


@triton.jit
def vectors_of(matrices, vectors):
    """This program's matrix (its number in the part) and row of the vector table."""
    this = matrices + tl.program_id(0).to(tl.int64) * 2
    return tl.load(this + 1), vectors + tl.load(this) * VEC


@triton.jit
def side_of(matrix, vector, side):
    """v_row (side 0) or v_col (side 1) of a matrix: where it begins, the pitch, its elements."""
    size = tl.load(vector + 4 + side)
    begin = tl.load(vector + side).to(tl.pointer_type(tl.float32)) + matrix * size
    return begin, tl.load(vector + 2 + side), size


@triton.jit
def update_factored_kernel(matrices, vectors, BLOCK: tl.constexpr):
    matrix, vector = vectors_of(matrices, vectors)
    side = tl.program_id(1)
    v, pitch, size = side_of(matrix, vector, side)
    count = tl.load(vector + 5 - side).to(tl.float32)  # elements that the sum was taken over
    total = tl.load(vector + 6 + side).to(tl.pointer_type(tl.float32)) + matrix * size
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < size
        mean = tl.load(total + i, mask=mask, other=0.0) / count
        x = tl.load(v + i, mask=mask, other=0.0)
        tl.store(v + i, x * 0.9 + mean * REST_0, mask=mask)
        x = tl.load(v + pitch + i, mask=mask, other=0.0)
        tl.store(v + pitch + i, x * 0.99 + mean * REST_1, mask=mask)
        x = tl.load(v + 2 * pitch + i, mask=mask, other=0.0)
        tl.store(v + 2 * pitch + i, x * 0.999 + mean * REST_2, mask=mask)


@triton.jit
def factors_kernel(matrices, vectors, BLOCK: tl.constexpr):
    matrix, vector = vectors_of(matrices, vectors)
    decay = tl.program_id(1)
    v_row, row_pitch, row_size = side_of(matrix, vector, 0)
    v_col, col_pitch, col_size = side_of(matrix, vector, 1)
    v_row += decay * row_pitch
    v_col += decay * col_pitch
    row_factor = tl.load(vector + 8).to(tl.pointer_type(tl.float32)) + (matrix * 3 + decay) * row_size
    col_factor = tl.load(vector + 9).to(tl.pointer_type(tl.float32)) + (matrix * 3 + decay) * col_size
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, row_size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(v_row + i, mask=i < row_size, other=0.0)
    mean = tl.sum(total) / row_size.to(tl.float32)
    for start in range(0, row_size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(v_row + i, mask=i < row_size, other=0.0) / (mean + 1e-9)
        tl.store(row_factor + i, tl.rsqrt(tl.maximum(x, 1e-9)), mask=i < row_size)
    for start in range(0, col_size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(v_col + i, mask=i < col_size, other=0.0)
        tl.store(col_factor + i, tl.rsqrt(tl.maximum(x, 1e-9)), mask=i < col_size)


@triton.jit
def scales_kernel(matrices, vectors, BLOCK: tl.constexpr):
    matrix, vector = vectors_of(matrices, vectors)
    decay = tl.program_id(1)
    v_row, row_pitch, row_size = side_of(matrix, vector, 0)
    v_col, col_pitch, col_size = side_of(matrix, vector, 1)
    v_row += decay * row_pitch
    v_col += decay * col_pitch
    row_scale = tl.load(vector + 15).to(tl.pointer_type(tl.float32)) + (matrix * 3 + decay) * row_size
    col_scale = tl.load(vector + 16).to(tl.pointer_type(tl.float32)) + (matrix * 3 + decay) * col_size
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, row_size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(v_row + i, mask=i < row_size, other=0.0)
    mean = tl.maximum(tl.sum(total) / row_size.to(tl.float32), 1.2e-38)
    for start in range(0, row_size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.div_rn(tl.load(v_row + i, mask=i < row_size, other=0.0), mean)  # a hair less than 1 has half the power
        tl.store(row_scale + i, power_near_root(x), mask=i < row_size)
    for start in range(0, col_size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(v_col + i, mask=i < col_size, other=0.0)
        tl.store(col_scale + i, power_near_root(x), mask=i < col_size)


def update_factored(matrices: Tensor, vectors: Tensor) -> None:
    """`v_k ← β_k v_k + (1 − β_k) total / count` in place, for the rows and columns of every matrix.

    Args:
        matrices: (matrices, 2) int64: part, and number within the part.
        vectors: (parts, 17) int64 in the order of VECTORS: v_row (3, matrices · row_size), v_col, their totals.
    """
    if len(matrices):
        update_factored_kernel[(len(matrices), 2)](matrices, vectors, BLOCK, **OPTIONS)


def factors(matrices: Tensor, vectors: Tensor) -> None:
    """Write row_factor (matrices, 3, row_size) and col_factor (matrices, 3, col_size) of step 3; arguments as above."""
    if len(matrices):
        factors_kernel[(len(matrices), 3)](matrices, vectors, BLOCK, **OPTIONS)


def scales(matrices: Tensor, vectors: Tensor) -> None:
    """Write row_scale (matrices, 3, row_size), col_scale (matrices, 3, col_size) of packed accumulators; as above."""
    if len(matrices):
        scales_kernel[(len(matrices), 3)](matrices, vectors, BLOCK, **OPTIONS)
