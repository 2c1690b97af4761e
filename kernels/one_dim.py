"""The learned rule for 1-D tensors: a program for each, since there are many of them and they are short.

Twins: the branches for vectors in celo2_pretrain/optimizer/backends/passes.py. One pass by plain torch is some sixty
launches a tensor, which for a GPT's biases and norms took ten times as long as all its matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .accumulate import CLAMP, ONE_MINUS_DECAY_0, ONE_MINUS_DECAY_1, ONE_MINUS_DECAY_2
from .direction import add_products, output
from .fold import EPS, HIDDEN, THETA_BIAS, THETA_SECOND
from .tiles import OPTIONS, place

NAN = tl.constexpr(tl.PropagateNan.ALL)
FEATURES = tl.constexpr(15)


class OneDimRow(NamedTuple):
    """What a kernel is told of a vector, int64: addresses of a rank's flat slice and of the sums over all ranks, sizes."""

    g: int = 0
    p: int = 0
    m0: int = 0
    m1: int = 0
    m2: int = 0
    v: int = 0
    v0: int = 0  # its second moments of three decays
    v1: int = 0
    v2: int = 0
    out: int = 0
    sums: int = 0
    elements: int = 0  # of the slice
    length: int = 0  # elements of the whole vector


ROW = tl.constexpr(len(OneDimRow._fields))
G_AT = place(OneDimRow, "g")
P_AT = place(OneDimRow, "p")
M0_AT = place(OneDimRow, "m0")
M1_AT = place(OneDimRow, "m1")
M2_AT = place(OneDimRow, "m2")
V_AT = place(OneDimRow, "v")
V0_AT = place(OneDimRow, "v0")
V1_AT = place(OneDimRow, "v1")
V2_AT = place(OneDimRow, "v2")
OUT_AT = place(OneDimRow, "out")
SUMS_AT = place(OneDimRow, "sums")
ELEMENTS_AT = place(OneDimRow, "elements")
LENGTH_AT = place(OneDimRow, "length")
BLOCK = 256


@triton.jit
def column(table, which: tl.constexpr, DTYPE: tl.constexpr):
    """This program's tensor of that number."""
    return tl.load(table + tl.program_id(0).to(tl.int64) * ROW + which).to(tl.pointer_type(DTYPE))


@triton.jit
def elements_of(table):
    return tl.load(table + tl.program_id(0).to(tl.int64) * ROW + ELEMENTS_AT)


@triton.jit
def length_of(table):
    return tl.load(table + tl.program_id(0).to(tl.int64) * ROW + LENGTH_AT).to(tl.float32)


@triton.jit
def clamped(at, mask):
    return tl.clamp(tl.load(at, mask=mask, other=0.0).to(tl.float32), -CLAMP, CLAMP, propagate_nan=NAN)


@triton.jit
def decayed(at, i, mask, decay: tl.constexpr, new):
    tl.store(at + i, tl.load(at + i, mask=mask, other=0.0) * decay + new, mask=mask)


@triton.jit
def accumulate_1d_kernel(table, G: tl.constexpr, BLOCK: tl.constexpr):
    g_at, elements = column(table, G_AT, G), elements_of(table)
    m0, m1, m2 = column(table, M0_AT, tl.float32), column(table, M1_AT, tl.float32), column(table, M2_AT, tl.float32)
    v = column(table, V_AT, tl.float32)
    v0, v1, v2 = column(table, V0_AT, tl.float32), column(table, V1_AT, tl.float32), column(table, V2_AT, tl.float32)
    for start in range(0, elements, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < elements
        g = clamped(g_at + i, mask)
        square = g * g
        decayed(m0, i, mask, 0.9, g * ONE_MINUS_DECAY_0)
        decayed(m1, i, mask, 0.99, g * ONE_MINUS_DECAY_1)
        decayed(m2, i, mask, 0.999, g * ONE_MINUS_DECAY_2)
        decayed(v, i, mask, 0.95, square * 0.05)
        decayed(v0, i, mask, 0.9, (square + 1e-30) * ONE_MINUS_DECAY_0)
        decayed(v1, i, mask, 0.99, (square + 1e-30) * ONE_MINUS_DECAY_1)
        decayed(v2, i, mask, 0.999, (square + 1e-30) * ONE_MINUS_DECAY_2)


@triton.jit
def factored_1d(at, i, mask):
    return tl.rsqrt(tl.maximum(tl.load(at + i, mask=mask, other=0.0) + 1e-9, 1e-9, propagate_nan=NAN))


@triton.jit
def features_1d(table, i, mask, G: tl.constexpr, P: tl.constexpr):
    """The 15 features, (BLOCK,) each."""
    g = clamped(column(table, G_AT, G) + i, mask)
    p = tl.load(column(table, P_AT, P) + i, mask=mask, other=0.0).to(tl.float32)
    m0 = tl.load(column(table, M0_AT, tl.float32) + i, mask=mask, other=0.0)
    m1 = tl.load(column(table, M1_AT, tl.float32) + i, mask=mask, other=0.0)
    m2 = tl.load(column(table, M2_AT, tl.float32) + i, mask=mask, other=0.0)
    v = tl.load(column(table, V_AT, tl.float32) + i, mask=mask, other=0.0)
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
        g * factored_1d(column(table, V0_AT, tl.float32), i, mask),
        g * factored_1d(column(table, V1_AT, tl.float32), i, mask),
        g * factored_1d(column(table, V2_AT, tl.float32), i, mask),
        g * inverse,
    )


@triton.jit
def norms_1d_kernel(table, G: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):
    elements = elements_of(table)
    total = (tl.zeros([BLOCK], tl.float32),) * FEATURES
    for start in range(0, elements, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < elements
        x = features_1d(table, i, mask, G, P)
        new = ()
        for k in tl.static_range(FEATURES):
            here = tl.where(mask, x[k], 0.0) if k == 10 else x[k]  # only rsqrt(v + 1e-8) isn't zero there
            new = new + (total[k] + here * here,)
        total = new
    sums = column(table, SUMS_AT, tl.float32)
    for k in tl.static_range(FEATURES):
        tl.store(sums + k, tl.load(sums + k) + tl.sum(total[k]))


@triton.jit
def direction_1d_kernel(table, theta, G: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):
    elements, length, sums = elements_of(table), length_of(table), column(table, SUMS_AT, tl.float32)
    out = column(table, OUT_AT, tl.float32)
    w1 = theta + THETA_SECOND
    b2 = tl.load(w1 + HIDDEN * (HIDDEN + 2))
    for start in range(0, elements, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < elements
        x = features_1d(table, i, mask, G, P)
        h = ()
        for k in tl.static_range(HIDDEN):
            h = h + (tl.zeros([BLOCK], tl.float32) + tl.load(theta + THETA_BIAS + k),)
        for f in tl.static_range(FEATURES):
            h = add_products(h, x[f] * tl.rsqrt(tl.load(sums + f) / length + EPS), theta + f * HIDDEN)
        tl.store(out + i, output(h, w1, b2), mask=mask)


@triton.jit
def output_squares_1d_kernel(table, BLOCK: tl.constexpr):
    elements, out, sums = elements_of(table), column(table, OUT_AT, tl.float32), column(table, SUMS_AT, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, elements, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(out + i, mask=i < elements, other=0.0)
        total += x * x
    tl.store(sums, tl.load(sums) + tl.sum(total))


@triton.jit
def rescale_1d_kernel(table, BLOCK: tl.constexpr):
    elements, out, sums = elements_of(table), column(table, OUT_AT, tl.float32), column(table, SUMS_AT, tl.float32)
    scale = tl.rsqrt(tl.load(sums) / length_of(table) + EPS)
    for start in range(0, elements, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(out + i, tl.load(out + i, mask=i < elements, other=0.0) * scale, mask=i < elements)


# `table`: (vectors, 13) int64, a OneDimRow each, those of a rank that holds some of their elements. What a pass doesn't
# need may be 0. Accumulators, directions and sums are float32.


def accumulate_1d(table: Tensor, g_dtype: tl.dtype) -> None:
    """Pass A: the momenta and all second moments, in place."""
    accumulate_1d_kernel[(len(table),)](table, g_dtype, BLOCK, **OPTIONS)


def norms_1d(table: Tensor, g_dtype: tl.dtype, p_dtype: tl.dtype) -> None:
    """Pass B: add the sums of squares of the features to the 15 `sums` of each vector."""
    norms_1d_kernel[(len(table),)](table, g_dtype, p_dtype, BLOCK, **OPTIONS)


def direction_1d(table: Tensor, theta: Tensor, g_dtype: tl.dtype, p_dtype: tl.dtype) -> None:
    """Pass C: write the direction to `out`. `sums`: pass B's, of all ranks; `theta` as `fold.flat_theta` lays it out."""
    direction_1d_kernel[(len(table),)](table, theta, g_dtype, p_dtype, BLOCK, **OPTIONS)


def output_squares_1d(table: Tensor) -> None:
    """Add the sum of squares of `out` to the one of `sums`."""
    output_squares_1d_kernel[(len(table),)](table, BLOCK, **OPTIONS)


def rescale_1d(table: Tensor) -> None:
    """Step 8: divide `out` by its root mean square, by `sums` of all ranks."""
    rescale_1d_kernel[(len(table),)](table, BLOCK, **OPTIONS)
