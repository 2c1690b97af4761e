"""`celo2-pretrain meta-train`: its options and its help."""
import argparse

DESCRIPTION = """\
Meta-train the weights of the learned rule. Without --config this is the paper's recipe for Celo2, from random weights;
configs/meta/ holds ours, which begins with constructed weights and needs about an hour of two CPU cores.

  celo2-pretrain meta-train --config configs/meta/celo2.yaml out=runs/meta/mine
  celo2-pretrain meta-train --resume runs/meta/mine                      goes on after an interruption, bit for bit
  celo2-pretrain meta-train orthogonalize=false outer_lr=1e-4            the paper's recipe for Celo2-base
  celo2-pretrain meta-train "families=mlp/mnist mlp/fashion_mnist mlp/cifar10 mlp/svhn"   the paper's images (online)

The folder `out` gets theta_*.safetensors (take one with `optimizer.weights=…` or Celo2(weights=…)), metrics.jsonl,
meta_loss.png and a checkpoint. docs/meta_training.md explains the method and how to change the rule.
"""


def add(commands) -> None:
    p = commands.add_parser("meta-train", help="meta-train weights of the learned rule", description=DESCRIPTION,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", help="YAML file (default: the paper's recipe)")
    p.add_argument("--resume", metavar="OUT", help="go on with the meta-training in that folder")
    p.add_argument("--overwrite", action="store_true", help="replace the meta-training in `out`")
    p.add_argument("--list-keys", action="store_true", help="list all keys with their defaults and meanings")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys")
    p.set_defaults(run=run)


def run(args) -> None:
    from pathlib import Path

    from ..train.errors import UserError
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
