"""What changes over the steps of a run: the learning rate and the global batch, as functions of the step."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from celo2_pretrain.config import Config, Schedule, Train


@dataclass(frozen=True)
class Curve:
    """What the peak rates are multiplied by in each step: linear warm-up, then the schedule.

    cosine falls from the peak to `final` over all of the steps. wsd (warm-up, stable, decay: arXiv 2404.06395) stays at
    the peak and falls to `final` in the last part, `decay` of all steps. constant stays at the peak.
    """

    name: str
    shape: str
    final: float
    warmup: int  # steps
    begin: int  # the step in which the rate begins to fall
    end: int  # steps in all
    # A resume with another schedule moves the rate from `moved_from` to this curve in `move_steps` steps from `move` on.
    move: int = 0
    move_steps: int = 0
    moved_from: float = 0.0

    def at(self, step: int) -> float:
        """The factor of step `step`, from 0."""
        factor = self._of_the_schedule(step)
        if not self.move_steps or step >= self.move + self.move_steps:
            return factor
        return self.moved_from + (factor - self.moved_from) * max(0, step - self.move + 1) / self.move_steps

    def _of_the_schedule(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.name == "constant":
            return 1.0
        progress = min(1.0, max(0.0, (step - self.begin) / max(1, self.end - self.begin)))
        left = {
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
            "linear": 1 - progress,
            "sqrt": 1 - math.sqrt(progress),  # arXiv 2405.18392
        }[self.shape]
        return self.final + (1 - self.final) * left

    @property
    def decay_begin(self) -> int | None:
        """The step after which wsd's decay begins; None without one."""
        return self.begin if self.name == "wsd" and self.begin < self.end else None


def curve_of(keys: dict[str, Any]) -> Curve:
    """The curve of a run that begins with these keys: the schedule section, `steps` being a number."""
    total, warmup = keys["steps"], round(keys["warmup"] * keys["steps"])
    begins = {
        "cosine": warmup,
        "wsd": max(warmup, total - round(keys["decay"] * total)),
        "constant": total,
    }
    shape = keys["shape"] if keys["name"] == "wsd" else "cosine"
    return Curve(keys["name"], shape, keys["final"], warmup, begins[keys["name"]], total)


def lr_factor(step: int, schedule: Schedule, max_steps: int) -> float:
    """What the peak rates are multiplied by in step `step` (from 0) of a run that was never resumed with another length."""
    return LearningRate.of(schedule, max_steps).curve.at(step)


@dataclass(frozen=True)
class LearningRate:
    """The curve of a run, and the keys that it was asked for by. Both are in each checkpoint."""

    keys: dict[str, Any]
    curve: Curve

    @classmethod
    def of(cls, schedule: Schedule, max_steps: int) -> "LearningRate":
        """Of a run that begins."""
        keys = asdict(schedule) | {"steps": schedule.steps or max_steps}
        return cls(keys, curve_of(keys))

    @classmethod
    def restore(cls, saved: dict[str, Any]) -> "LearningRate":
        """What `saved()` gave. Raises TypeError, KeyError or ValueError for anything else."""
        keys, curve = asdict(Schedule(**saved["keys"])), Curve(**saved["curve"])
        if not all(
            type(number) in (int, float) for number in (keys["warmup"], keys["steps"], curve.at(0), curve.at(curve.end))
        ):
            raise ValueError
        return cls(keys, curve)

    def saved(self) -> dict[str, Any]:
        return {"keys": self.keys, "curve": asdict(self.curve)}

    def resumed(self, schedule: Schedule, max_steps: int, step: int) -> "LearningRate":
        """What goes on from `step` with a configuration that may ask for another schedule or length.

        The rate never jumps, and the run never warms up twice:
        - The warm-up keeps its number of steps.
        - A run at its peak stays there until the new schedule falls, or begins to fall at once.
        - Elsewhere the rate moves from where it is to the new schedule, linearly, in as many steps as a warm-up takes.
        """
        new, old = LearningRate.of(schedule, max_steps), self.curve
        if new.keys == self.keys or step < 1:
            return self if new.keys == self.keys else new
        curve, share = new.curve, new.keys["warmup"]
        if step >= old.warmup or share == self.keys["warmup"]:
            begin = old.warmup if curve.name == "cosine" else max(old.warmup, curve.begin)
            curve = replace(curve, warmup=old.warmup, begin=begin)
        if curve.warmup <= step < curve.end and old.at(step) == 1.0:
            curve = replace(curve, begin=max(curve.begin, step))
        if curve.at(step) != old.at(step):
            steps = min(max(curve.warmup, round(share * (curve.end - step))), max_steps - step)
            curve = replace(curve, move=step, move_steps=steps, moved_from=old.at(step - 1))
        return LearningRate(new.keys, curve)

    def describe_change(self, other: "LearningRate", step: int, peak: float) -> str | None:
        """What a run that is resumed at `step` does instead of `other`'s schedule; None where it is the same."""
        if self.keys == other.keys:
            return None
        curve = self.curve
        changed = ", ".join(
            f"{'length' if key == 'steps' else key} {other.keys[key]} -> {value}"
            for key, value in self.keys.items()
            if other.keys[key] != value
        )
        if curve == other.curve:
            what = "goes on as before"
        elif curve.move_steps and curve.move == step:
            reached = peak * curve.at(step + curve.move_steps - 1)
            what = (
                f"goes from {peak * curve.moved_from:.2g} to {reached:.2g} in {curve.move_steps} step(s), and then "
                "follows the new one"
            )
        elif step < curve.warmup:
            what = f"goes on warming up, to step {curve.warmup}"
        elif curve.at(step) != other.curve.at(step):  # without a warm-up
            what = f"goes from {peak * other.curve.at(step - 1):.2g} to {peak * curve.at(step):.2g} at once"
        elif curve.name == "constant" or curve.begin >= curve.end:
            what = f"stays at {peak:.2g}"
        else:
            what = f"falls from step {curve.begin} to step {curve.end}"
        return f"another schedule ({changed}): the learning rate {what}"


def rate_ends_early(config: Config, rate: LearningRate) -> str | None:
    """A warning where the rate is 0 before the last step, so that the steps after it learn nothing."""
    curve = rate.curve
    if curve.name == "constant" or curve.final > 0 or curve.end >= config.train.max_steps:
        return None
    return (
        f"the learning rate is 0 from step {curve.end} of {config.train.max_steps} on, where the schedule ends "
        f"(schedule.steps={config.schedule.steps}): schedule.steps=null makes it last as long as the run"
    )


class BatchSizes:
    """The global batch of each step: the stages of train.batch_warmup, then train.global_batch_size.

    A stage lasts its number of steps, or as many as give its number of tokens (the last one may overshoot).
    """

    def __init__(self, train: Train, context: int):
        self.sizes, self.ends, end = [], [], 0
        for stage in train.batch_warmup:
            size = stage["global_batch_size"]
            end += stage["steps"] if "steps" in stage else math.ceil(stage["tokens"] / (size * context))
            self.sizes.append(size)
            self.ends.append(end)
        self.last = train.global_batch_size

    def at(self, step: int) -> int:
        """Windows in step `step`, from 0."""
        return next((size for size, end in zip(self.sizes, self.ends) if step < end), self.last)

    def all(self) -> list[int]:
        return [*self.sizes, self.last]

    def set(self, engine, step: int) -> int:
        """Have DeepSpeed's engine take step `step` with its batch; returns the micro-batches a rank gives to it."""
        if engine.train_batch_size() != self.at(step):
            engine.set_train_batch_size(self.at(step))
            # A step is due when this count of micro-batches is a multiple of their number in a step.
            engine.micro_steps = 0
        return engine.gradient_accumulation_steps()
