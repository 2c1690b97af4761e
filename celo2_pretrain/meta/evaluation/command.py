"""The options of `celo2-pretrain meta-eval`; `evaluate` carries them out, and is imported only then."""

import argparse

DESCRIPTION = """\
Compare learned optimizers with others on tasks that none of them was meta-trained on: small language models,
a vision transformer, a convolutional net, an auto-encoder, a recurrent net, PPO on control and on an Atari game.
Each (task, optimizer, learning rate, seed) is one training run of some seconds on one core; every run that ends is
written to OUT/results.jsonl at once, and the same command goes on where an earlier one stopped.

  celo2-pretrain meta-eval --quick                          2 tasks, a fifth of the steps: 60 runs, 2 minutes
  celo2-pretrain meta-eval --out runs/eval                  everything: 825 runs, about 1.5 hours on 2 cores
  celo2-pretrain meta-eval --out runs/eval --optimizers celo2,adamw --theta mine=runs/meta/theta.safetensors
  celo2-pretrain meta-eval --report runs/eval               the report again
  celo2-pretrain meta-eval --list                           tasks, optimizers, and what is missing for them here

At the end OUT has report.md (measures at the best rates, who beats whom, speed-up in steps, width of the good
learning rates), results.csv, curves.png, learning_rates.png and seeds.png. The tasks' data is what the installed
Python and packages ship, so numbers of two machines compare only where those are the same.

Learning rates are those of the hidden matrices, each optimizer's own grid around its own middle; embeddings, heads and
vectors are stepped by AdamW at the same rates under all of them (Celo2-base and VeLO step every tensor themselves).
"""


def add(commands) -> None:
    """Add the command to the subparsers of `celo2-pretrain`."""
    p = commands.add_parser(
        "meta-eval",
        help="compare learned optimizers with others on unseen tasks",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--out", default="runs/meta_eval", help="folder of results and report (default: runs/meta_eval)")
    p.add_argument(
        "--quick", action="store_true", help="2 tasks, a fifth of the steps, 3 learning rates, 2 seeds, unless those are given"
    )
    p.add_argument("--tasks", metavar="A,B", help="default: all; one whose packages are missing is named and skipped")
    p.add_argument("--optimizers", metavar="A,B", help="default: celo2, celo2-base, adamw, muon, soap; see --list")
    p.add_argument(
        "--theta",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help=(
            "also Celo2 with these weights, as celo2[NAME]: .safetensors, theta.state, .pt, a hub id, or an .npz with "
            "arrays w0 … b2 (FILE.npz:CASE: those called CASE/theta/w0 …); can be given several times"
        ),
    )
    p.add_argument(
        "--theta-base",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help="the same without orthogonalisation, as celo2-base[NAME]",
    )
    p.add_argument(
        "--lrs", metavar="X,Y", help=("multiples of each optimizer's middle learning rate (default: 0.1,0.316,1,3.16,10)")
    )
    p.add_argument("--seeds", metavar="N,M", help="of weights, data order and games (default: 0,1,2)")
    p.add_argument("--steps-scale", type=float, default=1.0, help="multiply the steps of every task (default: 1)")
    p.add_argument("--jobs", type=int, help="runs at a time, each on one core (default: one per core)")
    p.add_argument("--report", metavar="OUT", help="only write the report of a folder of results")
    p.add_argument("--list", action="store_true", help="tasks, optimizers, grids, and what is missing here")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from .evaluate import evaluate

    evaluate(args)
