"""What changes over the steps of a run: the learning rate and the global batch, as functions of the step."""

import math

from celo2_pretrain.config import Schedule, Train


def lr_factor(step: int, schedule: Schedule, max_steps: int) -> float:
    """What the peak rates are multiplied by in step `step` (from 0): linear warm-up, then the schedule.

    cosine falls from the peak to `final` over all of the steps. wsd (warm-up, stable, decay: arXiv 2404.06395) stays at
    the peak and falls to `final` in the last part, `decay` of all steps. constant stays at the peak.

    Without schedule.steps all of it ends at max_steps, so a resumed run with more steps gets a longer schedule.
    """
    total = schedule.steps or max_steps
    warmup = round(schedule.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.name == "constant":
        return 1.0
    begin = warmup if schedule.name == "cosine" else max(warmup, total - round(schedule.decay * total))
    progress = min(1.0, max(0.0, (step - begin) / max(1, total - begin)))
    shape = "cosine" if schedule.name == "cosine" else schedule.shape
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "sqrt": 1 - math.sqrt(progress)}[
        shape
    ]  # 1-sqrt: arXiv 2405.18392
    return schedule.final + (1 - schedule.final) * left


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
