"""Pictures of the results: curves, sensitivity to the learning rate, spread over seeds; a panel for each task."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean

from ...common.figures import new_figure, save_figure
from .analysis import Entry
from .suite.tasks import TASKS

Entries = dict[tuple[str, str], Entry]


def _panels(found: Entries, title: str, path: Path):
    """(figure, {task: axes}, {optimizer: colour}) of the picture `path`."""
    tasks = list(dict.fromkeys(task for task, _ in found))
    optimizers = list(dict.fromkeys(optimizer for _, optimizer in found))
    columns = min(4, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    size = (1 + 4 * max(2, columns), 0.8 + 3.1 * rows)  # one panel alone is too narrow for the title and the legend
    figure, axes = new_figure(path, nrows=rows, ncols=columns, squeeze=False, figsize=size)
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    panels = dict(zip(tasks, axes.flat))
    for task, axis in panels.items():
        axis.set_title(task, fontsize=10)
        axis.set_ylabel(TASKS[task].unit if task in TASKS else "loss", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    return figure, panels, {name: f"C{k % 10}" for k, name in enumerate(optimizers)}


def _save(figure, path: Path, legend: bool = True) -> Path:
    if legend:
        labelled = {}
        for axis in figure.axes:
            handles, labels = axis.get_legend_handles_labels()
            labelled.update(zip(labels, handles))
        columns = max(1, min(len(labelled), int(figure.get_figwidth() / 2.2)))  # "celo2-base[constructed]" is 2.2 inches wide
        figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=columns)
    save_figure(figure, path, dpi=80)
    return path


def curves(found: Entries, path: Path) -> Path:
    """The measure over steps at each optimizer's best rate: mean over seeds, and a band from least to greatest."""
    figure, panels, colours = _panels(found, "At each optimizer's best learning rate: mean and range of the seeds", path)
    limits: dict[str, list[float]] = {task: [] for task in panels}
    for (task, optimizer), entry in found.items():
        points = entry.points()
        if not points or not math.isfinite(entry.best):
            continue
        steps, seeds = zip(*points)  # seeds: at each step, each seed's measure
        means = list(map(fmean, seeds))
        axis, colour = panels[task], colours[optimizer]
        axis.plot(steps, means, color=colour, label=f"{optimizer}", linewidth=1.4)
        axis.fill_between(steps, list(map(min, seeds)), list(map(max, seeds)), color=colour, alpha=0.15, linewidth=0)
        axis.set_xlabel("step", fontsize=8)
        limits[task] += means[len(means) // 10 :]
    for task, values in limits.items():  # the first steps would squeeze the rest
        if values:
            margin = 0.05 * (max(values) - min(values)) or 0.1
            panels[task].set_ylim(min(values) - margin, max(values) + margin)
    return _save(figure, path)


def rates(found: Entries, path: Path) -> Path:
    """The measure at the end over the learning rate, with the range of the seeds; diverged rates at the upper edge."""
    from matplotlib.ticker import LogLocator

    figure, panels, colours = _panels(found, "Sensitivity to the rate: mean and range of the seeds; ×: diverged", path)
    tops = {}
    for task in panels:
        finite = sorted(
            value
            for (t, _), entry in found.items()
            if t == task
            for value in map(entry.mean, entry.lrs)
            if math.isfinite(value)
        )
        if finite:  # far outliers would squeeze the rest; but every optimizer's best is shown
            low, middle = finite[0], finite[len(finite) // 2]
            bests = max(entry.best for (t, _), entry in found.items() if t == task and math.isfinite(entry.best))
            height = max(min(finite[-1] - low, 3 * (middle - low)), bests - low) or 1.0
            tops[task] = low + 1.08 * height
            panels[task].set_ylim(low - 0.06 * height, tops[task])
    for (task, optimizer), entry in found.items():
        axis, colour = panels[task], colours[optimizer]
        fine = [lr for lr in entry.lrs if math.isfinite(entry.mean(lr))]
        means = [entry.mean(lr) for lr in fine]
        ranges = [
            [m - min(entry.losses[lr].values()) for lr, m in zip(fine, means)],
            [max(entry.losses[lr].values()) - m for lr, m in zip(fine, means)],
        ]
        axis.errorbar(
            fine, means, yerr=ranges, color=colour, marker="o", markersize=3, linewidth=1.2, elinewidth=0.8, label=optimizer
        )
        bad = [lr for lr in entry.lrs if lr not in fine]
        if bad and task in tops:
            axis.plot(bad, [tops[task]] * len(bad), "x", color=colour, clip_on=False)
        axis.set_xscale("log")
        axis.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))  # within a decade they are labelled, and nine overlap
        axis.set_xlabel("learning rate of hidden matrices", fontsize=8)
    return _save(figure, path)


def seeds(found: Entries, baseline: str, path: Path) -> Path:
    """Every seed's measure at the end, at the best rates; a bar is the mean."""
    figure, panels, colours = _panels(found, "At each optimizer's best learning rate: all seeds (bar: mean)", path)
    names = list(colours)
    for (task, optimizer), entry in found.items():
        values = [value for value in entry.losses[entry.best_lr].values() if math.isfinite(value)]
        axis, place = panels[task], names.index(optimizer)
        axis.plot([place] * len(values), values, "o", color=colours[optimizer], markersize=4, alpha=0.7)
        if values:
            axis.hlines(sum(values) / len(values), place - 0.3, place + 0.3, color=colours[optimizer], linewidth=2)
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    for task, axis in panels.items():
        if (task, baseline) in found and math.isfinite(found[task, baseline].best):
            axis.axhline(found[task, baseline].best, color="grey", linewidth=0.8, linestyle=":")
    return _save(figure, path, legend=False)
