"""`celo2-pretrain plan`: its options, and which plans they ask for."""

import argparse
import json
import time

from celo2_pretrain.common.errors import UserError

DESCRIPTION = """\
What a run needs and how long it takes, before paying for a node: memory per GPU by part, the largest micro-batch that
fits, time of a step with the assumptions behind it, bytes sent, tokens a day. Nothing is trained and no GPU is needed.

  celo2-pretrain plan --config configs/gpt3_xl_1.3b.yaml                   on 8 H100s, as the config says
  celo2-pretrain plan --config configs/gpt3_xl_1.3b.yaml --gpu a100-40 train.micro_batch_size=4
  celo2-pretrain plan --config configs/gpt3_6.7b.yaml --gpus 8,16,64 --zero 1,2,3      one line each, to compare
  celo2-pretrain plan --config configs/gpt3_xl_1.3b.yaml --gpus 64 --dry-run           which rank holds and owns what

Memory is counted as DeepSpeed and Celo2 hold it, activations by tracing the real model. The time is an estimate: run
some steps, and give the share of the peak that you measure by --mfu.
GPUs: h100, h200, b200, a100-80, a100-40, mi300x, l4, 4090, and cpu (this machine, a rank's share).
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--config", help="YAML file (default: the defaults)")
    p.add_argument("--gpu", default="h100", metavar="TYPE[,TYPE…]", help="kind of GPU (default: h100), or several to compare")
    p.add_argument("--gpus", default="8", metavar="N[,N…]", help="number of GPUs in all (default: 8)")
    p.add_argument("--zero", metavar="N[,N…]", help="ZeRO stages (default: the config's train.zero_stage)")
    p.add_argument(
        "--mfu", type=float, help="share of the GPU's dense peak that forward and backward passes reach (default: 0.4)"
    )
    p.add_argument("--gpus-per-node", type=int, help="GPUs in a node (default: 8)")
    p.add_argument("--network-gbits", type=float, help="network between nodes, Gbit/s per GPU (default: the vendor's node)")
    p.add_argument("--dry-run", action="store_true", help="also what each rank holds, owns and sends")
    p.add_argument("--json", action="store_true", help="as JSON: bytes, seconds, tokens")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys, as for train")


def numbers(option: str, given: str, least: int, most: int) -> list[int]:
    """Comma-separated whole numbers in [least, most]. Raises UserError."""
    try:
        out = [int(x) for x in given.split(",")]
    except ValueError:
        out = []
    if not out or not all(least <= x <= most for x in out):
        raise UserError(f"{option} {given}: must be whole numbers from {least} to {most}, separated by commas")
    return out


def run(args: argparse.Namespace) -> None:
    from celo2_pretrain.common.devices import device, with_network
    from celo2_pretrain.config import load_config
    from celo2_pretrain.plan import report
    from celo2_pretrain.plan.estimate import estimate, subject
    from celo2_pretrain.plan.step_time import MFU

    counts, names = numbers("--gpus", args.gpus, 1, 1 << 16), args.gpu.split(",")
    stages = numbers("--zero", args.zero, 0, 3) if args.zero else [None]
    mfu = MFU if args.mfu is None else args.mfu
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu:g}: must lie above 0 and at most at 1")
    for option in ("gpus_per_node", "network_gbits"):
        if getattr(args, option) is not None and not getattr(args, option) > 0:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)}: must be above 0")
    cases = [
        (name, with_network(device(name, n), args.network_gbits, args.gpus_per_node), n, stage)
        for name in names
        for n in counts
        for stage in stages
    ]
    config = load_config(args.config, args.overrides)
    began = time.perf_counter()
    planned = subject(config)
    plans = []
    for name, kind, n, stage in cases:
        try:
            plans.append(estimate(planned, kind, n, stage, mfu))
        except UserError:
            if len(cases) == 1:
                raise
            plans.append(None)
    if args.json:
        found = [report.as_json(planned, case[0], plan, args.dry_run) for case, plan in zip(cases, plans) if plan]
        print(json.dumps(found[0] if len(cases) == 1 else found, indent=1))
        return
    if len(cases) == 1:
        print(report.text(planned, plans[0], mfu))
    else:
        shown = [
            (name, n, config.train.zero_stage if stage is None else stage, plan)
            for (name, _, n, stage), plan in zip(cases, plans)
        ]
        print(report.comparison(planned, shown))
    if args.dry_run:
        for (name, _, n, _), plan in zip(cases, plans):
            if plan:
                print(
                    f"\nDry run on {n} ranks ({name}, ZeRO-{plan.config.train.zero_stage}): the model without its memory, the "
                    "optimizer's own layout"
                )
                print("\n".join(report.ranks_table(plan)))
        print(f"planned in {time.perf_counter() - began:.1f} s")
