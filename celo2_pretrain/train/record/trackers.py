"""TensorBoard and Weights & Biases: where the records of metrics.jsonl also go, under the same names."""

import logging
import secrets
from importlib.util import find_spec
from pathlib import Path

from celo2_pretrain.common.errors import UserError, one_line
from celo2_pretrain.common.settings import as_tree
from celo2_pretrain.config import Config

WANDB_ID = "wandb_id"  # in the run folder: a resumed run goes on in the same run of the project


def check_installed(config: Config) -> None:
    """Raises UserError where a tracker's package is missing."""
    wanted = {
        "tensorboard": ("track.tensorboard=true", config.track.tensorboard),
        "wandb": (f"track.wandb_project={config.track.wandb_project}", bool(config.track.wandb_project)),
    }
    for package, (key, on) in wanted.items():
        if on and find_spec(package) is None:
            raise UserError(f"{key} needs the package {package}: pip install 'celo2-pretrain[track]', or leave it out")


def open_trackers(config: Config, start_step: int) -> list:
    """What the configuration asks for; step 0 begins anew. Raises UserError when Weights & Biases can't begin."""
    trackers = []
    if config.track.tensorboard:
        trackers.append(TensorBoard(config, start_step))
    if config.track.wandb_project:
        trackers.append(WandB(config, start_step))
    return trackers


class TensorBoard:
    """Scalars in run_dir/tensorboard."""

    def __init__(self, config: Config, start_step: int):
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(config.run_dir, "tensorboard")
        # Of a run that is replaced: they go with the first record, when this one has begun.
        self.replaced = [] if start_step else list(folder.glob("*"))
        # What was written after the checkpoint is hidden.
        self.writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)

    def log(self, record: dict) -> None:
        while self.replaced:
            self.replaced.pop().unlink(missing_ok=True)
        for name, value in numbers(record).items():
            self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of the project, named as the run folder; its files lie in run_dir/wandb, also with WANDB_MODE=offline."""

    def __init__(self, config: Config, start_step: int):
        import wandb

        folder = Path(config.run_dir)
        id_file = folder / WANDB_ID
        if start_step == 0 or not id_file.is_file():
            id_file.write_text(secrets.token_hex(4) + "\n")
        try:
            self.run = wandb.init(
                project=config.track.wandb_project,
                dir=str(folder),
                id=id_file.read_text().strip(),
                resume="allow",
                name=folder.resolve().name,
                config=as_tree(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.Error, OSError) as error:
            raise UserError(
                f"track.wandb_project={config.track.wandb_project}: Weights & Biases says: {one_line(error)}; "
                "run `wandb login`, or set WANDB_MODE=offline"
            ) from None
        # Its own steps can't go back to a checkpoint; ours is a field like any other.
        self.run.define_metric("*", step_metric="step")

    def log(self, record: dict) -> None:
        self.run.log({**numbers(record), "step": record["step"]})

    def close(self) -> None:
        self.run.finish()


def numbers(record: dict) -> dict[str, float]:
    """The record's numbers but the step."""
    return {
        name: value
        for name, value in record.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
