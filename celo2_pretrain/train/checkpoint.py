"""Checkpoints of a run: DeepSpeed's files, one file of random states per rank, and a description to check first.

    run_dir/checkpoints/step_00000500/   DeepSpeed's model and optimizer files, random_state_rank_*.pt, state.json;
                                         any_world/: parameters and optimizer state for another world (optimizer/state.py)
    run_dir/checkpoints/latest           the name of the newest whole checkpoint, written last and by a rename
"""
import json
import os
import random
import shutil
from pathlib import Path

import deepspeed.comm as dist
import numpy as np
import torch

from celo2_pretrain.optimizer.state import StateError, load_state, save_state
from celo2_pretrain.train.config import Config, as_tree
from celo2_pretrain.train.errors import UserError


ANY_WORLD = "any_world"  # folder of the state that goes on with another of these:
# How the model is computed or began: a resumed run may have it otherwise.
NOT_OF_THE_MODEL = ("activation_checkpointing", "attention", "compile", "scaled_init")
OF_THE_WORLD = ("number of ranks", "train.zero_stage", "train.precision", "optimizer.state_dtype")


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def random_states() -> dict:
    """This process's random states, in types that torch.load(weights_only=True) reads."""
    kind, keys, *rest = np.random.get_state()
    states = {"python": random.getstate(), "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
              "torch": torch.get_rng_state()}
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


def describe(config: Config, index: dict, world_size: int) -> dict:
    """What a checkpoint and the run that resumes it must have in common, each with the key it is set by."""
    return {
        **{f"model.{k}": v for k, v in as_tree(config.model).items() if k not in NOT_OF_THE_MODEL},
        "model.vocab_size": config.model.vocab_size or index["vocab_size"],  # null is the data's
        "data.path's tokenizer": index["tokenizer"]["sha256"][:12],
        "optimizer.name": config.optimizer.name, "optimizer.weights": config.optimizer.weights,
        "optimizer.state_dtype": config.optimizer.state_dtype,
        "train.seed": config.train.seed, "train.precision": config.train.precision,
        "train.zero_stage": config.train.zero_stage, "number of ranks": world_size,
    }


def save(engine, config: Config, description: dict, step: int, samples: int, extra: dict) -> Path:
    """Write a checkpoint on all ranks; `latest` names it only when every rank's part is on disk.

    `extra` goes into state.json, for `read_state`.
    """
    folder = Path(config.run_dir, "checkpoints")
    tag = f"step_{step:08d}"
    state = {"step": step, "samples": samples, "description": description, "extra": extra}
    if dist.get_rank() == 0 and (folder / tag).exists():
        shutil.rmtree(folder / tag)  # left by a trajectory that this one replaces; `latest` names an older one
    engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)
    torch.save(random_states(), folder / tag / f"random_state_rank_{dist.get_rank()}.pt")
    if config.checkpoint.any_world:
        try:
            save_state(engine, folder / tag / ANY_WORLD)
        except StateError as error:
            raise UserError(f"cannot save {folder / tag / ANY_WORLD}: {error}; checkpoint.any_world=false leaves it out") from None
    dist.barrier()
    if dist.get_rank() == 0:
        write_atomically(folder / tag / "state.json", json.dumps(state, indent=1) + "\n")
        write_atomically(folder / "latest", tag)
        old = sorted(p for p in folder.glob("step_*") if p.name < tag)
        for path in old[: max(0, len(old) - config.checkpoint.keep + 1)]:
            shutil.rmtree(path)
    dist.barrier()
    return folder / tag


def find(path: str) -> Path:
    """The checkpoint folder that `path` (a run, its checkpoints folder, or one checkpoint) stands for."""
    given = Path(path)
    if not given.exists():
        raise UserError(f"no run or checkpoint at {path!r}: give a run folder or checkpoints/step_… of one")
    if (given / "state.json").is_file():
        return given
    folder = given / "checkpoints" if (given / "checkpoints").is_dir() else given
    if not (folder / "latest").is_file():
        raise UserError(f"{path!r} has no whole checkpoint: start the run without --resume")
    found = folder / (folder / "latest").read_text().strip()
    if not (found / "state.json").is_file():
        raise UserError(f"{folder / 'latest'} names {found.name}, which is incomplete: name a checkpoint")
    return found


def read_state(checkpoint: Path, description: dict) -> dict:
    """The checkpoint's state.json, and in it `other_world`: what of OF_THE_WORLD is another now.

    Raises UserError when the checkpoint is of another model or set-up than this run's.
    """
    state = json.loads((checkpoint / "state.json").read_text())
    state["other_world"] = []
    state.setdefault("extra", {})  # checkpoints of earlier versions have none
    for name, ours in description.items():
        theirs = state["description"].get(name)
        if theirs == ours:
            continue
        if name in OF_THE_WORLD and (checkpoint / ANY_WORLD).is_dir():
            state["other_world"].append(f"{name} {theirs} -> {ours}")
            continue
        hint = "; checkpoint.any_world=true would have made this possible" if name in OF_THE_WORLD else ""
        raise UserError(
            f"cannot resume from {checkpoint}: it was written with {name} = {theirs}, this run has {ours}; "
            f"resume with the same, or start another run_dir{hint}"
        )
    return state


def load(engine, checkpoint: Path, other_world: bool) -> None:
    """Load model, optimizer and this rank's random state, on all ranks.

    Into another world only parameters and optimizer states go; the random states begin anew there.
    """
    if other_world:
        try:
            load_state(engine, checkpoint / ANY_WORLD)
        except StateError as error:
            raise UserError(f"cannot resume from {checkpoint}: {error}") from None
        return
    path, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_lr_scheduler_states=False)
    if path is None:
        raise UserError(f"DeepSpeed found no checkpoint in {checkpoint}: files are missing")
    set_random_states(torch.load(checkpoint / f"random_state_rank_{dist.get_rank()}.pt", weights_only=True))
