"""Newton–Schulz for matrices whose elements lie on several ranks.

Each *unit* (one or more matrices of one block) has one owner. Directions travel to the owners and come
back normalised, bucket by bucket, by all-to-all; a unit that lies whole on one rank doesn't travel. Only the
direction travels, never p, m or v, and nobody ever holds more than its bucket's share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.newton_schulz import Triple, newton_schulz
from ..matrices.views import Piece
from ..reference import NORM_EPS, normalize
from ..sharding.layouts import Layout, collective_device
from ..sharding.owners import Unit


class Exchange:
    """One bucket's way to the owners and back. Call start, orthogonalize, finish in this order on every rank."""

    def __init__(self, units: list[Unit], layout: Layout, directions: list[Tensor]) -> None:
        """`directions`: for each slice of the bucket, what this rank holds (float32, flat); overwritten in place."""
        self.units, self.layout, self.directions = units, layout, directions
        self.rank, self.world = layout.rank, layout.world
        self.away = [unit for unit in units if unit.numel_of(unit.owner) < unit.numel]  # travels
        self.mine = [unit for unit in units if unit.owner == self.rank]
        self.pending = None
        self.stacks: list[Tensor] = []  # in batches: the matrices that are owned here, by their size

    def counts(self) -> tuple[list[int], list[int]]:
        """Elements that go from here to each owner, and that come here from each rank."""
        to, come = [0] * self.world, [0] * self.world
        for unit in self.away:
            to[unit.owner] += unit.numel_of(self.rank)
            if unit.owner == self.rank:
                for rank in range(self.world):
                    come[rank] += unit.numel_of(rank)
        to[self.rank] = come[self.rank] = 0  # its own part stays where it is
        return to, come

    def _all_to_all(self, sent: Tensor, to: list[int], come: list[int]) -> None:
        device = collective_device(self.layout.process_group, sent.device)
        received = torch.empty(sum(come), dtype=sent.dtype, device=device)
        sent = sent.to(device)
        handle = dist.all_to_all_single(received, sent, come, to, group=self.layout.process_group, async_op=True)
        self.pending = handle, sent, received  # `sent` must outlive the transfer

    def _wait(self, device: torch.device) -> Tensor:
        handle, _, received = self.pending
        handle.wait()
        self.pending = None
        return received.to(device)

    @property
    def _travels(self) -> bool:
        return self.layout.world > 1 and bool(self.away)

    def _device(self) -> torch.device:
        return self.directions[0].device

    @property
    def _batched(self) -> bool:
        return self._device().type != "cpu"  # where nothing is gained by it, and a copy is saved

    def _empty(self) -> Tensor:
        return torch.empty(0, dtype=torch.float32, device=self._device())

    def start(self) -> None:
        """Send the directions to the owners."""
        if not self._travels:
            return
        to, come = self.counts()
        parts = [
            part.of(self.directions[unit.slice_in_bucket]).reshape(-1)
            for owner in range(self.world)
            if owner != self.rank
            for unit in self.away
            if unit.owner == owner
            for part in unit.parts[self.rank]
        ]
        self._all_to_all(torch.cat(parts) if parts else self._empty(), to, come)

    def orthogonalize(self, coefficients: Sequence[Triple], dtype: torch.dtype) -> None:
        """Orthogonalise what is owned here by products in `dtype`, normalise it (step 8), and send it back."""
        received = self._wait(self._device()) if self._travels else self._empty()
        cursor = [0] * self.world
        to, come = self.counts()
        for rank in range(1, self.world):
            cursor[rank] = cursor[rank - 1] + come[rank - 1]
        matrices = self._memory()
        to_fill: list[tuple[Tensor, Tensor]] = []
        for number, unit in enumerate(self.mine):
            for rank in range(self.world):
                for part in unit.parts[rank]:
                    if rank == self.rank:
                        source = part.of(self.directions[unit.slice_in_bucket])
                    else:
                        source = received[cursor[rank] : cursor[rank] + part.numel].view(part.shape)
                        cursor[rank] += part.numel
                    to_fill.append((_inside(matrices[number], unit, part), source))
        _copy(to_fill)
        matrices = self._orthogonalize(matrices, coefficients, dtype)
        to_fill, back = [], defaultdict(list)
        for number, unit in enumerate(self.mine):
            for rank in range(self.world):
                for part in unit.parts[rank]:
                    inside = _inside(matrices[number], unit, part)
                    if rank == self.rank:
                        to_fill.append((part.of(self.directions[unit.slice_in_bucket]), inside))
                    else:
                        back[rank].append(inside.reshape(-1))
        _copy(to_fill)
        if self._travels:
            parts = [part for rank in range(self.world) for part in back[rank]]
            self._all_to_all(torch.cat(parts) if parts else self._empty(), come, to)

    def _memory(self) -> list[Tensor]:
        """For each unit that is owned here a tensor of its shape. In batches, those of one size, short side first."""
        if not self._batched:
            return [torch.empty(unit.shape, dtype=torch.float32, device=self._device()) for unit in self.mine]
        sizes: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, unit in enumerate(self.mine):
            sizes[tuple(sorted(unit.shape[-2:]))].append(number)
        found: dict[int, Tensor] = {}
        for size, numbers in sizes.items():
            counts = [prod(self.mine[number].shape[:-2]) for number in numbers]
            self.stacks.append(torch.empty(sum(counts), *size, dtype=torch.float32, device=self._device()))
            for number, x in zip(numbers, self.stacks[-1].split(counts)):
                *lead, rows, cols = self.mine[number].shape
                found[number] = x.view(*lead, *size) if rows <= cols else x.view(*lead, *size).mT
        return [found[number] for number in range(len(self.mine))]

    def _orthogonalize(self, matrices: list[Tensor], coefficients: Sequence[Triple], dtype: torch.dtype) -> list[Tensor]:
        """Newton–Schulz and step 8 of what `_memory` gave."""
        if self._batched:
            for stack in self.stacks:
                x = newton_schulz(stack, coefficients, dtype)
                norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)  # one pass, where `normalize` makes three
                torch.mul(x, (norm.square() / prod(x.shape[-2:]) + NORM_EPS).rsqrt(), out=stack)
            return matrices
        done = dict(enumerate(matrices))
        _on_cores(
            lambda number: done.update({number: normalize(newton_schulz(done[number], coefficients, dtype), (-2, -1))}),
            sorted(done, key=lambda k: -self.mine[k].cost),
        )
        return [done[number] for number in range(len(matrices))]

    def finish(self) -> None:
        """The directions now hold the orthogonalised, unit-RMS step: this rank's part of each slice of the bucket."""
        if self._travels:
            received, cursor = self._wait(self._device()), 0
            for owner in range(self.world):
                if owner == self.rank:
                    continue
                for unit in self.away:
                    if unit.owner != owner:
                        continue
                    for part in unit.parts[self.rank]:
                        part.of(self.directions[unit.slice_in_bucket]).copy_(
                            received[cursor : cursor + part.numel].view(part.shape)
                        )
                        cursor += part.numel


def _on_cores(work: Callable[[int], None], numbers: list[int]) -> None:
    """`work` for each of `numbers`, one to a core: a product on one core is done with less waiting than one on all."""
    threads = torch.get_num_threads()
    if threads == 1 or len(numbers) < threads:
        for number in numbers:
            work(number)
        return

    @torch.no_grad()  # which a new thread doesn't inherit
    def one(number: int) -> None:
        work(number)

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(one, numbers))
    finally:
        torch.set_num_threads(threads)


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy the second to the first of each pair, in one call: one at a time takes a GPU's host longer than the GPU."""
    if pairs:
        to, come = zip(*pairs)
        torch._foreach_copy_(list(to), list(come))


def _inside(x: Tensor, unit: Unit, part: Piece) -> Tensor:
    """The place of a piece (in block coordinates) in the unit's tensor."""
    index = [slice(start, stop) for start, stop in part.box]
    if unit.first is not None:
        index[0] = slice(index[0].start - unit.first, index[0].stop - unit.first)
    return x[tuple(index)]
