"""What do norms, timers and memory figures cost in a logged step, beside a step that isn't logged?

    python benchmarks/insight.py                 configs/tiny_cpu.yaml's model on this machine, one rank
    python benchmarks/insight.py --width 768     a wider one

Watched and plain steps take turns in one run, in an order that changes from pair to pair; shown are the median and the
quartiles of the ratio within a pair, for steps with norms and for steps with timers alone. With `train.log_every=10` a
tenth of that is what a run pays.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import deepspeed
import torch

from celo2_pretrain.config import load_config
from celo2_pretrain.deepspeed_config import deepspeed_config
from celo2_pretrain.model.build import build_model
from celo2_pretrain.model.build_optimizer import build_optimizer
from celo2_pretrain.model.flops import flops_per_token
from celo2_pretrain.model.loss import training_loss
from celo2_pretrain.train.record.insight import Insight
from celo2_pretrain.train.record.peak_flops import Peak
from celo2_pretrain.train.start.ranks import join_ranks

from report import RESULTS, device_name, quartiles, write_csv

VOCABULARY = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV (default: benchmarks/results)")
    args = parser.parse_args()

    join_ranks()
    config = load_config(
        None,
        [
            f"model.width={args.width}",
            f"model.layers={args.layers}",
            "model.heads=4",
            "model.context=128",
            "train.micro_batch_size=8",
            "train.global_batch_size=16",
            f"train.zero_stage={args.stage}",
            "optimizer.lr=1e-6",
        ],
    )
    torch.manual_seed(0)
    model = build_model(config.model, VOCABULARY, 0)
    parameters, per_token = sum(p.numel() for p in model.parameters()), flops_per_token(model, 128)
    optimizer = build_optimizer(model, config.optimizer)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config, 1))
    insight = Insight(engine, optimizer, config, parameters, per_token, Peak(1e12, "none"))
    windows = torch.randint(VOCABULARY, (8, 129), device=engine.device)
    norms, log_every = insight.norms, config.train.log_every

    def step(watched: bool) -> float:
        """Seconds of a step, with all that is done for its record."""
        begin = time.perf_counter()
        insight.begin(log_every if watched else 1)
        for _ in range(2):
            insight.mark("data")
            insight.mark("forward")
            loss, _ = training_loss(engine, windows)
            insight.mark("backward")
            engine.backward(loss)
            insight.mark("optimizer")
            engine.step()
        insight.end()
        if watched:
            insight.record(1.0, 1.0)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    rows = []
    with insight.installed():
        for _ in range(3):
            step(False)
        for what, found in (("norms, timers, memory", norms), ("timers, memory", None)):
            insight.norms = found
            ratios, plain = [], []
            for pair in range(args.pairs):
                order = (True, False) if pair % 2 else (False, True)
                seconds = {watched: step(watched) for watched in order}
                ratios.append(seconds[True] / seconds[False])
                plain.append(seconds[False])
            low, middle, high = quartiles(ratios)
            rows.append(
                {
                    "device": device_name(engine.device),
                    "parameters": parameters,
                    "stage": args.stage,
                    "watched": what,
                    "plain_ms": round(1e3 * statistics.median(plain), 1),
                    "ratio": round(middle, 3),
                    "ratio_q1": round(low, 3),
                    "ratio_q3": round(high, 3),
                    "pairs": args.pairs,
                }
            )
            print(f"{what:22s} {middle:.3f} x a plain step of {rows[-1]['plain_ms']} ms (quartiles {low:.3f} to {high:.3f})")
    write_csv(args.out / f"insight_{engine.device.type}.csv", rows)


if __name__ == "__main__":
    main()
