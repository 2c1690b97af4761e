"""The command line: `celo2-pretrain COMMAND`; `celo2-pretrain --help` lists the commands."""

import argparse
import os
import sys
import threading

from celo2_pretrain.common.console import flush, print_notice
from celo2_pretrain.common.errors import EXIT_STOPPED, EXIT_USER_ERROR, Stopped, UserError
from celo2_pretrain.common.extras import install_line
from celo2_pretrain.meta import command as meta_train
from celo2_pretrain.meta.evaluation import command as meta_eval
from celo2_pretrain.plan import command as planning
from celo2_pretrain.train.faults import once
from celo2_pretrain.train.faults.exit_code import record_exit_code

INTRODUCTION = """\
Pretrain GPT-style models with Celo2, a learned optimizer, under DeepSpeed.

From nothing to a model:
  celo2-pretrain prepare --stdlib --out data/python          text of the installed Python, as tokens
  celo2-pretrain train --config configs/tiny_cpu.yaml        one process; metrics, checkpoints and loss.png in run_dir
  celo2-pretrain generate runs/tiny_cpu --prompt "def main"
  celo2-pretrain export runs/tiny_cpu --out exported         for transformers

On several GPUs (or CPU ranks) the same driver, with the same arguments as `train`:
  celo2-pretrain plan --config configs/gpt2_124m.yaml --gpus 8            will it fit, how long will it take
  deepspeed --no_local_rank launch/pretrain.py --config configs/gpt2_124m.yaml optimizer.lr=5e-4

The learned rule itself:
  celo2-pretrain meta-eval --quick                                        Celo2 beside AdamW, Muon and SOAP on small tasks
  celo2-pretrain meta-train --config configs/meta/celo2.yaml              meta-train weights of your own
"""
TRAIN = """\
Train a model. Each key of the configuration can be given as key=value after the options, and overrides the file:
  celo2-pretrain train --config configs/tiny_cpu.yaml optimizer.lr=2e-3 model.layers=6 run_dir=runs/deeper
  celo2-pretrain train --resume runs/deeper train.max_steps=2000
  celo2-pretrain train --list-keys
When it fails, start it again from its last checkpoint, a launcher's ranks too, and with fewer of them (docs/faults.md):
  celo2-pretrain train --config configs/gpt2_124m.yaml --max-restarts 20 --ranks 8,8,4 \\
      --launch "deepspeed --no_local_rank --num_gpus {ranks} launch/pretrain.py"
"""
SWEEP = """\
Train once for each learning rate, one after the other, and choose the one with the least validation loss at the end.
The same command goes on after an interruption; runs that are finished are left as they are.
  celo2-pretrain sweep --config configs/tiny_cpu.yaml --out runs/sweep --lrs 3e-4,1e-3,3e-3 train.max_steps=100
  celo2-pretrain sweep --config configs/gpt2_124m.yaml --out runs/sweep \\
      --launch "deepspeed --no_local_rank launch/pretrain.py"
"""


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("celo2-pretrain", description=INTRODUCTION, formatter_class=raw)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    p = commands.add_parser(
        "prepare",
        help="turn text into memory-mapped tokens",
        description=(
            "Turn text into a folder of memory-mapped tokens, with a tokenizer trained on it or a given one. An interrupted "
            "call goes on where it stopped when it is given again."
        ),
    )
    p.add_argument("paths", nargs="*", help="text, JSON Lines (.jsonl) or parquet files, also .gz and .zst, or folders")
    p.add_argument("--stdlib", action="store_true", help="the installed Python's sources: every machine has them")
    p.add_argument("--dataset", metavar="NAME[:CONFIG]", help="a Hugging Face dataset, or a folder of save_to_disk")
    p.add_argument("--dataset-split", default="train", help="its split (default: train)")
    p.add_argument("--download", action="store_true", help="fetch --dataset whole first instead of streaming its rows")
    p.add_argument("--field", default="text", help="field of JSON Lines, or column, that holds the text (default: text)")
    p.add_argument("--out", required=True, help="the folder to make")
    p.add_argument("--tokenizer", help="a sentencepiece .model, or a transformers tokenizer's folder or hub name")
    p.add_argument("--vocab-size", type=int, default=4096, help="pieces of the tokenizer to train (default: 4096)")
    p.add_argument("--tokenizer-mb", type=float, default=4, help="MB of text to train the tokenizer on (default: 4)")
    p.add_argument("--val-fraction", type=float, default=0.05, help="documents kept for validation (default: 0.05)")
    p.add_argument("--max-mb", type=float, default=20, help="with --stdlib: MB of text to take (default: 20)")
    p.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens in one file (default: 100 million)")
    p.add_argument("--workers", type=int, help="processes; any number gives the same bytes (default: one per core)")
    p.add_argument("--overwrite", action="store_true", help="replace --out where it exists")
    p.set_defaults(run=run_prepare)

    p = commands.add_parser(
        "plan",
        help="memory, time and communication of a run, before it is paid for",
        description=planning.DESCRIPTION,
        formatter_class=raw,
    )
    planning.add_arguments(p)
    p.set_defaults(run=planning.run)

    p = commands.add_parser("train", help="train or resume", description=TRAIN, formatter_class=raw)
    p.add_argument("--config", help="YAML file (default: the resumed run's config.yaml, or the defaults)")
    p.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="continue a run or checkpoint (default: run_dir's newest); auto: run_dir's newest "
        "whole one, or begin where there is none",
    )
    p.add_argument(
        "--take-over",
        metavar="RUN",
        help="begin where this AdamW run (or one of its checkpoints) is, with Celo2 as the optimizer, in a run_dir of its own",
    )
    p.add_argument("--overwrite", action="store_true", help="replace the run in run_dir")
    p.add_argument("--list-keys", action="store_true", help="list all keys with their defaults and meanings")
    p.add_argument(
        "--max-restarts", type=int, metavar="N", help="when it fails, start again from its last checkpoint, at most N times"
    )
    p.add_argument(
        "--launch", metavar="COMMAND", help="with --max-restarts: the driver that gets train's arguments (default: this train)"
    )
    p.add_argument(
        "--ranks",
        metavar="N,N,…",
        help="what {ranks} in --launch stands for; the next one is taken when a start brought no new checkpoint",
    )
    p.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # older launchers pass it
    p.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys")
    p.set_defaults(run=run_train)

    p = commands.add_parser("sweep", help="find the learning rate", description=SWEEP, formatter_class=raw)
    p.add_argument("--config", help="YAML file (default: the defaults)")
    p.add_argument("--out", required=True, help="folder for the runs, sweep.csv and sweep.png")
    p.add_argument("--lrs", metavar="LR,LR,…", help="learning rates (default: the paper's range, 1e-5 to 1e-3, in five)")
    p.add_argument("--launch", metavar="COMMAND", help="the driver that gets train's arguments (default: this train)")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys")
    p.set_defaults(run=run_sweep)

    p = commands.add_parser(
        "eval",
        help="validation loss of a run, and benchmark tasks",
        description=(
            "Validation loss, perplexity and bits per byte of a run's newest (or one) checkpoint; with --tasks also its "
            "scores in EleutherAI's lm-evaluation-harness. On a GPU if there is one."
        ),
    )
    p.add_argument("path", help="run folder, or one of its checkpoints/step_… folders")
    p.add_argument("--sequences", type=int, help="validation windows (default: all)")
    p.add_argument(
        "--tasks",
        metavar="TASK,TASK,…",
        help="tasks of the harness (hellaswag, arc_easy, …); needs pip install 'celo2-pretrain[eval]'",
    )
    p.add_argument("--task-folder", metavar="FOLDER", help="with task files (.yaml) of your own, for --tasks")
    p.add_argument("--limit", type=int, help="only so many examples of each task, to try it")
    p.add_argument("--json", metavar="FILE", help="write all results there, too")
    p.set_defaults(run=run_eval)

    p = commands.add_parser("generate", help="continue a text", description="Continue a text with a run's model.")
    p.add_argument("path", help="run folder, or one of its checkpoints/step_… folders")
    p.add_argument("--prompt", default="", help="text to continue (default: begin a document)")
    p.add_argument("--tokens", type=int, default=200, help="tokens to generate (default: 200)")
    p.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    p.add_argument("--top-k", type=int, default=50, help="sample among the k likeliest tokens (default: 50)")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(run=run_generate)

    p = commands.add_parser(
        "plot",
        help="compare runs in one picture",
        description=(
            "Draw one or more runs in one picture: losses, learning rate, norms of gradient, update and weights, "
            "tokens a second."
        ),
    )
    p.add_argument("runs", nargs="+", help="run folders")
    p.add_argument("--out", default="runs.png", help=".png, .pdf or .svg (default: runs.png)")
    p.add_argument("--x", choices=["step", "tokens", "time"], default="step", help="what to draw against (default: step)")
    p.add_argument("--title", default="")
    p.set_defaults(run=run_plot)

    p = commands.add_parser(
        "export",
        help="write a Hugging Face folder",
        description=("Write a run's model and tokenizer as a folder that transformers' from_pretrained reads."),
    )
    p.add_argument("path", help="run folder, or one of its checkpoints/step_… folders")
    p.add_argument("--out", required=True, help="the folder to make")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    p.add_argument("--overwrite", action="store_true", help="replace --out where it exists")
    p.set_defaults(run=run_export)

    meta_train.add(commands)
    meta_eval.add(commands)
    return top


def run_prepare(args) -> None:
    from celo2_pretrain.data import sources
    from celo2_pretrain.data.prepare import prepare
    from celo2_pretrain.data.statistics import describe

    if bool(args.paths) + args.stdlib + bool(args.dataset) != 1:
        raise UserError("give one corpus: paths of text, or --stdlib, or --dataset NAME")
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val-fraction {args.val_fraction}: must lie between 0 and 1")
    for option in ("max_mb", "tokenizer_mb", "shard_tokens", "workers"):
        if getattr(args, option) is not None and not getattr(args, option) > 0:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)}: must be above 0")
    if args.stdlib:
        source = sources.PythonSources(int(args.max_mb * 1e6), args.val_fraction)
    elif args.dataset:
        source = sources.Dataset(args.dataset, args.val_fraction, args.field, args.dataset_split, args.download)
    else:
        source = sources.Files(args.paths, args.val_fraction, args.field)
    index = prepare(
        source,
        args.out,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        workers=args.workers,
        tokenizer_bytes=int(args.tokenizer_mb * 1e6),
        shard_tokens=args.shard_tokens,
        overwrite=args.overwrite,
    )
    print(describe(index, args.out))


def run_train(args) -> int | None:
    from celo2_pretrain.config import list_keys

    if args.list_keys:
        print(list_keys())
        return
    config, take_over = train_config(args)
    if args.max_restarts is not None:
        from celo2_pretrain.train.faults.supervisor import supervise

        return supervise(args, config)
    if args.launch or args.ranks:
        raise UserError("--launch and --ranks are for --max-restarts N: give it too, or start the launcher itself")
    from celo2_pretrain.train.faults.failures import ending_all_ranks
    from celo2_pretrain.train.loop import train

    resume = args.resume or (config.run_dir if args.resume == "" else None)
    with ending_all_ranks(config.run_dir):
        train(config, resume=resume, overwrite=args.overwrite, take_over=take_over)


def train_config(args):
    """The configuration of a run, and the run that it is to take over (None: none)."""
    from celo2_pretrain.config import load_config

    if args.resume and "=" in args.resume and not os.path.exists(args.resume):  # --resume key=value …
        args.overrides.insert(0, args.resume)
        args.resume = ""
    path = args.config
    folders = [override for override in args.overrides if override.startswith("run_dir=")]
    if args.take_over is not None:
        from celo2_pretrain.train.start.take_over import begun, take_over

        if args.resume not in (None, "auto"):
            raise UserError("--take-over begins a run and --resume goes on with one: give one of them, or --resume auto")
        if not (args.resume and begun(load_config(path, folders).run_dir)):
            return take_over(args.take_over, path, args.overrides)
        path = os.path.join(load_config(path, folders).run_dir, "config.yaml")  # it has the rates that were measured
    elif args.resume is not None and not path:
        # The other overrides are for the run's own configuration: beside the defaults they may be wrong.
        run_dir = load_config(None, folders).run_dir
        if args.resume != "auto":
            from celo2_pretrain.train.checkpoints.export import run_config_path

            path = run_config_path(args.resume or run_dir)
        elif os.path.exists(os.path.join(run_dir, "config.yaml")):
            path = os.path.join(run_dir, "config.yaml")
    config = load_config(path, args.overrides)
    if path and not args.config and not folders:
        config.run_dir = os.path.dirname(path) or "."  # the folder may have been moved since
    return config, None


def run_sweep(args) -> None:
    import shlex

    from celo2_pretrain.train.sweep import PAPER_GRID, parse_rates, sweep, verdict

    rates = parse_rates(args.lrs) if args.lrs is not None else PAPER_GRID
    launch = shlex.split(args.launch) if args.launch else [sys.executable, "-m", "celo2_pretrain.cli", "train"]
    rows = sweep(args.out, args.config, args.overrides, rates, launch)
    print(f"{verdict(rows)}\nwrote {os.path.join(args.out, 'sweep.csv')} and sweep.png")


def run_eval(args) -> None:
    from celo2_pretrain.train import score

    score.evaluate(args.path, args.sequences, score.task_names(args.tasks), args.task_folder, args.limit, args.json)


def run_generate(args) -> None:
    from celo2_pretrain.model.sample import sample
    from celo2_pretrain.train.checkpoints.export import load_trained

    for option in ("tokens", "top_k"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)}: must be at least 1")
    if args.temperature < 0:
        raise UserError(f"--temperature {args.temperature}: must not be negative")
    model, tokenizer, config = load_trained(args.path)
    ids = tokenizer.encode([args.prompt])[0]
    new = sample(
        model,
        ids,
        args.tokens,
        context=config.model.context,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
    )
    print(tokenizer.decode(ids + new))


def run_plot(args) -> None:
    from celo2_pretrain.train.record.plot import plot_runs

    plot_runs(args.runs, args.out, args.title, args.x)
    print(f"wrote {args.out}")


def run_export(args) -> None:
    import transformers

    from celo2_pretrain.train.checkpoints.export import export

    transformers.utils.logging.disable_progress_bar()  # it tells of one file
    export(args.path, args.out, args.dtype, args.overwrite)
    print(f"wrote {args.out}: load it with transformers.AutoModelForCausalLM.from_pretrained({args.out!r})")


def quiet_libraries() -> None:
    """Keep DeepSpeed's and transformers' chatter out of the output, before they are imported."""
    import warnings

    import torch

    # DeepSpeed calls functions that torch has renamed; nothing a user of this command could do about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found nothing else


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns 0, or after a line on standard error 2 (wrong input) or 75 (stopped on request)."""
    code = record_exit_code(run(argv))
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1 and "torch" in sys.modules:  # not in a test
        leave(code)
    return code


def leave(code: int) -> None:
    """End one of several ranks without Python's finalisation: gloo's threads now and then abort it, after all went well."""
    threading._shutdown()  # what Python begins its end with: pools are told to end before their threads are waited for
    flush(sys.stdout)
    flush(sys.stderr)
    os._exit(code)


def run(argv: list[str] | None) -> int:
    args = parser().parse_args(argv)
    quiet_libraries()
    try:
        return args.run(args) or 0
    except UserError as error:
        if once.may_say(str(error)):  # the ranks of a node mostly find the same
            print_notice(f"error: {error}{once.where_found()}")
        return EXIT_USER_ERROR
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print_notice(str(stopped))
        return EXIT_STOPPED
    except ModuleNotFoundError as error:
        if not (needed := install_line(error, "meta" if args.command.startswith("meta-") else "train")):
            raise
        print_notice(f"error: {args.command} needs {needed}")
        return EXIT_USER_ERROR
    except MemoryError as error:  # train/faults/out_of_memory.py says what to do
        print_notice(f"error: {error or 'out of memory'}")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
