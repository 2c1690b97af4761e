"""Does the loss hold when Celo2's accumulators have half or a quarter of the size? A small GPT, several seeds.

    python benchmarks/state_dtype.py --seeds 3      -> results/state_dtype.csv and .png

Each run is the driver's (`celo2-pretrain train`, configs/tiny_cpu.yaml, one process): the text of the installed Python,
the seed of weights and data order from 0 on. The dtypes of a seed share everything else. `--only fp8` trains these and
takes the others' losses from the CSV that is there.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from celo2_pretrain.common.figures import new_figure, save_figure
from celo2_pretrain.train.record.metrics import read_metrics

from report import RESULTS, write_csv

ROOT = Path(__file__).parents[1]
DTYPES = ("fp32", "bf16", "fp8")


def driver(*arguments: str, log: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    with open(log, "w") as file:
        done = subprocess.run(
            [sys.executable, "-m", "celo2_pretrain.cli", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed; see {log}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--parallel", type=int, default=2, help="runs at the same time")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/state_dtype")
    parser.add_argument("--only", choices=DTYPES, nargs="+", default=DTYPES, help="train these")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    data = ROOT / "data/python"
    if not (data / "index.json").exists():
        driver(
            "prepare",
            "--stdlib",
            "--out",
            str(data),
            "--vocab-size",
            "2048",
            "--tokenizer-mb",
            "2",
            log=args.runs / "prepare.log",
        )

    def train(case: tuple[str, int]) -> None:
        dtype, seed = case
        run = args.runs / f"{dtype}_{seed}"
        driver(
            "train",
            "--config",
            "configs/tiny_cpu.yaml",
            "--overwrite",
            f"run_dir={run}",
            f"data.path={data}",
            f"train.seed={seed}",
            f"train.max_steps={args.steps}",
            f"optimizer.state_dtype={dtype}",
            "eval.every=25",
            "eval.prompt=",
            "checkpoint.every=1000000",
            "checkpoint.any_world=false",
            log=args.runs / f"{dtype}_{seed}.log",
        )

    cases = [(dtype, seed) for seed in range(args.seeds) for dtype in DTYPES]
    kept: dict[tuple[str, int], list[tuple[int, float]]] = {}
    if any(dtype not in args.only for dtype in DTYPES):
        for row in csv.DictReader(open(RESULTS / "state_dtype.csv")):
            points = kept.setdefault((row["state_dtype"], int(row["seed"])), [])
            points.append((int(row["step"]), float(row["val_loss"])))
    chosen = [case for case in cases if case[0] in args.only]
    with ThreadPoolExecutor(args.parallel) as pool:
        for case, _ in zip(chosen, pool.map(train, chosen)):
            print(f"trained {case[0]}, seed {case[1]}", flush=True)

    rows, curves = [], {dtype: [] for dtype in DTYPES}
    for dtype, seed in cases:
        points = (
            [(r["step"], r["val_loss"]) for r in read_metrics(args.runs / f"{dtype}_{seed}") if "val_loss" in r]
            if dtype in args.only
            else kept[dtype, seed]
        )
        curves[dtype].append(points)
        rows += [{"state_dtype": dtype, "seed": seed, "step": step, "val_loss": round(loss, 5)} for step, loss in points]
    write_csv(RESULTS / "state_dtype.csv", rows)
    final = {dtype: [points[-1][1] for points in curves[dtype]] for dtype in DTYPES}
    for dtype, losses in final.items():
        print(
            f"{dtype}: validation loss {statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f} over {len(losses)} "
            f"seeds ({', '.join(f'{loss:.4f}' for loss in losses)})"
        )
    for dtype in DTYPES[1:]:
        gaps = [b - a for a, b in zip(final["fp32"], final[dtype])]
        print(f"{dtype} − fp32, seed by seed: {statistics.mean(gaps):+.4f} ({', '.join(f'{gap:+.4f}' for gap in gaps)})")

    figure, axes = new_figure(RESULTS / "state_dtype.png", figsize=(7, 4.5))
    for number, dtype in enumerate(DTYPES):
        for seed, points in enumerate(curves[dtype]):
            axes.plot(
                *zip(*points[1:]),
                color=f"C{number}",
                linewidth=1,
                linestyle=("-", "--", ":", "-.")[seed % 4],
                label=f"{dtype}: {statistics.mean(final[dtype]):.3f} ± {statistics.stdev(final[dtype]):.3f}"
                if seed == 0
                else None,
            )
    axes.set(
        xlabel="step",
        ylabel="validation loss (nats per token)",
        title="Celo2's accumulators of 16, 8 and 4 bytes a parameter (a line style is a seed)",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, RESULTS / "state_dtype.png", dpi=120)
    print(f"wrote {RESULTS / 'state_dtype.png'}")


if __name__ == "__main__":
    main()
