"""Checkpoints of a run, each of them whole or not there (docs/checkpoints.md).

    run_dir/checkpoints/step_00000500/   DeepSpeed's model and optimizer files, random_state_rank_*.pt, state.json;
                                         any_world/: parameters and optimizer state for another world
                                         (optimizer/state/save_load.py);
                                         manifest.json: size and sha256 of every other file
    run_dir/checkpoints/latest           the name of the newest one, moved last
    run_dir/checkpoints/abandoned_step_… later than the one that the run was resumed from; removed when it has come as far
    run_dir/checkpoints/.tmp-*           what is being written or removed; the next start clears it away

`save`, `load` and `finish` are called by every rank.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer

from celo2_pretrain.common.durable import sha256, sync, write_atomically
from celo2_pretrain.common.errors import UserError, one_line
from celo2_pretrain.common.settings import as_tree
from celo2_pretrain.config import Config
from celo2_pretrain.optimizer.state import files as state_files
from celo2_pretrain.optimizer.state.adamw_checkpoint import load_plain
from celo2_pretrain.optimizer.state.collective import gather, together
from celo2_pretrain.optimizer.state.save_load import StateError, load_state, save_state
from celo2_pretrain.train.checkpoints import manifest
from celo2_pretrain.train.checkpoints.deepspeed_files import Files, files_of, random_states, set_random_states
from celo2_pretrain.train.checkpoints.select import ANY_WORLD, in_order, latest, step_of
from celo2_pretrain.train.checkpoints.staging import Copy, staged_folder
from celo2_pretrain.train.start.ranks import lost_connection

# How the model is computed or began: a resumed run may have it otherwise.
NOT_OF_THE_MODEL = ("activation_checkpointing", "attention", "compile", "scaled_init")
TEMPORARY = ".tmp-"
ABANDONED = "abandoned_"
ROUND_SECONDS = 5.0  # between two beats of a wait


def describe(config: Config, index: dict, world_size: int) -> dict:
    """What a checkpoint and the run that resumes it must have in common, each with the key it is set by."""
    return {
        **{f"model.{k}": v for k, v in as_tree(config.model).items() if k not in NOT_OF_THE_MODEL},
        "model.vocab_size": config.model.vocab_size or index["vocab_size"],  # null is the data's
        "data.path's tokenizer": index["tokenizer"]["sha256"][:12],
        "optimizer.name": config.optimizer.name,
        "optimizer.weights": config.optimizer.weights,
        "optimizer.state_dtype": config.optimizer.state_dtype,
        "train.seed": config.train.seed,
        "train.precision": config.train.precision,
        "train.zero_stage": config.train.zero_stage,
        "number of ranks": world_size,
    }


def save(
    engine,
    config: Config,
    description: dict,
    step: int,
    samples: int,
    extra: dict,
    print_line: Callable[[str], None] = print,
    beat: Callable[[], None] = lambda: None,
    decay_begin: int | None = None,
) -> Path | None:
    """Write a checkpoint of what the run is in after `step` steps.

    Args:
        description: of `describe`.
        samples: windows that the run has seen.
        extra: goes into state.json, for `read_state`.
        print_line: is told on rank 0 of a save that failed, or of an old checkpoint that couldn't be removed.
        beat: is called now and then while the copy of the checkpoint before is waited for.
        decay_begin: the newest checkpoint up to this step is kept, whatever checkpoint.keep_last says.

    Returns the checkpoint's folder; None where it couldn't be written and checkpoint.on_error is continue (not after the
    last step). Else raises UserError then, alike on all ranks. The checkpoints before it stay as they are.
    """
    files = files_of(engine)
    folder = Path(config.run_dir, "checkpoints")
    final, temporary = folder / f"step_{step:08d}", folder / f"{TEMPORARY}step_{step:08d}"
    if files.newest == final:  # a stop right after the regular save
        return final
    state = {"step": step, "samples": samples, "description": description, "extra": extra}
    print_once = print_line if dist.get_rank() == 0 else lambda text: None
    staging = config.checkpoint.staging
    place = staged_folder(staging, config.run_dir) if staging else temporary

    def named(entries: dict[str, dict[str, Any]]) -> None:
        publish(temporary, final, step, entries)
        prune(final, config.checkpoint.keep_last, config.checkpoint.keep_every, print_once, decay_begin)

    def complete(entries: dict[str, dict[str, Any]]) -> None:
        if dist.get_rank() == 0 and staging:
            make_whole(place, step, entries)
            folder.mkdir(parents=True, exist_ok=True)
            files.copying = Copy(place, temporary, final, named)
        elif dist.get_rank() == 0:
            named(entries)

    finish(engine, config, print_line, beat)
    try:
        entries = write(engine, files, config, place, state)
        together(lambda: complete(entries))
    except StateError as error:
        if dist.get_rank() == 0:
            shutil.rmtree(place, ignore_errors=True)
        not_saved(config, final, error, step == config.train.max_steps, print_once)
        return None
    files.newest = final
    Copy.folder = place if staging else None
    return final


def finish(engine, config: Config, print_line: Callable[[str], None] = print, beat: Callable[[], None] = lambda: None) -> bool:
    """Wait for the copy that checkpoint.staging left under way; on all ranks, which `beat` meanwhile. Its failure is
    treated as a save's.

    Returns whether the last checkpoint that was saved is there.
    """
    files = files_of(engine)
    if not config.checkpoint.staging or files.newest is None:
        return files.newest is not None
    copying, files.copying, newest = files.copying, None, files.newest
    if copying and copying.goes_on(0):
        print_line(f"waiting for the copy of {newest.name} from {config.checkpoint.staging}")
    while any(gather(copying is not None and copying.goes_on(ROUND_SECONDS))):
        beat()
    Copy.folder = None
    try:
        together(lambda: copying.wait() if copying else None)
    except StateError as error:
        files.newest = None
        last = step_of(newest) == config.train.max_steps
        not_saved(config, newest, error, last, print_line if dist.get_rank() == 0 else lambda text: None)
    return files.newest is not None


def not_saved(config: Config, final: Path, error: StateError, last: bool, print_line: Callable[[str], None]) -> None:
    """Warn, or raise UserError as checkpoint.on_error says; always after the last step."""
    kept = latest(final.parent)
    kept = f"the newest whole checkpoint is {final.parent / kept}" if kept else "the run has no checkpoint yet"
    message = f"cannot save {final}: {error}; {kept}"
    if config.checkpoint.on_error == "stop" or last:
        raise UserError(f"{message}: see to it, then go on with --resume {config.run_dir}") from None
    print_line(f"warning: {message}; training goes on, as checkpoint.on_error=continue says")


def write(engine, files: Files, config: Config, folder: Path, state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All of a checkpoint but its manifest; returns the manifest's entries. Raises StateError, alike on all ranks."""

    def prepare() -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            check_space(folder, in_order(Path(config.run_dir, "checkpoints")))

    def write_own() -> dict[str, dict[str, Any]]:
        files.checked()
        files.save(random_states(), str(folder / f"random_state_rank_{dist.get_rank()}.pt"))
        if dist.get_rank() == 0:
            text = json.dumps(state, indent=1) + "\n"
            files.written["state.json"] = manifest.write_file(folder / "state.json", lambda file: file.write(text.encode()))
        return files.checked()

    together(prepare)
    files.begin(folder)
    engine.save_checkpoint(str(folder.parent), tag=folder.name, client_state=state, save_latest=False)
    entries = {name: entry for some in gather(together(write_own)) for name, entry in some.items()}
    if config.checkpoint.any_world:
        try:
            save_state(engine, folder / ANY_WORLD)
        except StateError as error:
            raise StateError(f"{error}; checkpoint.any_world=false leaves out {ANY_WORLD}/") from None
        entries |= together(lambda: any_world_entries(folder) if dist.get_rank() == 0 else {})
    return entries


def check_space(folder: Path, others: list[Path]) -> None:
    """Refuse to fill the disk with a checkpoint of the size of the last of `others` that won't fit. Raises StateError."""
    try:
        needed = sum(entry["size"] for entry in manifest.read(others[-1])["files"].values()) if others else 0
    except manifest.Damaged:
        return
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StateError(f"{folder.parent} has {free / 1e6:,.1f} MB left, the checkpoint before took {needed / 1e6:,.1f} MB")


def any_world_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest's entries of what `save_state` wrote, which has the checksums already."""
    index = folder / ANY_WORLD / state_files.INDEX
    digests = {name: entry["sha256"] for name, entry in json.loads(index.read_bytes())["files"].items()}
    digests[state_files.INDEX] = sha256(index)
    return {
        f"{ANY_WORLD}/{name}": {"size": (folder / ANY_WORLD / name).stat().st_size, "sha256": digest}
        for name, digest in digests.items()
    }


def publish(temporary: Path, final: Path, step: int, entries: dict[str, dict[str, Any]]) -> None:
    """Give a written checkpoint its name, then have `latest` name it."""
    make_whole(temporary, step, entries)
    if final.exists():
        remove(final)  # damaged: a rollback has passed it over
    os.rename(temporary, final)
    sync(final.parent)
    write_atomically(final.parent / "latest", final.name)


def make_whole(folder: Path, step: int, entries: dict[str, dict[str, Any]]) -> None:
    """Write the manifest. Raises StateError when the ranks' files aren't all there."""
    try:
        manifest.write(folder, step, entries)
    except manifest.Damaged as error:
        raise StateError(str(error)) from None


def prune(
    newest: Path, keep_last: int, keep_every: int, print_line: Callable[[str], None], decay_begin: int | None = None
) -> None:
    """Remove what is older than the `keep_last` newest ones, where every `keep_every`-th step stays, and the newest up to
    step `decay_begin`; and what was abandoned, once the run has come as far again."""
    old = [path for path in in_order(newest.parent) if step_of(path) < step_of(newest)]
    before = [path for path in (*old, newest) if decay_begin is not None and step_of(path) <= decay_begin][-1:]
    doomed = [
        path
        for path in old[: max(0, len(old) - keep_last + 1)]
        if path not in before and not (keep_every and step_of(path) % keep_every == 0)
    ]
    abandoned = [
        path
        for path in newest.parent.glob(f"{ABANDONED}step_*")
        if (number := path.name.rpartition("_")[2]).isdecimal() and int(number) <= step_of(newest)
    ]
    for path in (*doomed, *abandoned):
        try:
            remove(path)
        except OSError as error:
            print_line(f"warning: cannot remove the old checkpoint {path}: {error.strerror}")


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; one that is half gone has no checkpoint's name."""
    doomed = checkpoint.with_name(f"{TEMPORARY}removed-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def clear_away(folder: Path) -> None:
    """Remove what a killed run left half written in its checkpoints folder."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def go_on_from(checkpoint: Path, print_line: Callable[[str], None]) -> None:
    """Make this the newest of its folder: what was saved after it is of a trajectory that the run leaves. Rank 0 calls
    it, when the run is known to start, and `print_line` is told."""
    clear_away(checkpoint.parent)
    write_atomically(checkpoint.parent / "latest", checkpoint.name)  # first: nothing later than `latest` is gone on from
    later = [path for path in in_order(checkpoint.parent) if step_of(path) > step_of(checkpoint)]
    for path in later:
        to = path.with_name(f"{ABANDONED}{path.name}")
        shutil.rmtree(to, ignore_errors=True)
        os.rename(path, to)
    if later:
        print_line(
            f"going on from {checkpoint.name}: what was saved later is now "
            f"{', '.join(ABANDONED + path.name for path in later)}, which are removed when the run has come as far "
            "again"
        )


def load(engine, checkpoint: Path, other_world: bool) -> None:
    """Load model, optimizer and this rank's random state, on all ranks; before training, or in the middle of it.

    Into another world only parameters and optimizer states go; the random states begin anew there.
    `choose.verify` comes first: here nothing is compared. Raises UserError.
    """
    files_of(engine).newest = None
    forget_gradients(engine)
    try:
        if other_world:
            load_state(engine, checkpoint / ANY_WORLD)
            return
        path, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_lr_scheduler_states=False)
        if path is None:
            raise StateError("DeepSpeed finds no checkpoint there: files are missing")
        set_random_states(load_plain(checkpoint / f"random_state_rank_{dist.get_rank()}.pt"))
    except StateError as error:
        raise UserError(f"cannot resume from {checkpoint}: {error}") from None
    except (RuntimeError, ValueError, KeyError) as error:  # DeepSpeed's or torch's, of tensors that aren't where they were
        if not_of_the_files(error):
            raise
        raise UserError(
            f"cannot resume from {checkpoint}: its tensors don't fit this model and optimizer "
            f"({type(error).__name__}: {one_line(error)}); resume with the versions that origin.jsonl names, "
            f"or choose another run_dir=…"
        ) from error


def not_of_the_files(error: Exception) -> bool:
    """Whether it is the machine's: another rank that is gone, a GPU, memory."""
    return (
        lost_connection(error)
        or isinstance(error, torch.OutOfMemoryError)
        or bool(re.search("can't allocate memory|CUDA|NCCL", str(error)))
    )


def forget_gradients(engine) -> None:
    """Drop what a step that wasn't finished has accumulated, so that the next micro-batch is the first of a step."""
    engine.micro_steps = 0
    zero = engine.optimizer
    zero.zero_grad()
    for parameter in engine.module.parameters():
        parameter.grad = None
    for name, value in (("averaged_gradients", {}), ("all_grad_tensors", {})):  # ZeRO's
        if hasattr(zero, name):
            setattr(zero, name, value)
    if isinstance(zero, DeepSpeedZeroOptimizer):  # stages 1 and 2
        zero.micro_step_id = INITIAL_MICRO_STEP_ID
