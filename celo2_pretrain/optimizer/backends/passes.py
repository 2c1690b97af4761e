"""The three passes of the sharded step, in plain torch, on whatever part of a block a rank holds.

The whole step: docs/how_it_works.md, "The sharded step".

Each pass reads the rank's own elements and adds to small sums; between passes the sums are reduced over
the ranks. With one rank that holds everything, the same code is the unsharded update.

    A  accumulate   momenta, second moment; row and column sums of g²
    (  repack       momenta, second moment where they are packed: their scales come out of the sums )
    B  norms        sums of squares of the elementwise features, one per matrix
    C  direction    the MLP with the normalisation folded into its first layer

Shapes: a block has shape (*lead, rows, cols) (or (n,) for a 1-D tensor). Row and column quantities keep
the reduced axis with size 1, so everything broadcasts; `(3, *row_shape)` means that with a leading decay axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ...kernels.packed import WORD, draws, pack, powers, unpack
from ...kernels.rounding import stochastic_round
from ...weights.mlp import MLP
from ..matrices.views import Piece
from ..reference import FACTORED_DECAYS, GRAD_CLAMP, MOMENTUM_DECAYS, NORM_EPS, RMS_DECAY
from ..sharding.shape import BlockShape

ROW_FEATURES = (15, 16, 17, 21, 22, 23)  # v_row[3], rsqrt(v_row + 1e-8)[3]
COL_FEATURES = (18, 19, 20, 24, 25, 26)


@dataclass
class Scale:
    """By which a block's packed accumulators are stored: powers of two."""

    row: Tensor  # (3, *row); for Triton's kernels (matrices, 3, size)
    col: Tensor  # (3, *col)
    outer: Tensor | None = None  # for kernels: (matrices, outer, 3)
    inner: Tensor | None = None  # (matrices, 3, inner)

    def of(self, piece: Piece) -> list[Tensor]:
        """For each decay, what broadcasts to the piece."""
        return [row * col for row, col in zip(piece.within(self.row), piece.within(self.col))]


@dataclass
class Tensors:
    """A rank's flat slice of one tensor: parameter, gradient (any float dtype) and accumulators, each 1-D.

    momentum and rms are float32, or bfloat16 and then written with stochastic rounding by `start` and `keys`. Or they
    are packed (kernels/packed.py): rms holds the words of all four, and momentum is empty.
    """

    p: Tensor
    g: Tensor
    momentum: list[Tensor]
    rms: Tensor
    v_full: list[Tensor]  # of a 1-D tensor; else empty
    start: int = 0  # of the slice, in the whole tensor
    keys: tuple[int, ...] = ()  # for rounding momentum[0], [1], [2] and rms in this step; packed: and the step's step_offset
    scale: Scale | None = None  # of the block that is being worked on, where they are packed

    @property
    def packed(self) -> bool:
        return self.rms.dtype == WORD


def clamp_gradient(g: Tensor) -> Tensor:
    return g.float().clamp(-GRAD_CLAMP, GRAD_CLAMP)


@cache
def one_minus_decay(decay: float) -> float:
    """1 − β as the authors' float32 arithmetic has it: for 0.999 a relative 1.3e-5 less than 0.001."""
    return float(1 - torch.tensor(decay, dtype=torch.float32))


def accumulate(t: Tensors, piece: Piece, shape: BlockShape, row_sum: Tensor, col_sum: Tensor) -> None:
    """Pass A on one piece, in place. `row_sum`, `col_sum` (of shape row, col) gain this piece's sums of g² + 1e-30."""
    g = clamp_gradient(piece.of(t.g))
    if t.rms.dtype == torch.float32:
        for decay, momentum in zip(MOMENTUM_DECAYS, t.momentum):
            piece.of(momentum).mul_(decay).add_(g, alpha=one_minus_decay(decay))
        piece.of(t.rms).mul_(RMS_DECAY).addcmul_(g, g, value=1 - RMS_DECAY)
    elif not t.packed:
        index = piece.of(torch.arange(t.start, t.start + t.rms.numel(), device=g.device))
        for decay, momentum, key in zip(MOMENTUM_DECAYS, t.momentum, t.keys):
            m = piece.of(momentum)
            m.copy_(stochastic_round(m.float() * decay + g * one_minus_decay(decay), index, key))
        v = piece.of(t.rms)
        v.copy_(stochastic_round(v.float() * RMS_DECAY + g * g * (1 - RMS_DECAY), index, t.keys[3]))
    s = g * g + 1e-30
    if shape.matrix:
        d1, d0 = shape.block.factored
        piece.within(row_sum).add_(s.sum(d0, keepdim=True))
        piece.within(col_sum).add_(s.sum(d1, keepdim=True))
    else:
        for decay, v_full in zip(FACTORED_DECAYS, t.v_full):
            piece.of(v_full).mul_(decay).add_(s, alpha=one_minus_decay(decay))


def scales(v_row: Tensor, v_col: Tensor, shape: BlockShape) -> Scale:
    """The scales of packed accumulators from a block's factored second moments (3, *row), (3, *col)."""
    mean = v_row.mean(shape.block.factored[0] + 1, keepdim=True)
    return Scale(powers(v_row / mean.clamp_min(1.2e-38)), powers(v_col))


def repack(t: Tensors, piece: Piece, old: Scale, new: Scale) -> None:
    """Update packed accumulators of one piece: read by the last step's scales, written by this one's."""
    g, words = clamp_gradient(piece.of(t.g)), piece.of(t.rms)
    *momentum, v = unpack(words, old.of(piece))
    values = [m * decay + g * one_minus_decay(decay) for m, decay in zip(momentum, MOMENTUM_DECAYS)]
    values.append(v * RMS_DECAY + g * g * (1 - RMS_DECAY))
    index = piece.of(torch.arange(t.start, t.start + t.rms.numel(), device=g.device))
    *keys, step_offset = t.keys
    words.copy_(pack(values, new.of(piece), [draws(index, key, step_offset) for key in keys]))


def update_factored(v: Tensor, total: Tensor, count: int) -> None:
    """`v_k ← β_k v_k + (1 − β_k) total / count` in place, for v of shape (3, …)."""
    mean = total / count
    for k, decay in enumerate(FACTORED_DECAYS):
        v[k].mul_(decay).add_(mean, alpha=one_minus_decay(decay))


def factors(v_row: Tensor, v_col: Tensor, shape: BlockShape) -> tuple[Tensor, Tensor]:
    """row_factor (3, *row), col_factor (3, *col) of step 3."""
    mean = v_row.mean(shape.block.factored[0] + 1, keepdim=True)
    return (v_row / (mean + 1e-9)).clamp_min(1e-9).rsqrt(), v_col.clamp_min(1e-9).rsqrt()


def elementwise_features(
    t: Tensors, piece: Piece, shape: BlockShape, factor: tuple[Tensor, Tensor] | None
) -> Iterator[Tensor]:
    """The 18 (1-D: 15) features that differ from element to element, in ascending order of their index."""
    g, p = clamp_gradient(piece.of(t.g)), piece.of(t.p).float()
    *momentum, v = (
        unpack(piece.of(t.rms), t.scale.of(piece)) if t.packed else [piece.of(x).float() for x in (*t.momentum, t.rms)]
    )
    inverse = (v + 1e-8).rsqrt()
    yield g
    yield g.clamp(-0.1, 0.1)
    yield p
    yield from momentum
    yield v
    for m in momentum:
        yield m * inverse
    yield inverse
    if factor is None:
        for v_full in t.v_full:
            yield g * (piece.of(v_full) + 1e-9).clamp_min(1e-9).rsqrt()
        yield g * inverse
        return
    row, col = piece.within(factor[0]), piece.within(factor[1])
    for k in range(3):
        yield g * row[k] * col[k]
    yield g * inverse
    for k, m in enumerate(momentum):
        yield m * row[k] * col[k]


def norms(t: Tensors, piece: Piece, shape: BlockShape, factor: tuple[Tensor, Tensor] | None, squares: Tensor) -> None:
    """Pass B on one piece: `squares` (18 or 15, *lead) gains the sums of squares of the elementwise features."""
    for k, x in enumerate(elementwise_features(t, piece, shape, factor)):
        piece.within(squares[k]).add_(x.square().sum(shape.norm_axes, keepdim=True))


@dataclass
class FirstLayer:
    """The MLP's first layer for one block, with the input normalisation folded in."""

    weight: Tensor  # (*lead, features, 8)
    bias: list[Tensor]  # broadcastable to (*block shape, 8): the row and column features' part, and b0


def first_layer(squares: Tensor, v_row: Tensor, v_col: Tensor, shape: BlockShape, mlp: MLP) -> FirstLayer:
    """Fold step 5 into `w0`. `squares` (18 or 15, *lead) from pass B, `v_row` (3, *row), `v_col` (3, *col) updated."""
    inverse = (squares / shape.per_matrix + NORM_EPS).rsqrt()  # (features, *lead)
    weight = inverse.unsqueeze(-1) * mlp.w0[list(shape.elementwise)].view(
        len(shape.elementwise), *[1] * len(shape.full), -1
    )  # (features, *lead, 8)
    if not shape.matrix:
        return FirstLayer(weight.squeeze(1), [mlp.b0])
    weight = weight.squeeze(-2).squeeze(-2).movedim(0, -2)  # (*lead axes, features, 8)
    bias = [mlp.b0]
    for v, index in ((v_row, ROW_FEATURES), (v_col, COL_FEATURES)):
        x = torch.cat([v, (v + 1e-8).rsqrt()])  # (6, *row or *col)
        x = x * (x.square().mean(shape.norm_axes, keepdim=True) + NORM_EPS).rsqrt()
        bias.append(torch.einsum("f...,fh->...h", x, mlp.w0[list(index)]))  # (*row or *col, 8)
    return FirstLayer(weight, bias)


def direction(
    t: Tensors, piece: Piece, shape: BlockShape, factor: tuple[Tensor, Tensor] | None, layer: FirstLayer, mlp: MLP
) -> Tensor:
    """Pass C on one piece: output 0 of the MLP, of the piece's shape, float32."""
    x = torch.stack(list(elementwise_features(t, piece, shape, factor)), -1)  # (*piece, features)
    if shape.matrix:
        weight = layer.weight
        for axis, (start, stop) in enumerate(piece.box[:-2]):
            weight = weight.narrow(axis, start, stop - start)
        h = (x.flatten(-3, -2) @ weight).unflatten(-2, piece.shape[-2:])
        for bias in layer.bias[1:]:
            h = h + _within_but_last(piece, bias)
    else:
        h = x @ layer.weight
    h = torch.relu(h + layer.bias[0])
    h = torch.relu(h @ mlp.w1 + mlp.b1)
    return h @ mlp.w2[:, 0] + mlp.b2[0]


def _within_but_last(piece: Piece, x: Tensor) -> Tensor:
    return piece.within(x.movedim(-1, 0)).movedim(0, -1)
