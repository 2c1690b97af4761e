"""How long does training wait for a checkpoint, with and without a staging folder?

    python benchmarks/checkpoint.py                          a model of about 30 M parameters, one rank
    python benchmarks/checkpoint.py --staging /mnt/nvme/x    another staging folder than /dev/shm

The two ways take turns; between two saves there are steps of training, in which the copy goes on. Shown are the median and the
quartiles of the seconds that `checkpoint.save` takes, of a step while a copy is under way and of one while none is, and of the
ratios within a pair.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import deepspeed
import torch

from celo2_pretrain.config import load_config
from celo2_pretrain.deepspeed_config import deepspeed_config
from celo2_pretrain.model.build import build_model
from celo2_pretrain.model.build_optimizer import build_optimizer
from celo2_pretrain.model.loss import training_loss
from celo2_pretrain.train.checkpoints import checkpoint
from celo2_pretrain.train.start.ranks import join_ranks

from report import RESULTS, device_name, quartiles, write_csv

VOCABULARY = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--staging", default="/dev/shm")
    parser.add_argument("--folder", help="where the run lies (default: the system's folder for temporary files)")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV (default: benchmarks/results)")
    args = parser.parse_args()

    join_ranks()
    config = load_config(
        None,
        [
            f"model.width={args.width}",
            f"model.layers={args.layers}",
            "model.heads=8",
            "model.context=64",
            "train.micro_batch_size=1",
            "train.global_batch_size=1",
            "optimizer.name=celo2_base",
            "checkpoint.keep_last=1",
        ],
    )
    model = build_model(config.model, VOCABULARY, 0)
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = build_optimizer(model, config.optimizer)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config, 1))
    windows = torch.randint(VOCABULARY, (1, 65), device=engine.device)

    def step() -> float:
        begin = time.perf_counter()
        engine.backward(training_loss(engine, windows)[0])
        engine.step()
        return time.perf_counter() - begin

    step()
    seconds: dict[str, list[float]] = {name: [] for name in ("plain save", "staged save", "step beside a copy", "step alone")}
    with tempfile.TemporaryDirectory(dir=args.folder) as run, tempfile.TemporaryDirectory(dir=args.staging) as staging:
        config.run_dir = run
        staged = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, staging=staging))
        for pair in range(args.pairs + 1):  # the first one warms up
            for name, way in (("plain save", config), ("staged save", staged)):
                begin = time.perf_counter()
                checkpoint.save(engine, way, {}, 2 * pair + (way is staged) + 1, 0, {})
                waited = time.perf_counter() - begin
                beside = step()
                checkpoint.finish(engine, way)
                alone = step()
                if pair:
                    seconds[name].append(waited)
                    if way is staged:
                        seconds["step beside a copy"].append(beside)
                        seconds["step alone"].append(alone)
        size = sum(path.stat().st_size for path in Path(run).rglob("*") if path.is_file())
    base = {
        "plain save": "plain save",
        "staged save": "plain save",
        "step alone": "step alone",
        "step beside a copy": "step alone",
    }
    rows = []
    for name, found in seconds.items():
        low, middle, high = quartiles([a / b for a, b in zip(found, seconds[base[name]])])
        rows.append(
            {
                "device": device_name(engine.device),
                "parameters": parameters,
                "checkpoint_mb": round(size / 1e6),
                "what": name,
                "seconds": round(statistics.median(found), 3),
                "ratio": round(middle, 3),
                "ratio_q1": round(low, 3),
                "ratio_q3": round(high, 3),
                "pairs": args.pairs,
            }
        )
        print(f"{name:20s} {rows[-1]['seconds']:8.3f} s   {middle:6.2f} x {base[name]} (quartiles {low:.2f} to {high:.2f})")
    write_csv(args.out / "checkpoint.csv", rows)


if __name__ == "__main__":
    main()
