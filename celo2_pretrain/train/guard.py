"""What becomes of a step whose loss or gradient is bad: NaN or Inf, too large for float32's square, or a spike.

Such a gradient never reaches the accumulators: under ZeRO 1-3 DeepSpeed leaves the step out when the gradient's norm is not
finite, and elsewhere the optimizer does (`guarded` sees to the cases that neither would notice). The guard finds out after
the step, alike on all ranks, and says whether the run stops, goes on, or goes back to its last checkpoint.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import Config
from celo2_pretrain.optimizer.step.finite import LARGEST
from celo2_pretrain.train.checkpoints import checkpoint
from celo2_pretrain.train.checkpoints.select import find_damage, newest_good, read_state
from celo2_pretrain.train.record.metrics import Metrics

WINDOW = 64  # steps whose median a loss is compared with
FEWEST = 16  # before so many there is no comparison


def guarded(engine) -> None:
    """Spoil gradients whose norm is no number below 1.8e19 where DeepSpeed would clip and take them, so that the optimizer
    leaves the step out: without ZeRO, where an infinite norm clips everything to zeros, and in stage 3, which has
    larger norms."""

    def spoil(norm, grads) -> None:
        if not norm < LARGEST:
            for grad in grads:
                grad.fill_(math.nan)

    def clip() -> None:
        norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())
        spoil(norm, [p.grad for p in engine.module.parameters() if p.grad is not None])

    engine.clip_fp32_gradients = clip
    if engine.zero_optimization_stage() == 3:
        zero, unscale = engine.optimizer, engine.optimizer.unscale_and_clip_grads

        def unscale_and_clip_grads(sub_group_id, total_norm):
            unscale(sub_group_id, total_norm)
            spoil(total_norm / zero.loss_scale, [zero.fp32_partitioned_groups_flat[sub_group_id].grad])

        zero.unscale_and_clip_grads = unscale_and_clip_grads


def take_step(engine, number: int) -> None:
    """DeepSpeed's step `number`. Raises UserError where it gives up, on all ranks: fp16's loss scale can't fall further."""
    try:
        engine.step()
    except Exception as error:  # DeepSpeed raises no other kind
        if "loss scale already at minimum" not in str(error):
            raise
        raise UserError(
            f"training diverged: the gradient of step {number} overflows fp16 at the smallest loss scale "
            f"({engine.optimizer.loss_scale:g}); look at the data there, lower optimizer.lr, or take "
            f"train.precision=bf16, and resume from an earlier checkpoint"
        ) from None


@dataclass
class Found:
    """What a step calls for, and why."""

    what: Literal["fine", "left out", "spike", "roll back"]
    why: str = ""


class Guard:
    """Looks at each step. Every rank sees the same numbers, so that all come to the same end."""

    def __init__(
        self,
        engine,
        optimizer,
        config: Config,
        state: dict | None = None,
        resumed: Path | None = None,
        print_line: Callable[[str], None] = print,
        beat: Callable[[], None] = lambda: None,
    ):
        """`optimizer`: the one inside of DeepSpeed's; `resumed`: the checkpoint that the run began from, `state` what
        `state()` gave when it was written; `print_line`: is told of checkpoints that are passed over; `beat`: called while it
        reads them."""
        self.engine, self.optimizer, self.config, self.resumed = engine, optimizer, config, resumed
        self.print_line, self.beat = print_line, beat
        self.rollbacks, self.target = 0, None
        self.restore(state)

    def state(self) -> dict:
        """For a checkpoint's state.json: a resumed run then finds the same spikes."""
        return {"losses": list(self.losses), "in_a_row": self.in_a_row, "rollbacks": self.rollbacks, "left_out": self.left_out}

    def restore(self, state: dict | None) -> None:
        """Go on from a checkpoint's state. The number of rollbacks never goes down."""
        state = state or {"losses": [], "in_a_row": 0, "rollbacks": 0}
        self.losses, self.in_a_row = deque(state["losses"], WINDOW), state["in_a_row"]
        self.rollbacks = max(self.rollbacks, state["rollbacks"])
        self.left_out = state.get("left_out", 0)  # steps of this trajectory
        self._calls = self._calls_left_out()

    def look(self, step: int, mean: float) -> Found:
        """After step `step`, whose loss over all ranks was `mean` nats. Every rank calls it: for a spike they look for the
        checkpoint to go back to.

        Raises UserError when the run is to stop, on all ranks alike.
        """
        calls, self._calls = self._calls, self._calls_left_out()
        left_out = self._calls != calls
        self.left_out += left_out
        if left_out or not math.isfinite(mean):
            return self._bad(step, mean, left_out)
        self.in_a_row = 0
        found = self._compare(step, mean)
        if found.what != "roll back":
            self.losses.append(mean)
        return found

    def _calls_left_out(self) -> int:
        """Calls of the optimizer: a step of ZeRO-3 has several."""
        return self.engine.skipped_steps + getattr(self.optimizer, "skipped_steps", 0)

    def _bad(self, step: int, mean: float, left_out: bool) -> Found:
        size = self.config.train
        where = "the gradient" if math.isfinite(mean) else "the loss"
        why = f"NaN, Inf or overflow in {where} of step {step} (loss {mean:.4g})"
        if size.precision == "fp16" and math.isfinite(mean):
            return Found("left out", f"{why}: the loss scale falls")  # how DeepSpeed finds the scale
        self.in_a_row += 1
        if not left_out:  # the loss alone is bad
            why += "; its gradient was not, and the step was taken"
        advice = "look at the data there, or lower optimizer.lr"
        if size.on_nonfinite == "stop":
            raise UserError(
                f"training diverged: {why}{'; this step was not taken' if left_out else ''}. {advice.capitalize()}; "
                "train.on_nonfinite=skip leaves such steps out"
            )
        if self.in_a_row > size.max_skipped:
            raise UserError(
                f"training diverged: {why}, as in the {self.in_a_row - 1} steps before it (train.max_skipped="
                f"{size.max_skipped}); {advice}, and resume from an earlier checkpoint"
            )
        return Found("left out", why)

    def _compare(self, step: int, mean: float) -> Found:
        size = self.config.train
        if size.on_spike == "ignore" or len(self.losses) < FEWEST:
            return Found("fine")
        median = statistics.median(self.losses)
        if mean <= median + size.spike_nats:
            return Found("fine")
        why = f"loss {mean:.4g} at step {step} is a spike: {mean - median:.3g} above the median of the last {len(self.losses)}"
        if size.on_spike == "warn":
            return Found("spike", why)
        self.target = self._target()
        if self.target is None:
            return Found("spike", f"{why}; there is no checkpoint to go back to yet: training goes on")
        self.rollbacks += 1
        if self.rollbacks > size.max_rollbacks:
            raise UserError(
                f"{why}, after {size.max_rollbacks} rollbacks (train.max_rollbacks): lower optimizer.lr, or look "
                "at the data there"
            )
        return Found("roll back", why)

    def _target(self) -> Path | None:
        """The newest whole checkpoint, or else the one that the run was resumed from; None where there is neither."""
        checkpoint.finish(self.engine, self.config, self.print_line, self.beat)
        self.print_line("a spike: reading the newest checkpoint, to see whether it is whole")
        found = newest_good(self.config.run_dir, shared=True, print_line=self.print_line, beat=self.beat)
        if found is None and self.resumed and find_damage(self.resumed, shared=True, beat=self.beat) is None:
            return self.resumed
        return found

    def roll_back(self, description: dict, metrics: Metrics) -> int:
        """Load the checkpoint that `look` has found; returns its step. Data, which the caller counts, goes on after the
        spike's. Every rank calls it."""
        state = read_state(self.target, description)
        checkpoint.load(self.engine, self.target, bool(state["other_world"]))
        self.restore(state["extra"].get("guard"))
        metrics.rewind(state["step"])
        metrics.print_line(f"rolled back to {self.target}; going on with the data after the spike's")
        return state["step"]
