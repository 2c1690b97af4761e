"""What do the results say? Best learning rates, who beats whom, speed-up over AdamW, how wide the good rates are."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

TOLERANCE = 0.02  # of the width


@dataclass
class Entry:
    """An optimizer on a task. Losses are measures at the end, inf for diverged and failed runs."""

    task: str
    optimizer: str
    losses: dict[float, dict[int, float]]  # lr → seed → loss
    curves: dict[float, dict[int, list[tuple[int, float]]]]  # lr → seed → (step, measure)
    steps: int

    def mean(self, lr: float) -> float:
        return fmean(self.losses[lr].values())

    @property
    def lrs(self) -> list[float]:
        return sorted(self.losses)

    @property
    def best_lr(self) -> float:
        """With the least mean over seeds; where all rates diverge on some seed, the middle one."""
        return min(self.lrs, key=lambda lr: (self.mean(lr), abs(self.lrs.index(lr) - len(self.lrs) // 2)))

    @property
    def best(self) -> float:
        return self.mean(self.best_lr)

    @property
    def deviation(self) -> float:
        """Over seeds, at the best rate; nan where there is one seed, or a diverged one."""
        values = list(self.losses[self.best_lr].values())
        return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan

    @property
    def at_edge(self) -> bool:
        """The best rate is the grid's first or last: a wider grid might find a better one."""
        return len(self.lrs) > 1 and self.best_lr in (self.lrs[0], self.lrs[-1])

    def points(self, lr: float | None = None) -> list[tuple[int, list[float]]]:
        """(step, each seed's measure) at the best (or a given) rate, at the steps that all seeds have."""
        curves = [dict(curve) for curve in self.curves[self.best_lr if lr is None else lr].values()]
        # A folder may hold curves of other spacing: the k-th points of two seeds need not be of the same step.
        shared = sorted(set.intersection(*map(set, curves))) if curves else []
        return [(step, [curve[step] for curve in curves]) for step in shared]

    def curve(self, lr: float | None = None) -> list[tuple[int, float]]:
        """(step, mean over seeds), as `points`."""
        return [(step, fmean(values)) for step, values in self.points(lr)]


def entries(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], Entry]:
    """(task, optimizer) → Entry, in the order of the rows."""
    found: dict[tuple[str, str], Entry] = {}
    for row in rows:
        entry = found.setdefault(
            (row["task"], row["optimizer"]),
            Entry(row["task"], row["optimizer"], defaultdict(dict), defaultdict(dict), row["steps"]),
        )
        entry.losses[row["lr"]][row["seed"]] = math.inf if row["loss"] is None else row["loss"]
        entry.curves[row["lr"]][row["seed"]] = [tuple(point) for point in row["curve"]]
    return found


def steps_to(curve: list[tuple[int, float]], loss: float) -> float | None:
    """The step at which a curve first reaches `loss`, interpolated between its points; None if it never does."""
    before = None
    for step, value in curve:
        if value <= loss:
            if before is None or before[1] <= value:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = step, value
    return None


def speed_up(entry: Entry, baseline: Entry) -> float | None:
    """Steps of the baseline's whole run over the steps to its best final loss; None if that is never reached.

    The schedule isn't shortened for it, so what a retuned shorter run would give is more.
    """
    steps = steps_to(entry.curve(), baseline.best)
    return baseline.steps / steps if steps else None


def width(losses: Mapping[float, float], span: float | None = None) -> tuple[float, bool]:
    """Decades of learning rate around the best with a loss within TOLERANCE, and whether the grid ends before they do.

    Args: mean loss by lr; `span`, what the tolerance is of (default: the best loss). The loss is taken as linear in
    log lr between two rates; towards a diverged one the width ends at the last finite rate.
    """
    lrs = sorted(losses)
    if not lrs or not math.isfinite(min(losses.values())):
        return 0.0, False
    centre = min(range(len(lrs)), key=lambda k: losses[lrs[k]])
    best = losses[lrs[centre]]
    limit = best + TOLERANCE * (abs(best) if span is None else span)
    total, open_ended = 0.0, False
    for direction in (-1, 1):
        k = centre
        while True:
            if not 0 <= k + direction < len(lrs):
                open_ended = True
                break
            here, there = losses[lrs[k]], losses[lrs[k + direction]]
            decades = abs(math.log10(lrs[k + direction] / lrs[k]))
            if there > limit:
                total += decades * (limit - here) / (there - here) if math.isfinite(there) else 0.0
                break
            total += decades
            k += direction
    return total, open_ended


def beats(found: Mapping[tuple[str, str], Entry], a: str, b: str) -> tuple[int, int]:
    """On how many of the tasks that both have is `a` better than `b` at its best rate (mean over seeds): (wins, tasks).

    A tie counts for neither.
    """
    tasks = [task for task, optimizer in found if optimizer == a and (task, b) in found]
    return sum(found[task, a].best < found[task, b].best for task in tasks), len(tasks)
