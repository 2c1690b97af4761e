"""Curves of one or more runs in one picture: a panel for each kind of figure, a colour for each run."""

import itertools
import math
from pathlib import Path

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.common.figures import new_figure, save_figure
from celo2_pretrain.train.record.metrics import read_metrics

STYLES = {"celo2": "-", "adamw": "--"}  # norms by rule
# Title and fields of each panel. A field ends in a rule where there is a curve for each.
PANELS = {
    "training loss (nats per token)": ("loss",),
    "validation loss (nats per token)": ("val_loss",),
    "learning rate": ("lr",),
    "gradient norm, before clipping": ("grad_norm",),
    "norm of the update": ("update_norm/celo2", "update_norm/adamw"),
    "norm of the weights": ("weight_norm/celo2", "weight_norm/adamw"),
    "tokens a second": ("tokens_per_s",),
    "seconds of a step waited for communication": ("time/communication",),
}
LOGARITHMIC = ("norm of the update", "gradient norm, before clipping")
AXES = {"step": "step", "tokens": "tokens", "time": "hours of training"}


def read_run(run: str) -> list[dict]:
    """The records of a run, each with `hours` of training until then. Raises UserError where there are none."""
    records = [
        record
        for record in read_metrics(run)
        if any(isinstance(loss := record.get(name), (int, float)) and math.isfinite(loss) for name in ("loss", "val_loss"))
    ]
    if not records:
        raise UserError(f"{run!r} has no metrics.jsonl with losses: give folders of runs")
    seconds = 0.0
    for record in records:
        seconds += record.get("seconds") or 0.0  # a validation has none: it stands where the training before it ended
        record["hours"] = seconds / 3600
    return records


def labels(runs: list[str]) -> list[str]:
    """The folders' names, or the paths where a name is there twice."""
    names = [Path(run).resolve().name for run in runs]
    return [name if names.count(name) == 1 else run for name, run in zip(names, runs)]


def curve(records: list[dict], field: str, x: str) -> list[tuple[float, float]]:
    where = {"time": "hours"}.get(x, x)
    return [
        (record[where], record[field])
        for record in records
        if all(record.get(name) is not None and math.isfinite(record[name]) for name in (where, field))
    ]


def top_of(losses: list[float]) -> float:
    """Where a panel of losses may end: the first few steps would squeeze the rest of the curve."""
    losses = sorted(losses)
    return losses[-1 - len(losses) // 30] if len(losses) < 30 else losses[-1 - len(losses) // 15]


def plot_loss(run: str, out: str) -> None:
    """Training (thin) and validation loss (thick, with points) of one run against its steps. Raises UserError."""
    records = read_run(run)
    figure, axes = new_figure(out, figsize=(7, 4.5))
    train, val = curve(records, "loss", "step"), curve(records, "val_loss", "step")
    if train:
        axes.plot(*zip(*train), color="C0", linewidth=0.8, alpha=0.5, label="training")
    if val:
        axes.plot(*zip(*val), color="C0", marker="o", markersize=3, label=f"validation, {val[-1][1]:.3f} at the end")
    axes.set_ylim(top=1.02 * top_of([loss for _, loss in train or val]))
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=labels([run])[0])
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, out)


def plot_runs(runs: list[str], out: str, title: str = "", x: str = "step") -> None:
    """Compare runs in the PNG, PDF or SVG `out`.

    Args:
        x: what the curves are drawn against, one of AXES.

    Raises UserError for a run without metrics, or without what `x` needs, or a kind of file that cannot be drawn.
    """
    read = [read_run(run) for run in runs]
    for run, records in zip(runs, read):
        if not any(curve(records, field, x) for field in ("loss", "val_loss")):
            raise UserError(f"--x {x}: the records of {run!r} don't tell it (an older run?): use --x step")
    # A panel that no run has anything for is left out: older runs have no norms, one rank has nothing to wait for.
    panels = {
        name: fields
        for name, fields in PANELS.items()
        if any(y for records in read for field in fields for _, y in curve(records, field, x))
    }
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = new_figure(out, nrows=rows, ncols=columns, squeeze=False, figsize=(5 * columns, 3.4 * rows))
    for axes, (name, fields) in itertools.zip_longest(grid.flat, panels.items(), fillvalue=(None, ())):
        if name is None:
            axes.set_visible(False)
            continue
        draw(axes, name, fields, read, labels(runs), x)
    figure.suptitle(title)
    save_figure(figure, out)


def draw(axes, name: str, fields: tuple[str, ...], read: list[list[dict]], names: list[str], x: str) -> None:
    """One panel."""
    tops = []
    for number, (records, label) in enumerate(zip(read, names)):
        for field in fields:
            points = curve(records, field, x)
            if not points:
                continue
            rule = field.partition("/")[2]
            if field == "val_loss":
                label = f"{label} ({points[-1][1]:.3f})"
            style = STYLES.get(rule, "-")
            axes.plot(
                *zip(*points),
                color=f"C{number}",
                linewidth=1.2,
                linestyle=style,
                marker="o" if len(points) < 12 else None,
                markersize=3,
                label=f"{label}, {rule}" if rule in STYLES else label,
            )
            tops.append(top_of([y for _, y in points]))
    if "loss" in name:
        low = axes.get_ylim()[0]
        axes.set_ylim(low, max(low + 1e-6, 1.02 * max(tops)))
    if name in LOGARITHMIC:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=None if "loss" in name else 0)
    axes.set_title(name, fontsize=10)
    axes.set_xlabel(AXES[x])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
