"""Between passes A and B, for all matrices in one launch each: the factored second moments, and the factors from them.

Plain twins: `update_factored`, `factors` and `scales` in celo2_pretrain/optimizer/backends/passes.py. These are vectors, small
beside the tensors, but several a tensor: one by one their launches would take longer than the passes.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .accumulate import ONE_MINUS_DECAY_0, ONE_MINUS_DECAY_1, ONE_MINUS_DECAY_2
from .packed_triton import power_near_root
from .tiles import OPTIONS, place


class VectorRow(NamedTuple):
    """What a kernel is told of a part's vectors, int64: addresses, but for pitches, sizes and counts."""

    v_row: int = 0  # (3, matrices · row_size) elements
    v_col: int = 0
    row_pitch: int = 0  # elements from one decay to the next
    col_pitch: int = 0
    row_size: int = 0  # elements for each matrix and decay
    col_size: int = 0
    row_total: int = 0
    col_total: int = 0
    row_factor: int = 0
    col_factor: int = 0
    weight: int = 0
    row_bias: int = 0
    col_bias: int = 0
    squares: int = 0
    matrices: int = 0  # their number
    row_scale: int = 0
    col_scale: int = 0


VEC = tl.constexpr(len(VectorRow._fields))
VEC_V_ROW = place(VectorRow, "v_row")
VEC_V_COL = place(VectorRow, "v_col")
VEC_ROW_PITCH = place(VectorRow, "row_pitch")
VEC_COL_PITCH = place(VectorRow, "col_pitch")
VEC_ROW_SIZE = place(VectorRow, "row_size")
VEC_COL_SIZE = place(VectorRow, "col_size")
VEC_ROW_TOTAL = place(VectorRow, "row_total")
VEC_COL_TOTAL = place(VectorRow, "col_total")
VEC_ROW_FACTOR = place(VectorRow, "row_factor")
VEC_COL_FACTOR = place(VectorRow, "col_factor")
VEC_WEIGHT = place(VectorRow, "weight")
VEC_ROW_BIAS = place(VectorRow, "row_bias")
VEC_COL_BIAS = place(VectorRow, "col_bias")
VEC_SQUARES = place(VectorRow, "squares")
VEC_MATRICES = place(VectorRow, "matrices")
VEC_ROW_SCALE = place(VectorRow, "row_scale")
VEC_COL_SCALE = place(VectorRow, "col_scale")
BLOCK = 512


@triton.jit
def vectors_of(matrices, vectors):
    """This program's matrix (its number in the part) and row of the vector table."""
    this = matrices + tl.program_id(0).to(tl.int64) * 2
    return tl.load(this + 1), vectors + tl.load(this) * VEC


@triton.jit
def side_of(matrix, vector, side):
    """v_row (side 0) or v_col (side 1) of a matrix: where it begins, the pitch, its elements. Fields of a column follow
    those of the row."""
    size = tl.load(vector + VEC_ROW_SIZE + side)
    begin = tl.load(vector + VEC_V_ROW + side).to(tl.pointer_type(tl.float32)) + matrix * size
    return begin, tl.load(vector + VEC_ROW_PITCH + side), size


@triton.jit
def update_factored_kernel(matrices, vectors, BLOCK: tl.constexpr):
    matrix, vector = vectors_of(matrices, vectors)
    side = tl.program_id(1)
    v, pitch, size = side_of(matrix, vector, side)
    count = tl.load(vector + VEC_COL_SIZE - side).to(tl.float32)  # elements that the sum was taken over
    total = tl.load(vector + VEC_ROW_TOTAL + side).to(tl.pointer_type(tl.float32)) + matrix * size
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < size
        mean = tl.load(total + i, mask=mask, other=0.0) / count
        x = tl.load(v + i, mask=mask, other=0.0)
        tl.store(v + i, x * 0.9 + mean * ONE_MINUS_DECAY_0, mask=mask)
        x = tl.load(v + pitch + i, mask=mask, other=0.0)
        tl.store(v + pitch + i, x * 0.99 + mean * ONE_MINUS_DECAY_1, mask=mask)
        x = tl.load(v + 2 * pitch + i, mask=mask, other=0.0)
        tl.store(v + 2 * pitch + i, x * 0.999 + mean * ONE_MINUS_DECAY_2, mask=mask)


@triton.jit
def factors_kernel(matrices, vectors, BLOCK: tl.constexpr):
    matrix, vector = vectors_of(matrices, vectors)
    decay = tl.program_id(1)
    v_row, row_pitch, row_size = side_of(matrix, vector, 0)
    v_col, col_pitch, col_size = side_of(matrix, vector, 1)
    v_row += decay * row_pitch
    v_col += decay * col_pitch
    row_factor = tl.load(vector + VEC_ROW_FACTOR).to(tl.pointer_type(tl.float32)) + (matrix * 3 + decay) * row_size
    col_factor = tl.load(vector + VEC_COL_FACTOR).to(tl.pointer_type(tl.float32)) + (matrix * 3 + decay) * col_size
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
    row_scale = tl.load(vector + VEC_ROW_SCALE).to(tl.pointer_type(tl.float32)) + (matrix * 3 + decay) * row_size
    col_scale = tl.load(vector + VEC_COL_SCALE).to(tl.pointer_type(tl.float32)) + (matrix * 3 + decay) * col_size
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
        vectors: (parts, 17) int64, a VectorRow each: v_row (3, matrices · row_size), v_col, their totals.
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
