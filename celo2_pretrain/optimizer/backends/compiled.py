"""The passes by C++ kernels (kernels/cpu.cpp), for CPU tensors. What they don't cover goes to plain torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import cpu
from ...weights.mlp import MLP
from ..matrices.views import Piece
from ..sharding.plan import Part
from ..sharding.shape import BlockShape
from .boxes import MatrixBox, boxes_of
from .passes import FirstLayer, Scale, Tensors
from .plain import TorchBackend


@dataclass
class Factor:
    """Row and column factor, for plain torch and for the kernels."""

    plain: tuple[Tensor, Tensor] | None
    outer: Tensor | None = None  # (matrices, outer, 3)
    inner: Tensor | None = None  # (matrices, 3, inner)


@dataclass
class Layer:
    """The folded first layer, for plain torch and for the kernels."""

    plain: FirstLayer
    weight: Tensor | None = None  # (matrices, 18, 8)
    outer: Tensor | None = None  # (matrices, outer, 8), b0 inside
    inner: Tensor | None = None  # (matrices, 8, inner)
    second: tuple[Tensor, Tensor, Tensor, float] | None = None


Calls = list[tuple[Future, Callable[[], None] | None]]  # under way, and what adds up what they made


class Compiled(TorchBackend):
    """The C++ kernels, on as many threads as torch uses. Raises cpu.Unavailable where they can't be built."""

    name = "compile"

    def __init__(self) -> None:
        self.kernels = cpu.library()
        self.pool = ThreadPoolExecutor(max(1, torch.get_num_threads()), "celo2")

    def factor(self, shape: BlockShape, v_row: Tensor, v_col: Tensor) -> Factor:
        plain = super().factor(shape, v_row, v_col)
        inner = shape.inner_axis
        if inner is None:
            return Factor(plain)
        return Factor(plain, *_by_storage(*plain, shape, inner))

    def first_layer(self, squares: Tensor, v_row: Tensor, v_col: Tensor, shape: BlockShape, mlp: MLP) -> Layer:
        plain = super().first_layer(squares, v_row, v_col, shape, mlp)
        inner = shape.inner_axis
        if inner is None:
            return Layer(plain)
        by_axis = {
            axis - len(shape.full): x.reshape(-1, shape.full[axis], 8) for axis, x in zip(shape.block.factored, plain.bias[1:])
        }  # (matrices, size, 8)
        return Layer(
            plain,
            plain.weight.reshape(-1, 18, 8).contiguous(),
            (by_axis[-3 - inner] + plain.bias[0]).contiguous(),
            by_axis[inner].mT.contiguous(),
            (mlp.w1.contiguous(), mlp.b1.contiguous(), mlp.w2[:, 0].contiguous(), mlp.b2[0].item()),
        )

    def accumulate(self, parts: Sequence[Part], tensors: Sequence[Tensors], totals: Sequence[tuple[Tensor, Tensor]]) -> None:
        calls: Calls = []
        for part, t, total in zip(parts, tensors, totals):
            inner = part.shape.inner_axis
            if inner is None:
                super().accumulate([part], [t], [total])
            else:
                for piece in part.pieces:
                    self._accumulate(calls, t, piece, part.shape, inner, *total)
        _wait(calls)

    def scales(self, parts: Sequence[Part], vectors: Sequence[tuple[Tensor, Tensor]]) -> list[Scale]:
        found = super().scales(parts, vectors)
        for part, scale in zip(parts, found):
            inner = part.shape.inner_axis
            if inner is not None:
                scale.outer, scale.inner = _by_storage(scale.row, scale.col, part.shape, inner)
        return found

    def repack(self, parts: Sequence[Part], tensors: Sequence[Tensors], old: Sequence[Scale], new: Sequence[Scale]) -> None:
        calls: Calls = []
        for part, t, before, after in zip(parts, tensors, old, new):
            inner = part.shape.inner_axis
            if inner is None:
                super().repack([part], [t], [before], [after])
            else:
                for piece in part.pieces:
                    self._repack(calls, t, piece, part.shape, inner, before, after)
        _wait(calls)

    def norms(
        self, parts: Sequence[Part], tensors: Sequence[Tensors], factors: Sequence[Factor], squares: Sequence[Tensor]
    ) -> None:
        calls: Calls = []
        for part, t, factor, total in zip(parts, tensors, factors, squares):
            inner = part.shape.inner_axis
            if inner is None:
                super().norms([part], [t], [factor.plain], [total])
            else:
                for piece in part.pieces:
                    self._norms(calls, t, piece, part.shape, inner, factor, total)
        _wait(calls)

    def direction(
        self,
        parts: Sequence[Part],
        tensors: Sequence[Tensors],
        factors: Sequence[Factor],
        layers: Sequence[Layer],
        mlp: MLP,
        out: Sequence[Tensor],
    ) -> None:
        calls: Calls = []
        for part, t, factor, layer, direction in zip(parts, tensors, factors, layers, out):
            inner = part.shape.inner_axis
            if inner is None:
                super().direction([part], [t], [factor.plain], [layer.plain], mlp, [direction])
            else:
                for piece in part.pieces:
                    self._direction(calls, t, piece, part.shape, inner, factor, layer, direction)
        _wait(calls)

    def _accumulate(
        self, calls: Calls, t: Tensors, piece: Piece, shape: BlockShape, inner: int, row_sum: Tensor, col_sum: Tensor
    ) -> None:
        # v_row's sum is over d0: along d1 it is the storage's row or column sum.
        d1_is_inner = shape.block.factored[0] == len(shape.full) + inner
        outer_total, inner_total = (col_sum, row_sum) if d1_is_inner else (row_sum, col_sum)
        keys = (ctypes.c_uint32 * 4)(*t.keys[:4])
        outer_total = outer_total.view(-1, shape.full[-3 - inner])
        inner_total = inner_total.view(-1, shape.full[inner])
        for box in boxes_of(piece, shape, inner):
            rows, cols = torch.zeros(box.rows), torch.zeros(box.cols)

            def call(box: MatrixBox = box, rows: Tensor = rows, cols: Tensor = cols) -> None:
                (g,) = _float32(box, t.g)
                self._kernel("accumulate", t)(
                    g.data_ptr(),
                    *_accumulators(t, box),
                    box.rows,
                    box.cols,
                    box.stride,
                    rows.data_ptr(),
                    cols.data_ptr(),
                    t.start + box.offset,
                    keys,
                )

            def add(box: MatrixBox = box, rows: Tensor = rows, cols: Tensor = cols) -> None:
                outer_total[box.matrix, box.row : box.row + box.rows].add_(rows)
                inner_total[box.matrix, box.col : box.col + box.cols].add_(cols)

            calls.append((self.pool.submit(call), add))

    def _repack(self, calls: Calls, t: Tensors, piece: Piece, shape: BlockShape, inner: int, old: Scale, new: Scale) -> None:
        keys = (ctypes.c_uint32 * 5)(*t.keys)
        for box in boxes_of(piece, shape, inner):

            def call(box: MatrixBox = box) -> None:
                (g,) = _float32(box, t.g)
                scales = *_scales(old, box), *_scales(new, box)
                self.kernels.celo2_repack(
                    g.data_ptr(),
                    _at(t.rms, box),
                    box.rows,
                    box.cols,
                    box.stride,
                    *map(_pointer, scales),
                    t.start + box.offset,
                    keys,
                )

            calls.append((self.pool.submit(call), None))

    def _norms(
        self, calls: Calls, t: Tensors, piece: Piece, shape: BlockShape, inner: int, factor: Factor, squares: Tensor
    ) -> None:
        flat = squares.view(18, -1)
        for box in boxes_of(piece, shape, inner):
            total = torch.zeros(18, dtype=torch.float64)

            def call(box: MatrixBox = box, total: Tensor = total) -> None:
                g, p = _float32(box, t.g, t.p)
                columns, scales = _columns(factor.inner, box), _scales(t.scale, box)
                self._kernel("norms", t)(
                    g.data_ptr(),
                    p.data_ptr(),
                    *_accumulators(t, box),
                    box.rows,
                    box.cols,
                    box.stride,
                    *map(_pointer, scales),
                    factor.outer[box.matrix, box.row].data_ptr(),
                    columns.data_ptr(),
                    total.data_ptr(),
                )

            calls.append((self.pool.submit(call), lambda box=box, total=total: flat[:, box.matrix].add_(total)))

    def _direction(
        self, calls: Calls, t: Tensors, piece: Piece, shape: BlockShape, inner: int, factor: Factor, layer: Layer, out: Tensor
    ) -> None:
        w1, b1, w2, b2 = layer.second
        for box in boxes_of(piece, shape, inner):

            def call(box: MatrixBox = box) -> None:
                g, p = _float32(box, t.g, t.p)
                columns, bias, scales = _columns(factor.inner, box), _columns(layer.inner, box), _scales(t.scale, box)
                self._kernel("direction", t)(
                    g.data_ptr(),
                    p.data_ptr(),
                    *_accumulators(t, box),
                    _at(out, box),
                    box.rows,
                    box.cols,
                    box.stride,
                    *map(_pointer, scales),
                    factor.outer[box.matrix, box.row].data_ptr(),
                    columns.data_ptr(),
                    layer.weight[box.matrix].data_ptr(),
                    layer.outer[box.matrix, box.row].data_ptr(),
                    bias.data_ptr(),
                    w1.data_ptr(),
                    b1.data_ptr(),
                    w2.data_ptr(),
                    b2,
                )

            calls.append((self.pool.submit(call), None))

    def _kernel(self, name: str, t: Tensors) -> Callable[..., None]:
        kind = "packed" if t.packed else "f32" if t.rms.dtype == torch.float32 else "bf16"
        return getattr(self.kernels, f"celo2_{name}_{kind}")


def _by_storage(row: Tensor, col: Tensor, shape: BlockShape, inner: int) -> tuple[Tensor, Tensor]:
    """(3, *row), (3, *col) as the kernels take them: (matrices, outer, 3) and (matrices, 3, inner)."""
    # What belongs to v_row varies along d1, to v_col along d0.
    by_axis = {
        axis - len(shape.full): x.reshape(3, -1, shape.full[axis]) for axis, x in zip(shape.block.factored, (row, col))
    }  # (3, matrices, size)
    return by_axis[-3 - inner].permute(1, 2, 0).contiguous(), by_axis[inner].movedim(0, 1).contiguous()


def _columns(x: Tensor, box: MatrixBox) -> Tensor:
    """A box's columns of what lies (matrices, any, inner)."""
    return x[box.matrix, :, box.col : box.col + box.cols].contiguous()


def _scales(scale: Scale | None, box: MatrixBox) -> tuple[Tensor | None, Tensor | None]:
    """For the rows (rows, 3) and columns (3, cols) of a box."""
    return (None, None) if scale is None else (scale.outer[box.matrix, box.row :], _columns(scale.inner, box))


def _wait(calls: Calls) -> None:
    """Until all calls of a pass are done; sums are added in order, whichever thread was first."""
    for future, then in calls:
        future.result()
        if then is not None:
            then()


def _at(x: Tensor, box: MatrixBox) -> int:
    return x.data_ptr() + x.element_size() * box.offset


def _accumulators(t: Tensors, box: MatrixBox) -> list[int]:
    """Addresses of m0, m1, m2, v; packed, all four are the words'."""
    return [_at(t.rms, box)] * 4 if t.packed else [_at(x, box) for x in (*t.momentum, t.rms)]


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _float32(box: MatrixBox, *tensors: Tensor) -> list[Tensor]:
    """The range of the flat tensors that a box lies in, in float32: views where they are already."""
    stop = box.offset + (box.rows - 1) * box.stride + box.cols
    return [x[box.offset : stop].to(torch.float32) for x in tensors]
