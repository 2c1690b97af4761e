"""Who holds what: which contiguous part of each tensor lies in the storage that the optimizer is given.

`locate` looks at a parameter group at `step()` and recognises how its tensors are held:

    whole            one process, DDP, DeepSpeed without ZeRO (fp32 originals, or its fp32 copies)
    ZeRO-1/2, BF16   one flat fp32 partition a group; the originals' `_hp_mapping` says which part is here
    ZeRO-3           one flat fp32 slice a sub-group; every tensor sliced evenly over the ranks
    DTensor          FSDP2 (`fully_shard`): this rank's rows of each tensor

Anything else is refused by name: a wrong guess would be a silently wrong step. Whatever was recognised is
checked once over all ranks: the slices of every tensor must cover it exactly once.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils.weak import TensorWeakRef

from ..matrices.views import MatrixView, whole


class LayoutError(RuntimeError):
    """The optimizer was handed parameters in a form that it can't place exactly."""


class Original:
    """A parameter as the user gave it: what the optimizer remembers for when a wrapper replaces it.

    A plain tensor is held weakly: a wrapper that needs it (DeepSpeed) keeps it alive, and one that doesn't (FSDP2) can free
    the unsharded model. Others, such as DTensors, stay in the group; `module.to` swaps them, which torch refuses for a
    tensor with weak references.
    """

    hidden = True  # in pickles of earlier versions

    def __init__(self, param: Tensor, name: str, view: MatrixView, hidden: bool = True) -> None:
        """`hidden`: whether it is a hidden matrix, as far as weight decay goes."""
        self.name, self.view, self.hidden = name, view, hidden
        self.param = param
        # ZeRO-3 parameters are empty between uses; ds_shape is what they stand for.
        self.shape = whole(tuple(getattr(param, "ds_shape", param.shape)))

    @property
    def param(self) -> Tensor | None:
        """None once everyone else has let go of it."""
        return self._param()

    @param.setter
    def param(self, param: Tensor | None) -> None:
        swapped = type(param) not in (Tensor, torch.nn.Parameter) or torch.__future__.get_swap_module_params_on_conversion()
        self._param = (lambda: param) if swapped else TensorWeakRef(param)

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle, which keep one tensor one tensor: the groups have it, too."""
        return {"param": self.param, **{key: x for key, x in self.__dict__.items() if key != "_param"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)

    @property
    def trainable(self) -> bool:
        param = self.param
        return (param is None or param.requires_grad) and prod(self.shape) > 0


@dataclass
class Slice:
    """The flat elements [start, stop) of one tensor, lying at `offset` of `storage` (a parameter of the group)."""

    original: Original
    start: int
    stop: int
    offset: int
    storage: Tensor

    @property
    def name(self) -> str:
        return self.original.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.original.shape

    def of(self, flat: Tensor) -> Tensor:
        """This slice of a flat tensor that lies like the storage."""
        return flat[self.offset : self.offset + self.stop - self.start]


@dataclass
class Layout:
    """What this rank holds of a list of tensors, and the ranks that hold the rest (None: everything is here)."""

    kind: str
    slices: list[Slice]
    process_group: Any = None
    rank: int = 0  # in the process group
    world: int = 1
    ranges: Tensor | None = None  # (ranks, tensors, 2) int64: start and stop of everyone's slices
    replicas: tuple[Any, ...] = ()  # groups of ranks that hold the same slices (hybrid sharding)

    def __post_init__(self) -> None:
        if self.process_group is not None:
            self.rank, self.world = dist.get_rank(self.process_group), dist.get_world_size(self.process_group)


def local(x: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank."""
    return x.to_local() if isinstance(x, DTensor) else x


def locate(originals: Sequence[Original], current: Sequence[Tensor], params: Sequence[Tensor]) -> list[Layout]:
    """Recognise how `params` store `originals` (what the user gave for a group).

    Args:
        current: all that the group holds now.
        params: those of them that are stepped now (that have a gradient).

    Returns one layout for each set of ranks involved. Raises LayoutError for a form it doesn't know.
    """
    adopt(originals, current)
    by_id = {id(original.param): original for original in originals}
    if all(id(param) in by_id for param in params):
        layouts = _given([by_id[id(param)] for param in params])
    else:
        layouts = [_replaced([original for original in originals if original.trainable], current, params)]
    for layout in layouts:
        _check_cover(layout)
    return layouts


def adopt(originals: Sequence[Original], current: Sequence[Tensor]) -> None:
    """Take what stands in the group for the original in its place, where a wrapper exchanged the tensors one for one.

    Accelerate exchanges them for FSDP2's DTensors. DeepSpeed's replacements are no originals: it keeps those alive.
    """
    if len(current) != len(originals):
        return
    present = {id(original.param) for original in originals}
    for original, param in zip(originals, current):
        known = original.param
        if (
            id(param) not in present
            and (known is None or isinstance(param, DTensor))
            and whole(tuple(param.shape)) == original.shape
        ):
            original.param = param


def _given(originals: list[Original]) -> list[Layout]:
    """The user's own parameters: whole tensors, or DTensors."""
    plain: dict[torch.device, list[Slice]] = {}
    sharded: dict[Any, list[Slice]] = {}
    for original in originals:
        param = original.param
        refuse_unknown(original.name, param)
        if hasattr(param, "ds_id"):
            raise LayoutError(
                f"{original.name!r} is a ZeRO-3 parameter, but DeepSpeed's ZeRO-3 optimizer does not drive "
                "this step; pass the optimizer to deepspeed.initialize and call engine.step()"
            )
        if isinstance(param, DTensor):
            group, start, stop = _dtensor_rows(original)
            if group is not None:
                sharded.setdefault((group, _replicas(param)), []).append(Slice(original, start, stop, 0, param))
                continue
        plain.setdefault(param.device, []).append(Slice(original, 0, prod(original.shape), 0, param))
    return [
        *(Layout("whole", slices) for slices in plain.values()),
        *(Layout("DTensor", slices, group, replicas=replicas) for (group, replicas), slices in sharded.items()),
    ]


def refuse_unknown(name: str, param: Tensor) -> None:
    """Raise LayoutError for a tensor that stands for others, or for a part of one, and doesn't say which."""
    kind = type(param).__name__
    if kind == "FlatParameter" or getattr(param, "_is_flat_param", False):
        raise LayoutError(
            f"{name!r} is a flat parameter of FSDP1, which hides the tensors' shapes; use FSDP2 "
            "(torch.distributed.fsdp.fully_shard) instead"
        )
    if getattr(param, "_fsdp_flattened", False):
        raise LayoutError(
            f"{name!r} was flattened by FSDP1 (FullyShardedDataParallel), also with use_orig_params=True: on "
            f"this rank it has shape {tuple(param.shape)}, whatever the matrix's; use FSDP2 "
            "(torch.distributed.fsdp.fully_shard) instead"
        )
    if kind in ("ShardedTensor", "ShardedParameter", "ColoParameter", "ColoTensor"):
        raise LayoutError(
            f"{name!r} is a {kind}, of which Celo2 can't tell which part of a tensor it is; it supports "
            "FSDP2's DTensors and DeepSpeed's ZeRO 0-3"
        )
    for mark in ("tensor_model_parallel", "model_parallel", "ds_is_replaced_module"):
        if getattr(param, mark, False):
            raise LayoutError(
                f"{name!r} is split by tensor parallelism ({mark}); Celo2 supports data-parallel "
                "sharding (ZeRO 0-3, FSDP2) only"
            )


def check_gradient(name: str, param: Tensor) -> None:
    """Raise for a gradient that isn't this rank's part of the whole one: ValueError, LayoutError."""
    if param.grad.is_sparse:
        raise ValueError("Celo2 doesn't support sparse gradients; use sparse=False in the embedding")
    ours, theirs = (getattr(x, "placements", None) for x in (param, param.grad))
    if ours != theirs:
        raise LayoutError(
            f"{name!r} has placements {ours}, its gradient {theirs}: tensor parallelism leaves gradients that are "
            "not summed over its ranks; Celo2 supports data-parallel sharding (ZeRO 0-3, FSDP2) only"
        )


def flattened_by_fsdp1() -> bool:
    """Whether some model of this process is wrapped by FSDP1, which leaves no mark on the tensors that it replaced.

    It looks at every object of the process: for a step that finds no gradient at all.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    return any(type(x).__name__ == "FullyShardedDataParallel" for x in gc.get_objects())


def _replicas(param: DTensor) -> tuple[Any, ...]:
    """The groups of ranks over which a DTensor is replicated, one for each such axis of its mesh."""
    mesh = param.device_mesh
    return tuple(
        mesh.get_group(axis)
        for axis, placement in enumerate(param.placements)
        if isinstance(placement, Replicate) and mesh.size(axis) > 1
    )


def _dtensor_rows(original: Original) -> tuple[Any, int, int]:
    """(process group, start, stop) of the flat range that this rank holds; group None where it holds everything."""
    param = original.param
    cut = [(axis, placement) for axis, placement in enumerate(param.placements) if not isinstance(placement, Replicate)]
    if not cut:
        return None, 0, prod(original.shape)
    if len(cut) > 1 or type(cut[0][1]) is not Shard or cut[0][1].dim != 0:
        raise LayoutError(
            f"{original.name!r} has DTensor placements {param.placements}; Celo2 supports FSDP2's "
            "sharding of dim 0 (Shard(0), with Replicate for hybrid sharding), not tensor parallelism"
        )
    axis = cut[0][0]
    mesh = param.device_mesh
    rows, parts, rank = original.shape[0], mesh.size(axis), mesh.get_local_rank(axis)
    chunk = -(-rows // parts)  # as torch.chunk: every rank but the last ones has `chunk` rows
    first, last = min(rank * chunk, rows), min((rank + 1) * chunk, rows)
    inner = prod(original.shape[1:])
    elements = param.to_local().numel()
    if elements != (last - first) * inner:
        raise LayoutError(
            f"{original.name!r}: the local shard has {elements} elements where rows {first} to {last} of "
            f"shape {original.shape} have {(last - first) * inner}"
        )
    return mesh.get_group(axis), first * inner, last * inner


def _replaced(originals: list[Original], current: Sequence[Tensor], params: Sequence[Tensor]) -> Layout:
    """Parameters that a DeepSpeed wrapper put in the place of the user's."""
    if not originals:
        raise LayoutError("the group holds parameters that the optimizer was not constructed with")
    first = originals[0].param
    if first is None:
        raise LayoutError(
            f"{originals[0].name!r} of shape {originals[0].shape} is gone, and the group holds other tensors, "
            f"of shapes {[tuple(p.shape) for p in current[:4]]}: make the optimizer from the model's present "
            "parameters"
        )
    zero3 = getattr(first, "_z3_optimizer", None)
    if zero3 is not None:
        return _zero3(originals, params, zero3)
    if hasattr(first, "_hp_mapping"):
        return _zero12(originals, params)
    if len(current) == len(originals) and all(
        whole(tuple(param.shape)) == original.shape for param, original in zip(current, originals)
    ):
        if first.dtype == torch.float16:
            raise LayoutError(
                "fp16 without ZeRO: DeepSpeed 0.19 divides the gradients by a loss scale that the loss was "
                'never multiplied by; set "zero_optimization": {"stage": 1}, or use bf16'
            )
        place = {id(param): original for original, param in zip(originals, current)}
        return Layout("whole", [Slice(place[id(param)], 0, prod(place[id(param)].shape), 0, param) for param in params])
    raise LayoutError(
        f"the group holds {len(current)} tensors of shapes {[tuple(p.shape) for p in current[:4]]} instead "
        f"of the {len(originals)} parameters it was constructed with, put there by a wrapper that Celo2 "
        "doesn't know; supported: DeepSpeed ZeRO 0-3 (with or without offload), DDP, FSDP2"
    )


def _zero12(originals: list[Original], params: Sequence[Tensor]) -> Layout:
    if len(params) != 1:
        raise LayoutError(f"expected one flat partition a group from ZeRO-1/2, got {len(params)} tensors")
    flat, slices = params[0], []
    if _reordered(originals, flat):
        return _by_storage(originals, flat)
    for original in originals:
        mapping = original.param._hp_mapping  # None on a rank that holds nothing of it
        if mapping is None:
            slices.append(Slice(original, 0, 0, 0, flat))
            continue
        inside, partition = mapping.lp_fragment_address, mapping.hp_fragment_address
        slices.append(Slice(original, inside.start, inside.start + inside.numel, partition.start, flat))
    return Layout("ZeRO-1/2", slices, originals[0].param._dp_group)


def _begins(originals: list[Original]) -> list[int]:
    """Where each parameter begins in the group's flat 16-bit (or fp32) buffer, whose views the parameters are."""
    offsets = [original.param.storage_offset() for original in originals]
    return [offset - min(offsets) for offset in offsets]


def _reordered(originals: list[Original], flat: Tensor) -> bool:
    """Whether `_hp_mapping` contradicts where the parameters lie.

    With `round_robin_gradients` DeepSpeed 0.19 flattens a group in another order than it links. A rank whose mapping
    names no parameter holds none in either order, only the padding at the end.
    """
    if len({original.param.untyped_storage().data_ptr() for original in originals}) > 1:
        return False
    low = dist.get_rank(originals[0].param._dp_group) * flat.numel()
    return any(
        low + mapping.hp_fragment_address.start - mapping.lp_fragment_address.start != begin
        for original, begin in zip(originals, _begins(originals))
        if (mapping := original.param._hp_mapping) is not None
    )


def _by_storage(originals: list[Original], flat: Tensor) -> Layout:
    process_group, slices = originals[0].param._dp_group, []
    low = dist.get_rank(process_group) * flat.numel()
    for original, begin in zip(originals, _begins(originals)):
        end = begin + prod(original.shape)
        start = min(max(low, begin), end)
        stop = max(start, min(low + flat.numel(), end))
        slices.append(Slice(original, start - begin, stop - begin, max(start - low, 0), flat))
    return Layout("ZeRO-1/2, round robin", slices, process_group)


def _zero3(originals: list[Original], params: Sequence[Tensor], zero3: Any) -> Layout:
    if len(params) != 1:
        raise LayoutError(f"expected one flat slice a step from ZeRO-3, got {len(params)} tensors")
    if getattr(zero3, "offload_optimizer", False) and getattr(zero3, "partial_offload", 1.0) < 1.0:
        raise LayoutError(
            "ZeRO-Offload++ (offload_optimizer.ratio < 1) steps a part of the parameters with AdamW behind "
            'the optimizer\'s back; set "ratio": 1.0'
        )
    flat = params[0]
    number = next((i for i, x in enumerate(zero3.fp32_partitioned_groups_flat) if x is flat), None)
    if number is None:
        raise LayoutError("ZeRO-3 handed the optimizer a tensor that is none of its sub-groups")
    by_id = {id(original.param): original for original in originals}
    slices, offset, group = [], 0, None
    for param in zero3.fp16_groups[number]:
        original = by_id.get(id(param))
        if original is None:
            raise LayoutError(f"ZeRO-3 sub-group {number} holds a parameter of another param group")
        group = param.ds_process_group
        rank, size = param.ds_zero_partition_rank, param.partition_numel()
        total = prod(original.shape)
        start, stop = min(rank * size, total), min((rank + 1) * size, total)
        slices.append(Slice(original, start, stop, offset, flat))
        offset += size  # padding stands at the end of the last ranks' parts
    return Layout("ZeRO-3", slices, group)


def _check_cover(layout: Layout) -> None:
    """Exchange everyone's ranges, and insist that each tensor is held exactly once."""
    mine = torch.tensor([[s.start, s.stop] for s in layout.slices], dtype=torch.int64).view(-1, 2)
    if layout.world == 1:
        layout.ranges = mine[None]
    else:
        device = collective_device(layout.process_group, torch.device("cpu"))
        everyone = [torch.empty_like(mine, device=device) for _ in range(layout.world)]
        dist.all_gather(everyone, mine.to(device), group=layout.process_group)
        layout.ranges = torch.stack(everyone).cpu()
    for number, shard in enumerate(layout.slices):
        there = local(shard.storage).numel()
        if shard.start < shard.stop and shard.offset + shard.stop - shard.start > there:
            raise LayoutError(
                f"{shard.name!r}: elements {shard.start} to {shard.stop} should lie at {shard.offset} of a tensor "
                f"that has only {there} elements on this rank ({layout.kind})"
            )
        spans = sorted((start, stop) for start, stop in layout.ranges[:, number].tolist() if start < stop)
        ends = [0, *(stop for _, stop in spans)]
        if [start for start, _ in spans] != ends[:-1] or ends[-1] != prod(shard.shape):
            raise LayoutError(
                f"{shard.name!r} of shape {shard.shape} is not held exactly once by the "
                f"{layout.world} ranks ({layout.kind}): they hold the flat ranges {spans}"
            )


def collective_device(process_group: Any, device: torch.device) -> torch.device:
    """Where a tensor must lie for a collective of this group: offloaded tensors can't travel by NCCL."""
    if device.type == "cpu" and dist.get_backend(process_group) in ("nccl", "rccl"):
        return torch.device("cuda", torch.cuda.current_device())
    return device


def called_to_initialize() -> bool:
    """Whether DeepSpeed's 16-bit wrapper without ZeRO makes this `step` only to have the states allocated.

    Its constructor steps once with gradients of zero. AdamW with fresh states survives that; a learned rule
    would move the parameters and every accumulator.
    """
    frame = sys._getframe(1)
    for _ in range(12):
        if frame is None:
            return False
        if frame.f_code.co_name == "initialize_optimizer_states" and frame.f_globals.get("__name__", "").startswith(
            "deepspeed.runtime."
        ):
            return True
        frame = frame.f_back
    return False
