"""One config on so many GPUs of a kind: memory, time, communication, and the largest micro-batch that fits."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from celo2_pretrain.common.devices import Device
from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import Config, accumulation_steps
from celo2_pretrain.data.shards import read_index
from celo2_pretrain.deepspeed_config import deepspeed_config
from celo2_pretrain.model.build import build_model
from celo2_pretrain.model.build_optimizer import build_optimizer
from celo2_pretrain.optimizer.sharding.plan import Plan
from celo2_pretrain.plan.activations import Activations, activations
from celo2_pretrain.plan.memory import Memory, memory
from celo2_pretrain.plan.shards import ZERO3_SUB_GROUP, Group, groups
from celo2_pretrain.plan.step_time import MFU, StepTime, step_time

ASSUMED_VOCABULARY = 50257  # GPT-2's, where neither config nor data say


@dataclass
class Subject:
    """What is planned for, whatever the GPUs: the model on the meta device, its optimizer, its micro-batches."""

    config: Config
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    acts: Activations  # of the config's micro-batch
    acts_double: Activations  # of one twice as large
    notes: list[str]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def acts_of(self, micro_batch: int) -> Activations:
        """Bytes are a straight line in the micro-batch."""
        size = self.config.train.micro_batch_size
        one, two = self.acts, self.acts_double
        return Activations(
            *(
                getattr(one, part) + (micro_batch / size - 1) * (getattr(two, part) - getattr(one, part))
                for part in ("saved", "peak")
            )
        )


@dataclass
class Estimate:
    config: Config
    device: Device
    ranks: int
    accumulation: int
    memory: Memory
    time: StepTime
    fits: bool
    largest_micro_batch: int  # that fits, 0 if none does
    useful_micro_batch: int  # the largest of them that divides the global batch
    groups: list[Group]
    plans: list[Plan | None]

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.global_batch_size * self.config.model.context

    @property
    def tokens(self) -> int:
        return self.tokens_per_step * self.config.train.max_steps

    @property
    def tokens_per_day(self) -> float:
        return self.tokens_per_step / self.time.step * 86400


def subject(config: Config) -> Subject:
    """Build the model without memory for it, and trace its activations. Raises UserError as training would."""
    notes = []
    vocabulary = config.model.vocab_size or ASSUMED_VOCABULARY
    if config.model.vocab_size is None and config.model.from_ is None:
        path = config.data.mixture[0]["path"] if config.data.mixture else config.data.path
        if Path(path, "index.json").is_file():
            vocabulary = read_index(path)["vocab_size"]
        else:
            notes.append(
                f"{path} is not prepared yet: a vocabulary of {ASSUMED_VOCABULARY:,} is assumed; "
                "model.vocab_size=… says otherwise"
            )
    with torch.device("meta"):
        model = build_model(config.model, 0 if config.model.from_ is not None else vocabulary, 0, pretrained=False)
    optimizer = build_optimizer(model, config.optimizer)
    acts, double = (
        activations(
            model,
            times * config.train.micro_batch_size,
            config.model.context,
            config.train.precision,
            config.model.activation_checkpointing,
            config.train.z_loss,
        )
        for times in (1, 2)
    )
    if config.train.batch_warmup:
        notes.append("train.batch_warmup: tokens and time are those of train.global_batch_size in every step")
    if config.model.compile:
        notes.append("model.compile: activations are those of eager kernels; compiled ones need less")
    return Subject(config, model, optimizer, acts, double, notes)


def estimate(subject: Subject, device: Device, ranks: int, stage: int | None = None, mfu: float = MFU) -> Estimate:
    """Plan a run on `ranks` GPUs. Raises UserError for a batch that doesn't divide, and for offloading."""
    config = copy.deepcopy(subject.config)
    if stage is not None:
        config.train.zero_stage = stage
    ds_config = deepspeed_config(config, ranks)
    zero = ds_config["zero_optimization"]
    for name in ("offload_optimizer", "offload_param"):
        if name in zero:
            raise UserError(
                f"deepspeed.zero_optimization.{name}: a plan knows GPU memory only; leave it out of what is planned"
            )
    parts = groups(subject.optimizer, ranks, config.train.zero_stage, int(float(zero.get("sub_group_size", ZERO3_SUB_GROUP))))
    plans = [group.plan(0) if group.rule == "celo2" else None for group in parts]

    def needed(micro_batch: int) -> Memory:
        return memory(
            subject.model,
            parts,
            plans,
            config,
            ds_config,
            ranks,
            subject.acts_of(micro_batch),
            gpu=not device.name.startswith("CPU"),
        )

    own = needed(config.train.micro_batch_size)
    largest = _largest(lambda micro: needed(micro).total <= device.memory)
    share = config.train.global_batch_size // ranks
    useful = max(
        (micro for micro in range(1, min(largest, share) + 1) if config.train.global_batch_size % (micro * ranks) == 0),
        default=0,
    )
    return Estimate(
        config,
        device,
        ranks,
        accumulation_steps(config, ranks),
        own,
        step_time(subject.model, parts, plans, config, ds_config, device, ranks, mfu),
        own.total <= device.memory,
        largest,
        useful,
        parts,
        plans,
    )


def _largest(fits) -> int:
    """The largest number from 1 for which `fits` holds (it holds for smaller ones then); 0 if there is none."""
    if not fits(1):
        return 0
    high = 1
    while high < 1 << 16 and fits(2 * high):
        high *= 2
    low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
