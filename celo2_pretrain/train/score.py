"""How good a run's model is: validation loss, perplexity, bits per byte, and tasks of the lm-evaluation-harness."""

import importlib
import json
import math
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from celo2_pretrain.common.durable import write_atomically
from celo2_pretrain.common.errors import UserError
from celo2_pretrain.data.loader import ValLoader
from celo2_pretrain.data.mixture import open_mixture
from celo2_pretrain.model.loss import validation_loss
from celo2_pretrain.train.checkpoints.export import export, load_trained

REPORTED = ("results", "groups", "versions", "n-shot", "n-samples")  # of what lm_eval returns; the rest is its settings


def evaluate(
    path: str, sequences: int | None, tasks: list[str], task_folder: str | None, limit: int | None, out: str | None
) -> None:
    """Print how good the newest checkpoint of run `path`, or one checkpoint, is.

    Args:
        sequences: validation windows; None: all.
        tasks: names of the harness's tasks.
        task_folder: with task files of the user's own.
        limit: examples of each task; None: all.
        out: a JSON file for all results.

    Raises UserError, before anything is computed, for what isn't there: the run, the harness, a task.
    """
    for option, value in (("--sequences", sequences), ("--limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: must be at least 1")
    for option, value in (("--limit", limit), ("--task-folder", task_folder)):
        if value is not None and not tasks:
            raise UserError(f"{option} {value} is for benchmark tasks: give --tasks, too")
    if out and not Path(out).absolute().parent.is_dir():
        raise UserError(f"--json {out!r}: there is no folder {str(Path(out).parent)!r}")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    harness = open_harness(tasks, task_folder) if tasks else None
    results = {"path": path, "validation": (found := on_validation(path, sequences, device))}
    print(
        f"validation loss {found['loss']:.4f} nats a token, {found['bits_per_byte']:.4f} bits per byte, perplexity "
        f"{found['perplexity']:.2f}, over {found['windows']} windows of {found['context']} tokens",
        flush=True,
    )
    if tasks:
        scores = on_tasks(path, harness, tasks, limit, device)
        results["tasks"] = {key: scores[key] for key in REPORTED if key in scores}
        print(importlib.import_module("lm_eval.utils").make_table(scores))
    if out:
        write_atomically(Path(out), json.dumps(results, indent=1, default=str) + "\n")
        print(f"wrote {out}")


def on_validation(path: str, sequences: int | None, device: torch.device) -> dict[str, float]:
    """Mean loss in nats a token, and what follows from it, over the run's validation windows."""
    model, _, config = load_trained(path)
    mixture = open_mixture(config.data.path, config.data.mixture)
    loader = ValLoader(mixture, config.model.context, config.train.micro_batch_size, sequences or sys.maxsize, 0, 1)
    loss = validation_loss(model.to(device), loader, device, show=True)
    # exp(710) is beyond a float: a model that diverged has a loss, too.
    return {
        "loss": loss,
        "bits_per_byte": loss * mixture.val_tokens_per_byte / math.log(2),
        "perplexity": math.exp(min(loss, 700)),
        "windows": loader.sequences,
        "context": config.model.context,
    }


def task_names(text: str | None) -> list[str]:
    """Tasks separated by commas. Raises UserError where there is none between two."""
    names = [name.strip() for name in text.split(",")] if text is not None else []
    if not all(names):
        raise UserError(f"--tasks {text!r}: give names separated by commas, for example --tasks hellaswag,arc_easy")
    return names


def open_harness(tasks: list[str], folder: str | None):
    """lm_eval's TaskManager, which knows all `tasks`. Raises UserError when lm_eval isn't there, or knows one not."""
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--task-folder {folder!r} is not a folder")
    try:
        manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=folder)
    except ImportError as error:
        raise UserError(f"--tasks needs the lm-evaluation-harness ({error}): pip install 'celo2-pretrain[eval]'") from None
    for task in tasks:
        if not manager.match_tasks([task]):
            raise UserError(
                f"--tasks {task}: the lm-evaluation-harness has no such task (`lm-eval ls tasks` lists all); "
                f"for one of your own give --task-folder"
            )
    return manager


def on_tasks(path: str, manager, tasks: list[str], limit: int | None, device: torch.device) -> dict:
    """What lm_eval's `simple_evaluate` returns for the exported model, in float32. Raises UserError when it can't be run,
    as when a task's data can't be had."""
    transformers.utils.logging.disable_progress_bar()  # of writing and reading one file
    with tempfile.TemporaryDirectory() as folder:
        export(path, exported := str(Path(folder, "model")))
        try:
            return importlib.import_module("lm_eval").simple_evaluate(
                model="hf",
                model_args={"pretrained": exported, "dtype": "float32"},
                tasks=tasks,
                limit=limit,
                task_manager=manager,
                device=str(device),
                batch_size=8,
                log_samples=False,
            )
        except (ImportError, OSError, ValueError, RuntimeError) as error:  # no hub, no such data, too little memory, …
            reason = next(iter(str(error).splitlines()), "")
            raise UserError(f"--tasks {','.join(tasks)}: {type(error).__name__}: {reason}") from error
