"""Ways to break the sharded step on purpose, in the worker before its cells run. The matrix must notice each one."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from celo2_pretrain.optimizer import celo2
from celo2_pretrain.optimizer.matrices.views import MatrixView
from celo2_pretrain.optimizer.sharding.layouts import Layout, Original, Slice
from celo2_pretrain.optimizer.step import learned
from celo2_pretrain.optimizer.step.exchange import Exchange

from .engines import DeepSpeedRun


def drop_all_reduce_a() -> None:
    """Pass A: every rank keeps the row and column sums of its own elements."""
    _without_reduce("_accumulate")


def drop_all_reduce_b() -> None:
    """Pass B: every rank normalises the features by its own elements."""
    _without_reduce("_norms")


def flat_slice_as_vector() -> None:
    """What a rank holds of a matrix is taken for a 1-D tensor of its own."""

    def wrong(shard: Slice) -> Slice:
        size = shard.stop - shard.start
        return replace(shard, original=_other(shard.original, shape=(max(size, 1),), view=MatrixView()), start=0, stop=size)

    _after_locate(wrong)


def shift_offset() -> None:
    """A slice is looked for one element further on in the flat partition than it is."""

    def wrong(shard: Slice) -> Slice:
        room = shard.offset + shard.stop - shard.start < shard.storage.numel()
        return replace(shard, offset=shard.offset + 1) if room else shard

    _after_locate(wrong)


def ignore_transpose() -> None:
    """A square `nn.Linear` is read as (in, out), which it isn't: only the tie of step 3 tells the difference."""

    def wrong(shard: Slice) -> Slice:
        square = len(shard.shape) == 2 and shard.shape[0] == shard.shape[1]
        view = replace(shard.original.view, transpose=False) if square else shard.original.view
        return replace(shard, original=_other(shard.original, shape=shard.shape, view=view))

    _after_locate(wrong)


def ignore_repeats() -> None:
    """Parts that are interleaved are read as if each lay in one piece."""

    def wrong(shard: Slice) -> Slice:
        view = shard.original.view
        view = replace(view, repeats=1, split=tuple(size * view.repeats for size in view.split))
        return replace(shard, original=_other(shard.original, shape=shard.shape, view=view))

    _after_locate(wrong)


def swap_ranks() -> None:
    """Owners take the pieces that two other ranks sent the wrong way round. Shows from 3 ranks on."""
    orthogonalize, wait = Exchange.orthogonalize, Exchange._wait

    def wrong_orthogonalize(self: Exchange, *coefficients) -> None:
        self.orthogonalizing = True
        orthogonalize(self, *coefficients)
        self.orthogonalizing = False

    def wrong_wait(self: Exchange, device: torch.device) -> Tensor:
        received = wait(self, device)
        if getattr(self, "orthogonalizing", False):
            received = torch.cat(received.split(self.counts()[1])[::-1])
        return received

    Exchange.orthogonalize, Exchange._wait = wrong_orthogonalize, wrong_wait


def step_per_micro_batch() -> None:
    """The optimizer steps after every micro-batch instead of after all of them."""
    backward = DeepSpeedRun.backward

    def wrong(self: DeepSpeedRun, *args: Any) -> None:
        self.engine.set_gradient_accumulation_boundary(True)
        backward(self, *args)

    DeepSpeedRun.backward = wrong


def hang() -> None:
    """A rank that never enters a collective, as the launcher must survive it."""

    def wrong(*args: Any) -> None:
        time.sleep(3600)

    learned.LearnedStep._norms = wrong


MUTATIONS: dict[str, Callable[[], None]] = {
    mutation.__name__: mutation
    for mutation in (
        drop_all_reduce_a,
        drop_all_reduce_b,
        flat_slice_as_vector,
        shift_offset,
        step_per_micro_batch,
        swap_ranks,
        ignore_transpose,
        ignore_repeats,
    )
}


def apply_mutation(name: str) -> None:
    """Break the optimizer in this process. Raises ValueError for a name that isn't in MUTATIONS."""
    known = {**MUTATIONS, "hang": hang}
    if name not in known:
        raise ValueError(f"unknown mutation {name!r}; there are {', '.join(known)}")
    known[name]()


def _without_reduce(method: str) -> None:
    original = getattr(learned.LearnedStep, method)
    reduce = learned.reduce

    def wrong(self: learned.LearnedStep, *args: Any) -> Any:
        learned.reduce = lambda *ignored: None
        try:
            return original(self, *args)
        finally:
            learned.reduce = reduce

    setattr(learned.LearnedStep, method, wrong)


def _after_locate(wrong: Callable[[Slice], Slice]) -> None:
    """Change every slice that the optimizer finds."""
    locate = celo2.locate

    def mutated(*args: Any) -> list[Layout]:
        layouts = locate(*args)
        for layout in layouts:
            layout.slices = [wrong(shard) for shard in layout.slices]
        return layouts

    celo2.locate = mutated


def _other(original: Original, shape: tuple[int, ...], view: MatrixView) -> Original:
    changed = copy.copy(original)
    changed.shape, changed.view = shape, view
    return changed
