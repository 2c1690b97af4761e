"""`celo2-pretrain meta-train` and `meta-select`: their options and their help."""

import argparse

DESCRIPTION = """\
Meta-train the weights of the learned rule. Without --config this is the paper's recipe for Celo2, from random weights;
configs/meta/ holds ours, which begins with constructed weights and needs an hour of one CPU core.

  celo2-pretrain meta-train --config configs/meta/celo2.yaml out=runs/meta/mine
  celo2-pretrain meta-train --resume runs/meta/mine                      goes on after an interruption, bit for bit
  celo2-pretrain meta-train orthogonalize=false outer_lr=1e-4            the paper's recipe for Celo2-base
  celo2-pretrain meta-train "families=mlp/mnist mlp/fashion_mnist mlp/cifar10 mlp/svhn"   the paper's images (online)

The folder `out` gets theta_*.safetensors (take one with `optimizer.weights=…` or Celo2(weights=…)), metrics.jsonl,
meta_loss.png and a checkpoint. docs/meta_training.md explains the method and how to change the rule.
"""

SELECT = """\
Compare the theta_*.safetensors of a meta-training on a small language model that is neither in meta-training nor in the
evaluation suite (a byte-level GPT on the descriptions of installed packages; two learning rates, two seeds or more), and name
the best. About 10 s of one core for each run, so a minute for each theta.

  celo2-pretrain meta-select runs/meta/celo2 --every 5 --also default
"""


def add(commands) -> None:
    p = commands.add_parser(
        "meta-train",
        help="meta-train weights of the learned rule",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--config", help="YAML file (default: the paper's recipe)")
    p.add_argument("--resume", metavar="OUT", help="go on with the meta-training in that folder")
    p.add_argument("--overwrite", action="store_true", help="replace the meta-training in `out`")
    p.add_argument("--list-keys", action="store_true", help="list all keys with their defaults and meanings")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys")
    p.set_defaults(run=run)

    p = commands.add_parser(
        "meta-select",
        help="take the best theta of a meta-training",
        description=SELECT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("folder", help="a meta-training's folder")
    p.add_argument("--every", type=int, default=1, help="take only every n-th of its theta_*.safetensors (the last always)")
    p.add_argument("--also", nargs="*", default=[], metavar="WEIGHTS", help="other weights to compare, for example default")
    p.add_argument("--steps", type=int, default=400, help="steps of each run (default: 400)")
    p.add_argument("--lrs", default="2e-3,4e-3", metavar="LR,LR,…", help="learning rates (default: 2e-3,4e-3)")
    p.add_argument("--seeds", type=int, default=2, help="seeds of each theta and rate (default: 2)")
    p.add_argument("--jobs", type=int, help="runs at the same time (default: a core each)")
    p.set_defaults(run=run_select)


def run_select(args) -> None:
    import os
    from pathlib import Path

    from ..common.errors import UserError
    from . import config, select

    folder = Path(args.folder)
    thetas = sorted(map(str, folder.glob("theta_*.safetensors")))
    if not thetas:
        raise UserError(f"{folder} has no theta_*.safetensors: is it the `out` of a meta-training?")
    for option in ("every", "steps", "seeds", "jobs"):
        if (given := getattr(args, option)) is not None and given < 1:
            raise UserError(f"--{option} {given}: give at least 1")
    thetas = thetas[::-1][:: args.every][::-1]
    try:
        lrs = tuple(float(lr) for lr in args.lrs.split(","))
    except ValueError:
        lrs = ()
    if not lrs or not all(0 < lr < float("inf") for lr in lrs):
        raise UserError(f"--lrs {args.lrs!r}: give rates above 0, as in --lrs 2e-3,4e-3")
    kind = "celo2" if config.load_config(str(folder / "config.yaml"), []).orthogonalize else "celo2-base"
    best = select.select(
        [*thetas, *args.also], kind, folder / "selection.csv", args.jobs or os.cpu_count(), args.steps, lrs, args.seeds
    )
    print(f"best: {best}; all scores in {folder / 'selection.csv'}")


def run(args) -> None:
    from pathlib import Path

    from ..common.errors import UserError
    from . import config, train

    if args.list_keys:
        print(config.list_keys())
        return
    if args.resume is None:
        train.run(config.load_config(args.config, args.overrides), overwrite=args.overwrite)
        return
    if args.config or args.overwrite:
        raise UserError("--resume goes on with the folder's own configuration: leave out --config and --overwrite")
    kept = Path(args.resume) / "config.yaml"
    if not kept.is_file():
        raise UserError(f"{args.resume} holds no meta-training: there is no config.yaml in it")
    # More outer steps may be asked for; the folder may have been moved.
    overrides = [*args.overrides, f"out={args.resume}"]
    if any(not override.startswith("outer_steps=") for override in args.overrides):
        raise UserError("with --resume only outer_steps=N may be given: the rest would make it another meta-training")
    train.run(config.load_config(str(kept), overrides), resume=True)
