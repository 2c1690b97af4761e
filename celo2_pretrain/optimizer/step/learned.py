"""One learned step for a layout's tensors: the three passes, the collectives between them, and the update.

`make_plan` works out, once for a layout, which pieces a rank holds, which slices form a bucket and who owns which
matrix; `LearnedStep` carries the plan out. Neither knows what a wrapper or a parameter group is.
"""
from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.newton_schulz import COEFFICIENTS, dtype_for
from ...kernels.packed import WORD, turn_of
from ...kernels.rounding import key_of
from ..backends.choose import backend_for
from ..backends.passes import Scale, Shape, Tensors
from ..groups import decay_of
from ..matrices.views import MatrixView, Piece, pieces
from ..reference import MLP
from ..sharding.layouts import Layout, Slice, collective_device, local
from .exchange import Exchange, Unit, choose_owners, units_of


ACCUMULATORS = ("momentum_0", "momentum_1", "momentum_2", "rms")


@dataclass
class Part:
    """One block of a slice with what the passes need of it."""

    held: int  # which slice of the layout
    shape: Shape
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
    factored: dict[int, tuple[int, int]] = field(default_factory=dict)  # columns of v_row, v_col by the storage's id; 0 for vectors
    memory: dict[int, Tensor] = field(default_factory=dict)  # on the CPU: for directions, kept from step to step

    def parts_of(self, bucket: list[int]) -> list[int]:
        """Numbers of the parts that a bucket's slices consist of."""
        chosen = set(bucket)
        return [number for number, part in enumerate(self.parts) if part.held in chosen]

    def columns(self, number: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where the v_row and the v_col of a slice's tensor begin and end in its storage's; empty for a vector."""
        parts = [part for part in self.parts if part.held == number and part.shape.matrix]
        if not parts:
            return (0, 0), (0, 0)
        row, col = parts[0].row_at, parts[0].col_at
        return ((row, row + sum(prod(part.shape.row) for part in parts)),
                (col, col + sum(prod(part.shape.col) for part in parts)))

    def parts_in(self, storage: Tensor) -> list[Part]:
        return [part for part in self.parts if self.layout.slices[part.held].storage is storage]


def make_plan(layout: Layout, orthogonalize: bool, bucket_size: int) -> Plan:
    """Plan the learned step of a layout; the same buckets and owners on every rank."""
    plan = Plan(layout, [], [[]], [])
    rows: dict[int, int] = {}
    cols: dict[int, int] = {}
    for number, held in enumerate(layout.slices):
        for block in held.original.view.blocks(held.shape):
            shape, storage = Shape(block), id(held.storage)
            plan.parts.append(Part(number, shape, pieces(block, held.start, held.stop),
                                   rows.get(storage, 0), cols.get(storage, 0)))
            rows[storage] = rows.get(storage, 0) + prod(shape.row)
            cols[storage] = cols.get(storage, 0) + prod(shape.col)
    plan.factored = {storage: (rows[storage], cols[storage]) for storage in rows}
    size = 0
    for number, held in enumerate(layout.slices):
        if plan.buckets[-1] and size + prod(held.shape) > bucket_size:
            plan.buckets.append([])
            size = 0
        plan.buckets[-1].append(number)
        size += prod(held.shape)
    if orthogonalize and any(part.shape.matrix for part in plan.parts):
        for bucket in plan.buckets:
            plan.units.append([unit for part in map(plan.parts.__getitem__, plan.parts_of(bucket))
                               for unit in units_of(bucket.index(part.held), part.shape, part.held, layout)])
        choose_owners(plan.units, layout.world)
    return plan


def factored_sizes(tensor: tuple[int, ...], view: MatrixView) -> tuple[int, int]:
    """Columns of v_row and of v_col of a whole tensor of this shape under the learned rule; 0 for a vector."""
    shapes = [Shape(block) for block in view.blocks(tensor)]
    return sum(prod(shape.row) for shape in shapes), sum(prod(shape.col) for shape in shapes)


def init_state(param: Tensor, parts: list[Part], zeros_like: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Zero accumulators for a storage (a tensor, or a flat partition of several) that consists of `parts`.

    momentum_0, _1, _2 (decays 0.9, 0.99, 0.999) and rms are of the storage's shape and lie like it; of `dtype`, or,
    where that is kernels.packed.WORD, one tensor `packed` holds all four. Unless they are float32 there is a step
    count, which stochastic rounding needs. v_row and v_col are (3, n): the factored second moments of all its matrices,
    replicated over the ranks, float32. Vectors have v_full_0, _1, _2, all float32.
    """
    vectors = any(not part.shape.matrix for part in parts)
    if vectors:
        dtype = torch.float32
    state = {key: zeros_like(param, dtype) for key in (("packed",) if dtype == WORD else ACCUMULATORS)}
    if dtype != torch.float32:
        state["step"] = torch.zeros((), dtype=torch.float32)
    if vectors:
        return {**state, **{f"v_full_{k}": zeros_like(param, dtype) for k in range(3)}}
    device = local(param).device
    return {**state, "v_row": torch.zeros(3, sum(prod(part.shape.row) for part in parts), device=device),
            "v_col": torch.zeros(3, sum(prod(part.shape.col) for part in parts), device=device)}


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
        for key, state in {id(held.storage): self.state[held.storage] for held in self.layout.slices}.items():
            if "step" in state:
                state["step"] += 1
                steps[key] = int(state["step"])
        self.tensors = [_tensors(held, self.state[held.storage], steps.get(id(held.storage)))
                        for held in self.layout.slices]
        packed = [part for part, t in zip(self.plan.parts, self._tensors_of(self.plan.parts)) if t.packed]
        old = self._scales(packed)
        self._accumulate()
        self.scales = self._scales(packed)
        if packed:
            self.backend.repack(packed, self._tensors_of(packed), list(old.values()), list(self.scales.values()))
        self.factors = [self.backend.factor(part.shape, *self._row_col(part)) for part in self.plan.parts]
        squares = self._norms()
        self.layers = [self.backend.first_layer(square, *self._row_col(part), part.shape, self.mlp)
                       for part, square in zip(self.plan.parts, squares)]
        if self.plan.units:
            self._orthogonalized()
        else:
            self._normalized()

    def _tensors_of(self, parts: list[Part]) -> list[Tensors]:
        if not self.scales:
            return [self.tensors[part.held] for part in parts]
        return [replace(self.tensors[part.held], scale=self.scales.get(id(part))) for part in parts]

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
        totals = [(chunks[2 * k].view(part.shape.row), chunks[2 * k + 1].view(part.shape.col))
                  for k, part in enumerate(parts)]
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

    def _empty(self, sizes: list[int], turn: int) -> list[Tensor]:
        """Uninitialised flat tensors, which the next call for the same `turn` may overwrite."""
        if self.device.type != "cpu":
            return [torch.empty(size, device=self.device) for size in sizes]
        memory = self.plan.memory.get(turn)  # the kernel gives fresh memory page by page: a fifth of Celo2-base's time
        if memory is None or memory.numel() < sum(sizes):
            memory = self.plan.memory[turn] = torch.empty(sum(sizes))
        return list(memory[:sum(sizes)].split(sizes))

    def _directions(self, bucket: list[int], turn: int = 0) -> dict[int, Tensor]:
        """Pass C: this rank's part of the direction for each slice of a bucket, flat, float32; see `_empty`."""
        sizes = [self.layout.slices[held].stop - self.layout.slices[held].start for held in bucket]
        out = dict(zip(bucket, self._empty(sizes, turn)))
        numbers = self.plan.parts_of(bucket)
        parts = [self.plan.parts[k] for k in numbers]
        self.backend.direction(parts, self._tensors_of(parts), [self.factors[k] for k in numbers],
                               [self.layers[k] for k in numbers], self.mlp, [out[part.held] for part in parts])
        return out

    def _orthogonalized(self) -> None:
        """Pass C, Newton–Schulz and the update, in a pipeline: while bucket k travels, k − 1 is orthogonalised."""
        coefficients = COEFFICIENTS[self.group["newton_schulz"]]
        dtype = dtype_for(self.group.get("newton_schulz_dtype", "auto"), self.device)  # older states lack it
        under_way: list[tuple[dict[int, Tensor], Exchange]] = []
        for number, (bucket, units) in enumerate(zip(self.plan.buckets, self.plan.units)):
            out = self._directions(bucket, number % 3)  # three at most are under way
            exchange = Exchange(units, self.layout, [out[held] for held in bucket])
            exchange.start()
            under_way.append((out, exchange))
            if len(under_way) > 1:
                under_way[-2][1].turn(coefficients, dtype)
            if len(under_way) > 2:
                out, exchange = under_way.pop(0)
                exchange.finish()
                self._apply(out)
        under_way[-1][1].turn(coefficients, dtype)
        for out, exchange in under_way:
            exchange.finish()
            self._apply(out)

    def _normalized(self) -> None:
        """Pass C and the update of Celo2-base and of vectors: step 8 needs each matrix's sum of squares."""
        for bucket in self.plan.buckets:
            out, parts = self._directions(bucket), [self.plan.parts[k] for k in self.plan.parts_of(bucket)]
            flat, chunks = self._zeros([prod(part.shape.lead) for part in parts])
            squares = [chunk.view(part.shape.lead) for chunk, part in zip(chunks, parts)]
            directions = [out[part.held] for part in parts]
            self.backend.output_squares(parts, directions, squares)
            reduce(flat, self.layout)
            self.backend.rescale(parts, directions, squares)
            self._apply(out)

    def _apply(self, out: dict[int, Tensor]) -> None:
        """`p ← p − lr · (step + weight_decay · p)` (step 9) for the slices of a bucket; `out` is used up."""
        slices: dict[float, list[tuple[Tensor, Tensor]]] = {}
        for held, step in out.items():
            decay = decay_of(self.group, hidden=self.layout.slices[held].original.hidden)
            slices.setdefault(decay, []).append((self.tensors[held].p, step))
        for decay, some in slices.items():
            self.backend.apply(some, self.group["lr"], decay)
        for held in out:
            storage = local(self.layout.slices[held].storage).detach()
            if not storage.is_contiguous():  # p is a copy then
                storage.copy_(self.tensors[held].p.view(storage.shape))

    def _row_col(self, part: Part) -> tuple[Tensor, Tensor]:
        """v_row (3, *row) and v_col (3, *col) of a block, as views of the storage's state; empty for a vector."""
        if not part.shape.matrix:
            return torch.empty(0), torch.empty(0)
        state = self.state[self.layout.slices[part.held].storage]
        return row_col(part, state["v_row"], state["v_col"])


def row_col(part: Part, v_row: Tensor, v_col: Tensor) -> tuple[Tensor, Tensor]:
    """A block's views (3, *row), (3, *col) of what holds the factored second moments of its storage."""
    shape = part.shape
    return (v_row[:, part.row_at:part.row_at + prod(shape.row)].unflatten(1, shape.row),
            v_col[:, part.col_at:part.col_at + prod(shape.col)].unflatten(1, shape.col))


def _tensors(held: Slice, state: Mapping[str, Tensor], step: int | None) -> Tensors:
    """A slice's flat tensors, contiguous: views, but copies of a parameter or gradient that is not contiguous.

    `step`: the storage's step count where its accumulators are rounded stochastically.
    """
    # `reshape` would give a view with gaps where all strides allow it; kernels would not see the bit that negates a view.
    flat = lambda x: held.of(local(x).detach().resolve_neg().contiguous().view(-1))  # noqa: E731
    several = lambda key: [flat(state[f"{key}_{k}"]) for k in range(3)] if f"{key}_0" in state else []  # noqa: E731
    packed = "packed" in state
    keys: tuple[int, ...] = ()
    if packed:
        keys = (*(key_of(held.name, k) for k in range(4)), turn_of(step))
    elif step is not None:
        keys = tuple(key_of(held.name, step, k) for k in range(4))
    return Tensors(flat(held.storage), flat(held.storage.grad), several("momentum"),
                   flat(state["packed" if packed else "rms"]), several("v_full"), held.start, keys)


def reduce(x: Tensor, layout: Layout, op: Any = dist.ReduceOp.SUM) -> None:
    """All-reduce in place over the ranks that share the layout's tensors."""
    if layout.world == 1 or x.numel() == 0:
        return
    moved = x.to(collective_device(layout.process_group, x.device))
    dist.all_reduce(moved, op=op, group=layout.process_group)
    if moved is not x:
        x.copy_(moved)
