"""The passes by Triton kernels: a few launches a step, whatever the number of tensors.

This is the bookkeeping around celo2_pretrain/kernels: which addresses, boxes and matrices a launch works on. What
doesn't change from step to step (boxes, tiles) is made once for a plan and lives as long as its parts. Vectors have kernels
of their own (kernels/one_dim.py). Blocks that none of them cover (stacks whose factored axes aren't the last two) go to
plain torch.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...kernels.accumulate import accumulate
from ...kernels.adamw import adamw
from ...kernels.apply import apply
from ...kernels.direction import direction
from ...kernels.factored import factors, scales, update_factored
from ...kernels.flat import make_chunks
from ...kernels.fold import flat_theta, fold
from ...kernels.norms import norms
from ...kernels.one_dim import OneDimRow, accumulate_1d, direction_1d, norms_1d, output_squares_1d, rescale_1d
from ...kernels.packed import WORD
from ...kernels.repack import repack
from ...kernels.rescale import output_squares, rescale
from ...kernels.tiles import PointerRow, Size, Tiles, make_tiles
from ...weights.mlp import MLP
from ..groups import decay_of
from ..sharding.layouts import local
from ..sharding.plan import Part
from ..sharding.shape import BlockShape
from .passes import Scale, Tensors
from .plain import TorchBackend
from .triton_tables import (
    Vectors,
    boxes_aligned,
    by_storage,
    element_pointers,
    make_buffer,
    make_table,
    on_device,
    pointer_row,
    scale_pointers,
    storage_boxes,
    vector_row,
)

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    WORD: tl.int32,
}  # packed accumulators


@dataclass
class Layer:
    """What pass C folds a block's first layer from."""

    squares: Tensor  # (18, *lead)
    plain: Any = None


@dataclass
class Group:
    """Parts that one launch can serve: the same dtypes, and all aligned or not."""

    numbers: list[int]
    g_dtype: tl.dtype
    p_dtype: tl.dtype
    s_dtype: tl.dtype  # of the accumulators
    aligned: bool


class Triton(TorchBackend):
    """Triton kernels for one kind of device. `size` is that of a tile (tests take small ones)."""

    name = "triton"

    def __init__(self, size: Size = Size()) -> None:
        self.size = size
        self.kept: dict[tuple, Any] = {}

    def factor(self, shape: BlockShape, v_row: Tensor, v_col: Tensor) -> Vectors:
        return Vectors(shape, v_row, v_col, super().factor(shape, v_row, v_col) if needs_torch(shape) else None)

    def first_layer(self, squares: Tensor, v_row: Tensor, v_col: Tensor, shape: BlockShape, mlp: MLP) -> Layer:
        return Layer(squares, super().first_layer(squares, v_row, v_col, shape, mlp) if needs_torch(shape) else None)

    def accumulate(self, parts: Sequence[Part], tensors: Sequence[Tensors], totals: Sequence[tuple[Tensor, Tensor]]) -> None:
        in_torch = [k for k, part in enumerate(parts) if needs_torch(part.shape)]
        super().accumulate(*(_pick(x, in_torch) for x in (parts, tensors, totals)))
        for g_dtype, _, table in self._one_dim(parts, tensors):
            accumulate_1d(table, g_dtype)
        for group in self._groups(parts, tensors):
            some, picked = _pick(parts, group.numbers), _pick(tensors, group.numbers)
            device = picked[0].rms.device
            sums = [
                by_storage(part.shape, row.data_ptr(), col.data_ptr())
                for part, (row, col) in zip(some, _pick(totals, group.numbers))
            ]
            with on_device(device):
                accumulate(
                    self._tiles(some, device),
                    make_table([pointer_row(t) for t in picked], device),
                    make_table(sums, device),
                    group.g_dtype,
                    group.s_dtype,
                    group.aligned,
                )

    def update_factored(
        self, parts: Sequence[Part], totals: Sequence[tuple[Tensor, Tensor]], vectors: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        in_torch = [k for k, part in enumerate(parts) if not has_kernel(part.shape)]
        super().update_factored(*(_pick(x, in_torch) for x in (parts, totals, vectors)))
        chosen = [k for k, part in enumerate(parts) if has_kernel(part.shape)]
        if chosen:
            device = vectors[chosen[0]][0].device
            rows = [
                vector_row(
                    Vectors(parts[k].shape, *vectors[k]), row_total=totals[k][0].data_ptr(), col_total=totals[k][1].data_ptr()
                )
                for k in chosen
            ]
            with on_device(device):
                update_factored(self._matrices(_pick(parts, chosen), device), make_table(rows, device))

    def scales(self, parts: Sequence[Part], vectors: Sequence[tuple[Tensor, Tensor]]) -> list[Scale]:
        """Of parts that the kernels cover in (matrices, 3, size)."""
        chosen = [k for k, part in enumerate(parts) if has_kernel(part.shape)]
        in_torch = [k for k in range(len(parts)) if k not in set(chosen)]
        made = dict(zip(in_torch, super().scales(_pick(parts, in_torch), _pick(vectors, in_torch))))
        if chosen:
            device = vectors[chosen[0]][0].device
            found = {k: Vectors(parts[k].shape, *vectors[k]) for k in chosen}
            for k, x in found.items():
                made[k] = Scale(*(torch.empty(x.matrices, 3, n, device=device) for n in x.sizes))
            rows = [
                vector_row(x, row_scale=made[k].row.data_ptr(), col_scale=made[k].col.data_ptr()) for k, x in found.items()
            ]
            with on_device(device):
                scales(self._matrices(_pick(parts, chosen), device), make_table(rows, device))
        return [made[k] for k in range(len(parts))]

    def repack(self, parts: Sequence[Part], tensors: Sequence[Tensors], old: Sequence[Scale], new: Sequence[Scale]) -> None:
        in_torch = [k for k, part in enumerate(parts) if not has_kernel(part.shape)]
        super().repack(*(_pick(x, in_torch) for x in (parts, tensors, old, new)))
        for group in self._groups(parts, tensors):
            some, picked = _pick(parts, group.numbers), _pick(tensors, group.numbers)
            device = picked[0].rms.device
            pointers = [
                pointer_row(t, scale=scale_pointers(part.shape, after), old=scale_pointers(part.shape, before))
                for part, t, before, after in zip(some, picked, *(_pick(x, group.numbers) for x in (old, new)))
            ]
            with on_device(device):
                repack(self._tiles(some, device), make_table(pointers, device), group.g_dtype, group.aligned)

    def norms(
        self, parts: Sequence[Part], tensors: Sequence[Tensors], factors: Sequence[Vectors], squares: Sequence[Tensor]
    ) -> None:
        in_torch = [k for k, part in enumerate(parts) if needs_torch(part.shape)]
        super().norms(
            _pick(parts, in_torch), _pick(tensors, in_torch), [factors[k].plain for k in in_torch], _pick(squares, in_torch)
        )
        for g_dtype, p_dtype, table in self._one_dim(parts, tensors, sums=squares):
            norms_1d(table, g_dtype, p_dtype)
        self._factors(parts, factors)
        for group in self._groups(parts, tensors):
            some, picked = _pick(parts, group.numbers), _pick(tensors, group.numbers)
            device = picked[0].rms.device
            pointers = [
                pointer_row(
                    t,
                    factor=by_storage(part.shape, vectors.row_factor, vectors.col_factor),
                    scale=scale_pointers(part.shape, t.scale),
                )
                for part, t, vectors in zip(some, picked, _pick(factors, group.numbers))
            ]
            sums = [(x.data_ptr(), x[0].numel()) for x in _pick(squares, group.numbers)]
            with on_device(device):
                norms(
                    self._tiles(some, device),
                    make_table(pointers, device),
                    make_table(sums, device),
                    group.g_dtype,
                    group.p_dtype,
                    group.s_dtype,
                    group.aligned,
                )

    def direction(
        self,
        parts: Sequence[Part],
        tensors: Sequence[Tensors],
        factors: Sequence[Vectors],
        layers: Sequence[Layer],
        mlp: MLP,
        out: Sequence[Tensor],
    ) -> None:
        in_torch = [k for k, part in enumerate(parts) if needs_torch(part.shape)]
        super().direction(
            _pick(parts, in_torch),
            _pick(tensors, in_torch),
            [factors[k].plain for k in in_torch],
            [layers[k].plain for k in in_torch],
            mlp,
            _pick(out, in_torch),
        )
        theta = flat_theta(*mlp)
        for g_dtype, p_dtype, table in self._one_dim(parts, tensors, out, [layer.squares for layer in layers]):
            direction_1d(table, theta, g_dtype, p_dtype)
        numbers = [k for k, part in enumerate(parts) if has_kernel(part.shape)]
        if not numbers:
            return
        device = tensors[numbers[0]].rms.device
        # The addresses point into the buffer: it must live until the last launch.
        made, _buffer_of_addresses = self._fold(
            _pick(parts, numbers), _pick(factors, numbers), _pick(layers, numbers), theta, device
        )
        folded = dict(zip(numbers, made))
        for group in self._groups(parts, tensors, out):
            some, picked = _pick(parts, group.numbers), _pick(tensors, group.numbers)
            pointers = []
            for k, part, t in zip(group.numbers, some, picked):
                weight, row_bias, col_bias = folded[k]
                pointers.append(
                    pointer_row(
                        t,
                        out[k].data_ptr(),
                        by_storage(part.shape, factors[k].row_factor, factors[k].col_factor),
                        weight,
                        by_storage(part.shape, row_bias, col_bias),
                        scale_pointers(part.shape, t.scale),
                    )
                )
            with on_device(device):
                direction(
                    self._tiles(some, device),
                    make_table(pointers, device),
                    theta,
                    group.g_dtype,
                    group.p_dtype,
                    group.s_dtype,
                    group.aligned,
                )

    def output_squares(self, parts: Sequence[Part], out: Sequence[Tensor], squares: Sequence[Tensor]) -> None:
        in_torch = [k for k, part in enumerate(parts) if needs_torch(part.shape)]
        super().output_squares(*(_pick(x, in_torch) for x in (parts, out, squares)))
        for _, _, table in self._one_dim(parts, None, out, squares):
            output_squares_1d(table)
        self._outputs(output_squares, parts, out, squares)

    def rescale(self, parts: Sequence[Part], out: Sequence[Tensor], squares: Sequence[Tensor]) -> None:
        in_torch = [k for k, part in enumerate(parts) if needs_torch(part.shape)]
        super().rescale(*(_pick(x, in_torch) for x in (parts, out, squares)))
        for _, _, table in self._one_dim(parts, None, out, squares):
            rescale_1d(table)
        self._outputs(rescale, parts, out, squares)

    def _one_dim(
        self, parts: Sequence[Part], tensors: Sequence[Tensors] | None, out: Sequence[Tensor] = (), sums: Sequence[Tensor] = ()
    ) -> Iterator[tuple[tl.dtype, tl.dtype, Tensor]]:
        """Tables of the vectors of which this rank holds something, by their dtypes: (gradient's, parameter's, table).

        Each is launched on its device while it is yielded.
        """
        found: dict[tuple, list[int]] = {}
        for k, part in enumerate(parts):
            if not part.shape.matrix and part.pieces:
                dtypes = (tensors[k].g.dtype, tensors[k].p.dtype) if tensors else (torch.float32, torch.float32)
                found.setdefault(dtypes, []).append(k)
        for (g_dtype, p_dtype), numbers in found.items():
            rows = []
            for k in numbers:
                t = tensors[k] if tensors else None
                names = ("g", "p", "m0", "m1", "m2", "v", "v0", "v1", "v2")
                flat = (t.g, t.p, *t.momentum, t.rms, *t.v_full) if t else ()
                rows.append(
                    OneDimRow(
                        **{name: x.data_ptr() for name, x in zip(names, flat)},
                        out=out[k].data_ptr() if out else 0,
                        sums=sums[k].data_ptr() if sums else 0,
                        elements=sum(piece.numel for piece in parts[k].pieces),
                        length=parts[k].shape.per_matrix,
                    )
                )
            device = (tensors[numbers[0]].rms if tensors else out[numbers[0]]).device
            with on_device(device):
                yield DTYPES[g_dtype], DTYPES[p_dtype], make_table(rows, device)

    def _outputs(self, launch: Any, parts: Sequence[Part], out: Sequence[Tensor], squares: Sequence[Tensor]) -> None:
        """Launch a kernel of rescale.py for the parts that it covers."""
        for aligned in (True, False):
            numbers = [
                k
                for k, part in enumerate(parts)
                if has_kernel(part.shape) and part.pieces and (boxes_aligned(part) and out[k].data_ptr() % 16 == 0) == aligned
            ]
            if numbers:
                device = out[numbers[0]].device
                pointers = [PointerRow(out=out[k].data_ptr()) for k in numbers]
                totals = [(squares[k].data_ptr(), squares[k].numel()) for k in numbers]
                with on_device(device):
                    launch(
                        self._tiles(_pick(parts, numbers), device),
                        make_table(pointers, device),
                        make_table(totals, device),
                        aligned,
                    )

    def apply(self, slices: Sequence[tuple[Tensor, Tensor]], lr: float, weight_decay: float) -> None:
        found: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
        for p, step in slices:
            aligned = p.numel() % 4 == 0 and p.data_ptr() % 16 == 0 and step.data_ptr() % 16 == 0
            found.setdefault((p.dtype, aligned), []).append((p, step))
        for (dtype, aligned), some in found.items():
            device = some[0][0].device
            rows = [(p.data_ptr(), step.data_ptr(), p.numel()) for p, step in some]
            with on_device(device):
                apply(
                    _chunks(tuple(p.numel() for p, _ in some), device),
                    make_table(rows, device),
                    float(lr),
                    float(weight_decay),
                    DTYPES[dtype],
                    aligned,
                )

    def adamw(
        self, group: Mapping[str, Any], params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Mapping[str, Any]]
    ) -> None:
        """One AdamW step of whole, contiguous tensors in place."""
        rows = [(p, g, local(s["exp_avg"]), local(s["exp_avg_sq"])) for p, g, s in zip(params, grads, states)]
        steps = [s["step"] for s in states]
        torch._foreach_add_(steps, 1)
        found: dict[tuple, list[int]] = {}
        for k, row in enumerate(rows):
            aligned = row[0].numel() % 4 == 0 and all(x.data_ptr() % 16 == 0 for x in row)
            found.setdefault((row[0].dtype, row[1].dtype, aligned), []).append(k)
        for (p_dtype, g_dtype, aligned), some in found.items():
            device = rows[some[0]][0].device
            table = make_table([(*(x.data_ptr() for x in rows[k]), rows[k][0].numel()) for k in some], device)
            with on_device(device):
                adamw(
                    _chunks(tuple(rows[k][0].numel() for k in some), device),
                    table,
                    torch.stack(_pick(steps, some)),
                    float(group["lr"] * group["adamw_lr_multiplier"]),
                    group["adamw_betas"],
                    group["adamw_eps"],
                    decay_of(group, hidden=False),
                    DTYPES[g_dtype],
                    DTYPES[p_dtype],
                    aligned,
                )

    def _factors(self, parts: Sequence[Part], found: Sequence[Vectors]) -> None:
        """Row and column factors of all blocks that the kernels cover, in one buffer."""
        chosen = [k for k, part in enumerate(parts) if has_kernel(part.shape)]
        if not chosen:
            return
        device = found[chosen[0]].v_row.device
        sizes = [3 * found[k].matrices * n for k in chosen for n in found[k].sizes]
        buffer, addresses = make_buffer(sizes, device)
        for place, k in enumerate(chosen):
            found[k].row_factor, found[k].col_factor = addresses[2 * place : 2 * place + 2]
            found[k].buffer = buffer
        rows = [vector_row(found[k], row_factor=found[k].row_factor, col_factor=found[k].col_factor) for k in chosen]
        with on_device(device):
            factors(self._matrices(_pick(parts, chosen), device), make_table(rows, device))

    def _fold(
        self, parts: Sequence[Part], found: Sequence[Vectors], layers: Sequence[Layer], theta: Tensor, device: torch.device
    ) -> tuple[list[tuple[int, int, int]], Tensor]:
        """Addresses of weight, row_bias, col_bias for each part, and the buffer that they point into."""
        sizes = [8 * vectors.matrices * n for vectors in found for n in (18, *vectors.sizes)]
        buffer, flat = make_buffer(sizes, device)
        addresses = [tuple(flat[k : k + 3]) for k in range(0, len(flat), 3)]
        rows = [
            vector_row(
                vectors,
                weight=weight,
                row_bias=row_bias,
                col_bias=col_bias,
                squares=layer.squares.data_ptr(),
                matrices=layer.squares[0].numel(),
            )
            for vectors, layer, (weight, row_bias, col_bias) in zip(found, layers, addresses)
        ]
        with on_device(device):
            fold(self._matrices(parts, device), make_table(rows, device), theta)
        return addresses, buffer

    def _groups(self, parts: Sequence[Part], tensors: Sequence[Tensors], out: Sequence[Tensor] = ()) -> list[Group]:
        """Covered parts of which this rank holds something, by what a launch must know of them."""
        found: dict[tuple, list[int]] = {}
        for k, (part, t) in enumerate(zip(parts, tensors)):
            if has_kernel(part.shape) and part.pieces:
                aligned = boxes_aligned(part) and all(
                    address % 16 == 0 for address in (*element_pointers(t).values(), *((out[k].data_ptr(),) if out else ()))
                )
                found.setdefault((t.g.dtype, t.p.dtype, t.rms.dtype, aligned), []).append(k)
        return [Group(numbers, DTYPES[g], DTYPES[p], DTYPES[s], aligned) for (g, p, s, aligned), numbers in found.items()]

    def _tiles(self, parts: Sequence[Part], device: torch.device) -> Tiles:
        return self._keep(
            "tiles",
            parts,
            device,
            lambda: make_tiles(
                [box for number, part in enumerate(parts) for box in storage_boxes(number, part)], self.size, device
            ),
        )

    def _matrices(self, parts: Sequence[Part], device: torch.device) -> Tensor:
        """(matrices, 2): the part and the number in the part of every matrix."""
        return self._keep(
            "matrices",
            parts,
            device,
            lambda: make_table(
                [(k, matrix) for k, part in enumerate(parts) for matrix in range(prod(part.shape.full[:-2]))], device
            ),
        )

    def _keep(self, what: str, parts: Sequence[Part], device: torch.device, make: Any) -> Any:
        """`make()`, kept for these parts as long as they live."""
        key = (what, device, *map(id, parts))
        if key not in self.kept:
            self.kept[key] = make()
            for part in parts:  # the ids of dead parts may be given to others
                weakref.finalize(part, self.kept.pop, key, None)
        return self.kept[key]


@functools.lru_cache(maxsize=1024)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return make_chunks(list(sizes), device)


def interpreted() -> bool:
    """Whether Triton interprets kernels (TRITON_INTERPRET=1), which is how they run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def has_kernel(shape: BlockShape) -> bool:
    """Whether the kernels for matrices do a block."""
    return shape.inner_axis is not None


def needs_torch(shape: BlockShape) -> bool:
    """Whether plain torch does a block: one of 2 and more dims that the kernels don't cover."""
    return shape.matrix and not has_kernel(shape)


def _pick(values: Sequence[Any], numbers: Sequence[int]) -> list[Any]:
    return [values[k] for k in numbers]
