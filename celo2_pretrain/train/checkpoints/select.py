"""Which checkpoint a run goes on from: the one that was named, or the newest whole one; and whether it fits the run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed.comm as dist

from celo2_pretrain.common.errors import UserError, shown
from celo2_pretrain.optimizer.state.adamw_checkpoint import load_plain
from celo2_pretrain.optimizer.state.collective import gather
from celo2_pretrain.optimizer.state.files import StateError
from celo2_pretrain.train.checkpoints import manifest
from celo2_pretrain.train.checkpoints.manifest import Damaged

ANY_WORLD = "any_world"  # folder of the state that goes on with another of these:
OF_THE_WORLD = ("number of ranks", "train.zero_stage", "train.precision", "optimizer.state_dtype")
AUTO = "auto"  # --resume auto
NAMED = re.compile(r"step_\d+")


def find(path: str) -> Path:
    """The checkpoint folder that `path` (a run, its checkpoints folder, or one checkpoint) stands for.

    Raises UserError when there is none, or its files aren't those of its manifest, by name and size.
    """
    given = Path(path)
    if not given.exists():
        raise UserError(f"no run or checkpoint at {path!r}: give a run folder or checkpoints/step_… of one")
    folder = given / "checkpoints" if (given / "checkpoints").is_dir() else given
    if folder is given and ((given / manifest.NAME).exists() or NAMED.fullmatch(given.name)):
        found = given
    else:
        if not (folder / "latest").is_file():  # killed in or before its first save
            hint = other_to_resume(folder) if in_order(folder) else ", so no checkpoint yet: begin it with --resume auto"
            raise UserError(f"{path!r} has no file checkpoints/latest{hint}")
        tag = latest(folder)
        if tag is None or not (folder / tag).is_dir():
            raise UserError(f"{folder / 'latest'} names no checkpoint of the run" + other_to_resume(folder))
        found = folder / tag
    try:
        manifest.structure(found)
    except Damaged as error:
        raise damaged(found, error) from None
    except OSError as error:
        raise UserError(f"cannot read {found}: {error}") from None
    return found


def latest(folder: Path) -> str | None:
    """The name that `latest` in a checkpoints folder holds; None when it can't be one."""
    try:
        text = (folder / "latest").read_text(errors="replace").strip()
    except OSError:
        return None
    return text if NAMED.fullmatch(text) else None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def in_order(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, oldest first."""
    return sorted((path for path in folder.glob("step_*") if NAMED.fullmatch(path.name)), key=step_of)


def damaged(found: Path, why: object) -> UserError:
    """The error for a checkpoint that can't be read."""
    return UserError(f"{found} is damaged: {why}{other_to_resume(found.parent, found)}")


def other_to_resume(folder: Path, but: Path | None = None) -> str:
    """The end of a message that says what can be resumed instead."""
    for other in reversed(in_order(folder)):
        if other != but and find_damage(other) is None:
            return f"; the newest whole checkpoint is {other}: --resume {other}"
    return f"; {folder} has no {'other ' if but else ''}whole checkpoint"


def find_damage(checkpoint: Path, shared: bool = False, beat: Callable[[], None] = lambda: None) -> str | None:
    """What is wrong with a checkpoint: names, sizes, checksums, or a file that holds more than plain data; None when it
    is whole.

    Args:
        shared: every rank calls it and reads a part of the files; all get the same answer.
        beat: is called after each round, in which every rank has read a file.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
    everyones = gather if shared else lambda value: [value]
    content, names, found = {}, [], None
    try:
        content = manifest.structure(checkpoint)
        names = sorted(content["files"])
    except (Damaged, OSError) as error:
        found = str(error)
    for first in range(0, max(everyones(len(names))), world):
        if found is None and first + rank < len(names):
            found = find_damage_in_file(checkpoint, content, first + rank, names)
        if worst := next((text for text in everyones(found) if text), None):
            return worst
        beat()
    return next((text for text in everyones(found) if text), None)


def find_damage_in_file(checkpoint: Path, content: dict[str, Any], number: int, names: list[str]) -> str | None:
    """The same of one file."""
    try:
        found = manifest.damage(checkpoint, content, number, len(names))
        if found is None and names[number].endswith(".pt"):
            load_plain(checkpoint / names[number])
    except (Damaged, StateError, OSError) as error:
        found = str(error)
    return found


def verify(checkpoint: Path) -> None:
    """Read all of a checkpoint, shared out among the ranks where there are several. Raises UserError, on all of them, that
    names a damaged file."""
    if found := find_damage(checkpoint, shared=dist.is_initialized()):
        raise damaged(checkpoint, found)


def newest_good(
    run_dir: str | Path,
    shared: bool = False,
    print_line: Callable[[str], None] = print,
    beat: Callable[[], None] = lambda: None,
) -> Path | None:
    """The newest whole checkpoint of a run, None where there is none. It isn't newer than the one that `latest` names.

    Args:
        shared: every rank calls it; they share the reading.
        print_line: is told of each damaged checkpoint that is passed over (with `shared` on every rank).
        beat: as for `find_damage`.
    """
    folder = Path(run_dir, "checkpoints")
    newest = latest(folder)
    for candidate in reversed(in_order(folder)):
        if newest and step_of(candidate) > step_of(Path(newest)):
            continue  # of a trajectory that was given up, or not finished
        found = find_damage(candidate, shared, beat)
        if found is None:
            return candidate
        print_line(f"passing over {candidate}: {found}")
    return None


def automatic(run_dir: str, overwrite: bool, print_line: Callable[[str], None]) -> Path | None:
    """What `--resume auto` goes on from, on all ranks; None for a new run. Raises UserError when the run has checkpoints and
    all of them are damaged: what could be saved of them is not overwritten unasked."""
    if in_order(Path(run_dir, "checkpoints")):
        print_line(f"reading the newest checkpoint of {run_dir}, to see whether it is whole")
    found = newest_good(run_dir, shared=True, print_line=print_line)
    if found is None and in_order(Path(run_dir, "checkpoints")) and not overwrite:
        raise UserError(
            f"{Path(run_dir, 'checkpoints')} has no whole checkpoint: pass --overwrite to begin anew in its "
            f"place, or choose another run_dir=…"
        )
    return found


def read_state(checkpoint: Path, description: dict) -> dict[str, Any]:
    """The checkpoint's state.json, and in it `other_world`: what of OF_THE_WORLD is another now.

    Raises UserError when it is damaged, or the checkpoint is of another model or set-up than this run's.
    """
    try:
        if manifest.sha256(checkpoint / "state.json") != manifest.read(checkpoint)["files"]["state.json"]["sha256"]:
            raise Damaged("state.json is damaged (its sha256 is another)")
        state = json.loads((checkpoint / "state.json").read_bytes())
        theirs = dict(state["description"])
        if type(state.setdefault("extra", {})) is not dict:
            raise ValueError
        if not all(type(state[key]) is int and state[key] >= 0 for key in ("step", "samples")):
            raise ValueError
    except Damaged as error:
        raise damaged(checkpoint, error) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise damaged(checkpoint, "state.json is missing, or not of this program's form") from None
    state["other_world"] = []
    for name, ours in description.items():
        if theirs.get(name) == ours:
            continue
        if name in OF_THE_WORLD and (checkpoint / ANY_WORLD).is_dir():
            state["other_world"].append(f"{name} {shown(theirs.get(name))} -> {shown(ours)}")
            continue
        hint = "; checkpoint.any_world=true would have made this possible" if name in OF_THE_WORLD else ""
        raise UserError(
            f"cannot resume from {checkpoint}: it was written with {name} = {shown(theirs.get(name))}, this run has "
            f"{shown(ours)}; resume with the same, or start another run_dir{hint}"
        )
    return state
