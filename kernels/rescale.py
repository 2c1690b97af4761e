"""Step 8 for all tensors of a bucket: divide every matrix's direction by its root mean square over all ranks.

Plain twin: `output_squares` and `rescale` of `TorchBackend` in celo2_pretrain/optimizer/backends/plain.py. Per element 1 load
for the sums, 1 load and 1 store for the division: 4 and 8 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import OPTIONS, OUT_AT, Tiles, add_sums, find_tile, pointer

STEP = 8  # rows at a time
EPS = tl.constexpr(1e-9)


@triton.jit
def output_squares_kernel(
    tiles, boxes, pointers, squares, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr
):
    part, _, first, low, high, _, col_mask, _, _, at, stride = find_tile(tiles, boxes, ROWS, COLS, ALIGNED)
    out = pointer(pointers, part, OUT_AT, tl.float32, ALIGNED) + at
    total = tl.zeros([STEP, COLS], tl.float32)
    stop = tl.minimum(high - first, ROWS).to(tl.int32)
    for down in range(0, stop, STEP):
        i = down + tl.arange(0, STEP)
        mask = ((first + i >= low) & (first + i < high))[:, None] & col_mask[None, :]
        x = tl.load(out + i[:, None] * stride + tl.arange(0, COLS)[None, :], mask=mask, other=0.0)
        total += x * x
    tl.store(squares + tl.program_id(0), tl.sum(total))


@triton.jit
def rescale_kernel(
    tiles, boxes, pointers, totals, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr
):
    part, matrix, first, low, high, _, col_mask, height, width, at, stride = find_tile(tiles, boxes, ROWS, COLS, ALIGNED)
    out = pointer(pointers, part, OUT_AT, tl.float32, ALIGNED) + at
    square = tl.load(tl.load(totals + part * 2).to(tl.pointer_type(tl.float32)) + matrix)
    scale = tl.rsqrt(square / (height.to(tl.float32) * width.to(tl.float32)) + EPS)
    stop = tl.minimum(high - first, ROWS).to(tl.int32)
    for down in range(0, stop, STEP):
        i = down + tl.arange(0, STEP)
        mask = ((first + i >= low) & (first + i < high))[:, None] & col_mask[None, :]
        place = out + i[:, None] * stride + tl.arange(0, COLS)[None, :]
        tl.store(place, tl.load(place, mask=mask, other=0.0) * scale, mask=mask)


def output_squares(tiles: Tiles, pointers: Tensor, totals: Tensor, aligned: bool) -> None:
    """Add the sum of squares of every matrix's direction to its total.

    Args: as of `direction`; of `pointers` only out is read.
        totals: (parts, 2) int64, address of the (matrices,) sums, and the number of matrices.
    """
    if len(tiles):
        squares = torch.empty(len(tiles), 1, device=pointers.device)
        output_squares_kernel[(len(tiles),)](
            tiles.tiles, tiles.boxes, pointers, squares, aligned, *tiles.size, min(STEP, tiles.size.rows), **OPTIONS
        )
        add_sums(tiles.matrices, totals, 0, squares, 1)


def rescale(tiles: Tiles, pointers: Tensor, totals: Tensor, aligned: bool) -> None:
    """Multiply every matrix's direction by `rsqrt(total / elements + 1e-9)`, in place; arguments as above."""
    if len(tiles):
        rescale_kernel[(len(tiles),)](
            tiles.tiles, tiles.boxes, pointers, totals, aligned, *tiles.size, min(STEP, tiles.size.rows), **OPTIONS
        )
