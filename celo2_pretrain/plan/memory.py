"""Bytes on each GPU by part, as DeepSpeed 0.19 and Celo2 hold them (tests/plan/test_plan.py compares with running engines).

There are two moments of most memory: the backward pass (activations, gradient buckets), and the optimizer's step, when
activations are gone but float32 gradients and the Newton–Schulz buffers are there.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from celo2_pretrain.common.devices import GIB
from celo2_pretrain.config import Config
from celo2_pretrain.optimizer.sharding.plan import Plan
from celo2_pretrain.plan.activations import Activations
from celo2_pretrain.plan.shards import Group

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
# DeepSpeed's defaults, in elements.
REDUCE_BUCKET, LIVE_PARAMETERS, PREFETCH, PERSISTENT = 5e8, 1e9, 5e7, 1e5
# What no tensor accounts for: the driver's context with NCCL's buffers, and the allocator's losses.
CONTEXT, FRAGMENTATION = 1.5 * GIB, 0.05


@dataclass
class Memory:
    """Bytes of the rank that holds most."""

    weights: float  # what the forward pass uses, in the run's precision
    gathered: float  # ZeRO-3: whole parameters at hand for the layers at work, at most
    gradients: float  # at the end of the backward pass
    master: float  # float32 weights
    states: float  # the optimizer's accumulators
    buckets: float  # gradients on their way
    activations: float  # saved for the backward pass, one micro-batch
    temporaries: float  # of the backward pass beyond them, the logits' gradients above all
    step_gradients: float  # in the step: kept ones and float32 copies
    step_buffers: float  # in the step: directions, exchange, Newton–Schulz; in a logged one a copy of the weights it steps
    reserve_context: float

    @property
    def backward(self) -> float:
        return (
            self.weights
            + self.gathered
            + self.gradients
            + self.master
            + self.states
            + self.buckets
            + self.activations
            + self.temporaries
        )

    @property
    def step(self) -> float:
        return self.weights + self.step_gradients + self.master + self.states + self.step_buffers

    @property
    def total(self) -> float:
        """What the GPU must have: the larger moment, fragmentation, context."""
        return max(self.backward, self.step) * (1 + (FRAGMENTATION if self.reserve_context else 0)) + self.reserve_context


def memory(
    model: nn.Module,
    groups: list[Group],
    plans: list[Plan | None],
    config: Config,
    ds_config: dict,
    ranks: int,
    acts: Activations,
    gpu: bool = True,
) -> Memory:
    """Bytes by part.

    Args:
        groups, plans: what the optimizer steps, and rank 0's plan of each (None for AdamW).
        ds_config: DeepSpeed's merged configuration.
        acts: of one micro-batch.
        gpu: whether a context and fragmentation are to be reserved.
    """
    stage, size = config.train.zero_stage, BYTES[config.train.precision]
    zero = ds_config["zero_optimization"]
    numbers = [p.numel() for p in model.parameters()]
    total = sum(numbers)
    fp32_accumulation = size < 4 and ds_config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    shares = torch.stack([_share(group, stage) for group in groups])  # (groups, ranks)
    # Where a rank's part begins or ends inside a tensor, it keeps that tensor's whole gradient.
    kept = torch.stack([_kept(group) for group in groups]).sum(0)
    here, largest = int(shares.sum(0).max()), int(shares.max())

    gathered, buckets = 0.0, 0.0
    bucket = float(zero.get("reduce_bucket_size", REDUCE_BUCKET))
    if stage == 3:
        if ranks > 1:
            persistent = sum(n for n in numbers if n < float(zero.get("stage3_param_persistence_threshold", PERSISTENT)))
            live = float(zero.get("stage3_max_live_parameters", LIVE_PARAMETERS)) + float(
                zero.get("stage3_prefetch_bucket_size", PREFETCH)
            )
            gathered = size * min(total, live + persistent)
        buckets = size * bucket
        gradients, step_gradients = size * here, size * here + 4 * largest
    elif stage == 0:
        buckets = size * min(total, bucket) if ranks > 1 else 0.0
        gradients = size * total
        step_gradients = gradients + (4 * total if size < 4 else 0)
    elif fp32_accumulation and stage == 1:
        gradients = step_gradients = (size + 4) * total
    else:
        buckets = size * bucket * (2 if zero.get("overlap_comm") else 1)
        retained = 4 * here if fp32_accumulation else size * int(kept.max())
        # ZeRO-2 reduces them during every backward pass; ZeRO-1 after the last micro-batch's, with overlap_comm during it.
        early = stage == 2 or (zero.get("overlap_comm") and ds_config["gradient_accumulation_steps"] == 1)
        gradients = retained if early else size * total
        step_gradients = retained if fp32_accumulation else retained + 4 * largest
    return Memory(
        weights=size * (here if stage == 3 else total),
        gathered=gathered,
        gradients=gradients,
        master=4 * here if stage or size < 4 else 0.0,
        states=states(groups, plans, shares, config.optimizer.state_dtype),
        buckets=buckets,
        activations=acts.saved,
        temporaries=acts.peak - acts.saved,
        step_gradients=step_gradients,
        step_buffers=max((step_buffers(plan) for plan in plans if plan is not None), default=0.0)
        + (4.0 * (largest if stage else here) if config.track.norms else 0.0),  # without ZeRO all groups in one call
        reserve_context=CONTEXT if gpu else 0.0,
    )


def _share(group: Group, stage: int) -> torch.Tensor:
    """(ranks,) elements that each rank's part of the group has, with the padding of its end."""
    held = (group.held[..., 1] - group.held[..., 0]).sum(1)
    return held if stage == 0 else torch.full_like(held, int(held.max()))


def _kept(group: Group) -> torch.Tensor:
    """(ranks,) elements of the tensors of which each rank holds something."""
    sizes = torch.tensor([prod(original.shape) for original in group.originals])
    return ((group.held[..., 1] > group.held[..., 0]) * sizes).sum(1)


def states(groups: list[Group], plans: list[Plan | None], shares: torch.Tensor, state_dtype: str) -> float:
    """Bytes of the optimizer's states on the rank with the largest part."""
    out = torch.zeros(shares.shape[1])
    for group, plan, share in zip(groups, plans, shares):
        if plan is None:
            out += 8.0 * share  # exp_avg, exp_avg_sq
        elif any(not part.shape.matrix for part in plan.parts):
            out += 28.0 * share  # three momenta, rms and three v_full, always float32
        else:  # and v_row, v_col of three decays, float32 on every rank
            vectors = sum(prod(part.shape.row) + prod(part.shape.col) for part in plan.parts)
            out += 4.0 * BYTES[state_dtype] * share + 12.0 * vectors
    return float(out.max())


def step_buffers(plan: Plan) -> float:
    """Bytes that the learned step makes beside its states: the most of any rank.

    Three buckets are under way: one sent, one at its owners, one on its way back (exchange.py).
    """
    world = plan.layout.world
    held = plan.layout.ranges[..., 1] - plan.layout.ranges[..., 0]  # (ranks, tensors)
    here = [held[:, bucket].sum(1).double() for bucket in plan.buckets]
    if not plan.units:
        return 4 * float(torch.stack(here).max())
    sent, came, own, work = ([] for _ in range(4))
    for units in plan.units:
        to, come, owned = torch.zeros(3, world, dtype=torch.float64)
        shapes: list[dict] = [defaultdict(int) for _ in range(world)]
        for unit in units:
            owned[unit.owner] += unit.numel
            shapes[unit.owner][unit.shape[-2:]] += prod(unit.shape[:-2])
            parts = torch.tensor([unit.numel_of(rank) for rank in range(world)], dtype=torch.float64)
            parts[unit.owner] = 0
            to += parts
            come[unit.owner] += parts.sum()
        sent.append(to)
        came.append(come)
        own.append(owned)
        # A stack of equal shapes, its normalised copy, and an iteration's terms of both sizes.
        work.append(
            torch.tensor(
                [
                    max((count * (5.0 * prod(shape) + 3.0 * min(shape) ** 2) for shape, count in mine.items()), default=0.0)
                    for mine in shapes
                ],
                dtype=torch.float64,
            )
        )
    none = torch.zeros(world, dtype=torch.float64)
    at = lambda parts, k: parts[k] if 0 <= k < len(parts) else none  # noqa: E731
    peaks = [
        at(here, k - 2)
        + at(here, k - 1)
        + at(here, k)
        + at(sent, k)
        + at(came, k)  # k is being sent
        + at(came, k - 1)
        + at(own, k - 1)
        + at(work, k - 1)  # k − 1 is being orthogonalised
        + at(sent, k - 2)
        + at(came, k - 2)  # k − 2 travels back
        for k in range(len(here) + 1)
    ]
    return 4 * float(torch.stack(peaks).max())
