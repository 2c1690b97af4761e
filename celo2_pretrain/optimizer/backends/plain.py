"""The passes in plain torch, on every device and for every shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...weights.mlp import MLP
from ..reference import NORM_EPS
from ..sharding.plan import Part
from ..sharding.shape import BlockShape
from . import passes
from .passes import Scale, Tensors


class TorchBackend:
    """Plain torch. A pass is given all parts of a plan (or of a bucket) at once, each with its slice's tensors."""

    name = "reference"

    def factor(self, shape: BlockShape, v_row: Tensor, v_col: Tensor) -> Any:
        """What passes B and C need of a block's factored second moments."""
        return passes.factors(v_row, v_col, shape) if shape.matrix else None

    def first_layer(self, squares: Tensor, v_row: Tensor, v_col: Tensor, shape: BlockShape, mlp: MLP) -> Any:
        """What pass C needs of the MLP's first layer, from pass B's sums."""
        return passes.first_layer(squares, v_row, v_col, shape, mlp)

    def accumulate(self, parts: Sequence[Part], tensors: Sequence[Tensors], totals: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Pass A: `totals` (row sums, column sums) of each part gain what this rank holds."""
        for part, t, (row_sum, col_sum) in zip(parts, tensors, totals):
            for piece in part.pieces:
                passes.accumulate(t, piece, part.shape, row_sum, col_sum)

    def update_factored(
        self, parts: Sequence[Part], totals: Sequence[tuple[Tensor, Tensor]], vectors: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        """Update `vectors` (v_row, v_col) of each part from all ranks' `totals`."""
        for part, (row, col), (v_row, v_col) in zip(parts, totals, vectors):
            if part.shape.matrix:
                d1, d0 = part.shape.block.factored
                passes.update_factored(v_row, row, part.shape.full[d0])
                passes.update_factored(v_col, col, part.shape.full[d1])

    def scales(self, parts: Sequence[Part], vectors: Sequence[tuple[Tensor, Tensor]]) -> list[Scale]:
        """By which each part's packed accumulators are stored, from its v_row, v_col."""
        return [passes.scales(v_row, v_col, part.shape) for part, (v_row, v_col) in zip(parts, vectors)]

    def repack(self, parts: Sequence[Part], tensors: Sequence[Tensors], old: Sequence[Scale], new: Sequence[Scale]) -> None:
        """Update packed accumulators, which pass A leaves alone: what `old` scaled is scaled by `new` afterwards."""
        for part, t, before, after in zip(parts, tensors, old, new):
            for piece in part.pieces:
                passes.repack(t, piece, before, after)

    def norms(
        self, parts: Sequence[Part], tensors: Sequence[Tensors], factors: Sequence[Any], squares: Sequence[Tensor]
    ) -> None:
        """Pass B: `squares` (features, *lead) of each part gain what this rank holds."""
        for part, t, factor, total in zip(parts, tensors, factors, squares):
            for piece in part.pieces:
                passes.norms(t, piece, part.shape, factor, total)

    def direction(
        self,
        parts: Sequence[Part],
        tensors: Sequence[Tensors],
        factors: Sequence[Any],
        layers: Sequence[Any],
        mlp: MLP,
        out: Sequence[Tensor],
    ) -> None:
        """Pass C: into `out`, for each part the flat direction (float32) of the slice it belongs to."""
        for part, t, factor, layer, direction in zip(parts, tensors, factors, layers, out):
            for piece in part.pieces:
                piece.of(direction).copy_(passes.direction(t, piece, part.shape, factor, layer, mlp))

    def output_squares(self, parts: Sequence[Part], out: Sequence[Tensor], squares: Sequence[Tensor]) -> None:
        """`squares` (*lead) of each part gain the sums of squares of its slice's direction `out`, over what is here."""
        for part, x, square in zip(parts, out, squares):
            for piece in part.pieces:
                piece.within(square).add_(piece.of(x).square().sum(part.shape.norm_axes, keepdim=True))

    def rescale(self, parts: Sequence[Part], out: Sequence[Tensor], squares: Sequence[Tensor]) -> None:
        """Step 8: divide the directions by their root mean square, in place."""
        for part, x, square in zip(parts, out, squares):
            scale = (square / part.shape.per_matrix + NORM_EPS).rsqrt()
            for piece in part.pieces:
                piece.of(x).mul_(piece.within(scale))

    def apply(self, slices: Sequence[tuple[Tensor, Tensor]], lr: float, weight_decay: float) -> None:
        """Step 9 for flat (p, step) of each slice, p in any float dtype; `step` is used up."""
        for p, step in slices:
            p32 = p.float()  # p itself where it is float32
            if weight_decay:
                step.add_(p32, alpha=weight_decay)
            p32.add_(step, alpha=-lr)
            if p32 is not p:
                p.copy_(p32)
