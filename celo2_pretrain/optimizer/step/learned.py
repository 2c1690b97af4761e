"""One learned step for a layout's tensors: the three passes, the collectives between them, and the update.

`LearnedStep` carries a plan (sharding/plan.py) out. It doesn't know what a wrapper or a parameter group is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.newton_schulz import COEFFICIENTS, dtype_for
from ...kernels.packed import step_offset_of
from ...kernels.rounding import key_of
from ...weights.mlp import MLP
from ..backends.choose import backend_for
from ..backends.passes import Scale, Tensors
from ..groups import decay_of
from ..sharding.layouts import Layout, Slice, collective_device, local
from ..sharding.plan import Part, Plan
from .accumulators import row_col
from .exchange import Exchange


class LearnedStep:
    """The step of one plan, with its tensors at hand. Call `run` once."""

    def __init__(self, plan: Plan, state: Mapping[Tensor, dict[str, Any]], mlp: MLP, group: Mapping[str, Any]) -> None:
        """`group`: the param group's options lr, weight_decay, adamw_weight_decay, newton_schulz, newton_schulz_dtype."""
        self.plan, self.state, self.mlp, self.group = plan, state, mlp, group
        self.layout = plan.layout
        self.device = local(self.layout.slices[0].storage).device
        self.backend = backend_for(self.device)

    def run(self) -> None:
        self.scales: dict[int, Scale] = {}
        steps = {}
        for key, state in {id(shard.storage): self.state[shard.storage] for shard in self.layout.slices}.items():
            if "step" in state:
                state["step"] += 1
                steps[key] = int(state["step"])
        self.tensors = [
            _tensors(shard, self.state[shard.storage], steps.get(id(shard.storage))) for shard in self.layout.slices
        ]
        packed = [part for part, t in zip(self.plan.parts, self._tensors_of(self.plan.parts)) if t.packed]
        old = self._scales(packed)
        self._accumulate()
        self.scales = self._scales(packed)
        if packed:
            self.backend.repack(packed, self._tensors_of(packed), list(old.values()), list(self.scales.values()))
        self.factors = [self.backend.factor(part.shape, *self._row_col(part)) for part in self.plan.parts]
        squares = self._norms()
        self.layers = [
            self.backend.first_layer(square, *self._row_col(part), part.shape, self.mlp)
            for part, square in zip(self.plan.parts, squares)
        ]
        if self.plan.units:
            self._orthogonalized()
        else:
            self._normalized()

    def _tensors_of(self, parts: list[Part]) -> list[Tensors]:
        if not self.scales:
            return [self.tensors[part.slice_index] for part in parts]
        return [replace(self.tensors[part.slice_index], scale=self.scales.get(id(part))) for part in parts]

    def _scales(self, packed: list[Part]) -> dict[int, Scale]:
        """Of parts with packed accumulators, by id. Copies: they stay what they are when v_row and v_col change."""
        return dict(zip(map(id, packed), self.backend.scales(packed, [self._row_col(part) for part in packed])))

    def _zeros(self, sizes: list[int]) -> tuple[Tensor, list[Tensor]]:
        flat = torch.zeros(sum(sizes), device=self.device)
        return flat, list(flat.split(sizes))

    def _accumulate(self) -> None:
        """Pass A and its all-reduce: row and column sums of all tensors in one flat buffer."""
        parts = self.plan.parts
        sums, chunks = self._zeros([size for part in parts for size in (prod(part.shape.row), prod(part.shape.col))])
        totals = [(chunks[2 * k].view(part.shape.row), chunks[2 * k + 1].view(part.shape.col)) for k, part in enumerate(parts)]
        self.backend.accumulate(parts, self._tensors_of(parts), totals)
        reduce(sums, self.layout)
        self.backend.update_factored(parts, totals, [self._row_col(part) for part in parts])

    def _norms(self) -> list[Tensor]:
        """Pass B and its all-reduce: a few numbers a matrix, of all tensors in one flat buffer."""
        parts = self.plan.parts
        flat, chunks = self._zeros([len(part.shape.elementwise) * prod(part.shape.lead) for part in parts])
        squares = [chunk.view(-1, *part.shape.lead) for chunk, part in zip(chunks, parts)]
        self.backend.norms(parts, self._tensors_of(parts), self.factors, squares)
        reduce(flat, self.layout)
        return squares

    def _empty(self, sizes: list[int], buffer: int) -> list[Tensor]:
        """Uninitialised flat tensors, which the next call for the same `buffer` may overwrite."""
        if self.device.type != "cpu":
            return [torch.empty(size, device=self.device) for size in sizes]
        memory = self.plan.memory.get(buffer)  # the kernel gives fresh memory page by page: a fifth of Celo2-base's time
        if memory is None or memory.numel() < sum(sizes):
            memory = self.plan.memory[buffer] = torch.empty(sum(sizes))
        return list(memory[: sum(sizes)].split(sizes))

    def _directions(self, bucket: list[int], buffer: int = 0) -> dict[int, Tensor]:
        """Pass C: this rank's part of the direction for each slice of a bucket, flat, float32; see `_empty`."""
        sizes = [self.layout.slices[number].stop - self.layout.slices[number].start for number in bucket]
        out = dict(zip(bucket, self._empty(sizes, buffer)))
        numbers = self.plan.parts_of(bucket)
        parts = [self.plan.parts[k] for k in numbers]
        self.backend.direction(
            parts,
            self._tensors_of(parts),
            [self.factors[k] for k in numbers],
            [self.layers[k] for k in numbers],
            self.mlp,
            [out[part.slice_index] for part in parts],
        )
        return out

    def _orthogonalized(self) -> None:
        """Pass C, Newton–Schulz and the update, in a pipeline: while bucket k travels, k − 1 is orthogonalised."""
        coefficients = COEFFICIENTS[self.group["newton_schulz"]]
        dtype = dtype_for(self.group.get("newton_schulz_dtype", "auto"), self.device)  # older states lack it
        under_way: list[tuple[dict[int, Tensor], Exchange]] = []
        for number, (bucket, units) in enumerate(zip(self.plan.buckets, self.plan.units)):
            out = self._directions(bucket, number % 3)  # three at most are under way
            exchange = Exchange(units, self.layout, [out[number] for number in bucket])
            exchange.start()
            under_way.append((out, exchange))
            if len(under_way) > 1:
                under_way[-2][1].orthogonalize(coefficients, dtype)
            if len(under_way) > 2:
                out, exchange = under_way.pop(0)
                exchange.finish()
                self._apply(out)
        under_way[-1][1].orthogonalize(coefficients, dtype)
        for out, exchange in under_way:
            exchange.finish()
            self._apply(out)

    def _normalized(self) -> None:
        """Pass C and the update of Celo2-base and of vectors: step 8 needs each matrix's sum of squares."""
        for bucket in self.plan.buckets:
            out, parts = self._directions(bucket), [self.plan.parts[k] for k in self.plan.parts_of(bucket)]
            flat, chunks = self._zeros([prod(part.shape.lead) for part in parts])
            squares = [chunk.view(part.shape.lead) for chunk, part in zip(chunks, parts)]
            directions = [out[part.slice_index] for part in parts]
            self.backend.output_squares(parts, directions, squares)
            reduce(flat, self.layout)
            self.backend.rescale(parts, directions, squares)
            self._apply(out)

    def _apply(self, out: dict[int, Tensor]) -> None:
        """`p ← p − lr · (step + weight_decay · p)` (step 9) for the slices of a bucket; `out` is used up."""
        slices: dict[float, list[tuple[Tensor, Tensor]]] = {}
        for number, step in out.items():
            decay = decay_of(self.group, hidden=self.layout.slices[number].original.hidden)
            slices.setdefault(decay, []).append((self.tensors[number].p, step))
        for decay, some in slices.items():
            self.backend.apply(some, self.group["lr"], decay)
        for number in out:
            storage = local(self.layout.slices[number].storage).detach()
            if not storage.is_contiguous():  # p is a copy then
                storage.copy_(self.tensors[number].p.view(storage.shape))

    def _row_col(self, part: Part) -> tuple[Tensor, Tensor]:
        """v_row (3, *row) and v_col (3, *col) of a block, as views of the storage's state; empty for a vector."""
        if not part.shape.matrix:
            return torch.empty(0), torch.empty(0)
        state = self.state[self.layout.slices[part.slice_index].storage]
        return row_col(part, state["v_row"], state["v_col"])


def _tensors(shard: Slice, state: Mapping[str, Tensor], step: int | None) -> Tensors:
    """A slice's flat tensors, contiguous: views, but copies of a parameter or gradient that is not contiguous.

    `step`: the storage's step count where its accumulators are rounded stochastically.
    """
    # `reshape` would give a view with gaps where all strides allow it; kernels would not see the bit that negates a view.
    flat = lambda x: shard.of(local(x).detach().resolve_neg().contiguous().view(-1))  # noqa: E731
    several = lambda key: [flat(state[f"{key}_{k}"]) for k in range(3)] if f"{key}_0" in state else []  # noqa: E731
    packed = "packed" in state
    keys: tuple[int, ...] = ()
    if packed:
        keys = (*(key_of(shard.name, k) for k in range(4)), step_offset_of(step))
    elif step is not None:
        keys = tuple(key_of(shard.name, step, k) for k in range(4))
    return Tensors(
        flat(shard.storage),
        flat(shard.storage.grad),
        several("momentum"),
        flat(state["packed" if packed else "rms"]),
        several("v_full"),
        shard.start,
        keys,
    )


def reduce(x: Tensor, layout: Layout, op: Any = dist.ReduceOp.SUM) -> None:
    """All-reduce in place over the ranks that share the layout's tensors."""
    if layout.world == 1 or x.numel() == 0:
        return
    moved = x.to(collective_device(layout.process_group, x.device))
    dist.all_reduce(moved, op=op, group=layout.process_group)
    if moved is not x:
        x.copy_(moved)
