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
from .index import view_of
from .local_tensors import LocalTensor, at_rest, examine, of_celo2

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
    inner, wrapper, tensors = examine(optimizer)
    scaler = _scaler(wrapper)
    by_name = {t.name: t for t in tensors}

    def fetch(name: str, start: int, stop: int) -> dict[str, Tensor]:
        t = by_name[name]
        low = t.slice.offset + start - t.slice.start
        cut = {
            key: whole.reshape(-1)[low : low + stop - start]
            for key in (*t.keys, "packed")
            if (whole := t.tensor(key)) is not None
        }
        if "packed" in cut:
            cut |= unpack_range(cut["packed"], t.slice, start, *t.factored)
        return {
            key: cut[key].to("cpu", torch.float32, copy=True) if key in cut else torch.zeros(stop - start) for key in t.keys
        }

    def write() -> dict[str, Any]:
        unfinished = state_files.building(folder)
        if not unfinished.is_dir():
            raise StateError(
                f"{str(unfinished)!r}, which rank 0 made, is not there: the ranks need a file system that they share"
            )
        files = state_files.write_ranges(unfinished, f"rank_{this_rank():05d}", shares, fetch)
        if this_rank() == 0:
            digest = state_files.write_tensors(unfinished / SHARED, _shared(inner, tensors))
            files[SHARED] = {"sha256": digest, "ranges": {}}
        return files

    def begin() -> None:
        json.dumps(extra)  # refuse what JSON doesn't take before anything is written
        if this_rank() == 0:
            state_files.begin(folder)

    shares = _shares(tensors)
    together(begin)
    try:
        files = gather(together(write))
        index = {
            "tensors": {t.name: t.describe() for t in tensors},
            "groups": _options(tensors),
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
    inner, wrapper, tensors = examine(optimizer)

    def open_() -> StateReader:
        reader = StateReader(folder)
        _compare(reader, tensors)
        if any(t.kind.startswith("ZeRO-1/2") for t in tensors) and not hasattr(wrapper, "update_lp_params"):
            raise StateError(
                "the optimizer is driven by DeepSpeed's ZeRO: pass the engine, so that the model's own "
                "parameters can be refreshed too"
            )
        if verify:
            reader.verify(this_rank(), world_size())
        _check_factored(reader, tensors)
        return reader

    def restore() -> None:
        for t in tensors:
            _restore(t, reader)
        _restore_steps(tensors, reader)
        _restore_options(reader, tensors)
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
    tensors = _take_views(inner, tensors, reader)
    together(restore)
    _refresh(wrapper, tensors)
    return reader.extra


def _shares(tensors: list[LocalTensor]) -> list[tuple[str, int, int]]:
    """The ranges that this rank writes: where several ranks hold the same range, each writes a part of it."""
    mine = torch.tensor([[t.slice.start, t.slice.stop] for t in tensors], dtype=torch.int64)
    if world_size() == 1:
        everyone = mine[None]
    else:
        device = collective_device(None, torch.device("cpu"))
        parts = [torch.empty_like(mine, device=device) for _ in range(world_size())]
        dist.all_gather(parts, mine.to(device))
        everyone = torch.stack(parts).cpu()
    shares = []
    for number, t in enumerate(tensors):
        start, stop = t.slice.start, t.slice.stop
        same = (everyone[:, number] == mine[number]).all(1).nonzero().flatten().tolist()
        place, of = same.index(this_rank()), len(same)
        low, high = start + (stop - start) * place // of, start + (stop - start) * (place + 1) // of
        if low < high:
            shares.append((t.name, low, high))
    return shares


def _shared(optimizer: torch.optim.Optimizer, tensors: Iterable[LocalTensor]) -> dict[str, Tensor]:
    """What is the same on every rank."""
    shared = {}
    if isinstance(optimizer, Celo2):
        shared = {f"theta|{key}": x.cpu().contiguous() for key, x in optimizer.mlp._asdict().items()}
    for t in tensors:
        if t.rule == "adamw":
            step = t.state["step"] if "step" in t.state else t.group.get("step", 0)
            shared[f"{t.name}|step"] = torch.tensor(float(step))
        elif not t.vector:
            if "step" in t.state:  # counts for stochastic rounding
                shared[f"{t.name}|step"] = torch.tensor(float(t.state["step"]))
            for key, x in zip(("v_row", "v_col"), t.factored):
                shared[f"{t.name}|{key}"] = x.to("cpu", copy=True).contiguous()
    return shared


def _options(tensors: list[LocalTensor]) -> list[dict[str, Any]]:
    groups: dict[int, dict[str, Any]] = {}
    for t in tensors:
        options = {
            key: float(value) if isinstance(value, Tensor) else value for key, value in t.group.items() if key in OPTIONS
        }
        groups.setdefault(id(t.group), {"options": options, "names": []})["names"].append(t.name)
    return list(groups.values())


def _scaler(wrapper: Any) -> Any:
    """What holds the dynamic loss scale of an fp16 run; None for other runs."""
    for name, dynamic in (("loss_scaler", "dynamic"), ("loss_scale_config", "dynamic_loss_scale")):
        scaler = getattr(wrapper, name, None)
        if getattr(scaler, dynamic, False):
            return scaler
    return None


# ---- restoring --------------------------------------------------------------------------------------------------


def _compare(reader: StateReader, tensors: list[LocalTensor]) -> None:
    """Refuse a state of other parameters."""
    reader.rename(t.name for t in tensors)
    saved, where = reader.tensors, str(reader.folder)
    if missing := [t.name for t in tensors if t.name not in saved]:
        raise StateError(
            f"{where!r} has no parameter {missing[0]!r} ({len(missing)} of the optimizer's {len(tensors)} "
            f"are missing); it has names like {list(saved)[:2]}: load it into the model it was saved from"
        )
    if extra := sorted(set(saved) - {t.name for t in tensors}):
        raise StateError(
            f"{where!r} has the parameter {extra[0]!r}, which the optimizer does not train ({len(extra)} "
            "such): load it into the model it was saved from, with the same parameters frozen"
        )
    for t in tensors:
        ours, theirs = t.describe(), saved[t.name]
        for key in ("shape", "rule", "vector"):  # the state's view is taken over
            if ours[key] == theirs[key]:
                continue
            raise StateError(
                f"{where!r} has {t.name!r} with {key} {short(theirs[key])}, the optimizer with {ours[key]!r}: "
                "construct model and param groups as when it was saved"
                + (
                    f", e.g. by param_groups(model, {theirs[key]}=[{t.name!r}]) (from_adamw and to_adamw convert "
                    "the state of a whole run)"
                    if key == "rule"
                    else ""
                )
            )
    options = {name: group["options"] for group in reader.groups for name in group["names"]}
    first: dict[int, LocalTensor] = {}
    for t in tensors:
        other = first.setdefault(id(t.group), t)
        if options.get(other.name) != options.get(t.name):
            raise StateError(
                f"{other.name!r} and {t.name!r} are in one param group now, but {where!r} has different "
                "options for them: make the same param groups as when it was saved"
            )
    reader.check_options({t.name: t.group for t in tensors})


def _saved_view(reader: StateReader, t: LocalTensor) -> MatrixView:
    return view_of(reader.tensors[t.name]["view"])


def _check_factored(reader: StateReader, tensors: list[LocalTensor]) -> None:
    """Refuse a state whose v_row and v_col aren't those of its matrices."""
    matrices = [t for t in tensors if t.rule == "celo2" and not t.vector]
    reader.require(f"{t.name}|{key}" for t in matrices for key in ("v_row", "v_col"))
    for t in matrices:
        sizes = factored_sizes(t.slice.shape, _saved_view(reader, t))
        for key, columns in zip(("v_row", "v_col"), sizes):
            there = tuple(reader.shared(f"{t.name}|{key}").shape)
            if there != (3, columns):
                raise StateError(
                    f"{str(reader.folder)!r} is damaged: {key} of {t.name!r} has shape {there}, its matrices need "
                    f"{(3, columns)}; use another checkpoint"
                )


def _take_views(optimizer: torch.optim.Optimizer, tensors: list[LocalTensor], reader: StateReader) -> list[LocalTensor]:
    """Let the optimizer read tensors as the matrices that the state was made with; returns what it holds then."""
    changed = [t for t in tensors if t.rule == "celo2" and not t.vector and _saved_view(reader, t) != t.slice.original.view]
    if not changed:
        return tensors
    for t in changed:
        t.slice.original.view = _saved_view(reader, t)
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
            ", ".join(t.name for t in changed[:3]),
            reader.folder,
        )
    return list(of_celo2(optimizer))


def _restore(t: LocalTensor, reader: StateReader) -> None:
    if t.rule == "celo2" and not t.vector:
        for key, x in zip(("v_row", "v_col"), t.factored):
            x.copy_(reader.shared(f"{t.name}|{key}"))
    start, stop = t.slice.start, t.slice.stop
    read = lambda key: reader.read(t.name, key, start, stop)  # noqa: E731
    for key in (("param", "packed") if "packed" in t.state else t.keys) if start < stop else ():
        target, values = (
            t.tensor(key),
            read(key)
            if key != "packed"
            else pack_range({key: read(key) for key in ACCUMULATORS}, t.slice, start, *t.factored),
        )
        if target.is_contiguous():
            t.slice.of(target.view(-1)).copy_(values)
        else:  # a whole tensor that lies transposed
            target.copy_(values.view(target.shape))


def _restore_steps(tensors: list[LocalTensor], reader: StateReader) -> None:
    """Step counts, of AdamW and of accumulators that are rounded stochastically (0 where the saved ones were float32).

    A flat partition has one for all its tensors, so the largest of theirs is taken.
    """
    steps: dict[int, float] = {}
    for t in tensors:
        if t.rule == "adamw" or "step" in t.state:
            storage, saved = id(t.slice.storage), reader.shared(f"{t.name}|step")
            steps[storage] = max(steps.get(storage, 0.0), 0.0 if saved is None else float(saved))
    for t in tensors:
        if id(t.slice.storage) in steps:
            step = steps[id(t.slice.storage)]
            if isinstance(t.state.get("step"), Tensor):
                t.state["step"].fill_(step)
            else:  # DeepSpeed's own Adam kernels count in an int
                t.state["step"] = int(step)
            if "step" in t.group:
                t.group["step"] = int(step)


def _restore_options(reader: StateReader, tensors: list[LocalTensor]) -> None:
    options = {name: group["options"] for group in reader.groups for name in group["names"]}
    for t in tensors:
        saved = options.get(t.name, {})
        if "weight_decay" in saved and "adamw_weight_decay" in t.group:
            saved = {"adamw_weight_decay": None, **saved}  # earlier versions had one decay for all tensors of a group
        for key, value in saved.items():
            if value is not None and isinstance(t.group.get(key), Tensor):
                t.group[key].fill_(value)
            elif key in t.group or key == "initial_lr":
                t.group[key] = tuple(value) if isinstance(value, list) else value


@torch.no_grad()
def _refresh(wrapper: Any, tensors: list[LocalTensor]) -> None:
    """Round the restored masters to the model's own parameters, as a step does."""
    zero3 = next((zero for t in tensors if (zero := getattr(t.slice.original.param, "_z3_optimizer", None))), None)
    if zero3 is not None:
        zero3._partition_all_parameters()
        for number in range(len(zero3.fp32_partitioned_groups_flat)):
            zero3._reassign_or_swap_out_partitioned_parameters(number)
        if zero3.persistent_parameters:  # small ones, kept whole on every rank
            zero3.persistent_parameters[0].all_gather(zero3.persistent_parameters)
        zero3.invalidate_secondary_tensor()
    elif hasattr(wrapper, "update_lp_params"):
        wrapper.update_lp_params()
    for t in tensors:
        if t.kind == "whole" and t.slice.original.param is not t.slice.storage:
            t.slice.original.param.copy_(t.slice.storage)
