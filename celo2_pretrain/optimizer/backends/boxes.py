"""Rectangles of a matrix in storage: what one call of a kernel works on."""

from __future__ import annotations

from dataclasses import dataclass

from ..matrices.views import Piece
from ..sharding.shape import BlockShape

JOB = 1 << 20  # elements of one call; fixed, so that sums don't depend on the number of threads


@dataclass
class MatrixBox:
    """One call's part of a matrix: where it begins in the slice, and its rows and columns in storage order."""

    matrix: int
    offset: int
    row: int
    rows: int
    col: int
    cols: int
    stride: int


def boxes_of(piece: Piece, shape: BlockShape, inner: int) -> list[MatrixBox]:
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
            found.append(
                MatrixBox(
                    matrix,
                    offset + (start - row) * piece.stride[outer],
                    start,
                    min(step, row_stop - start),
                    col,
                    cols,
                    piece.stride[outer],
                )
            )
    return found


def _product(ranges: list[range]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for some in ranges:
        found = [(*index, i) for index in found for i in some]
    return found
