"""What a training run consists of once it can take steps, and the parts of a step: train, record, validate, save."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch

from celo2_pretrain.config import Config
from celo2_pretrain.data.loader import TrainLoader, ValLoader
from celo2_pretrain.model.loss import training_loss, validation_loss
from celo2_pretrain.train.checkpoints import checkpoint
from celo2_pretrain.train.faults.stop import Agreement
from celo2_pretrain.train.faults.watchdog import Watchdog
from celo2_pretrain.train.guard import Guard, take_step
from celo2_pretrain.train.rates import Rates
from celo2_pretrain.train.record.insight import Insight, perplexity
from celo2_pretrain.train.record.metrics import Metrics
from celo2_pretrain.train.record.profiler import Profiler
from celo2_pretrain.train.schedule import BatchSizes, LearningRate

LONG_SECONDS = 10.0  # a save that takes longer is announced the next time


@dataclass
class Trainer:
    """What the training loop works with and where it is; the same on every rank but for the rank's own windows."""

    engine: deepspeed.DeepSpeedEngine
    rates: Rates
    learning_rate: LearningRate
    config: Config
    loader: TrainLoader
    val_loader: ValLoader
    metrics: Metrics
    description: dict  # checkpoint.describe's
    insight: Insight
    profiler: Profiler
    guard: Guard
    watchdog: Watchdog
    agreement: Agreement
    step: int  # that was taken last
    samples: int  # windows that were seen

    def __post_init__(self):
        self.batch_sizes = BatchSizes(self.config.train, self.config.model.context)
        # Seconds that training waited for checkpoints: for the last one, since the last record, and in all.
        self.saving_once = self.saving = self.saving_in_all = 0.0
        self.begin_record()

    @property
    def finished(self) -> bool:
        return self.step == self.config.train.max_steps

    @property
    def tokens(self) -> int:
        """Tokens that were seen."""
        return self.samples * self.config.model.context

    def due(self, every: int) -> bool:
        """Whether what is done every so many steps is to be done after this one; all is, after the last step."""
        return self.step % every == 0 or self.finished

    @property
    def checkpoint_due(self) -> bool:
        """As `due`; and where wsd's decay begins, so that a longer run can go on from there."""
        return self.due(self.config.checkpoint.every) or self.step == self.learning_rate.curve.decay_begin

    def train_step(self) -> float:
        """Take the next step; this rank's loss, in nats a token."""
        number = self.step + 1
        self.rates.set(self.learning_rate.curve.at(self.step))
        micro_batches = self.batch_sizes.set(self.engine, self.step)
        self.profiler.before(number)
        self.insight.begin(number)
        loss = self.accumulate(number, micro_batches)
        self.insight.end()
        if traced := self.profiler.after(number):
            self.metrics.print_line(traced)
        self.samples += self.batch_sizes.at(self.step)
        self.step = number
        return loss

    def accumulate(self, number: int, micro_batches: int) -> float:
        """The mean loss of step `number`. DeepSpeed accumulates and clips, and steps after the last micro-batch."""
        engine, mark = self.engine, self.insight.mark
        total = torch.zeros((), device=engine.device)
        for micro in range(micro_batches):
            self.watchdog.beat(f"taking step {number}")
            mark("data")
            windows = self.loader.batch(self.samples, micro).to(engine.device)  # (micro-batch, context + 1)
            mark("forward")
            loss, cross_entropy = training_loss(engine, windows, self.config.train.z_loss)
            mark("backward")
            engine.backward(loss)
            mark("optimizer")
            take_step(engine, number)
            total += cross_entropy.detach() / micro_batches
        return float(total)

    def rolled_back(self, loss: float) -> bool:
        """Let the guard judge the step by `loss`, the mean over the ranks; whether it led back to a checkpoint."""
        found = self.guard.look(self.step, loss)
        if found.what != "fine":
            self.metrics.event({"step": self.step, "event": found.what, "why": found.why, "samples": self.samples})
        if found.what == "roll back":
            self.step = self.guard.roll_back(self.description, self.metrics)
            self.begin_record()
            return True
        if found.what != "left out":
            self.recent.append(loss)
        self.metrics.step(self.step)
        return False

    def begin_record(self) -> None:
        """What the next record tells of begins here."""
        self.recent: list[float] = []  # losses of the steps that were taken
        self.since, self.samples_then = time.monotonic(), self.samples

    def record(self) -> None:
        """Log the steps since the last record, unless all of them were left out."""
        if not self.recent:
            return
        mean = sum(self.recent) / len(self.recent)
        seconds, norm = time.monotonic() - self.since, self.engine.get_global_grad_norm()
        speed = (self.samples - self.samples_then) * self.config.model.context / seconds
        self.metrics.log(
            {
                "step": self.step,
                "loss": mean,
                "lr": self.rates.optimizer.param_groups[0]["lr"],
                "grad_norm": None if norm is None else float(norm),
                "samples": self.samples,
                "tokens": self.tokens,
                "global_batch_size": self.batch_sizes.at(self.step - 1),
                "epochs": self.loader.epochs(self.samples),
                "tokens_per_s": round(speed, 1),
                "seconds": round(seconds, 3),
                "skipped_steps": self.guard.left_out,
                "checkpoint_seconds": round(self.saving, 3),
                **self.insight.record(mean, speed),
            }
        )
        self.saving = 0.0
        self.begin_record()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What takes place here doesn't count in tokens_per_s."""
        began = time.monotonic()
        yield
        self.since += time.monotonic() - began

    def validate(self) -> bool:
        """False: abandoned, because the run is to stop (not after the last step, which has nothing left to do)."""

        def stopping() -> bool:
            self.watchdog.beat(f"validating after step {self.step}")
            return not self.finished and self.agreement.exchange()[1]

        loss = validation_loss(self.engine, self.val_loader, self.engine.device, stopping)
        if loss is not None:
            bits_per_byte = loss * (self.loader.mixture.val_tokens_per_byte / math.log(2))
            self.metrics.log(
                {
                    "step": self.step,
                    "val_loss": loss,
                    "val_bits_per_byte": bits_per_byte,
                    "val_perplexity": perplexity(loss),
                    "tokens": self.tokens,
                }
            )
        return loss is not None

    def save(self, validation_due: bool) -> tuple[Path | None, bool]:
        """(the checkpoint of this step, None where it couldn't be saved; whether the run is to stop)."""

        def waiting() -> None:
            self.watchdog.beat("waiting for a checkpoint to be copied")

        self.watchdog.beat(f"saving step {self.step}")
        if self.saving_once > LONG_SECONDS:
            self.metrics.print_line(f"saving step {self.step}; the save before took {self.saving_once:.0f} s")
        began = time.monotonic()
        extra = {
            "validation_due": validation_due,
            "guard": self.guard.state(),
            "data": self.loader.mixture.digest,
            "learning_rate": self.learning_rate.saved(),
        }
        saved = checkpoint.save(
            self.engine,
            self.config,
            self.description,
            self.step,
            self.samples,
            extra,
            self.metrics.print_line,
            waiting,
            self.learning_rate.curve.decay_begin,
        )
        stopping = self.agreement.exchange()[1]  # asked for while saving
        if (stopping or self.finished) and not checkpoint.finish(self.engine, self.config, self.metrics.print_line, waiting):
            saved = None
        self.saving_once = time.monotonic() - began
        self.saving, self.saving_in_all = self.saving + self.saving_once, self.saving_in_all + self.saving_once
        return saved, stopping
