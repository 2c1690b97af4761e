"""Does Celo2 spike in long runs, and what makes it? `python benchmarks/stability.py`

A user saw loss spikes with Celo2 after 3,100 steps at 138M parameters. A small byte-level GPT (2 layers of 32) runs for 5,000 steps, with
and without: the paper's multiplier of 20 for AdamW's tensors, gradient clipping, weight decay. A *spike* is a training loss
above the median of the 200 steps before it by more than 6 times their median absolute deviation and by 0.3. Writes results/stability.csv
and .png; finished runs are kept, so that it goes on where it was interrupted.
"""
from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from pathlib import Path

import torch
from report import RESULTS, write_csv

from celo2_pretrain import Celo2, param_groups
from celo2_pretrain.meta.evaluation.models import GPT
from celo2_pretrain.meta.evaluation.tasks_text import CONTEXT, corpus, language_model
from celo2_pretrain.train.config import Schedule
from celo2_pretrain.train.schedule import lr_factor


def settings(seeds: int) -> list[dict]:
    """Celo2 as in the paper, with each switch turned; at four times the rate, with less and less on AdamW's tensors; AdamW."""
    paper = {"optimizer": "celo2", "lr": 1e-3, "multiplier": 20.0, "clip": 1.0, "weight_decay": 0.0}
    fast = paper | {"lr": 4e-3}
    runs = [paper, paper | {"multiplier": 2.0}, paper | {"clip": 0.0}, paper | {"weight_decay": 0.1},
            fast, fast | {"clip": 0.0}, fast | {"multiplier": 5.0}, fast | {"multiplier": 2.0},
            paper | {"optimizer": "adamw", "lr": 3e-3, "multiplier": 1.0}]
    return [run | {"seed": seed} for seed in range(seeds) for run in runs]


def run(setting: dict, steps: int) -> list[float]:
    """Train; the training loss of each step (fewer where it became NaN)."""
    torch.set_num_threads(1)
    torch.manual_seed(setting["seed"])
    problem = language_model(GPT(256, 32, 2, CONTEXT), corpus(pieces=False), batch=8, seed=setting["seed"])
    if setting["optimizer"] == "celo2":
        optimizer = Celo2(param_groups(problem.model), lr=setting["lr"], weight_decay=setting["weight_decay"],
                          adamw_lr_multiplier=setting["multiplier"])
    else:
        optimizer = torch.optim.AdamW(problem.model.parameters(), lr=setting["lr"], betas=(0.9, 0.95),
                                      weight_decay=setting["weight_decay"])
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


def spikes(losses: torch.Tensor, window: int = 200) -> tuple[int, float]:
    """How often a spike begins, and the largest rise over the median before it (after the warm-up's steps)."""
    before = losses.unfold(0, window, 1)[:-1]
    median = before.median(-1, keepdim=True).values
    deviation = (before - median).abs().median(-1).values
    rise = losses[window:] - median[:, 0]
    high = (rise > 6 * deviation) & (rise > 0.3)
    begins = high & ~torch.cat([torch.zeros(1, dtype=torch.bool), high[:-1]])
    return int(begins.sum()), rise.max().item()


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
    jobs, rows, curves = [(setting, args.steps, args.folder) for setting in settings(args.seeds)], [], []
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for number, path in enumerate(pool.imap(work, jobs), 1):
            kept = torch.load(path, weights_only=True)
            losses, setting = kept["losses"], kept["setting"]
            count, rise = spikes(losses)
            final = losses[-100:].mean().item() if len(losses) == args.steps else float("inf")
            rows.append({**setting, "final": round(final, 4), "spikes": count, "worst_rise": round(rise, 3),
                         "seconds": round(kept["seconds"], 1)})
            curves.append(losses)
            print(f"[{number}/{len(jobs)}] {name_of(setting)}: final {final:.4f}, {count} spikes, worst rise {rise:.2f}",
                  flush=True)
    write_csv(RESULTS / "stability.csv", rows)
    plot(rows, curves)


def plot(rows: list[dict], curves: list[torch.Tensor]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = [(row, curve) for row, curve in zip(rows, curves) if row["seed"] == 0]
    figure, axes = plt.subplots(2, (len(first) + 1) // 2, figsize=(12, 6), sharex=True, sharey=True, layout="constrained")
    for axis, (row, losses) in zip(axes.T.flat, first):
        axis.plot(losses, linewidth=0.4)
        decay = f", decay {row['weight_decay']:g}" if row["weight_decay"] else ""
        clip = f"clip {row['clip']:g}" if row["clip"] else "no clip"
        axis.set_title(f"{row['optimizer']} {row['lr']:g} × {row['multiplier']:g}, {clip}{decay}\n"
                       f"{row['spikes']} spikes, final {row['final']:.3f}", fontsize=9)
        axis.grid(alpha=0.3)
        axis.set_ylim(1.0, 4.0)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel("training loss (nats a byte)")
    figure.savefig(RESULTS / "stability.png", dpi=120)


if __name__ == "__main__":
    main()
