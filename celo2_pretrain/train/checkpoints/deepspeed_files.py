"""How DeepSpeed writes and reads the files of a checkpoint here: hashed and synced, and nothing of them executed."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from celo2_pretrain.optimizer.state.adamw_checkpoint import load_plain
from celo2_pretrain.train.checkpoints.manifest import write_file


class Files(CheckpointEngine):
    """Takes the place of DeepSpeed's own engine for files.

    DeepSpeed saves between barriers: a rank that raised there would leave the others waiting. So an error is kept, and
    `checked` raises it where the ranks agree on what happened.
    """

    def __init__(self):
        super().__init__()
        self.folder: Path | None = None  # what the files' names in the manifest are relative to
        self.written: dict[str, dict[str, Any]] = {}
        self.error: Exception | None = None
        self.newest: Path | None = None  # the checkpoint of the state that the run is in, if there is one
        self.copying = None  # rank 0's staging.Copy that is under way

    def begin(self, folder: Path) -> None:
        self.folder, self.written, self.error = folder, {}, None

    def checked(self) -> dict[str, dict[str, Any]]:
        """The manifest's entries of the files that this rank wrote. Raises what went wrong first."""
        if self.error:
            raise self.error
        return self.written

    def create(self, info) -> None:
        pass

    def makedirs(self, path, exist_ok=False) -> None:
        try:
            super().makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.error = self.error or error

    def save(self, state_dict, path: str) -> None:
        if self.error:
            return
        try:
            self.written[Path(path).relative_to(self.folder).as_posix()] = write_file(
                Path(path), lambda file: torch.save(state_dict, file)
            )
        except Exception as error:
            self.error = error

    def load(self, path: str, map_location=None) -> dict[str, Any]:
        return load_plain(Path(path), map_location=map_location, mmap=False)

    def commit(self, info) -> bool:
        return True


def files_of(engine) -> Files:
    """The engine's `Files`, made at the first call."""
    if not isinstance(engine.checkpoint_engine, Files):
        engine.checkpoint_engine = Files()
        # A checkpoint holds data only, so DeepSpeed's script doesn't go into it: python -m deepspeed.utils.zero_to_fp32
        engine._copy_recovery_script = lambda path: None
    return engine.checkpoint_engine


def random_states() -> dict:
    """This process's random states, in types that torch.load(weights_only=True) reads."""
    kind, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict) -> None:
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
