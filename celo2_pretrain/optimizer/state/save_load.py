"""Save and restore an optimizer's state for any world: by parameter name and full shape, whatever shards it.

Each rank writes the ranges that it holds and reads the ranges that it needs, tensor by tensor, so a state saved on
4 ranks under ZeRO-2 goes on with 2 ranks under ZeRO-3, with offload, FSDP2, or one plain process. What is written
where is in `files`. AdamW under DeepSpeed is saved and restored the same way (`takeover` converts between them).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...weights import load_weights
from ..celo2 import Celo2
from ..matrices.views import MatrixView
from ..sharding.layouts import collective_device
from ..sharding.plan import factored_sizes
from ..step.accumulators import ACCUMULATORS
from ..step.state_dtypes import pack_range, unpack_range
from . import files as state_files
from .collective import gather, this_rank, together, world_size
from .files import SHARED, StateError, StateReader
from .held import Held, at_rest, examine, of_celo2
from .index import view_of

logger = logging.getLogger(__name__)

OPTIONS = (
    "lr",
    "initial_lr",
    "weight_decay",
    "adamw_weight_decay",
    "orthogonalize",
    "newton_schulz",
    "adamw_lr_multiplier",
    "adamw_betas",
    "adamw_eps",
    "betas",
    "eps",
)  # of a param group, as far as it has them
SCALE = ("cur_scale", "cur_iter", "last_overflow_iter")  # of a dynamic loss scale


def save_state(optimizer: Any, folder: str | Path, extra: Any = None) -> Path:
    """Write the optimizer's parameters (float32 masters) and states into a new folder. Every rank calls it.

    Args:
        optimizer: a `Celo2`, or the DeepSpeed engine (or wrapped optimizer) that drives one; or an engine with AdamW.
        folder: on a file system that all ranks share. It appears under its name when it is whole, not before.
        extra: anything JSON takes (step, samples, …); `load_state` returns it.

    Raises StateError, the same on every rank, and leaves no folder behind: it exists already, or a rank couldn't write.
    """
    folder = Path(folder).absolute()
    inner, wrapper, held = examine(optimizer)
    scaler = _scaler(wrapper)
    by_name = {h.name: h for h in held}

    def fetch(name: str, start: int, stop: int) -> dict[str, Tensor]:
        h = by_name[name]
        low = h.slice.offset + start - h.slice.start
        cut = {
            key: whole.reshape(-1)[low : low + stop - start]
            for key in (*h.keys, "packed")
            if (whole := h.tensor(key)) is not None
        }
        if "packed" in cut:
            cut |= unpack_range(cut["packed"], h.slice, start, *h.factored)
        return {
            key: cut[key].to("cpu", torch.float32, copy=True) if key in cut else torch.zeros(stop - start) for key in h.keys
        }

    def write() -> dict[str, Any]:
        unfinished = state_files.building(folder)
        if not unfinished.is_dir():
            raise StateError(
                f"{str(unfinished)!r}, which rank 0 made, is not there: the ranks need a file system that they share"
            )
        files = state_files.write_ranges(unfinished, f"rank_{this_rank():05d}", shares, fetch)
        if this_rank() == 0:
            digest = state_files.write_tensors(unfinished / SHARED, _shared(inner, held))
            files[SHARED] = {"sha256": digest, "ranges": {}}
        return files

    def begin() -> None:
        json.dumps(extra)  # refuse what JSON doesn't take before anything is written
        if this_rank() == 0:
            state_files.begin(folder)

    shares = _shares(held)
    together(begin)
    try:
        files = gather(together(write))
        index = {
            "tensors": {h.name: h.describe() for h in held},
            "groups": _options(held),
            "extra": extra,
            "loss_scale": {key: getattr(scaler, key) for key in SCALE if hasattr(scaler, key)} if scaler else None,
            "files": {name: entry for some in files for name, entry in some.items()},
        }
        together(lambda: state_files.finish(folder, index) if this_rank() == 0 else None)
    except BaseException:
        if this_rank() == 0:
            state_files.abandon(folder)
        raise
    return folder


def load_state(optimizer: Any, folder: str | Path, verify: bool = True) -> Any:
    """Restore parameters, states, theta and group options (lr, …) from `save_state`'s folder. Every rank calls it.

    The low-precision parameters of the model are refreshed from the float32 masters. Buffers and frozen parameters are
    no optimizer state: load those with the model.

    Args:
        optimizer: as for `save_state`, over the same parameters (names, shapes, rules) in any sharding. Tensors whose
            matrices are others in the state (those of an earlier version, say) are read as there from now on.
        verify: compare the files' checksums first (each file is read once more, by one of the ranks).

    Returns `extra` as it was saved. Raises StateError, the same on every rank and before anything is changed, for a
    folder that is incomplete or damaged, and for parameters that are missing, left over, or of another form.
    """
    inner, wrapper, held = examine(optimizer)

    def open_() -> StateReader:
        reader = StateReader(folder)
        _compare(reader, held)
        if any(h.kind.startswith("ZeRO-1/2") for h in held) and not hasattr(wrapper, "update_lp_params"):
            raise StateError(
                "the optimizer is driven by DeepSpeed's ZeRO: pass the engine, so that the model's own "
                "parameters can be refreshed too"
            )
        if verify:
            reader.verify(this_rank(), world_size())
        _check_factored(reader, held)
        return reader

    def restore() -> None:
        for h in held:
            _restore(h, reader)
        _restore_steps(held, reader)
        _restore_options(reader, held)
        for key, value in (reader.loss_scale or {}).items() if _scaler(wrapper) is not None else ():
            setattr(_scaler(wrapper), key, value)
        if (theta := reader.theta()) is not None and isinstance(inner, Celo2):
            inner.mlp, old, inner._mlps = load_weights(theta), inner.mlp, {}
            if any(not torch.equal(a, b) for a, b in zip(inner.mlp, old)):
                logger.warning(
                    "the restored state was made with other weights (theta) than the optimizer was given; "
                    "going on with the restored ones"
                )

    reader = together(open_)
    held = _take_views(inner, held, reader)
    together(restore)
    _refresh(wrapper, held)
    return reader.extra


def _shares(held: list[Held]) -> list[tuple[str, int, int]]:
    """The ranges that this rank writes: where several ranks hold the same range, each writes a part of it."""
    mine = torch.tensor([[h.slice.start, h.slice.stop] for h in held], dtype=torch.int64)
    if world_size() == 1:
        everyone = mine[None]
    else:
        device = collective_device(None, torch.device("cpu"))
        parts = [torch.empty_like(mine, device=device) for _ in range(world_size())]
        dist.all_gather(parts, mine.to(device))
        everyone = torch.stack(parts).cpu()
    shares = []
    for number, h in enumerate(held):
        start, stop = h.slice.start, h.slice.stop
        same = (everyone[:, number] == mine[number]).all(1).nonzero().flatten().tolist()
        place, of = same.index(this_rank()), len(same)
        low, high = start + (stop - start) * place // of, start + (stop - start) * (place + 1) // of
        if low < high:
            shares.append((h.name, low, high))
    return shares


def _shared(optimizer: torch.optim.Optimizer, held: Iterable[Held]) -> dict[str, Tensor]:
    """What is the same on every rank."""
    shared = {}
    if isinstance(optimizer, Celo2):
        shared = {f"theta|{key}": x.cpu().contiguous() for key, x in optimizer.mlp._asdict().items()}
    for h in held:
        if h.rule == "adamw":
            step = h.state["step"] if "step" in h.state else h.group.get("step", 0)
            shared[f"{h.name}|step"] = torch.tensor(float(step))
        elif not h.vector:
            if "step" in h.state:  # counts for stochastic rounding
                shared[f"{h.name}|step"] = torch.tensor(float(h.state["step"]))
            for key, x in zip(("v_row", "v_col"), h.factored):
                shared[f"{h.name}|{key}"] = x.to("cpu", copy=True).contiguous()
    return shared


def _options(held: list[Held]) -> list[dict[str, Any]]:
    groups: dict[int, dict[str, Any]] = {}
    for h in held:
        options = {
            key: float(value) if isinstance(value, Tensor) else value for key, value in h.group.items() if key in OPTIONS
        }
        groups.setdefault(id(h.group), {"options": options, "names": []})["names"].append(h.name)
    return list(groups.values())


def _scaler(wrapper: Any) -> Any:
    """What holds the dynamic loss scale of an fp16 run; None for other runs."""
    for name, dynamic in (("loss_scaler", "dynamic"), ("loss_scale_config", "dynamic_loss_scale")):
        scaler = getattr(wrapper, name, None)
        if getattr(scaler, dynamic, False):
            return scaler
    return None


# ---- restoring --------------------------------------------------------------------------------------------------


def _compare(reader: StateReader, held: list[Held]) -> None:
    """Refuse a state of other parameters."""
    reader.rename(h.name for h in held)
    saved, where = reader.tensors, str(reader.folder)
    if missing := [h.name for h in held if h.name not in saved]:
        raise StateError(
            f"{where!r} has no parameter {missing[0]!r} ({len(missing)} of the optimizer's {len(held)} "
            f"are missing); it has names like {list(saved)[:2]}: load it into the model it was saved from"
        )
    if extra := sorted(set(saved) - {h.name for h in held}):
        raise StateError(
            f"{where!r} has the parameter {extra[0]!r}, which the optimizer does not train ({len(extra)} "
            "such): load it into the model it was saved from, with the same parameters frozen"
        )
    for h in held:
        ours, theirs = h.describe(), saved[h.name]
        for key in ("shape", "rule", "vector"):  # the state's view is taken over
            if ours[key] == theirs[key]:
                continue
            raise StateError(
                f"{where!r} has {h.name!r} with {key} {short(theirs[key])}, the optimizer with {ours[key]!r}: "
                "construct model and param groups as when it was saved"
                + (
                    f", e.g. by param_groups(model, {theirs[key]}=[{h.name!r}]) (from_adamw and to_adamw convert "
                    "the state of a whole run)"
                    if key == "rule"
                    else ""
                )
            )
    options = {name: group["options"] for group in reader.groups for name in group["names"]}
    first: dict[int, Held] = {}
    for h in held:
        other = first.setdefault(id(h.group), h)
        if options.get(other.name) != options.get(h.name):
            raise StateError(
                f"{other.name!r} and {h.name!r} are in one param group now, but {where!r} has different "
                "options for them: make the same param groups as when it was saved"
            )
    reader.check_options({h.name: h.group for h in held})


def _saved_view(reader: StateReader, h: Held) -> MatrixView:
    return view_of(reader.tensors[h.name]["view"])


def _check_factored(reader: StateReader, held: list[Held]) -> None:
    """Refuse a state whose v_row and v_col aren't those of its matrices."""
    matrices = [h for h in held if h.rule == "celo2" and not h.vector]
    reader.require(f"{h.name}|{key}" for h in matrices for key in ("v_row", "v_col"))
    for h in matrices:
        sizes = factored_sizes(h.slice.shape, _saved_view(reader, h))
        for key, columns in zip(("v_row", "v_col"), sizes):
            there = tuple(reader.shared(f"{h.name}|{key}").shape)
            if there != (3, columns):
                raise StateError(
                    f"{str(reader.folder)!r} is damaged: {key} of {h.name!r} has shape {there}, its matrices need "
                    f"{(3, columns)}; use another checkpoint"
                )


def _take_views(optimizer: torch.optim.Optimizer, held: list[Held], reader: StateReader) -> list[Held]:
    """Let the optimizer read tensors as the matrices that the state was made with; returns what it holds then."""
    changed = [h for h in held if h.rule == "celo2" and not h.vector and _saved_view(reader, h) != h.slice.original.view]
    if not changed:
        return held
    for h in changed:
        h.slice.original.view = _saved_view(reader, h)
    optimizer._plans.clear()
    for plan in (plan for group, params in at_rest(optimizer) for plan in optimizer.plans_of(group, params)):
        for piece in plan.layout.slices:
            state = optimizer.state[piece.storage]
            for key, columns in zip(("v_row", "v_col"), plan.factored.get(id(piece.storage), ())):
                if key in state and state[key].shape[1] != columns:
                    state[key] = state[key].new_zeros(3, columns)  # to be read
    if this_rank() == 0:
        logger.warning(
            "%d tensors (%s) consist of other matrices in %s than Celo2 would read now: they are read as there, so "
            "that the run goes on as it began",
            len(changed),
            ", ".join(h.name for h in changed[:3]),
            reader.folder,
        )
    return list(of_celo2(optimizer))


def _restore(h: Held, reader: StateReader) -> None:
    if h.rule == "celo2" and not h.vector:
        for key, x in zip(("v_row", "v_col"), h.factored):
            x.copy_(reader.shared(f"{h.name}|{key}"))
    start, stop = h.slice.start, h.slice.stop
    read = lambda key: reader.read(h.name, key, start, stop)  # noqa: E731
    for key in (("param", "packed") if "packed" in h.state else h.keys) if start < stop else ():
        target, values = (
            h.tensor(key),
            read(key)
            if key != "packed"
            else pack_range({key: read(key) for key in ACCUMULATORS}, h.slice, start, *h.factored),
        )
        if target.is_contiguous():
            h.slice.of(target.view(-1)).copy_(values)
        else:  # a whole tensor that lies transposed
            target.copy_(values.view(target.shape))


def _restore_steps(held: list[Held], reader: StateReader) -> None:
    """Step counts, of AdamW and of accumulators that are rounded stochastically (0 where the saved ones were float32).

    A flat partition has one for all its tensors, so the largest of theirs is taken.
    """
    steps: dict[int, float] = {}
    for h in held:
        if h.rule == "adamw" or "step" in h.state:
            storage, saved = id(h.slice.storage), reader.shared(f"{h.name}|step")
            steps[storage] = max(steps.get(storage, 0.0), 0.0 if saved is None else float(saved))
    for h in held:
        if id(h.slice.storage) in steps:
            step = steps[id(h.slice.storage)]
            if isinstance(h.state.get("step"), Tensor):
                h.state["step"].fill_(step)
            else:  # DeepSpeed's own Adam kernels count in an int
                h.state["step"] = int(step)
            if "step" in h.group:
                h.group["step"] = int(step)


def _restore_options(reader: StateReader, held: list[Held]) -> None:
    options = {name: group["options"] for group in reader.groups for name in group["names"]}
    for h in held:
        saved = options.get(h.name, {})
        if "weight_decay" in saved and "adamw_weight_decay" in h.group:
            saved = {"adamw_weight_decay": None, **saved}  # earlier versions had one decay for all tensors of a group
        for key, value in saved.items():
            if value is not None and isinstance(h.group.get(key), Tensor):
                h.group[key].fill_(value)
            elif key in h.group or key == "initial_lr":
                h.group[key] = tuple(value) if isinstance(value, list) else value


@torch.no_grad()
def _refresh(wrapper: Any, held: list[Held]) -> None:
    """Round the restored masters to the model's own parameters, as a step does."""
    zero3 = next((zero for h in held if (zero := getattr(h.slice.original.param, "_z3_optimizer", None))), None)
    if zero3 is not None:
        zero3._partition_all_parameters()
        for number in range(len(zero3.fp32_partitioned_groups_flat)):
            zero3._reassign_or_swap_out_partitioned_parameters(number)
        if zero3.persistent_parameters:  # small ones, kept whole on every rank
            zero3.persistent_parameters[0].all_gather(zero3.persistent_parameters)
        zero3.invalidate_secondary_tensor()
    elif hasattr(wrapper, "update_lp_params"):
        wrapper.update_lp_params()
    for h in held:
        if h.kind == "whole" and h.slice.original.param is not h.slice.storage:
            h.slice.original.param.copy_(h.slice.storage)
