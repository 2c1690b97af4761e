"""Which matrices a tensor consists of, and which part of them a contiguous slice of the tensor is.

The learned rule factors, normalises and orthogonalises *matrices*. A stored tensor may be a matrix
lying transposed (`nn.Linear` is (out, in)), several matrices side by side (fused QKV), or a stack of
them. A `MatrixView` says so; `blocks` turns it into `Block`s, each an independent tensor for the rule.

A rank under ZeRO holds a contiguous range of the flattened tensor. `pieces` cuts that range into
rectangular boxes of a block, so that every pass of the update is plain dense arithmetic on boxes.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Iterator

from torch import Tensor

from .reference import factored_axes

Box = tuple[tuple[int, int], ...]  # (start, stop) for each axis


@dataclass(frozen=True)
class MatrixView:
    """How a stored tensor of shape (*batch axes, a, b) is read as matrices in (in, out) orientation.

    Args:
        transpose: the tensor is stored (out, in), as `nn.Linear` does.
        split: sizes of the parts along the *output* axis, each a matrix of its own (fused Q, K, V);
            empty: one matrix.
        head_dim: if not 0, every `head_dim` output columns are a matrix of their own (per-head view).
        batch: number of leading axes that only stack independent matrices (experts, layers).

    The default reads the tensor as it lies, which is what the reference trajectories do.
    """

    transpose: bool = False
    split: tuple[int, ...] = ()
    head_dim: int = 0
    batch: int = 0

    def blocks(self, shape: tuple[int, ...]) -> list[Block]:
        """The independent tensors that one of `shape` consists of. Raises ValueError where the view doesn't fit."""
        if self == MatrixView():
            return [Block(shape, 0, 0, shape[0], tuple(range(len(shape))), 0)]
        if len(shape) != self.batch + 2:
            raise ValueError(f"{self} describes a tensor of {self.batch + 2} dims (batch axes + matrix), "
                             f"but the tensor has shape {tuple(shape)}")
        lead, out = tuple(range(self.batch)), self.batch + (0 if self.transpose else 1)
        total = shape[out]
        if self.head_dim and total % self.head_dim:
            raise ValueError(f"head_dim {self.head_dim} does not divide the output axis of shape {tuple(shape)}")
        if self.split and sum(self.split) != total:
            raise ValueError(f"split sizes {self.split} add up to {sum(self.split)}, but the output axis of shape "
                             f"{tuple(shape)} has {total} elements")
        width = self.head_dim or (self.split[0] if len(set(self.split)) == 1 else 0)
        if width:  # equal parts: the output axis becomes (part, within part), and the part a batch axis
            expand = (*shape[:out], total // width, width, *shape[out + 1:])
            matrix = (out + 2, out + 1) if self.transpose else (out - 1, out + 1)
            return [Block(expand, out, 0, total // width, (*lead, out, *matrix), self.batch + 1)]
        matrix = (self.batch + 1, self.batch) if self.transpose else (self.batch, self.batch + 1)
        blocks, start = [], 0
        for size in self.split or (total,):
            blocks.append(Block(shape, out, start, size, (*lead, *matrix), self.batch))
            start += size
        return blocks


@dataclass(frozen=True)
class Block:
    """One independent tensor inside a stored one: `expand` the storage, narrow `axis`, permute to `order`."""

    expand: tuple[int, ...]
    axis: int
    start: int
    length: int
    order: tuple[int, ...]
    batch: int

    @cached_property
    def shape(self) -> tuple[int, ...]:
        sizes = [self.length if axis == self.axis else size for axis, size in enumerate(self.expand)]
        return tuple(sizes[axis] for axis in self.order)

    @cached_property
    def factored(self) -> tuple[int, int]:
        """(d1, d0) of DESIGN §1 step 3, in block axes."""
        return factored_axes(self.shape, self.batch)

    def select(self, x: Tensor) -> Tensor:
        """The block as a view of a whole stored tensor (contiguous)."""
        return x.view(self.expand).narrow(self.axis, self.start, self.length).permute(self.order)


@dataclass(frozen=True)
class Piece:
    """A box of a block that a contiguous slice holds: where in the block, and how it lies in the slice."""

    box: Box  # (start, stop) per block axis
    offset: int  # of the first element, from the beginning of the slice
    stride: tuple[int, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.box)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def of(self, flat: Tensor) -> Tensor:
        """The box as a strided view of the slice's flat storage (1-D, contiguous)."""
        return flat.as_strided(self.shape, self.stride, flat.storage_offset() + self.offset)

    def within(self, x: Tensor) -> Tensor:
        """The box's part of a tensor in block axes, some of which may have size 1 (broadcast). Extra axes lead."""
        extra = x.ndim - len(self.box)
        index = [slice(None)] * extra + [
            slice(0, 1) if x.shape[extra + axis] == 1 else slice(start, stop)
            for axis, (start, stop) in enumerate(self.box)]
        return x[tuple(index)]


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Cut the flat range [start, stop) of a contiguous tensor into at most 2·ndim − 1 boxes, in order."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield ((start, stop),)
        return
    inner = prod(shape[1:])
    first, last = start // inner, (stop - 1) // inner
    if first == last:
        for box in boxes(shape[1:], start - first * inner, stop - first * inner):
            yield ((first, first + 1), *box)
        return
    if start % inner:
        for box in boxes(shape[1:], start % inner, inner):
            yield ((first, first + 1), *box)
        first += 1
    whole = stop // inner
    if first < whole:
        yield ((first, whole), *((0, size) for size in shape[1:]))
    if stop % inner:
        for box in boxes(shape[1:], 0, stop % inner):
            yield ((whole, whole + 1), *box)


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1:]) for axis in range(len(shape)))


def pieces(block: Block, start: int, stop: int, most: int = 1 << 20) -> list[Piece]:
    """The boxes of `block` that the flat range [start, stop) of the stored tensor holds.

    A box of more than `most` elements is cut along its outermost stored axis, which bounds the
    temporaries of the plain-torch passes.
    """
    strides, found = _contiguous_strides(block.expand), []
    for stored in boxes(block.expand, start, stop):
        low = max(stored[block.axis][0], block.start)
        high = min(stored[block.axis][1], block.start + block.length)
        if low >= high:
            continue
        stored = (*stored[:block.axis], (low, high), *stored[block.axis + 1:])
        outer = next((axis for axis, (a, b) in enumerate(stored) if b - a > 1), 0)
        a, b = stored[outer]
        rows = max(1, most // max(1, prod(y - x for x, y in stored) // (b - a)))
        for cut in range(a, b, rows):
            box = (*stored[:outer], (cut, min(cut + rows, b)), *stored[outer + 1:])
            offset = sum(x * stride for (x, _), stride in zip(box, strides)) - start
            inside = [(x - block.start, y - block.start) if axis == block.axis else (x, y)
                      for axis, (x, y) in enumerate(box)]
            found.append(Piece(tuple(inside[axis] for axis in block.order), offset,
                               tuple(strides[axis] for axis in block.order)))
    return found


def cut_first_axis(piece: Piece, start: int, stop: int) -> Piece | None:
    """The part of a piece whose first block axis lies in [start, stop), or None."""
    (low, high), *rest = piece.box
    a, b = max(low, start), min(high, stop)
    if a >= b:
        return None
    return Piece(((a, b), *rest), piece.offset + (a - low) * piece.stride[0], piece.stride)


def whole(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A scalar counts as a vector of one element."""
    return tuple(shape) or (1,)


