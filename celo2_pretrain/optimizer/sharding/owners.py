"""Who orthogonalises which matrix: each unit, one or more matrices of a block, has one owner among the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ..matrices.views import Piece, cut_first_axis, pieces
from .layouts import Layout
from .shape import BlockShape


@dataclass
class Unit:
    """Matrices [start, stop) along the first axis of a block (all of it for 2-D blocks), and who computes them."""

    slice_in_bucket: int  # which of the bucket's slices
    shape: tuple[int, ...]
    first: int | None  # first index along the block's first axis, for blocks of 3 and more dims
    parts: list[list[Piece]]  # for each rank, what it holds
    owner: int = -1

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def cost(self) -> float:
        """Multiplications of one Newton–Schulz iteration."""
        *lead, rows, cols = self.shape
        short, long = sorted((rows, cols))
        return prod(lead) * (2.0 * long + short) * short * short

    def numel_of(self, rank: int) -> int:
        return sum(part.numel for part in self.parts[rank])


def units_of(slice_in_bucket: int, shape: BlockShape, number: int, layout: Layout) -> list[Unit]:
    """The units of a block of the layout's tensor `number`; stacked matrices are spread over the ranks."""
    block = shape.block
    parts = [pieces(block, *layout.ranges[rank, number].tolist(), most=1 << 62) for rank in range(layout.world)]
    if len(shape.full) == 2:
        return [Unit(slice_in_bucket, shape.full, None, parts)]
    stacked, units = shape.full[0], []
    chunk = -(-stacked // min(stacked, layout.world))
    for start in range(0, stacked, chunk):
        stop = min(start + chunk, stacked)
        cut = [[inside for part in mine if (inside := cut_first_axis(part, start, stop)) is not None] for mine in parts]
        units.append(Unit(slice_in_bucket, (stop - start, *shape.full[1:]), start, cut))
    return units


def choose_owners(buckets: list[list[Unit]], world: int) -> None:
    """Give each unit an owner: the rank that holds it whole, else the one with the least work so far.

    Deterministic, and the same on every rank, since everyone knows all ranges.
    """
    load = [0.0] * world
    for units in buckets:
        for unit in units:
            holders = [rank for rank in range(world) if unit.numel_of(rank)]
            if len(holders) == 1:
                unit.owner = holders[0]
                load[unit.owner] += unit.cost
        for unit in sorted((unit for unit in units if unit.owner < 0), key=lambda unit: -unit.cost):
            unit.owner = min(range(world), key=lambda rank: (load[rank], -unit.numel_of(rank), rank))
            load[unit.owner] += unit.cost
