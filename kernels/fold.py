"""Between passes B and C, for all matrices in one launch: the MLP's first layer with the normalisation folded in.

Plain twin: `first_layer` in celo2_pretrain/optimizer/backends/passes.py.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .factored import BLOCK, VEC_COL_SIZE, VEC_MATRICES, VEC_ROW_BIAS, VEC_SQUARES, VEC_WEIGHT, side_of, vectors_of
from .features import FEATURES
from .tiles import OPTIONS

HIDDEN = tl.constexpr(8)
EPS = tl.constexpr(1e-9)
# w0's rows in the order that `flat_theta` gives them: elementwise features, v_row's, v_col's.
ORDER = (*range(15), 27, 28, 29, 15, 16, 17, 21, 22, 23, 18, 19, 20, 24, 25, 26)
THETA_BIAS, THETA_SECOND = tl.constexpr(30 * 8), tl.constexpr(31 * 8)  # where b0 and w1 begin


@functools.cache
def _order(device: torch.device) -> Tensor:
    """ORDER there: copying it each time would wait for all that the device has to do."""
    return torch.tensor(ORDER, device=device)


def flat_theta(w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The weights of the learned rule in one flat tensor: w0 (30, 8) reordered, b0, w1, b1, w2's and b2's output 0."""
    return torch.cat([w0[_order(w0.device)].flatten(), b0, w1.flatten(), b1, w2[:, 0], b2[:1]])


@triton.jit
def fold_kernel(matrices, vectors, theta, BLOCK: tl.constexpr):
    matrix, vector = vectors_of(matrices, vectors)
    side = tl.program_id(1)
    v, pitch, size = side_of(matrix, vector, side)
    j = tl.arange(0, HIDDEN)
    if side == 0:
        number = size.to(tl.float32) * tl.load(vector + VEC_COL_SIZE).to(tl.float32)
        squares = tl.load(vector + VEC_SQUARES).to(tl.pointer_type(tl.float32)) + matrix
        pitch_of_squares = tl.load(vector + VEC_MATRICES)
        weight = tl.load(vector + VEC_WEIGHT).to(tl.pointer_type(tl.float32)) + matrix * FEATURES * HIDDEN
        for f in range(FEATURES):
            inverse = tl.rsqrt(tl.load(squares + f * pitch_of_squares) / number + EPS)
            tl.store(weight + f * HIDDEN + j, tl.load(theta + f * HIDDEN + j) * inverse)
    total = (tl.zeros([BLOCK], tl.float32),) * 6
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        new = ()
        for k in tl.static_range(3):
            x = tl.load(v + k * pitch + i, mask=i < size, other=0.0)
            new = new + (total[2 * k] + x * x, total[2 * k + 1] + tl.where(i < size, 1 / (x + 1e-8), 0.0))
        total = new
    scale = ()
    for k in tl.static_range(6):
        scale = scale + (tl.rsqrt(tl.sum(total[k]) / size.to(tl.float32) + EPS),)
    bias = tl.load(vector + VEC_ROW_BIAS + side).to(tl.pointer_type(tl.float32)) + matrix * HIDDEN * size
    w = theta + (FEATURES + 6 * side) * HIDDEN
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = ()
        for k in tl.static_range(3):
            plain = tl.load(v + k * pitch + i, mask=i < size, other=0.0)
            x = x + (plain * scale[2 * k], tl.rsqrt(plain + 1e-8) * scale[2 * k + 1])
        for k in tl.static_range(HIDDEN):
            y = tl.zeros([BLOCK], tl.float32)
            if side == 0:
                y += tl.load(theta + THETA_BIAS + k)
            for f in tl.static_range(3):
                y += x[2 * f] * tl.load(w + f * HIDDEN + k) + x[2 * f + 1] * tl.load(w + (3 + f) * HIDDEN + k)
            tl.store(bias + k * size + i, y, mask=i < size)


def fold(matrices: Tensor, vectors: Tensor, theta: Tensor) -> None:
    """Write weight (matrices, 18, 8), row_bias (matrices, 8, row_size) with b0 inside, col_bias (…, col_size).

    Args:
        matrices, vectors: as of `update_factored`; squares (18, matrices) are pass B's sums, v_row and v_col updated.
        theta: from `flat_theta`.
    """
    if len(matrices):
        fold_kernel[(len(matrices), 2)](matrices, vectors, theta, BLOCK, **OPTIONS)
