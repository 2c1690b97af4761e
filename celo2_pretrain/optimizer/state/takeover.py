"""Take over a running AdamW run with Celo2, and back: convert one optimizer's state into the other's.

    rates = from_adamw("checkpoints", "taken_over", Celo2(param_groups(model)))      # one process, beforehand
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=Celo2(
        param_groups(model), lr=rates["lr"], adamw_lr_multiplier=rates["adamw_lr_multiplier"]))
    load_state(engine, "taken_over")                                                 # every rank

With betas (b1, b2) and t steps, AdamW's unbiased moments are m̂ = exp_avg / (1 − b1^t), v̂ = exp_avg_sq / (1 − b2^t).
Celo2's accumulators are not bias-corrected, so they get what t steps at that average would have made of them:

    momentum_k = m̂ (1 − β_k^t)        rms = v̂ (1 − 0.95^t)
    v_row_k, v_col_k = row and column means of v̂ (1 − β_k^t)        v_full_k = v̂ (1 − β_k^t)

`to_adamw` is the inverse (from momentum_0 and rms), so there and back is exact up to round-off. Tensors under the AdamW
rule keep exp_avg, exp_avg_sq and step as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..celo2 import Celo2
from ..matrices.views import MatrixView
from ..reference import FACTORED_DECAYS, MOMENTUM_DECAYS, RMS_DECAY
from ..sharding.layouts import Original
from ..sharding.shape import BlockShape
from ..step.accumulators import element_keys
from . import files as state_files
from .adamw_checkpoint import AdamWCheckpoint, SavedAdamW
from .files import INDEX, SHARED, StateError, StateReader


def from_adamw(
    checkpoint: str | Path,
    folder: str | Path,
    optimizer: Any,
    tag: str | None = None,
    names: Sequence[str] | None = None,
    peak_lr: float | None = None,
) -> dict[str, float]:
    """Convert the state of an AdamW run into one that `load_state` gives to Celo2 in any world. One process calls it.

    Args:
        checkpoint: a DeepSpeed checkpoint folder of any ZeRO stage, or what `save_state` wrote of an engine with AdamW.
        folder: where to write.
        optimizer: the Celo2 (or its engine) that will go on; it says which tensor gets which rule and matrix view.
            Nothing of it is changed, so one over a model on the meta device does.
        tag, names: see `AdamWCheckpoint`.
        peak_lr: the highest rate of AdamW's schedule on the matrices; by default what the checkpoint records of it
            (`initial_lr` of torch's schedulers, DeepSpeed's own scheduler), or else its rate in the last step.

    Returns `learning_rates`, also printed. Only one tensor is in memory at a time.
    Raises StateError for a checkpoint that can't be read, or that doesn't have just the optimizer's parameters.
    """
    optimizer, targets = _targets(optimizer)
    source = (
        SavedAdamW(checkpoint)
        if (Path(checkpoint) / INDEX).is_file()
        else AdamWCheckpoint(checkpoint, tag, names, trained=targets.keys())
    )
    _compare(source, targets)
    update = {"squares": 0.0, "elements": 0, "lr": 0.0, "peak": 0.0, "adamw_peak": 0.0}

    def convert(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        original, rule = targets[name]
        values, step, options = source.read(name), source.step(name), source.options(name)
        if rule == "adamw":
            update["adamw_peak"] = max(update["adamw_peak"], float(options["peak_lr"]))
            return values, {"step": torch.tensor(step)}
        mean, square = _unbiased(values, step, options["betas"])
        update["squares"] += float((mean / (square.sqrt() + options["eps"])).square().sum())
        update["elements"] += mean.numel()
        update["lr"] = max(update["lr"], float(options["lr"]))
        update["peak"] = max(update["peak"], float(options["peak_lr"]))
        return _seed(original, values["param"], mean, square, step)

    entries = {name: (list(original.shape), rule, original.view) for name, (original, rule) in targets.items()}
    theta = {f"theta|{key}": x.cpu().contiguous() for key, x in optimizer.mlp._asdict().items()}
    _write(Path(folder), entries, convert, theta, lambda: {"learning_rates": _learning_rates(update, peak_lr)})
    rates = _learning_rates(update, peak_lr)
    print(describe(rates), flush=True)
    return rates


def to_adamw(
    state: str | Path, folder: str | Path, betas: tuple[float, float] = (0.9, 0.95), steps: int | None = None
) -> None:
    """Convert a Celo2 state into one that `load_state` gives to a DeepSpeed engine with AdamW in any world.

    Args:
        state: what `save_state` wrote.
        betas: of the AdamW that will go on.
        steps: how many steps were taken; by default the step count of the tensors under the AdamW rule.

    One process calls it. Raises StateError where `steps` isn't known or `state` can't be read.
    """
    reader = StateReader(state)
    reader.verify()
    counts = [float(reader.shared(f"{name}|step")) for name, entry in reader.tensors.items() if entry["rule"] == "adamw"]
    taken = float(steps) if steps is not None else max(counts, default=0.0)
    if taken < 1 and len(counts) < len(reader.tensors):
        raise StateError(
            f"{str(state)!r} doesn't say how many steps were taken (no tensor under the AdamW rule that "
            "was stepped): pass steps=…"
        )

    def convert(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if reader.tensors[name]["rule"] == "adamw":
            return (
                {key: reader.whole(name, key) for key in element_keys("adamw", False)},
                {"step": reader.shared(f"{name}|step")},
            )
        mean = reader.whole(name, "momentum_0") / (1 - MOMENTUM_DECAYS[0] ** taken)
        square = reader.whole(name, "rms") / (1 - RMS_DECAY**taken)
        return (
            {
                "param": reader.whole(name, "param"),
                "exp_avg": mean * (1 - betas[0] ** taken),
                "exp_avg_sq": square * (1 - betas[1] ** taken),
            },
            {"step": torch.tensor(taken)},
        )

    entries = {name: (entry["shape"], "adamw", MatrixView()) for name, entry in reader.tensors.items()}
    _write(Path(folder), entries, convert, {}, lambda: reader.extra)


def describe(rates: dict[str, float]) -> str:
    """`learning_rates` in words."""
    peak, last = rates["adamw_matrix_lr"], rates["adamw_last_lr"]
    decayed = abs(last - peak) > 1e-3 * peak
    of_peak = f"beside AdamW's peak rate of {peak:.2g}, the peak " if decayed else ""
    scheduled = " under the same schedule" if decayed else ""
    return (
        f"AdamW's last step had RMS {rates['update_rms']:.2f} × lr {last:.2g} on the matrices that Celo2 takes over, "
        f"Celo2's has RMS 1 × lr: {of_peak}lr={rates['lr']:.2g} goes on with steps of the same size{scheduled}, and "
        f"adamw_lr_multiplier={rates['adamw_lr_multiplier']:.3g} keeps AdamW's rate for the other tensors"
    )


def _learning_rates(update: dict[str, float], peak_lr: float | None = None) -> dict[str, float]:
    """With which peak rates Celo2's steps are as large as AdamW's were, under the same schedule.

    lr: AdamW's peak times the RMS of its normalised update on the matrices that Celo2 takes over; adamw_lr_multiplier:
    such that the tensors that stay under AdamW keep its rate; update_rms and adamw_matrix_lr: what lr was made of;
    adamw_last_lr: AdamW's rate in its last step.
    """
    rms = (update["squares"] / max(1, update["elements"])) ** 0.5
    ratio = update["adamw_peak"] / update["peak"] if update["adamw_peak"] and update["peak"] else 1.0
    peak = update["peak"] if peak_lr is None else peak_lr
    return {
        "lr": rms * peak,
        "adamw_lr_multiplier": ratio / rms if rms else 0.0,
        "update_rms": rms,
        "adamw_matrix_lr": peak,
        "adamw_last_lr": update["lr"],
    }


def _targets(optimizer: Any) -> tuple[Celo2, dict[str, tuple[Original, str]]]:
    while not isinstance(optimizer, Celo2) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Celo2):
        raise TypeError(f"expected the Celo2 (or its engine) that will go on, got {type(optimizer).__name__}")
    return optimizer, {
        original.name: (original, group["rule"])
        for group in optimizer.param_groups
        for original in optimizer.originals_of(group)
        if original.trainable
    }


def _compare(source: AdamWCheckpoint | SavedAdamW, targets: dict[str, tuple[Original, str]]) -> None:
    source.rename(targets)
    where = str(source.folder)
    for few, many, words in (
        (source.shapes, targets, "the checkpoint has no"),
        (targets, source.shapes, "Celo2 was not given the"),
    ):
        missing = [name for name in many if name not in few]
        if missing:
            raise StateError(
                f"{where!r}: {words} parameter {missing[0]!r} ({len(missing)} such; names there are like "
                f"{list(few)[:2]}): construct Celo2 over the same model, by param_groups(model)"
            )
    for name, (original, _) in targets.items():
        if source.shapes[name] != original.shape:
            raise StateError(f"{where!r} has {name!r} with shape {source.shapes[name]}, the model with {original.shape}")
        if source.step(name) < 1:
            raise StateError(f"{where!r}: AdamW has not stepped {name!r} yet, so there is nothing to take over")


def _unbiased(values: dict[str, Tensor], step: float, betas: Sequence[float]) -> tuple[Tensor, Tensor]:
    return values["exp_avg"] / (1 - betas[0] ** step), values["exp_avg_sq"] / (1 - betas[1] ** step)


def _seed(
    original: Original, param: Tensor, mean: Tensor, square: Tensor, step: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Celo2's states for one tensor: by element, and the factored ones, from the unbiased moments m̂ and v̂."""
    elements = {"param": param, "rms": square * (1 - RMS_DECAY**step)}
    elements |= {f"momentum_{k}": mean * (1 - decay**step) for k, decay in enumerate(MOMENTUM_DECAYS)}
    rows, cols = [], []
    for block in original.view.blocks(original.shape):
        shape = BlockShape(block)
        if not shape.matrix:
            elements |= {f"v_full_{k}": square * (1 - decay**step) for k, decay in enumerate(FACTORED_DECAYS)}
            return elements, {}
        d1, d0 = block.factored
        v = block.select(square)
        rows.append(v.mean(d0).flatten())
        cols.append(v.mean(d1).flatten())
    weight = torch.tensor([1 - decay**step for decay in FACTORED_DECAYS])[:, None]
    return elements, {"v_row": weight * torch.cat(rows), "v_col": weight * torch.cat(cols)}


def _write(
    folder: Path,
    entries: dict[str, tuple[list[int], str, MatrixView]],
    convert: Callable,
    shared: dict[str, Tensor],
    extra: Callable[[], Any],
) -> None:
    """Write a state: `convert(name)` gives a tensor's states by element, and those that are the same on all ranks."""
    folder = folder.absolute()
    state_files.begin(folder)
    last: tuple[str, dict[str, Tensor]] = ("", {})

    def fetch(name: str, start: int, stop: int) -> dict[str, Tensor]:
        nonlocal last
        if last[0] != name:
            elements, same = convert(name)
            shared.update({f"{name}|{key}": x for key, x in same.items()})
            last = name, elements
        return {key: x.reshape(-1)[start:stop].clone() for key, x in last[1].items()}

    try:
        unfinished = state_files.building(folder)
        ranges = [(name, 0, prod(shape)) for name, (shape, _, _) in entries.items()]
        files = state_files.write_ranges(unfinished, "rank_00000", ranges, fetch)
        files[SHARED] = {"sha256": state_files.write_tensors(unfinished / SHARED, shared), "ranges": {}}
        tensors = {name: state_files.tensor_entry(shape, rule, view) for name, (shape, rule, view) in entries.items()}
        state_files.finish(folder, {"tensors": tensors, "groups": [], "files": files, "extra": extra()})
    except BaseException:
        state_files.abandon(folder)
        raise
