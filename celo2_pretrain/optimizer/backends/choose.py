"""What computes the passes: plain torch anywhere, or compiled kernels. Chosen by CELO2_BACKEND, and said once.

    reference   plain torch (`passes.py`), every device and shape
    compile     C++ kernels on CPU tensors (kernels/cpu.cpp); what they don't cover goes to plain torch
    triton      Triton kernels on GPU tensors; on CPU tensors only where Triton interprets them (TRITON_INTERPRET=1)
    auto        compile on the CPU where a compiler is found, triton on a GPU where it is installed, else reference
"""
from __future__ import annotations

import ctypes
import functools
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Sequence

import torch
from torch import Tensor

from ...kernels import cpu
from ..matrices.views import Piece
from ..reference import DIMS, MLP, NORM_EPS
from . import passes
from .passes import FirstLayer, Scale, Shape, Tensors

if TYPE_CHECKING:
    from ..step.learned import Part

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "compile", "reference")
KERNEL_DIMS = (30, 8, 8)  # features and hidden units that the kernels are written for
JOB = 1 << 20  # elements of one call; fixed, so that sums don't depend on the number of threads


def backend_for(device: torch.device) -> Reference:
    """The backend for tensors of this device, by CELO2_BACKEND. Raises ValueError for an unknown name."""
    wanted = os.environ.get("CELO2_BACKEND", "auto")
    if wanted not in BACKENDS:
        raise ValueError(f"CELO2_BACKEND={wanted!r} is none of {', '.join(BACKENDS)}")
    return _choose(wanted, device.type)


@functools.cache
def _choose(wanted: str, device: str) -> Reference:
    if wanted == "reference":
        chosen, why = Reference(), "CELO2_BACKEND asks for it"
    elif DIMS[:3] != KERNEL_DIMS:  # a changed rule (docs/meta_training.md)
        if wanted != "auto":
            raise RuntimeError(f"CELO2_BACKEND={wanted}, but the kernels are made for an MLP of {KERNEL_DIMS}, the rule "
                               f"has {DIMS[:3]}: set CELO2_BACKEND=reference, or auto")
        chosen, why = Reference(), f"the kernels are made for an MLP of {KERNEL_DIMS}, the rule has {DIMS[:3]}"
    elif wanted == "triton" or device != "cpu":
        chosen, why = _choose_triton(wanted, device)
    else:
        try:
            chosen, why = Compiled(), "compiled CPU kernels"
        except cpu.Unavailable as error:
            if wanted == "compile":
                raise RuntimeError(f"CELO2_BACKEND=compile, but {error}") from None
            chosen, why = Reference(), f"{error}; the plain-torch passes are some 40 times slower"
            logger.warning("Celo2 backend on %s: reference (%s)", device, why)
            return chosen
    logger.info("Celo2 backend on %s: %s (%s)", device, chosen.name, why)
    return chosen


def _choose_triton(wanted: str, device: str) -> tuple[Reference, str]:
    """The Triton backend, or (unless it was asked for by name) plain torch, and why."""
    if wanted == "compile":
        return Reference(), "CELO2_BACKEND=compile has kernels for CPU tensors only"
    try:
        from .triton import Triton, interpreted
    except ImportError as error:
        if wanted == "triton":
            raise RuntimeError(f"CELO2_BACKEND=triton, but Triton can't be imported ({error}); install triton, or set "
                               "CELO2_BACKEND=auto") from None
        logger.warning("Triton can't be imported (%s): the plain-torch passes on %s are many times slower", error, device)
        return Reference(), "Triton can't be imported"
    if device == "cuda":  # also what torch calls AMD's GPUs
        return Triton(), "Triton kernels"
    if wanted == "triton" and device == "cpu":
        if not interpreted():
            raise RuntimeError("CELO2_BACKEND=triton, but the tensors are on the CPU, where Triton only interprets kernels "
                               "(for tests): set TRITON_INTERPRET=1 for that, or CELO2_BACKEND=auto for fast kernels")
        return Triton(), "Triton kernels, interpreted: very slow"
    if wanted == "triton":
        raise RuntimeError(f"CELO2_BACKEND=triton, but the tensors are on {device}; it serves cuda (NVIDIA and AMD)")
    return Reference(), f"there are no kernels for {device} yet"


class Reference:
    """Plain torch. A pass is given all parts of a plan (or of a bucket) at once, each with its slice's tensors."""

    name = "reference"

    def factor(self, shape: Shape, v_row: Tensor, v_col: Tensor) -> Any:
        """What passes B and C need of a block's factored second moments."""
        return passes.factors(v_row, v_col, shape) if shape.matrix else None

    def first_layer(self, squares: Tensor, v_row: Tensor, v_col: Tensor, shape: Shape, mlp: MLP) -> Any:
        """What pass C needs of the MLP's first layer, from pass B's sums."""
        return passes.first_layer(squares, v_row, v_col, shape, mlp)

    def accumulate(self, parts: Sequence[Part], tensors: Sequence[Tensors], totals: Sequence[tuple[Tensor, Tensor]]
                   ) -> None:
        """Pass A: `totals` (row sums, column sums) of each part gain what this rank holds."""
        for part, t, (row_sum, col_sum) in zip(parts, tensors, totals):
            for piece in part.pieces:
                passes.accumulate(t, piece, part.shape, row_sum, col_sum)

    def update_factored(self, parts: Sequence[Part], totals: Sequence[tuple[Tensor, Tensor]],
                        vectors: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Update `vectors` (v_row, v_col) of each part from all ranks' `totals`."""
        for part, (row, col), (v_row, v_col) in zip(parts, totals, vectors):
            if part.shape.matrix:
                d1, d0 = part.shape.block.factored
                passes.update_factored(v_row, row, part.shape.full[d0])
                passes.update_factored(v_col, col, part.shape.full[d1])

    def scales(self, parts: Sequence[Part], vectors: Sequence[tuple[Tensor, Tensor]]) -> list[Scale]:
        """By which each part's packed accumulators are stored, from its v_row, v_col."""
        return [passes.scales(v_row, v_col, part.shape) for part, (v_row, v_col) in zip(parts, vectors)]

    def repack(self, parts: Sequence[Part], tensors: Sequence[Tensors], old: Sequence[Scale], new: Sequence[Scale]
               ) -> None:
        """Update packed accumulators, which pass A leaves alone: what `old` scaled is scaled by `new` afterwards."""
        for part, t, before, after in zip(parts, tensors, old, new):
            for piece in part.pieces:
                passes.repack(t, piece, before, after)

    def norms(self, parts: Sequence[Part], tensors: Sequence[Tensors], factors: Sequence[Any], squares: Sequence[Tensor]
              ) -> None:
        """Pass B: `squares` (features, *lead) of each part gain what this rank holds."""
        for part, t, factor, total in zip(parts, tensors, factors, squares):
            for piece in part.pieces:
                passes.norms(t, piece, part.shape, factor, total)

    def direction(self, parts: Sequence[Part], tensors: Sequence[Tensors], factors: Sequence[Any], layers: Sequence[Any],
                  mlp: MLP, out: Sequence[Tensor]) -> None:
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


@dataclass
class Box:
    """One call's part of a matrix: where it begins in the slice, and its rows and columns in storage order."""

    matrix: int
    offset: int
    row: int
    rows: int
    col: int
    cols: int
    stride: int


def boxes_of(piece: Piece, shape: Shape, inner: int) -> list[Box]:
    """Cut a piece into calls: matrix by matrix, and by rows."""
    outer = -3 - inner  # the other of -1 and -2
    (row, row_stop), (col, col_stop) = piece.box[outer], piece.box[inner]
    cols, step = col_stop - col, max(1, JOB // (col_stop - col))
    found = []
    for index in _product([range(*axis) for axis in piece.box[:-2]]):
        matrix, offset = 0, piece.offset
        for axis, i in enumerate(index):
            matrix = matrix * shape.full[axis] + i
            offset += (i - piece.box[axis][0]) * piece.stride[axis]
        for start in range(row, row_stop, step):
            found.append(Box(matrix, offset + (start - row) * piece.stride[outer], start, min(step, row_stop - start),
                             col, cols, piece.stride[outer]))
    return found


def _product(ranges: list[range]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for some in ranges:
        found = [(*index, i) for index in found for i in some]
    return found


Calls = list[tuple[Future, Callable[[], None] | None]]  # under way, and what adds up what they made


class Compiled(Reference):
    """The C++ kernels, on as many threads as torch uses. Raises cpu.Unavailable where they can't be built."""

    name = "compile"

    def __init__(self) -> None:
        self.kernels = cpu.library()
        self.pool = ThreadPoolExecutor(max(1, torch.get_num_threads()), "celo2")

    def factor(self, shape: Shape, v_row: Tensor, v_col: Tensor) -> Factor:
        plain = super().factor(shape, v_row, v_col)
        inner = shape.inner_axis
        if inner is None:
            return Factor(plain)
        return Factor(plain, *_by_storage(*plain, shape, inner))

    def first_layer(self, squares: Tensor, v_row: Tensor, v_col: Tensor, shape: Shape, mlp: MLP) -> Layer:
        plain = super().first_layer(squares, v_row, v_col, shape, mlp)
        inner = shape.inner_axis
        if inner is None:
            return Layer(plain)
        by_axis = {axis - len(shape.full): x.reshape(-1, shape.full[axis], 8)
                   for axis, x in zip(shape.block.factored, plain.bias[1:])}  # (matrices, size, 8)
        return Layer(plain, plain.weight.reshape(-1, 18, 8).contiguous(),
                     (by_axis[-3 - inner] + plain.bias[0]).contiguous(), by_axis[inner].mT.contiguous(),
                     (mlp.w1.contiguous(), mlp.b1.contiguous(), mlp.w2[:, 0].contiguous(), mlp.b2[0].item()))

    def accumulate(self, parts: Sequence[Part], tensors: Sequence[Tensors], totals: Sequence[tuple[Tensor, Tensor]]
                   ) -> None:
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

    def repack(self, parts: Sequence[Part], tensors: Sequence[Tensors], old: Sequence[Scale], new: Sequence[Scale]
               ) -> None:
        calls: Calls = []
        for part, t, before, after in zip(parts, tensors, old, new):
            inner = part.shape.inner_axis
            if inner is None:
                super().repack([part], [t], [before], [after])
            else:
                for piece in part.pieces:
                    self._repack(calls, t, piece, part.shape, inner, before, after)
        _wait(calls)

    def norms(self, parts: Sequence[Part], tensors: Sequence[Tensors], factors: Sequence[Factor],
              squares: Sequence[Tensor]) -> None:
        calls: Calls = []
        for part, t, factor, total in zip(parts, tensors, factors, squares):
            inner = part.shape.inner_axis
            if inner is None:
                super().norms([part], [t], [factor.plain], [total])
            else:
                for piece in part.pieces:
                    self._norms(calls, t, piece, part.shape, inner, factor, total)
        _wait(calls)

    def direction(self, parts: Sequence[Part], tensors: Sequence[Tensors], factors: Sequence[Factor],
                  layers: Sequence[Layer], mlp: MLP, out: Sequence[Tensor]) -> None:
        calls: Calls = []
        for part, t, factor, layer, direction in zip(parts, tensors, factors, layers, out):
            inner = part.shape.inner_axis
            if inner is None:
                super().direction([part], [t], [factor.plain], [layer.plain], mlp, [direction])
            else:
                for piece in part.pieces:
                    self._direction(calls, t, piece, part.shape, inner, factor, layer, direction)
        _wait(calls)

    def _accumulate(self, calls: Calls, t: Tensors, piece: Piece, shape: Shape, inner: int, row_sum: Tensor,
                    col_sum: Tensor) -> None:
        # v_row's sum is over d0: along d1 it is the storage's row or column sum.
        d1_is_inner = shape.block.factored[0] == len(shape.full) + inner
        outer_total, inner_total = (col_sum, row_sum) if d1_is_inner else (row_sum, col_sum)
        keys = (ctypes.c_uint32 * 4)(*t.keys[:4])
        outer_total = outer_total.view(-1, shape.full[-3 - inner])
        inner_total = inner_total.view(-1, shape.full[inner])
        for box in boxes_of(piece, shape, inner):
            rows, cols = torch.zeros(box.rows), torch.zeros(box.cols)

            def call(box: Box = box, rows: Tensor = rows, cols: Tensor = cols) -> None:
                g, = _float32(box, t.g)
                self._kernel("accumulate", t)(
                    g.data_ptr(), *_accumulators(t, box), box.rows, box.cols, box.stride,
                    rows.data_ptr(), cols.data_ptr(), t.start + box.offset, keys)

            def add(box: Box = box, rows: Tensor = rows, cols: Tensor = cols) -> None:
                outer_total[box.matrix, box.row:box.row + box.rows].add_(rows)
                inner_total[box.matrix, box.col:box.col + box.cols].add_(cols)

            calls.append((self.pool.submit(call), add))

    def _repack(self, calls: Calls, t: Tensors, piece: Piece, shape: Shape, inner: int, old: Scale, new: Scale) -> None:
        keys = (ctypes.c_uint32 * 5)(*t.keys)
        for box in boxes_of(piece, shape, inner):

            def call(box: Box = box) -> None:
                g, = _float32(box, t.g)
                scales = *_scales(old, box), *_scales(new, box)
                self.kernels.celo2_repack(g.data_ptr(), _at(t.rms, box), box.rows, box.cols, box.stride,
                                          *map(_pointer, scales), t.start + box.offset, keys)

            calls.append((self.pool.submit(call), None))

    def _norms(self, calls: Calls, t: Tensors, piece: Piece, shape: Shape, inner: int, factor: Factor, squares: Tensor
               ) -> None:
        flat = squares.view(18, -1)
        for box in boxes_of(piece, shape, inner):
            total = torch.zeros(18, dtype=torch.float64)

            def call(box: Box = box, total: Tensor = total) -> None:
                g, p = _float32(box, t.g, t.p)
                columns, scales = _columns(factor.inner, box), _scales(t.scale, box)
                self._kernel("norms", t)(
                    g.data_ptr(), p.data_ptr(), *_accumulators(t, box), box.rows, box.cols, box.stride,
                    *map(_pointer, scales), factor.outer[box.matrix, box.row].data_ptr(), columns.data_ptr(),
                    total.data_ptr())

            calls.append((self.pool.submit(call), lambda box=box, total=total: flat[:, box.matrix].add_(total)))

    def _direction(self, calls: Calls, t: Tensors, piece: Piece, shape: Shape, inner: int, factor: Factor, layer: Layer,
                   out: Tensor) -> None:
        w1, b1, w2, b2 = layer.second
        for box in boxes_of(piece, shape, inner):

            def call(box: Box = box) -> None:
                g, p = _float32(box, t.g, t.p)
                columns, bias, scales = _columns(factor.inner, box), _columns(layer.inner, box), _scales(t.scale, box)
                self._kernel("direction", t)(
                    g.data_ptr(), p.data_ptr(), *_accumulators(t, box), _at(out, box), box.rows, box.cols, box.stride,
                    *map(_pointer, scales), factor.outer[box.matrix, box.row].data_ptr(), columns.data_ptr(),
                    layer.weight[box.matrix].data_ptr(), layer.outer[box.matrix, box.row].data_ptr(), bias.data_ptr(),
                    w1.data_ptr(), b1.data_ptr(), w2.data_ptr(), b2)

            calls.append((self.pool.submit(call), None))

    def _kernel(self, name: str, t: Tensors) -> Callable[..., None]:
        kind = "packed" if t.packed else "f32" if t.rms.dtype == torch.float32 else "bf16"
        return getattr(self.kernels, f"celo2_{name}_{kind}")


def _by_storage(row: Tensor, col: Tensor, shape: Shape, inner: int) -> tuple[Tensor, Tensor]:
    """(3, *row), (3, *col) as the kernels take them: (matrices, outer, 3) and (matrices, 3, inner)."""
    # What belongs to v_row varies along d1, to v_col along d0.
    by_axis = {axis - len(shape.full): x.reshape(3, -1, shape.full[axis])
               for axis, x in zip(shape.block.factored, (row, col))}  # (3, matrices, size)
    return by_axis[-3 - inner].permute(1, 2, 0).contiguous(), by_axis[inner].movedim(0, 1).contiguous()


def _columns(x: Tensor, box: Box) -> Tensor:
    """A box's columns of what lies (matrices, any, inner)."""
    return x[box.matrix, :, box.col:box.col + box.cols].contiguous()


def _scales(scale: Scale | None, box: Box) -> tuple[Tensor | None, Tensor | None]:
    """For the rows (rows, 3) and columns (3, cols) of a box."""
    return (None, None) if scale is None else (scale.outer[box.matrix, box.row:], _columns(scale.inner, box))


def _wait(calls: Calls) -> None:
    """Until all calls of a pass are done; sums are added in order, whichever thread was first."""
    for future, then in calls:
        future.result()
        if then is not None:
            then()


def _at(x: Tensor, box: Box) -> int:
    return x.data_ptr() + x.element_size() * box.offset


def _accumulators(t: Tensors, box: Box) -> list[int]:
    """Addresses of m0, m1, m2, v; packed, all four are the words'."""
    return [_at(t.rms, box)] * 4 if t.packed else [_at(x, box) for x in (*t.momentum, t.rms)]


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _float32(box: Box, *tensors: Tensor) -> list[Tensor]:
    """The range of the flat tensors that a box lies in, in float32: views where they are already."""
    stop = box.offset + (box.rows - 1) * box.stride + box.cols
    return [x[box.offset:stop].to(torch.float32) for x in tensors]
