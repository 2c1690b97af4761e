"""Before the ranks meet: everything about a run that can be refused is refused here."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import numpy as np
import torch

from celo2_pretrain.common.console import print_line
from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import Config, load_config
from celo2_pretrain.data.documents import mask_documents
from celo2_pretrain.data.loader import TrainLoader, ValLoader
from celo2_pretrain.data.mixture import Mixture, open_mixture
from celo2_pretrain.deepspeed_config import deepspeed_config
from celo2_pretrain.model.build import build_model, vocab_rows
from celo2_pretrain.model.build_optimizer import build_optimizer
from celo2_pretrain.model.flops import flops_per_token
from celo2_pretrain.train.checkpoints import checkpoint, select
from celo2_pretrain.train.checkpoints.staging import check_staging
from celo2_pretrain.train.faults.failures import join_and_look
from celo2_pretrain.train.faults.run_lock import RunLock
from celo2_pretrain.train.record.trackers import check_installed
from celo2_pretrain.train.schedule import BatchSizes, LearningRate, rate_ends_early
from celo2_pretrain.train.start import take_over
from celo2_pretrain.train.start.preflight import check_node, check_run_dir, warn
from celo2_pretrain.train.start.ranks import world_from_environment
from celo2_pretrain.train.start.take_over import TakeOver


@dataclass
class Start:
    """Where a run begins: at step 0, or from a checkpoint."""

    checkpoint: Path | None = None
    own: bool = False  # the checkpoint lies in the run's own folder
    take_over: TakeOver | None = None  # from the checkpoint, which is AdamW's
    verified: bool = False  # all of the checkpoint's files have been read
    step: int = 0
    samples: int = 0
    other_world: list[str] = field(default_factory=list)  # what of the world is not as it was when the checkpoint was written
    extra: dict[str, Any] = field(default_factory=dict)  # of the checkpoint's state.json

    @property
    def validation_due(self) -> bool:
        """Whether a validation comes before the next step."""
        return self.step == 0 or self.extra.get("validation_due", False)

    def learning_rate(self, config: Config) -> tuple[LearningRate, str | None]:
        """Of the run that begins here; and in words what changes, where a resumed run asks for another schedule."""
        if self.checkpoint is None:
            return LearningRate.of(config.schedule, config.train.max_steps), None
        earlier = self.earlier_rate(config)
        rate = earlier.resumed(config.schedule, config.train.max_steps, self.step)
        changed, decay_begin = rate.describe_change(earlier, self.step, config.optimizer.lr), earlier.curve.decay_begin
        if changed and rate.curve.move == self.step and decay_begin is not None:
            before = [path for path in select.in_order(self.checkpoint.parent) if select.step_of(path) <= decay_begin]
            changed += f"; {before[-1]} is from before the decay: --resume goes on from there at the peak" if before else ""
        return rate, changed

    def earlier_rate(self, config: Config) -> LearningRate:
        """Of the run that wrote the checkpoint. One of an earlier version doesn't say: its run's config.yaml does."""
        if "learning_rate" in self.extra:
            try:
                return LearningRate.restore(self.extra["learning_rate"])
            except (TypeError, KeyError, ValueError, AttributeError, ZeroDivisionError, OverflowError):
                raise select.damaged(self.checkpoint, "state.json's learning_rate is not of this program's form") from None
        try:
            config = load_config(str(self.checkpoint.parents[1] / "config.yaml"))
        except UserError:  # none there, or of another version
            pass
        return LearningRate.of(config.schedule, config.train.max_steps)


@dataclass
class Prepared:
    """A run that has passed every check which one rank can make alone, and what the checks have made."""

    config: Config
    rank: int
    world_size: int
    ds_config: dict[str, Any]  # DeepSpeed's
    mixture: Mixture
    loader: TrainLoader
    val_loader: ValLoader
    description: dict[str, Any]  # checkpoint.describe's
    start: Start
    learning_rate: LearningRate
    changed_schedule: str | None  # in words, where a resumed run has another
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    parameters: int  # of the whole model
    flops_per_token: float

    def print_line(self, text: str) -> None:
        """Print a line on rank 0."""
        if self.rank == 0:
            print_line(text)


def prepare(
    config: Config, resume: str | None, overwrite: bool, lock: RunLock, asked: TakeOver | None = None
) -> Prepared | None:
    """Check and make what needs no other rank; None where the run is at its last step already (with `resume="auto"`).

    Args: as of `train`. Raises UserError, alike on every rank. Only `resume="auto"` joins the ranks here: they share the
    reading of checkpoints.
    """
    rank, world_size = world_from_environment()
    check_installed(config)
    check_staging(config.checkpoint.staging, world_size)
    check_run_dir(config.run_dir)
    ds_config = deepspeed_config(config, world_size)
    mixture = open_mixture(config.data.path, config.data.mixture)
    index, size, context = mixture.index, config.train, config.model.context
    vocab_rows(config.model, index["vocab_size"])
    loader = TrainLoader(
        mixture, context, size.micro_batch_size, max(BatchSizes(size, context).all()), size.seed, rank, world_size
    )
    val_loader = ValLoader(mixture, context, size.micro_batch_size, config.eval.sequences, rank, world_size)
    description = checkpoint.describe(config, index, world_size)

    start = find_start(config, resume, overwrite, lock, description, mixture, asked)
    if start is None:
        return None
    learning_rate, changed_schedule = start.learning_rate(config)
    if rank == 0 and (warning := rate_ends_early(config, learning_rate)):
        warn(warning)
    check_node(config, index, replaced=overwrite and not start.own)
    model = build_seeded(config, index)
    parameters, per_token = sum(p.numel() for p in model.parameters()), flops_per_token(model, context)
    optimizer = build_optimizer(model, config.optimizer)  # reads the weights file, so it may refuse too
    return Prepared(
        config,
        rank,
        world_size,
        ds_config,
        mixture,
        loader,
        val_loader,
        description,
        start,
        learning_rate,
        changed_schedule,
        model,
        optimizer,
        parameters,
        per_token,
    )


def find_start(
    config: Config,
    resume: str | None,
    overwrite: bool,
    lock: RunLock,
    description: dict[str, Any],
    mixture: Mixture,
    asked: TakeOver | None,
) -> Start | None:
    """The checkpoint that `resume` or `asked` stands for, checked against this run; None where nothing is left to do."""
    print_once = print_line if lock.rank == 0 else lambda text: None
    automatic, checkpoints = resume == select.AUTO, Path(config.run_dir, "checkpoints")
    if automatic:
        lock.take()
        join_and_look(config.run_dir)  # the ranks share the reading
        found = select.automatic(config.run_dir, overwrite, print_once)
        if found is None:
            print_once(f"{config.run_dir} has no checkpoint yet: beginning anew")
        else:
            asked = None  # it was taken over before
    else:
        found = select.find(resume) if resume else None
    if asked:
        start = Start(take_over.find(asked.path), take_over=asked)
        free = ("optimizer.", *select.OF_THE_WORLD)
        description = {name: value for name, value in description.items() if not name.startswith(free)}
        found = start.checkpoint
    else:
        start = Start(found, own=found is not None and found.parent.resolve() == checkpoints.resolve(), verified=automatic)
    if start.own and not select.NAMED.fullmatch(found.name):
        raise UserError(
            f"{found} has no checkpoint's name, as one that was given up: rename it to step_ and its step to go on from it"
        )
    if found:
        read_start(start, description, mixture.digest, lock.rank)
        if start.step >= config.train.max_steps and automatic and not asked:
            print_once(f"{found} is at step {start.step} of {config.train.max_steps}: nothing left to do")
            dist.destroy_process_group()
            return None
        if start.step >= config.train.max_steps:
            raise UserError(
                f"{found} is already at step {start.step}, train.max_steps is {config.train.max_steps}: to train on, "
                f"give a larger one, for example train.max_steps={2 * start.step}"
            )
    if checkpoints.exists() and not (start.own or overwrite or automatic):
        raise UserError(
            f"run_dir {config.run_dir!r} already holds a run: pass --resume to continue it, --overwrite to "
            f"replace it, or choose another run_dir=…"
        )
    return start


def read_start(start: Start, description: dict[str, Any], data: str, rank: int) -> None:
    """Fill in what the checkpoint's state.json says; warn where `data`, the digest of this run's, is another."""
    state = select.read_state(start.checkpoint, description)
    start.step, start.samples = state["step"], state["samples"]
    start.other_world, start.extra = state["other_world"], state["extra"]
    if rank == 0 and start.extra.get("data") not in (None, data):  # None: an older checkpoint's
        warn(
            f"the data is not what {start.checkpoint} was trained on (prepared again, or mixed otherwise): its order is "
            "another from here on, so that some windows come again and some never"
        )


def build_seeded(config: Config, index: dict[str, Any]) -> torch.nn.Module:
    """The model with the initial weights that train.seed stands for, the same on every rank."""
    set_seeds(config.train.seed, 0)
    model = build_model(config.model, index["vocab_size"], index["eos_id"])
    if config.data.mask_documents:
        mask_documents(model, index["eos_id"])
    return model


def set_seeds(seed: int, rank: int) -> None:
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)
