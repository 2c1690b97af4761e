"""What does a folder of results show? results.csv, report.md and plots, from results.jsonl alone."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from statistics import median
from typing import Any

from celo2_pretrain.common.durable import write_atomically
from celo2_pretrain.common.errors import UserError

from . import analysis
from .analysis import Entry
from .runner import read_results
from .suite.tasks import TASKS

COLUMNS = ("task", "optimizer", "lr", "seed", "steps", "theta", "status", "loss", "seconds", "cpu_seconds", "error")
Entries = dict[tuple[str, str], Entry]


def write_report(folder: Path, baseline: str = "adamw") -> list[Path]:
    """Write everything into `folder` and return the files. Raises UserError where it has no results."""
    rows = read_results(folder)
    if not rows:
        raise UserError(f"{folder} has no results: first run celo2-pretrain meta-eval --out {folder}")
    order = {name: k for k, name in enumerate(TASKS)}
    rows.sort(key=lambda row: (order.get(row["task"], len(order)), _rank(row["optimizer"]), row["lr"], row["seed"]))
    found = analysis.entries(rows)
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "loss": "inf" if row["loss"] is None else row["loss"]} for row in rows)
    write_atomically(table := folder / "results.csv", buffer.getvalue())
    write_atomically(text := folder / "report.md", markdown(found, rows, baseline))
    from . import plots

    return [
        table,
        text,
        plots.curves(found, folder / "curves.png"),
        plots.rates(found, folder / "learning_rates.png"),
        plots.seeds(found, baseline, folder / "seeds.png"),
    ]


def _rank(optimizer: str) -> tuple:
    """Celo2 and its thetas first, then the baselines in the order of the optimizers' list."""
    from .optimizers import SPECS

    base = optimizer.partition("[")[0]
    return (list(SPECS).index(base) if base in SPECS else len(SPECS), optimizer)


def span_of(task: str) -> float | None:
    return TASKS[task].span if task in TASKS else None


# ---- tables -------------------------------------------------------------------------------------------------------


def markdown(found: Entries, rows: list[dict[str, Any]], baseline: str) -> str:
    """The report as a text of tables; found as `analysis.entries` returns it."""
    tasks = list(dict.fromkeys(task for task, _ in found))
    optimizers = list(dict.fromkeys(optimizer for _, optimizer in found))
    optimizers.sort(key=_rank)
    seeds, steps = sorted({row["seed"] for row in rows}), {row["task"]: row["steps"] for row in rows}
    failed, diverged = (sum(row["status"] == status for row in rows) for status in ("failed", "diverged"))
    parts = [
        "# Evaluation of optimizers",
        f"{len(rows)} runs: {len(tasks)} tasks, {len(optimizers)} optimizers, seeds {', '.join(map(str, seeds))}; "
        f"{diverged} diverged, {failed} failed. Every optimizer has the same steps, batches, initial weights, schedule "
        "(5 % warm-up, cosine to 0) and clipping (1.0). Rates are chosen by the mean over the same seeds that are "
        "shown. Lower is better everywhere.",
        "## Measure at the end, at each optimizer's best learning rate",
        "Mean ± deviation over seeds, and the rate. **Bold**: the best of a task. `*`: the best rate is the first or "
        "last of its grid.",
        _table(
            ["task (unit)", *optimizers],
            [[_task(task, steps[task]), *(_cell(found, task, o, optimizers) for o in optimizers)] for task in tasks],
        ),
        "## On how many tasks does the row beat the column?",
        _table(["", *optimizers], [[a, *("" if a == b else _wins(found, a, b) for b in optimizers)] for a in optimizers]),
    ]
    if baseline in optimizers:
        parts += [
            f"## Speed-up over {baseline}",
            f"Steps of {baseline}'s run over the steps until its final measure (at its best rate) is reached, on an "
            "unshortened schedule. —: not reached.",
            _table(
                ["task", *optimizers],
                [
                    *([task, *(_speed(found, task, o, baseline) for o in optimizers)] for task in tasks),
                    ["median", *(_median_speed(found, o, baseline) for o in optimizers)],
                ],
            ),
        ]
    parts += [
        "## Width of the good learning rates",
        f"Decades around the best rate in which the mean stays within {analysis.TOLERANCE:.0%} of the best (under "
        "reinforcement learning: of the range of returns), interpolated. >: up to the end of the grid.",
        _table(["task", *optimizers], [[task, *(_width(found, task, o) for o in optimizers)] for task in tasks]),
    ]
    if failed:
        parts += [
            "## Failed",
            _table(
                ["run", "error"],
                [
                    [f"{r['task']} {r['optimizer']} lr {r['lr']:.3g} seed {r['seed']}", r.get("error", "")]
                    for r in rows
                    if r["status"] == "failed"
                ],
            ),
        ]
    parts += [
        "## Plots",
        *(
            f"![{text}]({name})"
            for text, name in (
                ("Curves at the best rates", "curves.png"),
                ("Sensitivity to the learning rate", "learning_rates.png"),
                ("Spread over seeds", "seeds.png"),
            )
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _task(task: str, steps: int) -> str:
    unit = f", {TASKS[task].unit}" if task in TASKS else ""
    return f"{task} ({steps} steps{unit})"


def _cell(found: Entries, task: str, optimizer: str, optimizers: list[str]) -> str:
    entry = found.get((task, optimizer))
    if entry is None:
        return ""
    if not math.isfinite(entry.best):
        return "diverged"
    text = f"{entry.best:.4g}" + ("" if math.isnan(entry.deviation) else f" ± {entry.deviation:.2g}")
    if entry.best == min(found[task, o].best for o in optimizers if (task, o) in found):
        text = f"**{text}**"
    return f"{text} ({entry.best_lr:.2g}{'*' if entry.at_edge else ''})"


def _wins(found: Entries, a: str, b: str) -> str:
    wins, tasks = analysis.beats(found, a, b)
    return f"{wins} of {tasks}" if tasks else ""


def _speed(found: Entries, task: str, optimizer: str, baseline: str) -> str:
    if (task, optimizer) not in found or (task, baseline) not in found:
        return ""
    if not math.isfinite(found[task, baseline].best):
        return f"({baseline} diverged)"
    value = analysis.speed_up(found[task, optimizer], found[task, baseline])
    return "—" if value is None else f"{value:.2f} ×"


def _median_speed(found: Entries, optimizer: str, baseline: str) -> str:
    """Over the tasks that both have, with 0 for not reached."""
    values = [
        analysis.speed_up(entry, found[task, baseline]) or 0.0
        for (task, o), entry in found.items()
        if o == optimizer and (task, baseline) in found and math.isfinite(found[task, baseline].best)
    ]
    middle = median(values) if values else 0.0
    return f"{middle:.2f} ×" if middle >= 1 else "—"


def _width(found: Entries, task: str, optimizer: str) -> str:
    entry = found.get((task, optimizer))
    if entry is None:
        return ""
    decades, open_ended = analysis.width({lr: entry.mean(lr) for lr in entry.lrs}, span_of(task))
    return f"{'> ' if open_ended else ''}{decades:.2f}"
