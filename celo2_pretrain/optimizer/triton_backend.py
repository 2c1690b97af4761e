"""The passes by Triton kernels: a few launches a step, whatever the number of tensors.

This is the bookkeeping around celo2_pretrain/kernels: which addresses, boxes and matrices a launch works on. What
doesn't change from step to step (boxes, tiles) is made once for a plan and lives as long as its parts. Vectors have kernels
of their own (kernels/one_dim.py). Blocks that none of them cover (stacks whose factored axes aren't the last two) go to
plain torch.
"""
from __future__ import annotations

import contextlib
import functools
import os
import weakref
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Iterator, Mapping, Sequence

import torch
import triton.language as tl
from torch import Tensor

from ..kernels.accumulate import accumulate
from ..kernels.adamw import adamw
from ..kernels.apply import apply
from ..kernels.direction import direction
from ..kernels.factored import VECTORS, factors, scales, update_factored
from ..kernels.flat import make_chunks
from ..kernels.fold import flat_theta, fold
from ..kernels.norms import norms
from ..kernels.one_dim import accumulate_1d, direction_1d, norms_1d, output_squares_1d, rescale_1d
from ..kernels.packed import WORD
from ..kernels.repack import repack
from ..kernels.rescale import output_squares, rescale
from ..kernels.tiles import Box, Size, Tiles, make_tiles
from .backends import Reference, boxes_of
from .layouts import local
from .passes import Scale, Shape, Tensors
from .reference import MLP

if TYPE_CHECKING:
    from .learned import Part

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
          WORD: tl.int32}  # packed accumulators


@dataclass
class Vectors:
    """A block's factored second moments, and where the kernels put what they make of them."""

    shape: Shape
    v_row: Tensor  # (3, *row)
    v_col: Tensor
    plain: Any = None  # for plain torch
    row_factor: int = 0  # addresses
    col_factor: int = 0
    buffer: Tensor | None = field(default=None, repr=False)  # what they point into

    @property
    def matrices(self) -> int:
        return prod(self.shape.full[:-2])

    @property
    def sizes(self) -> tuple[int, int]:
        """Elements of v_row and of v_col for each matrix."""
        d1, d0 = self.shape.block.factored
        return self.shape.full[d1], self.shape.full[d0]


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


class Triton(Reference):
    """Triton kernels for one kind of device. `size` is that of a tile (tests take small ones)."""

    name = "triton"

    def __init__(self, size: Size = Size()) -> None:
        self.size = size
        self.kept: dict[tuple, Any] = {}

    def factor(self, shape: Shape, v_row: Tensor, v_col: Tensor) -> Vectors:
        return Vectors(shape, v_row, v_col, super().factor(shape, v_row, v_col) if plain(shape) else None)

    def first_layer(self, squares: Tensor, v_row: Tensor, v_col: Tensor, shape: Shape, mlp: MLP) -> Layer:
        return Layer(squares, super().first_layer(squares, v_row, v_col, shape, mlp) if plain(shape) else None)

    def accumulate(self, parts: Sequence[Part], tensors: Sequence[Tensors], totals: Sequence[tuple[Tensor, Tensor]]
                   ) -> None:
        rest = [k for k, part in enumerate(parts) if plain(part.shape)]
        super().accumulate(*(_pick(x, rest) for x in (parts, tensors, totals)))
        for g_dtype, _, table in self._one_dim(parts, tensors):
            accumulate_1d(table, g_dtype)
        for group in self._groups(parts, tensors):
            some, held = _pick(parts, group.numbers), _pick(tensors, group.numbers)
            device = held[0].rms.device
            sums = [_by_storage(part.shape, row.data_ptr(), col.data_ptr())
                    for part, (row, col) in zip(some, _pick(totals, group.numbers))]
            with _on(device):
                accumulate(self._tiles(some, device), _table([_pointers(t) for t in held], device),
                           _table(sums, device), group.g_dtype, group.s_dtype, group.aligned)

    def update_factored(self, parts: Sequence[Part], totals: Sequence[tuple[Tensor, Tensor]],
                        vectors: Sequence[tuple[Tensor, Tensor]]) -> None:
        rest = [k for k, part in enumerate(parts) if not covered(part.shape)]
        super().update_factored(*(_pick(x, rest) for x in (parts, totals, vectors)))
        chosen = [k for k, part in enumerate(parts) if covered(part.shape)]
        if chosen:
            device = vectors[chosen[0]][0].device
            rows = [_vectors(Vectors(parts[k].shape, *vectors[k]), row_total=totals[k][0].data_ptr(),
                             col_total=totals[k][1].data_ptr()) for k in chosen]
            with _on(device):
                update_factored(self._matrices(_pick(parts, chosen), device), _table(rows, device))

    def scales(self, parts: Sequence[Part], vectors: Sequence[tuple[Tensor, Tensor]]) -> list[Scale]:
        """Of parts that the kernels cover in (matrices, 3, size)."""
        chosen = [k for k, part in enumerate(parts) if covered(part.shape)]
        rest = [k for k in range(len(parts)) if k not in set(chosen)]
        made = dict(zip(rest, super().scales(_pick(parts, rest), _pick(vectors, rest))))
        if chosen:
            device = vectors[chosen[0]][0].device
            found = {k: Vectors(parts[k].shape, *vectors[k]) for k in chosen}
            for k, x in found.items():
                made[k] = Scale(*(torch.empty(x.matrices, 3, n, device=device) for n in x.sizes))
            rows = [_vectors(x, row_scale=made[k].row.data_ptr(), col_scale=made[k].col.data_ptr())
                    for k, x in found.items()]
            with _on(device):
                scales(self._matrices(_pick(parts, chosen), device), _table(rows, device))
        return [made[k] for k in range(len(parts))]

    def repack(self, parts: Sequence[Part], tensors: Sequence[Tensors], old: Sequence[Scale], new: Sequence[Scale]
               ) -> None:
        rest = [k for k, part in enumerate(parts) if not covered(part.shape)]
        super().repack(*(_pick(x, rest) for x in (parts, tensors, old, new)))
        for group in self._groups(parts, tensors):
            some, held = _pick(parts, group.numbers), _pick(tensors, group.numbers)
            device = held[0].rms.device
            pointers = [_pointers(t, scale=_scale(part.shape, after), old=_scale(part.shape, before))
                        for part, t, before, after in zip(some, held, *(_pick(x, group.numbers) for x in (old, new)))]
            with _on(device):
                repack(self._tiles(some, device), _table(pointers, device), group.g_dtype, group.aligned)

    def norms(self, parts: Sequence[Part], tensors: Sequence[Tensors], factors: Sequence[Vectors],
              squares: Sequence[Tensor]) -> None:
        rest = [k for k, part in enumerate(parts) if plain(part.shape)]
        super().norms(_pick(parts, rest), _pick(tensors, rest), [factors[k].plain for k in rest], _pick(squares, rest))
        for g_dtype, p_dtype, table in self._one_dim(parts, tensors, sums=squares):
            norms_1d(table, g_dtype, p_dtype)
        self._factors(parts, factors)
        for group in self._groups(parts, tensors):
            some, held = _pick(parts, group.numbers), _pick(tensors, group.numbers)
            device = held[0].rms.device
            pointers = [_pointers(t, factor=_by_storage(part.shape, vectors.row_factor, vectors.col_factor),
                                  scale=_scale(part.shape, t.scale))
                        for part, t, vectors in zip(some, held, _pick(factors, group.numbers))]
            sums = [(x.data_ptr(), x[0].numel()) for x in _pick(squares, group.numbers)]
            with _on(device):
                norms(self._tiles(some, device), _table(pointers, device), _table(sums, device), group.g_dtype,
                      group.p_dtype, group.s_dtype, group.aligned)

    def direction(self, parts: Sequence[Part], tensors: Sequence[Tensors], factors: Sequence[Vectors],
                  layers: Sequence[Layer], mlp: MLP, out: Sequence[Tensor]) -> None:
        rest = [k for k, part in enumerate(parts) if plain(part.shape)]
        super().direction(_pick(parts, rest), _pick(tensors, rest), [factors[k].plain for k in rest],
                          [layers[k].plain for k in rest], mlp, _pick(out, rest))
        theta = flat_theta(*mlp)
        for g_dtype, p_dtype, table in self._one_dim(parts, tensors, out, [layer.squares for layer in layers]):
            direction_1d(table, theta, g_dtype, p_dtype)
        numbers = [k for k, part in enumerate(parts) if covered(part.shape)]
        if not numbers:
            return
        device = tensors[numbers[0]].rms.device
        # The addresses point into the buffer: it must live until the last launch.
        made, _buffer_of_addresses = self._fold(
            _pick(parts, numbers), _pick(factors, numbers), _pick(layers, numbers), theta, device)
        folded = dict(zip(numbers, made))
        for group in self._groups(parts, tensors, out):
            some, held = _pick(parts, group.numbers), _pick(tensors, group.numbers)
            pointers = []
            for k, part, t in zip(group.numbers, some, held):
                weight, row_bias, col_bias = folded[k]
                pointers.append(_pointers(
                    t, out[k].data_ptr(), _by_storage(part.shape, factors[k].row_factor, factors[k].col_factor), weight,
                    _by_storage(part.shape, row_bias, col_bias), _scale(part.shape, t.scale)))
            with _on(device):
                direction(self._tiles(some, device), _table(pointers, device), theta, group.g_dtype, group.p_dtype,
                          group.s_dtype, group.aligned)

    def output_squares(self, parts: Sequence[Part], out: Sequence[Tensor], squares: Sequence[Tensor]) -> None:
        rest = [k for k, part in enumerate(parts) if plain(part.shape)]
        super().output_squares(*(_pick(x, rest) for x in (parts, out, squares)))
        for _, _, table in self._one_dim(parts, None, out, squares):
            output_squares_1d(table)
        self._outputs(output_squares, parts, out, squares)

    def rescale(self, parts: Sequence[Part], out: Sequence[Tensor], squares: Sequence[Tensor]) -> None:
        rest = [k for k, part in enumerate(parts) if plain(part.shape)]
        super().rescale(*(_pick(x, rest) for x in (parts, out, squares)))
        for _, _, table in self._one_dim(parts, None, out, squares):
            rescale_1d(table)
        self._outputs(rescale, parts, out, squares)

    def _one_dim(self, parts: Sequence[Part], tensors: Sequence[Tensors] | None, out: Sequence[Tensor] = (),
                 sums: Sequence[Tensor] = ()) -> Iterator[tuple[tl.dtype, tl.dtype, Tensor]]:
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
                held = [x.data_ptr() for x in (t.g, t.p, *t.momentum, t.rms, *t.v_full)] if t else [0] * 9
                rows.append([*held, out[k].data_ptr() if out else 0, sums[k].data_ptr() if sums else 0,
                             sum(piece.numel for piece in parts[k].pieces), parts[k].shape.per_matrix])
            device = (tensors[numbers[0]].rms if tensors else out[numbers[0]]).device
            with _on(device):
                yield DTYPES[g_dtype], DTYPES[p_dtype], _table(rows, device)

    def _outputs(self, launch: Any, parts: Sequence[Part], out: Sequence[Tensor], squares: Sequence[Tensor]) -> None:
        """Launch a kernel of rescale.py for the parts that it covers."""
        for aligned in (True, False):
            numbers = [k for k, part in enumerate(parts) if covered(part.shape) and part.pieces
                       and (_aligned(part) and out[k].data_ptr() % 16 == 0) == aligned]
            if numbers:
                device = out[numbers[0]].device
                pointers = [[0] * 6 + [out[k].data_ptr()] + [0] * 15 for k in numbers]
                totals = [(squares[k].data_ptr(), squares[k].numel()) for k in numbers]
                with _on(device):
                    launch(self._tiles(_pick(parts, numbers), device), _table(pointers, device), _table(totals, device),
                           aligned)

    def apply(self, slices: Sequence[tuple[Tensor, Tensor]], lr: float, weight_decay: float) -> None:
        found: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
        for p, step in slices:
            aligned = p.numel() % 4 == 0 and p.data_ptr() % 16 == 0 and step.data_ptr() % 16 == 0
            found.setdefault((p.dtype, aligned), []).append((p, step))
        for (dtype, aligned), some in found.items():
            device = some[0][0].device
            rows = [(p.data_ptr(), step.data_ptr(), p.numel()) for p, step in some]
            with _on(device):
                apply(_chunks(tuple(p.numel() for p, _ in some), device), _table(rows, device), float(lr),
                      float(weight_decay), DTYPES[dtype], aligned)

    def adamw(self, group: Mapping[str, Any], params: Sequence[Tensor], grads: Sequence[Tensor],
              states: Sequence[Mapping[str, Any]]) -> bool:
        """One AdamW step of whole tensors in place; False (and nothing done) where some don't lie contiguously."""
        rows = [(p, g, local(s["exp_avg"]), local(s["exp_avg_sq"])) for p, g, s in zip(params, grads, states)]
        if not all(x.is_contiguous() for row in rows for x in row):
            return False
        steps = [s["step"] for s in states]
        torch._foreach_add_(steps, 1)
        found: dict[tuple, list[int]] = {}
        for k, row in enumerate(rows):
            aligned = row[0].numel() % 4 == 0 and all(x.data_ptr() % 16 == 0 for x in row)
            found.setdefault((row[0].dtype, row[1].dtype, aligned), []).append(k)
        for (p_dtype, g_dtype, aligned), some in found.items():
            device = rows[some[0]][0].device
            table = _table([(*(x.data_ptr() for x in rows[k]), rows[k][0].numel()) for k in some], device)
            with _on(device):
                adamw(_chunks(tuple(rows[k][0].numel() for k in some), device), table, torch.stack(_pick(steps, some)),
                      float(group["lr"] * group["adamw_lr_multiplier"]), group["adamw_betas"], group["adamw_eps"],
                      float(group["weight_decay"]), DTYPES[g_dtype], DTYPES[p_dtype], aligned)
        return True

    def _factors(self, parts: Sequence[Part], found: Sequence[Vectors]) -> None:
        """Row and column factors of all blocks that the kernels cover, in one buffer."""
        chosen = [k for k, part in enumerate(parts) if covered(part.shape)]
        if not chosen:
            return
        device = found[chosen[0]].v_row.device
        sizes = [3 * found[k].matrices * n for k in chosen for n in found[k].sizes]
        buffer, addresses = _buffer(sizes, device)
        for place, k in enumerate(chosen):
            found[k].row_factor, found[k].col_factor = addresses[2 * place:2 * place + 2]
            found[k].buffer = buffer
        rows = [_vectors(found[k], row_factor=found[k].row_factor, col_factor=found[k].col_factor) for k in chosen]
        with _on(device):
            factors(self._matrices(_pick(parts, chosen), device), _table(rows, device))

    def _fold(self, parts: Sequence[Part], found: Sequence[Vectors], layers: Sequence[Layer], theta: Tensor,
              device: torch.device) -> tuple[list[tuple[int, int, int]], Tensor]:
        """Addresses of weight, row_bias, col_bias for each part, and the buffer that they point into."""
        sizes = [8 * vectors.matrices * n for vectors in found for n in (18, *vectors.sizes)]
        buffer, flat = _buffer(sizes, device)
        addresses = [tuple(flat[k:k + 3]) for k in range(0, len(flat), 3)]
        rows = [_vectors(vectors, weight=weight, row_bias=row_bias, col_bias=col_bias,
                         squares=layer.squares.data_ptr(), matrices=layer.squares[0].numel())
                for vectors, layer, (weight, row_bias, col_bias) in zip(found, layers, addresses)]
        with _on(device):
            fold(self._matrices(parts, device), _table(rows, device), theta)
        return addresses, buffer

    def _groups(self, parts: Sequence[Part], tensors: Sequence[Tensors], out: Sequence[Tensor] = ()) -> list[Group]:
        """Covered parts of which this rank holds something, by what a launch must know of them."""
        found: dict[tuple, list[int]] = {}
        for k, (part, t) in enumerate(zip(parts, tensors)):
            if covered(part.shape) and part.pieces:
                aligned = _aligned(part) and all(address % 16 == 0 for address in (
                    *_elements(t), *((out[k].data_ptr(),) if out else ())))
                found.setdefault((t.g.dtype, t.p.dtype, t.rms.dtype, aligned), []).append(k)
        return [Group(numbers, DTYPES[g], DTYPES[p], DTYPES[s], aligned)
                for (g, p, s, aligned), numbers in found.items()]

    def _tiles(self, parts: Sequence[Part], device: torch.device) -> Tiles:
        return self._keep("tiles", parts, device, lambda: make_tiles(
            [box for number, part in enumerate(parts) for box in _boxes(number, part)], self.size, device))

    def _matrices(self, parts: Sequence[Part], device: torch.device) -> Tensor:
        """(matrices, 2): the part and the number in the part of every matrix."""
        return self._keep("matrices", parts, device, lambda: _table(
            [(k, matrix) for k, part in enumerate(parts) for matrix in range(prod(part.shape.full[:-2]))], device))

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


def covered(shape: Shape) -> bool:
    """Whether the kernels for matrices do a block."""
    return shape.inner_axis is not None


def plain(shape: Shape) -> bool:
    """Whether plain torch does a block: one of 2 and more dims that the kernels don't cover."""
    return shape.matrix and not covered(shape)


def _pick(values: Sequence[Any], numbers: Sequence[int]) -> list[Any]:
    return [values[k] for k in numbers]


def _by_storage(shape: Shape, along_d1: int, along_d0: int) -> tuple[int, int]:
    """Of what lies along d1 (v_row's) and d0 (v_col's): first what lies along the storage's rows, then its columns."""
    d1_is_inner = shape.block.factored[0] == len(shape.full) + shape.inner_axis
    return (along_d0, along_d1) if d1_is_inner else (along_d1, along_d0)


def _elements(t: Tensors) -> list[int]:
    """Addresses of what there is one of for each element, in the order of the kernels' pointer table."""
    states = [t.rms] * 4 if t.packed else [*t.momentum, t.rms]
    return [x.data_ptr() for x in (t.g, t.p, *states)]


def _pointers(t: Tensors, out: int = 0, factor: tuple[int, int] = (0, 0), weight: int = 0,
              bias: tuple[int, int] = (0, 0), scale: tuple[int, int] = (0, 0), old: tuple[int, int] = (0, 0)
              ) -> list[int]:
    """A row of the kernels' pointer table."""
    keys = [*t.keys, 0, 0, 0, 0, 0][:5]
    return [*_elements(t), out, *factor, weight, *bias, t.start, *keys, *scale, *old]


def _scale(shape: Shape, scale: Scale | None) -> tuple[int, int]:
    """Addresses of the scales of packed accumulators, for rows and columns of the storage."""
    return (0, 0) if scale is None else _by_storage(shape, scale.row.data_ptr(), scale.col.data_ptr())


def _vectors(vectors: Vectors, **values: int) -> list[int]:
    """A row of the kernels' vector table, with `values` by name."""
    row_size, col_size = vectors.sizes
    known = dict(v_row=vectors.v_row.data_ptr(), v_col=vectors.v_col.data_ptr(), row_pitch=vectors.v_row.stride(0),
                 col_pitch=vectors.v_col.stride(0), row_size=row_size, col_size=col_size, **values)
    return [known.get(name, 0) for name in VECTORS]


def _aligned(part: Part) -> bool:
    """Whether four elements at a time can be loaded, as far as the part's boxes decide it."""
    inner = part.shape.inner_axis
    return all(x % 4 == 0 for piece in part.pieces for x in (
        piece.offset, *piece.stride[:inner], *piece.stride[len(piece.stride) + inner + 1:], *piece.box[inner]))


def _boxes(number: int, part: Part) -> list[Box]:
    """A part's boxes, matrix by matrix; what was cut for other backends is put together again."""
    shape, inner = part.shape, part.shape.inner_axis
    height, width = shape.full[-3 - inner], shape.full[inner]
    found = [Box(number, x.matrix, x.offset, x.row, x.rows, x.col, x.cols, x.stride, height, width)
             for piece in part.pieces for x in boxes_of(piece, shape, inner)]
    joined: list[Box] = []
    for box in sorted(found, key=lambda x: (x.matrix, x.col, x.cols, x.row)):
        last = joined[-1] if joined else None
        if last and last[:2] == box[:2] and last[5:] == box[5:] and last.row + last.rows == box.row and (
                last.offset + last.rows * last.stride == box.offset):
            joined[-1] = last._replace(rows=last.rows + box.rows)
        else:
            joined.append(box)
    return joined


def _table(rows: list, device: torch.device) -> Tensor:
    """An int64 table on the device. Kernels only read it: from step to step most addresses are the same, and so is the table."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _copied(tuple(map(tuple, rows)), device, stream)


@functools.lru_cache(maxsize=1024)
def _copied(rows: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
    """Copied without waiting for what the device is doing; on the current stream, which is `stream`."""
    table = torch.tensor(rows, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def _buffer(sizes: list[int], device: torch.device) -> tuple[Tensor, list[int]]:
    """A float32 buffer for parts of these sizes, and the parts' addresses."""
    buffer = torch.empty(sum(sizes), device=device)
    addresses, at = [], buffer.data_ptr()
    for size in sizes:
        addresses.append(at)
        at += 4 * size
    return buffer, addresses


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
