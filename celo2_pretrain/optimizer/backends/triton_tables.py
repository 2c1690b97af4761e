"""What Triton launches are told: tables of addresses and sizes, and the boxes of storage that a part consists of.

A row of a table is what a kernel of celo2_pretrain/kernels reads of one part; `triton` makes the launches.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...kernels.factored import VectorRow
from ...kernels.tiles import PointerRow, TileBox
from ..sharding.plan import Part
from ..sharding.shape import BlockShape
from .boxes import boxes_of
from .passes import Scale, Tensors


@dataclass
class Vectors:
    """A block's factored second moments, and where the kernels put what they make of them."""

    shape: BlockShape
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


def by_storage(shape: BlockShape, along_d1: int, along_d0: int) -> tuple[int, int]:
    """Of what lies along d1 (v_row's) and d0 (v_col's): first what lies along the storage's rows, then its columns."""
    d1_is_inner = shape.block.factored[0] == len(shape.full) + shape.inner_axis
    return (along_d0, along_d1) if d1_is_inner else (along_d1, along_d0)


def element_pointers(t: Tensors) -> dict[str, int]:
    """Addresses of what there is one of for each element."""
    states = [t.rms] * 4 if t.packed else [*t.momentum, t.rms]
    return {name: x.data_ptr() for name, x in zip(("g", "p", "m0", "m1", "m2", "v"), (t.g, t.p, *states))}


def pointer_row(
    t: Tensors,
    out: int = 0,
    factor: tuple[int, int] = (0, 0),
    weight: int = 0,
    bias: tuple[int, int] = (0, 0),
    scale: tuple[int, int] = (0, 0),
    old: tuple[int, int] = (0, 0),
) -> PointerRow:
    """A part's row of the kernels' pointer table; pairs are for the rows and columns of the storage."""
    return PointerRow(
        **element_pointers(t),
        out=out,
        row_factor=factor[0],
        col_factor=factor[1],
        weight=weight,
        row_bias=bias[0],
        col_bias=bias[1],
        start=t.start,
        **dict(zip(("m0_key", "m1_key", "m2_key", "v_key", "step_offset"), t.keys)),
        row_scale=scale[0],
        col_scale=scale[1],
        old_row_scale=old[0],
        old_col_scale=old[1],
    )


def scale_pointers(shape: BlockShape, scale: Scale | None) -> tuple[int, int]:
    """Addresses of the scales of packed accumulators, for rows and columns of the storage."""
    return (0, 0) if scale is None else by_storage(shape, scale.row.data_ptr(), scale.col.data_ptr())


def vector_row(vectors: Vectors, **values: int) -> VectorRow:
    """A part's row of the kernels' vector table, with `values` by name."""
    row_size, col_size = vectors.sizes
    return VectorRow(
        v_row=vectors.v_row.data_ptr(),
        v_col=vectors.v_col.data_ptr(),
        row_pitch=vectors.v_row.stride(0),
        col_pitch=vectors.v_col.stride(0),
        row_size=row_size,
        col_size=col_size,
        **values,
    )


def boxes_aligned(part: Part) -> bool:
    """Whether four elements at a time can be loaded, as far as the part's boxes decide it."""
    inner = part.shape.inner_axis
    return all(
        x % 4 == 0
        for piece in part.pieces
        for x in (piece.offset, *piece.stride[:inner], *piece.stride[len(piece.stride) + inner + 1 :], *piece.box[inner])
    )


def storage_boxes(number: int, part: Part) -> list[TileBox]:
    """A part's boxes, matrix by matrix; what was cut for other backends is put together again."""
    shape, inner = part.shape, part.shape.inner_axis
    height, width = shape.full[-3 - inner], shape.full[inner]
    found = [
        TileBox(number, x.matrix, x.offset, x.row, x.rows, x.col, x.cols, x.stride, height, width)
        for piece in part.pieces
        for x in boxes_of(piece, shape, inner)
    ]
    joined: list[TileBox] = []
    for box in sorted(found, key=lambda x: (x.matrix, x.col, x.cols, x.row)):
        last = joined[-1] if joined else None
        if (
            last
            and last[:2] == box[:2]
            and last[5:] == box[5:]
            and last.row + last.rows == box.row
            and (last.offset + last.rows * last.stride == box.offset)
        ):
            joined[-1] = last._replace(rows=last.rows + box.rows)
        else:
            joined.append(box)
    return joined


def make_table(rows: list, device: torch.device) -> Tensor:
    """An int64 table on the device. Kernels only read it; as most addresses stay from step to step, so does the table."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _copied(tuple(map(tuple, rows)), device, stream)


@functools.lru_cache(maxsize=1024)
def _copied(rows: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
    """Copied without waiting for what the device is doing; on the current stream, which is `stream`."""
    table = torch.tensor(rows, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def make_buffer(sizes: list[int], device: torch.device) -> tuple[Tensor, list[int]]:
    """A float32 buffer for parts of these sizes, and the parts' addresses."""
    buffer = torch.empty(sum(sizes), device=device)
    addresses, at = [], buffer.data_ptr()
    for size in sizes:
        addresses.append(at)
        at += 4 * size
    return buffer, addresses


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
