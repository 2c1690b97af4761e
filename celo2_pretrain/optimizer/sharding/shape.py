"""Axes and sizes of a block, as the passes and the plan need them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from ..matrices.views import Block

# Features that are one number an element, in the order of step 4 of the rule (docs/how_it_works.md).
ELEMENTWISE_ND = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 27, 28, 29)
ELEMENTWISE_1D = tuple(range(15))


@dataclass(frozen=True)
class BlockShape:
    """Axes and sizes that the passes need of a block."""

    block: Block

    @cached_property
    def full(self) -> tuple[int, ...]:
        return self.block.shape

    @property
    def matrix(self) -> bool:
        """Whether the rule of 2 and more dims applies."""
        return len(self.full) >= 2

    @cached_property
    def row(self) -> tuple[int, ...]:
        """BlockShape of v_row: the larger factored axis d0 averaged away (size 1)."""
        return self._without(self.block.factored[1]) if self.matrix else (0,)

    @cached_property
    def col(self) -> tuple[int, ...]:
        return self._without(self.block.factored[0]) if self.matrix else (0,)

    @cached_property
    def lead(self) -> tuple[int, ...]:
        """BlockShape of a per-matrix quantity: the last two axes (the only axis of a vector) have size 1."""
        return (*self.full[:-2], 1, 1) if self.matrix else (1,)

    @property
    def norm_axes(self) -> tuple[int, ...]:
        return (-2, -1) if self.matrix else (-1,)

    @property
    def per_matrix(self) -> int:
        """Elements that one root mean square is taken over."""
        return prod(self.full[-2:])

    @property
    def elementwise(self) -> tuple[int, ...]:
        return ELEMENTWISE_ND if self.matrix else ELEMENTWISE_1D

    @cached_property
    def inner_axis(self) -> int | None:
        """-1 or -2: the matrix axis whose elements lie together in storage; None where the kernels can't be used."""
        block, dims = self.block, len(self.full)
        if dims < 2 or set(block.factored) != {dims - 2, dims - 1} or prod(self.full[:-2]) > 64:
            return None
        return block.inner_axis

    def _without(self, axis: int) -> tuple[int, ...]:
        return (*self.full[:axis], 1, *self.full[axis + 1 :])
