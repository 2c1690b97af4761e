"""Which part of which matrix a program works on: tables that let one launch serve all tensors of a plan.

A *part* is a tensor with its flat slices (gradient, accumulators, …), a *box* the rows and columns of one of its
matrices that a slice holds, and a *tile* what one program does of a box. Tiles lie on a grid in the coordinates of the
whole matrix, whatever the box, so that the partial sums of several boxes line up and can be added in a fixed order.
"row" and "col" are axes of the storage, columns lying together; which of them is v_row's is the caller's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}


class Size(NamedTuple):
    """Elements of a tile, powers of two. A program walks down its rows a few at a time."""

    rows: int = 32
    cols: int = 128


class TileBox(NamedTuple):
    """The elements (row + i, col + j) of a matrix, lying at `offset + i · stride + j` of the part's flat slices."""

    part: int
    matrix: int  # which of the part's matrices
    offset: int
    row: int
    rows: int
    col: int
    cols: int
    stride: int
    height: int  # rows and columns of the whole matrix
    width: int


class PointerRow(NamedTuple):
    """What a kernel is told of a part, int64. A kernel reads the fields that it needs; the others may be 0."""

    g: int = 0  # addresses of the part's flat slices
    p: int = 0
    m0: int = 0  # of packed accumulators m0 … v are one address, that of the words
    m1: int = 0
    m2: int = 0
    v: int = 0
    out: int = 0
    row_factor: int = 0  # addresses of what belongs to its matrices
    col_factor: int = 0
    weight: int = 0
    row_bias: int = 0
    col_bias: int = 0
    start: int = 0  # where the slice begins in the whole tensor
    m0_key: int = 0  # by which m0, m1, m2 and v are rounded
    m1_key: int = 0
    m2_key: int = 0
    v_key: int = 0
    step_offset: int = 0  # of packed accumulators: the step's, and addresses of their scales
    row_scale: int = 0
    col_scale: int = 0
    old_row_scale: int = 0
    old_col_scale: int = 0


def place(row: type, name: str) -> tl.constexpr:
    """Where kernels find a field in a row of a table."""
    return tl.constexpr(row._fields.index(name))


BOX, PTR = tl.constexpr(len(TileBox._fields)), tl.constexpr(len(PointerRow._fields))
G_AT = place(PointerRow, "g")
P_AT = place(PointerRow, "p")
M0_AT = place(PointerRow, "m0")
M1_AT = place(PointerRow, "m1")
M2_AT = place(PointerRow, "m2")
V_AT = place(PointerRow, "v")
OUT_AT = place(PointerRow, "out")
ROW_FACTOR_AT = place(PointerRow, "row_factor")
COL_FACTOR_AT = place(PointerRow, "col_factor")
WEIGHT_AT = place(PointerRow, "weight")
ROW_BIAS_AT = place(PointerRow, "row_bias")
COL_BIAS_AT = place(PointerRow, "col_bias")
START_AT = place(PointerRow, "start")
M0_KEY_AT = place(PointerRow, "m0_key")
M1_KEY_AT = place(PointerRow, "m1_key")
M2_KEY_AT = place(PointerRow, "m2_key")
V_KEY_AT = place(PointerRow, "v_key")
STEP_OFFSET_AT = place(PointerRow, "step_offset")
ROW_SCALE_AT = place(PointerRow, "row_scale")
COL_SCALE_AT = place(PointerRow, "col_scale")
OLD_ROW_SCALE_AT = place(PointerRow, "old_row_scale")
OLD_COL_SCALE_AT = place(PointerRow, "old_col_scale")
BOX_PART = place(TileBox, "part")
BOX_MATRIX = place(TileBox, "matrix")
BOX_OFFSET = place(TileBox, "offset")
BOX_ROW = place(TileBox, "row")
BOX_ROWS = place(TileBox, "rows")
BOX_COL = place(TileBox, "col")
BOX_COLS = place(TileBox, "cols")
BOX_STRIDE = place(TileBox, "stride")
BOX_HEIGHT = place(TileBox, "height")
BOX_WIDTH = place(TileBox, "width")


@dataclass
class Sums:
    """What is added to what: each target takes the scratch rows order[start:stop], in this order."""

    order: Tensor  # (tiles,) int32
    targets: Tensor  # (targets, 5) int64: start, stop, part, where it begins in the part's totals, elements

    def __len__(self) -> int:
        return len(self.targets)


@dataclass
class Tiles:
    """The tables of a plan's boxes, on the device that the kernels run on."""

    size: Size
    boxes: Tensor  # (boxes, 10) int64
    tiles: Tensor  # (tiles, 3) int32: box, row block, column block
    rows: Sums  # of row sums, column sums, and sums over a matrix
    cols: Sums
    matrices: Sums

    def __len__(self) -> int:
        return len(self.tiles)


def make_tiles(boxes: list[TileBox], size: Size, device: torch.device) -> Tiles:
    """Cut boxes into tiles, and work out which tiles' partial sums belong together."""
    table = torch.tensor(boxes, dtype=torch.int64).view(-1, len(TileBox._fields))
    part, matrix, _, row, rows, col, cols, _, height, width = table.unbind(1)
    low_row, low_col = row // size.rows, col // size.cols
    wide = (col + cols - 1) // size.cols - low_col + 1
    counts = wide * ((row + rows - 1) // size.rows - low_row + 1)
    box = torch.repeat_interleave(torch.arange(len(table)), counts)
    number = torch.arange(len(box)) - (counts.cumsum(0) - counts)[box]  # of the tile in its box
    row_block, col_block = low_row[box] + number // wide[box], low_col[box] + number % wide[box]
    tiles = torch.stack([box, row_block, col_block], 1)

    # A number for each (part, matrix), then for each block of its rows or columns.
    whose, group = torch.unique(torch.stack([part, matrix], 1), dim=0, return_inverse=True)
    group = group[box]
    of_rows = _sums(group, row_block, size.rows, height[box], whose)
    of_cols = _sums(group, col_block, size.cols, width[box], whose)
    of_all = _sums(group, torch.zeros_like(group), 1, torch.ones_like(group), whose)
    return Tiles(
        size,
        table.to(device),
        tiles.to(torch.int32).to(device),
        *(Sums(x.order.to(device), x.targets.to(device)) for x in (of_rows, of_cols, of_all)),
    )


def _sums(group: Tensor, block: Tensor, size: int, length: Tensor, whose: Tensor) -> Sums:
    """Sums for each (matrix, block of `size` elements along an axis of `length` elements)."""
    if not len(group):
        return Sums(torch.empty(0, dtype=torch.int32), torch.empty(0, 5, dtype=torch.int64))
    key = group * (int(block.max()) + 1) + block
    order = torch.argsort(key, stable=True)
    counts = torch.unique_consecutive(key[order], return_counts=True)[1]
    stop = counts.cumsum(0)
    start = stop - counts
    first = order[start]  # any tile of the target
    part, matrix = whose[group[first]].unbind(1)
    begin = block[first] * size
    targets = torch.stack([start, stop, part, matrix * length[first] + begin, (length[first] - begin).clamp_max(size)], 1)
    return Sums(order.to(torch.int32), targets)


@triton.jit
def find_tile(tiles, boxes, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGNED: tl.constexpr):
    """This program's tile: part, matrix, its rows (first, from, to), its columns (COLS,), the mask, height, width,
    where its corner lies in the part's flat slices, and the stride. Rows and columns count in the whole matrix."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    box = boxes + tl.load(tile).to(tl.int64) * BOX
    first = tl.load(tile + 1).to(tl.int64) * ROWS
    begin = tl.load(tile + 2).to(tl.int64) * COLS
    offset, row, col = tl.load(box + BOX_OFFSET), tl.load(box + BOX_ROW), tl.load(box + BOX_COL)
    cols, stride = tl.load(box + BOX_COLS), tl.load(box + BOX_STRIDE)
    stop = col + cols
    at = offset + (first - row) * stride + begin - col
    if ALIGNED:  # the caller has checked: all these are multiples of 4 elements
        col, stop = tl.multiple_of(col, 4), tl.multiple_of(stop, 4)
        stride, at = tl.multiple_of(stride, 4), tl.multiple_of(at, 4)
    columns = begin + tl.arange(0, COLS)
    return (
        tl.load(box + BOX_PART),
        tl.load(box + BOX_MATRIX),
        first,
        row,
        row + tl.load(box + BOX_ROWS),
        columns,
        (columns >= col) & (columns < stop),
        tl.load(box + BOX_HEIGHT),
        tl.load(box + BOX_WIDTH),
        at,
        stride,
    )


@triton.jit
def pointer(pointers, part, which: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A part's tensor; `which` is a field's place in PointerRow."""
    found = tl.load(pointers + part * PTR + which).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def add_sums_kernel(
    order,
    targets,
    pointers,
    scratch,
    PITCH: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNT: tl.constexpr,
    TARGET: tl.constexpr,
    TARGETS: tl.constexpr,
):
    """One target: its rows of `scratch` (tiles, PITCH), summed up in a fixed order, are added to the part's totals,
    whose address is in column TARGET of the (parts, TARGETS) table `pointers`.

    COUNT = 0: a stretch of a row or column vector. Else COUNT numbers a matrix, laid out (COUNT, matrices); the number
    of matrices stands in the table's last column.
    """
    this = targets + tl.program_id(0).to(tl.int64) * 5
    start, stop, part = tl.load(this), tl.load(this + 1), tl.load(this + 2)
    begin, length = tl.load(this + 3), tl.load(this + 4)
    i = tl.arange(0, PITCH)
    chunk = tl.zeros([CHUNK, PITCH], tl.float32)
    for n in range(start, stop, CHUNK):
        some = n + tl.arange(0, CHUNK)
        tile = tl.load(order + some, mask=some < stop, other=0).to(tl.int64)
        mask = (some < stop)[:, None] & (i < (COUNT or PITCH))[None, :]
        chunk += tl.load(scratch + tile[:, None] * PITCH + i[None, :], mask=mask, other=0.0)
    total = tl.sum(chunk, 0)
    row = pointers + part * TARGETS
    totals = tl.load(row + TARGET).to(tl.pointer_type(tl.float32))
    if COUNT == 0:
        at, mask = totals + begin + i, i < length
    else:
        at, mask = totals + begin + i * tl.load(row + TARGETS - 1), i < COUNT
    tl.store(at, tl.load(at, mask=mask, other=0.0) + total, mask=mask)


def add_sums(sums: Sums, pointers: Tensor, target: int, scratch: Tensor, count: int = 0) -> None:
    """Add the partial sums `scratch` (tiles, pitch) to the totals whose addresses are in column `target` of `pointers`.

    Without `count` a target is a stretch of a row or column vector; with it, `count` numbers a matrix.
    """
    if len(sums):
        add_sums_kernel[(len(sums),)](
            sums.order,
            sums.targets,
            pointers,
            scratch,
            scratch.shape[1],
            64 if count else 8,
            count,
            target,
            pointers.shape[1],
            **OPTIONS,
        )
