"""Does Celo2 spike in long runs, and what makes it? `python benchmarks/stability.py`

Loss spikes were reported for Celo2 after 3,100 steps at 138M parameters. A small byte-level GPT (2 layers of 32) runs for
5,000 steps, with and without: the paper's multiplier of 20 for AdamW's tensors, gradient clipping, weight decay (of the
hidden matrices, or of all tensors); and at four times the rate.

A *spike* is a training loss above the median of the 200 steps before it by more than 6 times their median absolute
deviation and by 0.3. Batches of 8 windows differ in how hard they are, and all settings see the same ones: a spike is the
setting's *own* where it also rises by 0.3 more than the settings' median rise on that batch. A *lasting* rise is that
of the mean of 50 steps above the least such mean before. Writes results/stability.csv and .png; finished runs are kept,
so that it goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from celo2_pretrain import Celo2, param_groups
from celo2_pretrain.common.figures import new_figure, save_figure
from celo2_pretrain.config import Schedule
from celo2_pretrain.meta.evaluation.suite.models import GPT
from celo2_pretrain.meta.evaluation.suite.text import CONTEXT, corpus, language_model
from celo2_pretrain.train.schedule import lr_factor

from report import RESULTS, write_csv

RISE, WINDOW = 0.3, 200  # nats a byte, steps


def settings(seeds: int) -> list[dict]:
    """Celo2 as in the paper, with each switch turned; at four times the rate, likewise; AdamW."""
    paper = {"optimizer": "celo2", "lr": 1e-3, "multiplier": 20.0, "clip": 1.0, "weight_decay": 0.0, "decay_all": False}
    fast = paper | {"lr": 4e-3}
    runs = [
        paper,
        paper | {"multiplier": 2.0},
        paper | {"clip": 0.0},
        paper | {"weight_decay": 0.1},
        paper | {"weight_decay": 0.1, "decay_all": True},
        fast,
        fast | {"clip": 0.0},
        fast | {"multiplier": 5.0},
        fast | {"multiplier": 2.0},
        paper | {"optimizer": "adamw", "lr": 3e-3, "multiplier": 1.0},
    ]
    return [run | {"seed": seed} for seed in range(seeds) for run in runs]


def run(setting: dict, steps: int) -> list[float]:
    """Train; the training loss of each step (fewer where it became NaN)."""
    torch.set_num_threads(1)
    torch.manual_seed(setting["seed"])
    problem = language_model(GPT(256, 32, 2, CONTEXT), corpus(pieces=False), batch=8, seed=setting["seed"])
    if setting["optimizer"] == "celo2":
        optimizer = Celo2(
            param_groups(problem.model),
            lr=setting["lr"],
            adamw_lr_multiplier=setting["multiplier"],
            weight_decay=setting["weight_decay"],
            adamw_weight_decay=setting["weight_decay"] if setting["decay_all"] else 0.0,
        )
    else:
        optimizer = torch.optim.AdamW(
            problem.model.parameters(), lr=setting["lr"], betas=(0.9, 0.95), weight_decay=setting["weight_decay"]
        )
    peaks, losses = [group["lr"] for group in optimizer.param_groups], []
    for step in range(steps):
        factor = lr_factor(step, Schedule(warmup=0.05, final=0.0), steps)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * factor
        problem.model.zero_grad(set_to_none=True)
        loss = problem.loss(step)
        losses.append(loss.item())
        if not loss.isfinite():
            break
        loss.backward()
        if setting["clip"]:
            torch.nn.utils.clip_grad_norm_(problem.model.parameters(), setting["clip"])
        optimizer.step()
    return losses


def rises(losses: torch.Tensor, window: int = WINDOW) -> tuple[torch.Tensor, torch.Tensor]:
    """Each step's loss above the median of the `window` steps before it (from step `window` on), and whether it is high."""
    before = losses.unfold(0, window, 1)[:-1]
    median = before.median(-1, keepdim=True).values
    deviation = (before - median).abs().median(-1).values
    rise = losses[window:] - median[:, 0]
    return rise, (rise > 6 * deviation) & (rise > RISE)


def lasting_rise(losses: torch.Tensor, window: int = 50) -> float:
    """How far the mean of `window` steps rises above the least such mean before it."""
    means = losses.unfold(0, window, 1).mean(-1)
    return (means - means.cummin(0).values).max().item()


def table(runs: list[tuple[dict, torch.Tensor]], steps: int) -> list[dict]:
    """A row for each (setting, losses); a run that became NaN has fewer losses than `steps`."""
    typical, risen = {}, [rises(losses) for _, losses in runs]
    for seed in {setting["seed"] for setting, _ in runs}:
        same = [
            F.pad(rise, (0, steps - WINDOW - len(rise)), value=torch.nan)
            for (setting, _), (rise, _) in zip(runs, risen)
            if setting["seed"] == seed
        ]
        typical[seed] = torch.stack(same).nanmedian(0).values
    rows = []
    for (setting, losses), (rise, high) in zip(runs, risen):
        begins = high & ~F.pad(high[:-1], (1, 0))
        own = begins & (rise - typical[setting["seed"]][: len(rise)] > RISE)
        final = losses[-100:].mean().item() if len(losses) == steps and losses.isfinite().all() else float("inf")
        rows.append(
            {
                **setting,
                "final": round(final, 4),
                "spikes": int(begins.sum()),
                "own_spikes": int(own.sum()),
                "lasting_rise": round(lasting_rise(losses[losses.isfinite()]), 3),
            }
        )
    return rows


def name_of(setting: dict) -> str:
    return "_".join(f"{key}={value}" for key, value in setting.items())


def work(job: tuple[dict, int, Path]) -> str:
    setting, steps, folder = job
    path, began = folder / f"{name_of(setting)}.pt", time.perf_counter()
    if not path.exists():
        losses = torch.tensor(run(setting, steps))
        part = path.with_suffix(".part")
        torch.save({"setting": setting, "losses": losses, "seconds": time.perf_counter() - began}, part)
        os.replace(part, path)
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=Path("runs/stability"), help="finished runs' losses")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs, runs = [(setting, args.steps, args.folder) for setting in settings(args.seeds)], []
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for number, path in enumerate(pool.imap(work, jobs), 1):
            kept = torch.load(path, weights_only=True)
            runs.append((kept["setting"], kept["losses"]))
            print(f"[{number}/{len(jobs)}] {name_of(kept['setting'])}: {kept['seconds']:.0f} s", flush=True)
    rows = table(runs, args.steps)
    write_csv(RESULTS / "stability.csv", rows)
    summary(rows)
    plot(rows, [losses for _, losses in runs])


def summary(rows: list[dict]) -> None:
    """Print a line for each setting, over its seeds."""
    print("| setting | final loss | spikes | own | worst lasting rise |\n| --- | --- | --- | --- | --- |")
    groups = {}
    for row in rows:
        groups.setdefault(title(row), []).append(row)
    for name, group in groups.items():
        final = torch.tensor([row["final"] for row in group])
        spread = f" ± {final.std():.3f}" if len(group) > 1 else ""
        print(
            f"| {name} | {final.mean():.3f}{spread} | {sum(row['spikes'] for row in group)} | "
            f"{sum(row['own_spikes'] for row in group)} | {max(row['lasting_rise'] for row in group):.2f} |"
        )


def title(row: dict) -> str:
    decay = f", decay {row['weight_decay']:g}{' on all' if row['decay_all'] else ''}" if row["weight_decay"] else ""
    clip = "" if row["clip"] else ", no clipping"
    multiplier = f" × {row['multiplier']:g}" if row["optimizer"] == "celo2" else ""
    return f"{row['optimizer']} {row['lr']:g}{multiplier}{clip}{decay}"


def plot(rows: list[dict], curves: list[torch.Tensor]) -> None:
    """Every step's loss of the first seed."""
    first = [(row, curve) for row, curve in zip(rows, curves) if row["seed"] == 0]
    columns = (len(first) + 1) // 2
    figure, axes = new_figure(
        RESULTS / "stability.png", nrows=2, ncols=columns, figsize=(3 * columns, 6), sharex=True, sharey=True
    )
    for axis in axes.flat[len(first) :]:
        axis.set_visible(False)
    for axis, (row, losses) in zip(axes.flat, first):
        axis.plot(losses, linewidth=0.3, color="C0", alpha=0.6)
        axis.plot(range(49, len(losses)), losses.unfold(0, 50, 1).mean(-1), linewidth=1.2, color="black")
        axis.set_title(f"{title(row)}\nfinal {row['final']:.3f}, {row['spikes']} spikes ({row['own_spikes']} own)", fontsize=9)
        axis.grid(alpha=0.3)
        axis.set_ylim(1.0, 4.0)
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel("training loss (nats a byte);\nblack: mean of 50 steps")
    save_figure(figure, RESULTS / "stability.png", dpi=110)


if __name__ == "__main__":
    main()
