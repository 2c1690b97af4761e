"""Which matrices a tensor consists of, and which part of them a contiguous slice of the tensor is.

The learned rule factors, normalises and orthogonalises *matrices*. A stored tensor may be a matrix
lying transposed (`nn.Linear` is (out, in)), several matrices side by side or interleaved (fused QKV), or a
stack of them. A `MatrixView` says so; `blocks` turns it into `Block`s, each an independent tensor for the rule.

A rank under ZeRO holds a contiguous range of the flattened tensor. `pieces` cuts that range into
rectangular boxes of a block, so that every pass of the update is plain dense arithmetic on boxes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import NamedTuple

from torch import Tensor

from ..reference import factored_axes

IndexRange = tuple[tuple[int, int], ...]  # (start, stop) for each axis


@dataclass(frozen=True)
class MatrixView:
    """How a stored tensor of shape (*batch axes, a, b) is read as matrices in (in, out) orientation.

    Args:
        transpose: the tensor is stored (out, in), as `nn.Linear` does.
        split: sizes of the parts along the *output* axis, each a matrix of its own (fused Q, K, V);
            empty: one matrix.
        head_dim: if not 0, every `head_dim` output columns are a matrix of their own (per-head view).
        batch: number of leading axes that only stack independent matrices (experts, layers).
        repeats: the output axis repeats `split` this many times, and a part consists of its pieces in all repeats.
            GPT-NeoX's QKV is (heads, 3, d) along the output axis: split=(d, d, d), repeats=heads. Columns that
            alternate between two matrices: split=(1, 1), repeats=columns of each.
        flatten: the axes behind a and b belong to the input axis. A convolution's (out, in, kh, kw) with transpose is
            one matrix (in·kh·kw, out); a transposed convolution's (in, out, kh, kw) without transpose is one, too.

    The default reads the tensor as it lies, which is what the reference trajectories do.
    """

    transpose: bool = False
    split: tuple[int, ...] = ()
    head_dim: int = 0
    batch: int = 0
    repeats: int = 1
    flatten: bool = False

    def blocks(self, shape: tuple[int, ...]) -> list[Block]:
        """The independent tensors that one of `shape` consists of. Raises ValueError where the view doesn't fit."""
        if self == MatrixView():
            return [Block(shape, tuple((0, size) for size in shape), tuple((axis,) for axis in range(len(shape))), 0)]
        self._check(shape)
        lead, (a, b), kernel = shape[: self.batch], shape[self.batch : self.batch + 2], prod(shape[self.batch + 2 :])
        blocks = []
        for cut in self._cuts(a if self.transpose else b):
            # Factor axes: the batch axes, then (out, in · kernel), or (in, out, kernel).
            before, after = ((), (b * kernel,)) if self.transpose else ((a,), (kernel,) if kernel > 1 else ())
            first = len(lead) + len(before)  # of the output's factor axes
            last = first + len(cut.sizes)
            expand = (*lead, *before, *cut.sizes, *after)
            window = [(0, size) for size in expand]
            window[first:last] = cut.window
            inputs = (*range(len(lead), first), *range(last, len(expand)))
            stacked, merged = (tuple(first + axis for axis in axes) for axes in (cut.stacked, cut.merged))
            axes = (*((axis,) for axis in (*range(len(lead)), *stacked)), inputs, merged)
            blocks.append(Block(expand, tuple(window), axes, len(lead) + len(stacked)))
        return blocks

    def _check(self, shape: tuple[int, ...]) -> None:
        if min(self.head_dim, self.batch) < 0 or min((self.repeats, *self.split)) < 1:
            raise ValueError(f"{self} has a negative number, or 0 as repeats or in split")
        dims = self.batch + 2
        if len(shape) < dims or (len(shape) > dims and not self.flatten):
            raise ValueError(
                f"{self} describes a tensor of {dims}{' or more' if self.flatten else ''} dims (batch axes + "
                f"matrix), but the tensor has shape {tuple(shape)}"
            )
        total = shape[self.batch + (0 if self.transpose else 1)]
        if self.head_dim and (total % self.head_dim or any(size % self.head_dim for size in self.split)):
            raise ValueError(
                f"head_dim {self.head_dim} does not divide the output axis of shape {tuple(shape)}"
                + (f", or one of its parts {self.split}" if self.split else "")
            )
        if self.repeats > 1 and not self.split:
            raise ValueError(f"repeats {self.repeats} says how often split is repeated, but there is no split; give one")
        if self.split and self.repeats * sum(self.split) != total:
            times = f" × {self.repeats} repeats" if self.repeats > 1 else ""
            raise ValueError(
                f"split sizes {self.split} add up to {sum(self.split)}{times}, but the output axis of shape "
                f"{tuple(shape)} has {total} elements"
            )

    def _cuts(self, total: int) -> list[_Cut]:
        """How the output axis of `total` elements is cut, for each block. Equal parts are one block, stacked."""
        equal = len(set(self.split)) == 1
        width = self.head_dim or (self.split[0] if equal and self.repeats == 1 else 0)
        if width:
            sizes = (total // width, width)
            return [_Cut(sizes, [(0, size) for size in sizes], (0,), (1,))]
        if equal:
            sizes = (self.repeats, len(self.split), self.split[0])
            return [_Cut(sizes, [(0, size) for size in sizes], (1,), (0, 2))]
        cuts, start = [], 0
        for size in self.split or (total,):
            part = (start, start + size)
            if self.repeats > 1:
                cuts.append(_Cut((self.repeats, sum(self.split)), [(0, self.repeats), part], (), (0, 1)))
            else:
                cuts.append(_Cut((total,), [part], (), (0,)))
            start += size
        return cuts


class _Cut(NamedTuple):
    """One block's part of the output axis."""

    sizes: tuple[int, ...]  # of the factor axes that the output axis becomes
    window: list[tuple[int, int]]  # what of each belongs to the block
    stacked: tuple[int, ...]  # factor axes that are batch axes
    merged: tuple[int, ...]  # those that are the output axis of the block


@dataclass(frozen=True)
class Block:
    """One independent tensor inside a stored one.

    The stored tensor is viewed in the shape `expand`, whose axes are called factor axes. The block has the elements of
    `window`, a range of each factor axis. A block axis consists of the factor axes that `axes` names, merged row by
    row; each factor axis is in one of them.
    """

    expand: tuple[int, ...]
    window: IndexRange
    axes: tuple[tuple[int, ...], ...]
    batch: int

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(prod(self.sizes[axis] for axis in axes) for axes in self.axes)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Elements of the window along each factor axis."""
        return tuple(stop - start for start, stop in self.window)

    @cached_property
    def factored(self) -> tuple[int, int]:
        """(d1, d0) of step 3 of the rule (docs/how_it_works.md), in block axes."""
        return factored_axes(self.shape, self.batch)

    @cached_property
    def inner_axis(self) -> int | None:
        """-1 or -2: the matrix axis along which every piece has stride 1; None where there is none."""
        last = len(self.expand) - 1
        for axis in (-1, -2)[: len(self.axes)]:
            # Of merged axes the last one's stride counts, unless its size of 1 makes it that of another.
            if self.axes[axis][-1] == last and (len(self.axes[axis]) == 1 or self.sizes[last] > 1):
                return axis
        return None

    def select(self, x: Tensor) -> Tensor:
        """The block of a whole stored tensor (contiguous): a view, or a copy where merged axes make that impossible."""
        return self._unmerged(x).reshape(self.shape)

    def assign(self, x: Tensor, value: Tensor) -> None:
        """Write `value`, of the block's shape, to the block's place in a whole stored tensor (contiguous)."""
        place = self._unmerged(x)
        place.copy_(value.reshape(place.shape))

    def _unmerged(self, x: Tensor) -> Tensor:
        """A view with the factor axes in the block's order."""
        x = x.view(self.expand)
        for axis, (start, stop) in enumerate(self.window):
            x = x.narrow(axis, start, stop - start)
        return x.permute([axis for axes in self.axes for axis in axes])


@dataclass(frozen=True)
class Piece:
    """A box of a block that a contiguous slice holds: where in the block, and how it lies in the slice."""

    box: IndexRange  # (start, stop) per block axis
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
            slice(0, 1) if x.shape[extra + axis] == 1 else slice(start, stop) for axis, (start, stop) in enumerate(self.box)
        ]
        return x[tuple(index)]


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[IndexRange]:
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
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def pieces(block: Block, start: int, stop: int, most: int = 1 << 20) -> list[Piece]:
    """The boxes of `block` that the flat range [start, stop) of the stored tensor holds.

    A box of more than `most` elements is cut along its outermost stored axis, which bounds the temporaries of the
    plain-torch passes. Merged axes make one box for each index of the outer ones, unless the elements of all lie at
    equal distances.
    """
    strides, found = _contiguous_strides(block.expand), []
    for stored in boxes(block.expand, start, stop):
        stored = tuple((max(a, low), min(b, high)) for (a, b), (low, high) in zip(stored, block.window))
        if any(a >= b for a, b in stored):
            continue
        for box in _cut(stored, most, deep=block.inner_axis is None):
            for runs in product(*(_runs(block, axes, box, strides) for axes in block.axes)):
                found.append(
                    Piece(
                        tuple((run.start, run.stop) for run in runs),
                        sum(run.offset for run in runs) - start,
                        tuple(run.stride for run in runs),
                    )
                )
    return found


def _cut(box: IndexRange, most: int, deep: bool) -> Iterator[IndexRange]:
    """Cut a box along its outermost axis into parts of at most `most` elements, but at least one index.

    With `deep` an index that has more elements is cut along the next axis, and so on.
    """
    outer = next((axis for axis, (a, b) in enumerate(box) if b - a > 1), 0)
    a, b = box[outer]
    inner = prod(y - x for x, y in box) // (b - a)
    rows = max(1, most // max(1, inner))
    for start in range(a, b, rows):
        part = (*box[:outer], (start, min(start + rows, b)), *box[outer + 1 :])
        if deep and inner > most:
            yield from _cut(part, most, deep)
        else:
            yield part


class _Run(NamedTuple):
    """Elements [start, stop) of a block axis, `stride` apart in storage, beginning at `offset`."""

    start: int
    stop: int
    offset: int
    stride: int


def _runs(block: Block, axes: tuple[int, ...], box: IndexRange, strides: tuple[int, ...]) -> list[_Run]:
    """A stored box along one block axis, which consists of the factor axes `axes`."""
    runs, count = [_Run(0, 1, 0, 0)], 1  # of the axes so far, from the innermost; `count` elements in the block
    for axis in reversed(axes):
        (a, b), low, stride = box[axis], block.window[axis][0], strides[axis]
        run = runs[0]
        begin, offset = (a - low) * count + run.start, a * stride + run.offset
        if len(runs) == 1 and count == 1:
            runs = [_Run(begin, b - low, offset, stride)]
        elif len(runs) == 1 and run.stop - run.start == count and stride == count * run.stride:
            runs = [_Run(begin, (b - low) * count, offset, run.stride)]
        else:
            runs = [
                _Run((i - low) * count + run.start, (i - low) * count + run.stop, i * stride + run.offset, run.stride)
                for i in range(a, b)
                for run in runs
            ]
        count *= block.sizes[axis]
    return runs


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
