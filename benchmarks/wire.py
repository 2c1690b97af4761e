"""How many bytes does a rank send in one optimizer step? From the layout alone, for any number of ranks.

    python benchmarks/wire.py                          GPT-3 XL (1.3B) on 8, 64 and 512 ranks -> results/wire.csv
    python benchmarks/wire.py --ranks 8 --stage 2      one case
    python benchmarks/wire.py --check                  the same count for a small model on 2 processes, beside what
                                                       they really handed to torch.distributed

The count is celo2_pretrain/plan/shards.py's, which `celo2-pretrain plan` shows for any model. Counted are the elements
that a rank hands to each collective, as rings send them: all-reduce 2 (n − 1)/n of the buffer, reduce-scatter and
all-gather (n − 1)/n, all-to-all what goes to other ranks. Shown is the busiest of ranks 0, 1, n/2 and n − 1.
`ZeRO` is what every optimizer pays at this stage: gradients reduce-scattered and parameters all-gathered in 2 bytes
(ZeRO-3 gathers parameters twice). `gather everything` is what a rank would have to receive in order to take
the unsharded step alone: p, g, three momenta and v of every matrix in 4 bytes.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from math import prod
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from celo2_pretrain import Celo2, param_groups
from celo2_pretrain.optimizer.sharding.layouts import Layout, Slice
from celo2_pretrain.optimizer.sharding.plan import make_plan
from celo2_pretrain.optimizer.step.learned import LearnedStep
from celo2_pretrain.plan.shards import plan_for, ranges, sent_bytes
from celo2_pretrain.train.start.ranks import free_port

from report import RESULTS, write_csv


def gpt3_xl() -> nn.Module:
    """GPT-3 XL: 24 layers, width 2048, untied sizes of the paper (1.3B parameters), on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            GPT2Config(vocab_size=50257, n_positions=2048, n_embd=2048, n_layer=24, n_head=16)
        )


def count(ranks: int, stage: int, bucket_size: int) -> list[dict]:
    model = gpt3_xl()
    optimizer = Celo2(param_groups(model))
    (group,) = [g for g in optimizer.param_groups if g["rule"] == "celo2"]
    originals = optimizer.originals_of(group)
    held = ranges([original.shape for original in originals], ranks, stage)
    busiest, peak = Counter(), 0.0
    # The plan's owners are the same on every rank; what a rank sends differs, so look at several.
    for rank in sorted({0, 1, ranks // 2, ranks - 1}):
        sent = sent_bytes(plan_for(originals, held, rank, bucket_size))
        peak = max(peak, sum(sent.values()))
        for key, value in sent.items():
            busiest[key] = max(busiest[key], value)
    total = sum(prod(p.shape) for p in model.parameters())
    hidden = sum(prod(original.shape) for original in originals)
    zero = (2 if stage < 3 else 3) * 2 * total * (ranks - 1) / ranks
    rows = [{"case": f"celo2: {key}", "bytes": value} for key, value in busiest.items()]
    rows += [
        {"case": "celo2 in all (busiest rank)", "bytes": peak},
        {"case": f"ZeRO-{stage} itself, any optimizer", "bytes": zero},
        {"case": "gather everything (received)", "bytes": 6 * 4 * hidden * (ranks - 1) / ranks},
    ]
    return [
        {
            "model": "GPT-3 XL",
            "parameters": total,
            "stage": stage,
            "ranks": ranks,
            **row,
            "bytes": round(row["bytes"]),
            "of ZeRO": round(row["bytes"] / zero, 4),
        }
        for row in rows
    ]


def check() -> None:
    """Two processes, ZeRO-2 ranges of a small model: planned and really sent elements must be the same."""
    import torch.multiprocessing

    port = free_port()
    torch.multiprocessing.spawn(_check_rank, args=(port,), nprocs=2)


def _check_rank(rank: int, port: int) -> None:
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=61, n_positions=16, n_embd=24, n_layer=3, n_head=4, bos_token_id=None, eos_token_id=None)
    )
    optimizer = Celo2(param_groups(model))
    (group,) = [g for g in optimizer.param_groups if g["rule"] == "celo2"]
    originals = optimizer.originals_of(group)
    held = ranges([original.shape for original in originals], 2, 2)
    flat = torch.nn.Parameter(
        torch.cat([original.param.detach().flatten()[slice(*held[rank, k].tolist())] for k, original in enumerate(originals)])
    )
    flat.grad = torch.randn_like(flat)
    slices, offset = [], 0
    for k, original in enumerate(originals):
        start, stop = held[rank, k].tolist()
        slices.append(Slice(original, start, stop, offset, flat))
        offset += stop - start
    plan = make_plan(Layout("planned", slices, dist.group.WORLD, ranges=held), True, 1 << 25)
    real = Counter()
    all_reduce, all_to_all = dist.all_reduce, dist.all_to_all_single

    def counted_reduce(x, *args, **kwargs):
        real["all-reduce"] += 4 * x.numel()  # 2 (n − 1) / n is 1 for two ranks
        return all_reduce(x, *args, **kwargs)

    def counted_exchange(out, x, *args, **kwargs):
        real["all-to-all"] += 4 * x.numel()
        return all_to_all(out, x, *args, **kwargs)

    dist.all_reduce, dist.all_to_all_single = counted_reduce, counted_exchange
    with torch.no_grad():
        optimizer._init_state(group, flat, [plan])
        LearnedStep(plan, optimizer.state, optimizer.mlp, group).run()
    planned = sent_bytes(plan)
    planned = {
        "all-reduce": planned["pass A all-reduce"] + planned["pass B all-reduce"],
        "all-to-all": planned["to owners"] + planned["back"],
    }
    print(f"rank {rank}: planned {planned}, counted {dict(real)}", flush=True)
    assert planned == dict(real), "the plan is not what is sent"
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort the interpreter's exit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 64, 512])
    parser.add_argument("--stage", type=int, nargs="*", default=[2, 3])
    parser.add_argument("--bucket-size", type=int, default=1 << 25)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path, help="CSV to write (default: results/wire.csv for the whole table, else none)")
    args = parser.parse_args()
    if args.check:
        check()
        return
    rows = [row for stage in args.stage for ranks in args.ranks for row in count(ranks, stage, args.bucket_size)]
    for row in rows:
        print(
            f"ZeRO-{row['stage']}  {row['ranks']:4d} ranks  {row['case']:34s} {row['bytes'] / 1e6:12.2f} MB  "
            f"{row['of ZeRO']:8.2%} of ZeRO's own"
        )
    whole = (args.ranks, args.stage, args.bucket_size) == ([8, 64, 512], [2, 3], 1 << 25)
    out = args.out or (RESULTS / "wire.csv" if whole else None)
    if out:
        write_csv(out, rows)


if __name__ == "__main__":
    main()
