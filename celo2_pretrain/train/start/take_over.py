"""`train --take-over RUN`: Celo2 goes on from a checkpoint of the driver's own AdamW run, in a run of its own.

The weights, AdamW's moments and the place in the data and the schedule are those of the checkpoint. The peak rates are
AdamW's, times what makes Celo2's steps as large (optimizer/state/takeover.py), unless the command gives others.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import READER, Config, load_config
from celo2_pretrain.optimizer.state.collective import gather, together
from celo2_pretrain.optimizer.state.save_load import StateError, load_state
from celo2_pretrain.optimizer.state.takeover import from_adamw
from celo2_pretrain.train.checkpoints import select
from celo2_pretrain.train.checkpoints.export import run_config_path

CONVERTED = ".taken_over"  # in run_dir, until it is loaded
RATES = ("optimizer.lr", "optimizer.adamw_lr_multiplier")


@dataclass
class TakeOver:
    """Which run is taken over, and how."""

    path: str  # the run, or one of its checkpoints
    peak: float  # AdamW's highest rate on the matrices
    measured: tuple[str, ...]  # those of RATES that come from the checkpoint


def take_over(path: str, config_path: str | None, overrides: list[str]) -> tuple[Config, TakeOver]:
    """The configuration of the run that takes over: `config_path`'s, or the AdamW run's with Celo2 as its optimizer; with
    `overrides`. Raises UserError."""
    theirs = run_config_path(path)
    adamw = load_config(theirs)
    if adamw.optimizer.name != "adamw":
        raise UserError(f"--take-over {path}: its optimizer is {adamw.optimizer.name} already: go on with --resume {path}")
    config = load_config(config_path or theirs, overrides if config_path else ["optimizer.name=celo2", *overrides])
    if config.optimizer.name == "adamw":
        raise UserError("--take-over is for Celo2: leave out optimizer.name=adamw, or give optimizer.name=celo2")
    if Path(config.run_dir).resolve() == Path(theirs).parent.resolve():
        raise UserError(f"--take-over {path}: give the new run a folder of its own, such as run_dir={config.run_dir}_celo2")
    given = READER.parse(overrides) | (READER.read(config_path) if config_path else {})
    return config, TakeOver(path, adamw.optimizer.lr, tuple(name for name in RATES if name not in given))


def begun(run_dir: str) -> bool:
    """Whether the run that took over has saved: it goes on from its own checkpoints then."""
    return bool(select.in_order(Path(run_dir, "checkpoints")))


def find(path: str) -> Path:
    """The checkpoint to take over. Raises UserError where it has no state for another optimizer."""
    found = select.find(path)
    if not (found / select.ANY_WORLD).is_dir():
        raise UserError(
            f"--take-over {path}: {found} has no {select.ANY_WORLD}/, as checkpoint.any_world=false said: resume the AdamW "
            "run for some steps with checkpoint.any_world=true"
        )
    return found


def convert(asked: TakeOver, checkpoint: Path, config: Config, optimizer: torch.optim.Optimizer) -> Path:
    """Write the checkpoint's state as Celo2's, and set the peak rates of `config` and `optimizer`; every rank calls it.

    Returns the state's folder. Raises UserError.
    """
    folder = Path(config.run_dir, CONVERTED)

    def write() -> dict[str, float]:
        if int(os.environ.get("RANK", 0)) != 0:
            return {}
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed here
        return from_adamw(checkpoint / select.ANY_WORLD, folder, optimizer, peak_lr=asked.peak)

    try:
        rates = gather(together(write))[0]
    except StateError as error:
        raise UserError(f"--take-over {asked.path}: {error}") from None
    for name in asked.measured:
        key = name.removeprefix("optimizer.")
        setattr(config.optimizer, key, rates[key])
    for group in optimizer.param_groups:
        group.update({key: getattr(config.optimizer, key) for key in ("lr", "adamw_lr_multiplier") if key in group})
    return folder


def load(asked: TakeOver, engine, folder: Path) -> None:
    """Load what `convert` has written, on all ranks. Raises UserError."""
    try:
        load_state(engine, folder)
        together(lambda: shutil.rmtree(folder) if int(os.environ.get("RANK", 0)) == 0 else None)
    except StateError as error:
        raise UserError(f"--take-over {asked.path}: {error}") from None
