"""A layout made ready for the passes: which pieces a rank holds, which slices form a bucket, and who owns which matrix."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from torch import Tensor

from ..matrices.views import MatrixView, Piece, pieces
from .layouts import Layout
from .owners import Unit, choose_owners, units_of
from .shape import BlockShape


@dataclass
class Part:
    """One block of a slice with what the passes need of it."""

    slice_index: int  # among the layout's slices
    shape: BlockShape
    pieces: list[Piece]
    row_at: int  # where its v_row and v_col begin in the storage's
    col_at: int


@dataclass
class Plan:
    """A layout made ready for the passes."""

    layout: Layout
    parts: list[Part]
    buckets: list[list[int]]  # slices whose directions exist at the same time
    units: list[list[Unit]]  # of each bucket; empty without orthogonalisation
    factored: dict[int, tuple[int, int]] = field(
        default_factory=dict
    )  # columns of v_row, v_col by the storage's id; 0 for vectors
    memory: dict[int, Tensor] = field(default_factory=dict)  # on the CPU: for directions, kept from step to step

    def parts_of(self, bucket: list[int]) -> list[int]:
        """Numbers of the parts that a bucket's slices consist of."""
        chosen = set(bucket)
        return [number for number, part in enumerate(self.parts) if part.slice_index in chosen]

    def columns(self, number: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where the v_row and the v_col of a slice's tensor begin and end in its storage's; empty for a vector."""
        parts = [part for part in self.parts if part.slice_index == number and part.shape.matrix]
        if not parts:
            return (0, 0), (0, 0)
        row, col = parts[0].row_at, parts[0].col_at
        return (
            (row, row + sum(prod(part.shape.row) for part in parts)),
            (col, col + sum(prod(part.shape.col) for part in parts)),
        )

    def parts_in(self, storage: Tensor) -> list[Part]:
        return [part for part in self.parts if self.layout.slices[part.slice_index].storage is storage]


def make_plan(layout: Layout, orthogonalize: bool, bucket_size: int) -> Plan:
    """Plan the learned step of a layout; the same buckets and owners on every rank."""
    plan = Plan(layout, [], [[]], [])
    rows: dict[int, int] = {}
    cols: dict[int, int] = {}
    for number, shard in enumerate(layout.slices):
        for block in shard.original.view.blocks(shard.shape):
            shape, storage = BlockShape(block), id(shard.storage)
            plan.parts.append(
                Part(number, shape, pieces(block, shard.start, shard.stop), rows.get(storage, 0), cols.get(storage, 0))
            )
            rows[storage] = rows.get(storage, 0) + prod(shape.row)
            cols[storage] = cols.get(storage, 0) + prod(shape.col)
    plan.factored = {storage: (rows[storage], cols[storage]) for storage in rows}
    size = 0
    for number, shard in enumerate(layout.slices):
        if plan.buckets[-1] and size + prod(shard.shape) > bucket_size:
            plan.buckets.append([])
            size = 0
        plan.buckets[-1].append(number)
        size += prod(shard.shape)
    if orthogonalize and any(part.shape.matrix for part in plan.parts):
        for bucket in plan.buckets:
            plan.units.append(
                [
                    unit
                    for part in map(plan.parts.__getitem__, plan.parts_of(bucket))
                    for unit in units_of(bucket.index(part.slice_index), part.shape, part.slice_index, layout)
                ]
            )
        choose_owners(plan.units, layout.world)
    return plan


def factored_sizes(tensor: tuple[int, ...], view: MatrixView) -> tuple[int, int]:
    """Columns of v_row and of v_col of a whole tensor of this shape under the learned rule; 0 for a vector."""
    shapes = [BlockShape(block) for block in view.blocks(tensor)]
    return sum(prod(shape.row) for shape in shapes), sum(prod(shape.col) for shape in shapes)
