"""Seconds of a step, from a few stated assumptions: an estimate for choosing a node, not a measurement.

    compute    model FLOPs (6 a parameter and token, and attention) at `mfu` of the GPU's peak; a third more with
               activation checkpointing, which computes every forward pass twice
    gradients  what DeepSpeed sends at this ZeRO stage, at LINK_SHARE of the slowest link of the ring; hidden behind the
               backward pass only with overlap_comm
    optimizer  its passes' memory traffic at PASSES_SHARE (AdamW's at MEMORY_SHARE) of the bandwidth; then the longer of the
               busiest owner's Newton–Schulz, at MATMUL_SHARE of its dtype's peak, and the exchange, which overlap

The optimizer's shares are those measured on an H200 (docs/gpu.md), of its data sheet's peaks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from celo2_pretrain.common.devices import Device
from celo2_pretrain.config import Config
from celo2_pretrain.model.flops import flops_per_token
from celo2_pretrain.optimizer.sharding.plan import Plan
from celo2_pretrain.plan.memory import BYTES
from celo2_pretrain.plan.shards import Group, owned_flops, sent_bytes

MFU = 0.40  # of the dense peak; large models on one node reach 0.35 to 0.5
MEMORY_SHARE, PASSES_SHARE, LINK_SHARE = 0.7, 0.45, 0.75  # of the passes the direction's is bound by arithmetic
MATMUL_SHARE = {"bf16": 0.4, "fp32": 0.65}
CELO2_BYTES, ADAMW_BYTES = 80, 28  # memory traffic a parameter of the optimizer's passes, float32 states
BACKWARD_SHARE = 2 / 3  # of the compute, behind which gradients can travel


@dataclass
class StepTime:
    """Seconds of one step (all its micro-batches), and what they were computed from."""

    compute: float
    gradients: float  # of communication that ZeRO needs with any optimizer, that is not hidden
    passes: float
    newton_schulz: float
    exchange: float
    flops_per_token: float
    newton_schulz_flops: float  # of the busiest owner
    newton_schulz_dtype: str
    zero_bytes: float  # that a rank sends for ZeRO
    celo2_bytes: float  # and for the optimizer, the busiest rank
    link: float  # bytes/s that were assumed

    @property
    def optimizer(self) -> float:
        return self.passes + max(self.newton_schulz, self.exchange)

    @property
    def step(self) -> float:
        return self.compute + self.gradients + self.optimizer


def zero_bytes(parameters: int, stage: int, ranks: int, accumulation: int, size: int, zero: dict) -> float:
    """Bytes that a rank sends in a step for gradients and parameters, with any optimizer, in DeepSpeed 0.19."""
    ring = (ranks - 1) / ranks * parameters * size
    if stage == 0:
        return 2 * ring  # all-reduce
    if stage == 3:  # in every micro-batch: parameters gathered for forward and backward pass, gradients scattered
        return 3 * ring * accumulation
    scatter = zero.get("reduce_scatter", True) and not zero.get("use_multi_rank_bucket_allreduce", True)
    reduced = ring if scatter else 2 * ring  # DeepSpeed's default is to all-reduce and to keep a part
    return reduced * (accumulation if stage == 2 else 1) + ring


def step_time(
    model: nn.Module,
    groups: list[Group],
    plans: list[Plan | None],
    config: Config,
    ds_config: dict,
    device: Device,
    ranks: int,
    mfu: float = MFU,
) -> StepTime:
    stage, precision = config.train.zero_stage, config.train.precision
    zero = ds_config["zero_optimization"]
    peak = device.peak(precision)
    per_token = flops_per_token(model, config.model.context)
    tokens = config.train.global_batch_size * config.model.context
    compute = per_token * tokens / ranks / (mfu * peak) * (4 / 3 if config.model.activation_checkpointing else 1)
    link = LINK_SHARE * (device.link if ranks <= device.per_node else min(device.link, device.network))

    sent = zero_bytes(
        sum(p.numel() for p in model.parameters()),
        stage,
        ranks,
        ds_config["gradient_accumulation_steps"],
        BYTES[precision],
        zero,
    )
    overlap = zero.get("overlap_comm")
    hidden = BACKWARD_SHARE * compute if (stage == 3 if overlap is None else overlap) else 0.0

    seconds = torch.zeros(ranks if stage else 1)  # of each rank's passes
    flops = torch.zeros(1 if stage == 0 else ranks, dtype=torch.float64)
    exchanged = 0.0
    for group, plan in zip(groups, plans):
        cost = ADAMW_BYTES / MEMORY_SHARE if plan is None else CELO2_BYTES / PASSES_SHARE
        seconds += cost / device.bandwidth * (group.held[..., 1] - group.held[..., 0]).sum(1)
        if plan is not None:
            flops += torch.tensor(owned_flops(plan), dtype=torch.float64)
            exchanged += busiest_bytes(plan)
    dtype = config.optimizer.newton_schulz_dtype
    if dtype == "auto":
        dtype = "bf16" if device.bf16 > device.fp32 else "fp32"
    return StepTime(
        compute=compute,
        gradients=max(0.0, sent / link - hidden),
        passes=float(seconds.max()),
        newton_schulz=float(flops.max()) / (MATMUL_SHARE[dtype] * device.peak(dtype)),
        exchange=exchanged / link,
        flops_per_token=per_token,
        newton_schulz_flops=float(flops.max()),
        newton_schulz_dtype=dtype,
        zero_bytes=sent,
        celo2_bytes=exchanged,
        link=link,
    )


def some_ranks(ranks: int) -> list[int]:
    """Ranks enough to find the busiest: what a rank sends depends on where its part begins."""
    return list(range(ranks)) if ranks <= 16 else sorted({0, 1, ranks // 2, ranks - 1})


def busiest_bytes(plan: Plan) -> float:
    """Bytes that the busiest rank sends for one learned step."""
    return max(
        sum(sent_bytes(replace(plan, layout=replace(plan.layout, rank=rank))).values())
        for rank in some_ranks(plan.layout.world)
    )
