"""Who holds and who owns what on N ranks, and how many bytes a rank sends in one optimizer step: from shapes alone.

The optimizer's own planning (`make_plan`) is run on ranges computed as DeepSpeed cuts them, so that what is counted
here is what is sent; benchmarks/wire.py checks it against real collectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from celo2_pretrain.kernels.newton_schulz import use_gram
from celo2_pretrain.optimizer.celo2 import Celo2
from celo2_pretrain.optimizer.matrices.param_groups import tag_of
from celo2_pretrain.optimizer.matrices.views import MatrixView
from celo2_pretrain.optimizer.sharding.layouts import Layout, Original, Slice
from celo2_pretrain.optimizer.sharding.plan import Plan, make_plan
from celo2_pretrain.optimizer.step.exchange import Exchange

NEWTON_SCHULZ_STEPS = 5
ZERO3_SUB_GROUP = 1_000_000_000  # DeepSpeed's default: elements of a rank that one call of the optimizer steps


@dataclass
class Group:
    """Tensors that the optimizer steps in one call, and which flat elements of each every rank holds."""

    rule: str  # "celo2" or "adamw"
    orthogonalize: bool
    bucket_size: int
    originals: list[Original]
    held: torch.Tensor  # (ranks, tensors, 2) int64: start and stop

    @property
    def numel(self) -> int:
        return sum(prod(original.shape) for original in self.originals)

    def numel_of(self, rank: int) -> int:
        return int((self.held[rank, :, 1] - self.held[rank, :, 0]).sum())

    def plan(self, rank: int) -> Plan:
        """The optimizer's plan of this group on one rank (rule "celo2")."""
        return plan_for(self.originals, self.held, rank, self.bucket_size, self.orthogonalize)


def ranges(shapes: list[tuple[int, ...]], ranks: int, stage: int) -> torch.Tensor:
    """(ranks, tensors, 2) int64: which flat elements of each tensor each rank holds, as DeepSpeed slices a group.

    Stage 0 has everything on every rank, and stages as one rank: the first axis has length 1.
    """
    sizes = torch.tensor([prod(shape) for shape in shapes], dtype=torch.int64)
    if stage == 0:
        return torch.stack([torch.zeros_like(sizes), sizes], -1)[None]
    rank = torch.arange(ranks)[:, None]
    if stage == 3:  # every tensor evenly over the ranks
        part = -(-sizes // ranks)
        return torch.stack([torch.minimum(rank * part, sizes), torch.minimum((rank + 1) * part, sizes)], -1)
    # One flat buffer, evenly over the ranks, aligned to two elements of each rank.
    part, start = -(-int(sizes.sum()) // (2 * ranks)) * 2, sizes.cumsum(0) - sizes
    return torch.stack([torch.minimum((end * part - start).clamp(min=0), sizes) for end in (rank, rank + 1)], -1)


def plan_for(originals: list[Original], held: torch.Tensor, rank: int, bucket_size: int, orthogonalize: bool = True) -> Plan:
    # No storage is read in a plan; each slice has one of its own.
    slices = [Slice(original, *held[rank, k].tolist(), 0, torch.empty(0)) for k, original in enumerate(originals)]
    return make_plan(Layout("planned", slices, None, rank, held.shape[0], held), orthogonalize, bucket_size)


def groups(optimizer: torch.optim.Optimizer, ranks: int, stage: int, sub_group_size: int = ZERO3_SUB_GROUP) -> list[Group]:
    """The groups that DeepSpeed makes of an optimizer's (of tagged parameters; they may lie on the meta device)."""
    out = []
    for group in optimizer.param_groups:
        if isinstance(optimizer, Celo2):
            rule, orthogonalize = group["rule"], group["orthogonalize"]
            bucket_size, originals = optimizer.bucket_size, optimizer.originals_of(group)
        else:
            rule, orthogonalize, bucket_size = "adamw", False, 1
            originals = [Original(p, tag_of(p).name, MatrixView()) for p in group["params"]]
        for part in _sub_groups(originals, ranks, sub_group_size) if stage == 3 else [originals]:
            held = ranges([original.shape for original in part], ranks, stage)
            out.append(Group(rule, orthogonalize, bucket_size, part, held))
    return out


def _sub_groups(originals: list[Original], ranks: int, sub_group_size: int) -> list[list[Original]]:
    """ZeRO-3's sub-groups: closed when a rank's part of them has reached the size."""
    out, size = [[]], 0
    for original in originals:
        if size >= sub_group_size:
            out.append([])
            size = 0
        out[-1].append(original)
        size += -(-prod(original.shape) // ranks)
    return out


def sent_bytes(plan: Plan) -> dict[str, float]:
    """Bytes that this plan's rank sends in one step, by collective.

    Counted as rings send them: an all-reduce 2 (n − 1)/n of its buffer; an all-to-all what goes to other ranks.
    """
    n = plan.layout.world
    ring = 2 * (n - 1) / n * 4
    sent = {
        "pass A all-reduce": ring * sum(prod(p.shape.row) + prod(p.shape.col) for p in plan.parts if p.shape.matrix),
        "pass B all-reduce": ring * sum(len(p.shape.elementwise) * prod(p.shape.lead) for p in plan.parts),
        "to owners": 0.0,
        "back": 0.0,
    }
    for units in plan.units:
        to, come = Exchange(units, plan.layout, []).counts()
        sent["to owners"] += 4 * sum(to)
        sent["back"] += 4 * sum(come)
    return sent


def newton_schulz_flops(shape: tuple[int, ...]) -> float:
    """FLOPs (multiplications and additions) of the orthogonalisation of matrices (…, rows, cols), in the form taken."""
    *lead, rows, cols = shape
    short, long = sorted((rows, cols))
    if use_gram(shape):
        # First and last product on the long side; in between the square, and but for the ends the products of
        # two small matrices: `product`, c · square · gram and the new gram.
        small = NEWTON_SCHULZ_STEPS + 3 * (NEWTON_SCHULZ_STEPS - 1)
        return prod(lead) * (4.0 * short * short * long + small * 2.0 * short**3)
    return prod(lead) * NEWTON_SCHULZ_STEPS * (4.0 * short * short * long + 2.0 * short**3)


def owned_flops(plan: Plan) -> list[float]:
    """Newton–Schulz FLOPs of each rank in one step; the same list on every rank."""
    out = [0.0] * plan.layout.world
    for units in plan.units:
        for unit in units:
            out[unit.owner] += newton_schulz_flops(unit.shape)
    return out
