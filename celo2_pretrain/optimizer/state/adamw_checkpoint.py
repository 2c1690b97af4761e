"""Read the AdamW state in a DeepSpeed checkpoint of any ZeRO stage, parameter by parameter.

Files are opened memory-mapped and with torch's `weights_only` unpickler, which builds nothing but tensors, containers
and the four DeepSpeed classes below.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..matrices.views import whole
from ..names import match
from .files import StateError, StateReader

KEYS = ("param", "exp_avg", "exp_avg_sq")


@dataclass
class Fragment:
    """Consecutive elements of a parameter: `count` from `start` of three flat tensors of one file."""

    tensors: dict[str, Tensor]  # by key
    start: int
    count: int


class AdamWCheckpoint:
    """AdamW's masters and moments by parameter name.

    Args:
        folder: what `engine.save_checkpoint` was given.
        tag: the checkpoint in it; by default the one that `latest` names.
        names: the optimizer's parameters in its order. Only checkpoints without ZeRO need it, since they don't record
            the names; default: the model's own order, where there is one param group.
        trained: for that default: the names of the parameters that were not frozen.

    Raises StateError for what is no such checkpoint, lacks files, or holds the state of another optimizer.
    """

    def __init__(
        self,
        folder: str | Path,
        tag: str | None = None,
        names: Sequence[str] | None = None,
        trained: Collection[str] | None = None,
    ) -> None:
        self.folder = _find(Path(folder), tag)
        self._where = repr(str(self.folder))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._fragments: dict[str, list[Fragment]] = {}
        self._facts: dict[str, tuple[float, dict[str, Any]]] = {}  # step and options of the param group
        if any(re.search(r"mp_rank_0*[1-9]", path.name) for path in self.folder.iterdir()):
            raise StateError(f"{self._where} is of a run with tensor or pipeline parallelism, which is not supported")
        files = sorted(self.folder.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank_of)
        models = sorted(self.folder.glob("*mp_rank_00_model_states.pt"), key=_rank_of)
        if not models:
            raise StateError(f"{self._where} is no DeepSpeed checkpoint: it has no *_model_states.pt")
        model = load_plain(models[0])
        self._scheduled = _scheduled_peak(model.get("ds_config"))
        if not files:
            self._without_zero(model, names, trained)
            return
        missing = set(range(model["dp_world_size"])) - {_rank_of(path) for path in files}
        if missing:
            raise StateError(
                f"{self._where} lacks the optim_states file of rank {min(missing)}: copy the "
                "checkpoint again, with all ranks' files"
            )
        saved = [load_plain(path) for path in files]
        self._scheduled = max(self._scheduled, _scheduled_peak(saved[0].get("ds_config")))
        if len(files) > 1 and saved[0].get("ds_config", {}).get("zero_optimization", {}).get("round_robin_gradients"):
            raise StateError(
                f"{self._where} was saved with round_robin_gradients, where DeepSpeed records the "
                "tensors' places wrong: load it in DeepSpeed, call save_state(engine, …), and convert "
                "that"
            )
        ranks = [state["optimizer_state_dict"] for state in saved]
        self.shapes = {name: whole(tuple(shape)) for group in model["param_shapes"] for name, shape in group.items()}
        self._fragments = {name: [] for name in self.shapes}
        for rank, state in enumerate(ranks):
            if "fp32_flat_groups" in state:
                self._zero3(state, model["param_shapes"], rank, len(ranks))
            else:
                self._zero12(state)
        for name, parts in self._fragments.items():
            count = sum(part.count for part in parts)
            if count != prod(self.shapes[name]):
                raise StateError(
                    f"{self._where} holds {count} elements of {name!r} of shape {self.shapes[name]}: "
                    "files of different checkpoints seem mixed"
                )

    def rename(self, names: Iterable[str]) -> None:
        """Call the parameters by these names where both mean the same parameter, whatever wrapped the model."""
        new = match(self.shapes, names)
        self.shapes, self._fragments, self._facts = (
            {new.get(name, name): value for name, value in some.items()}
            for some in (self.shapes, self._fragments, self._facts)
        )

    def read(self, name: str) -> dict[str, Tensor]:
        """`param`, `exp_avg` and `exp_avg_sq` of one parameter, float32, in its full shape."""
        return {
            key: torch.cat(
                [part.tensors[key].reshape(-1)[part.start : part.start + part.count].float() for part in self._fragments[name]]
            ).view(self.shapes[name])
            for key in KEYS
        }

    def step(self, name: str) -> float:
        return self._facts[name][0]

    def options(self, name: str) -> dict[str, Any]:
        """lr, betas, eps and weight_decay of the parameter's group, and `peak_lr`, its highest rate as far as recorded."""
        return self._facts[name][1]

    def _zero12(self, state: dict[str, Any]) -> None:
        base = state["base_optimizer_state"]
        if not isinstance(base, dict):
            raise StateError(f'{self._where} is an elastic checkpoint; save it without "elastic_checkpoint"')
        for number, mapping in enumerate(state["param_slice_mappings"]):
            tensors, fact = self._group(
                base, number, state["single_partition_of_fp32_groups"][number], base["param_groups"][number]
            )
            for name, place in mapping.items():
                self._fragments[name].append(Fragment(tensors, place.start, place.numel))
                self._facts[name] = fact

    def _zero3(self, state: dict[str, Any], shapes: list[dict[str, Any]], rank: int, world: int) -> None:
        base = state["optimizer_state_dict"]
        owner = [number for number, group in enumerate(base["param_groups"]) for _ in group["params"]]
        for number, group in enumerate(shapes):  # one for each sub-group
            options = base["param_groups"][owner[number]]
            tensors, fact = self._group(base, number, state["fp32_flat_groups"][number], options)
            offset = 0
            for name, shape in group.items():
                total = prod(shape)
                size = -(-total // world)  # every tensor is sliced evenly, the last ranks' slices are padded
                self._fragments[name].append(Fragment(tensors, offset, max(0, min(size, total - rank * size))))
                self._facts[name] = fact
                offset += size

    def _without_zero(self, model: dict[str, Any], names: Sequence[str] | None, trained: Collection[str] | None) -> None:
        saved = model["optimizer"]
        if not saved:
            raise StateError(f"{self._where} holds no optimizer state")
        base = saved.get("optimizer_state_dict", saved)
        groups = base["param_groups"]
        fused = saved.get("fp32_groups_flat")  # FusedAdam in 16 bits: one flat tensor a group
        if names is None:
            names = [name for name in model["module"] if name not in model["buffer_names"]]
            if trained is not None:
                known = match(names, trained)
                names = [name for name in names if name in known]
            count = len(names) if fused else sum(len(group["params"]) for group in groups)
            if len(groups) > 1 or len(names) != count:
                raise StateError(
                    f"{self._where} was saved without ZeRO, so it doesn't say which of its {count} "
                    f"optimizer states ({len(groups)} param groups) is whose: pass names=[…], the "
                    "parameters' names in the order in which the optimizer was given them"
                )
        known = match(names, model["module"])
        unknown = [name for name in names if name not in known]
        if unknown:
            raise StateError(
                f"names has {unknown[0]!r}, but the checkpoint's model has names like {list(model['module'])[:2]}"
            )
        names = [known[name] for name in names]
        self.shapes = {name: whole(tuple(model["module"][name].shape)) for name in names}
        if fused:
            sizes = [(number, flat.numel()) for number, flat in enumerate(fused)]
            masters, owner = fused, groups
        else:
            owner = [group for group in groups for _ in group["params"]]
            if len(names) != len(owner):
                raise StateError(
                    f"{len(names)} names were passed, but {self._where} has the optimizer state of {len(owner)} parameters"
                )
            masters = saved.get("fp32_groups")  # in 16 bits; else the model's parameters are float32 themselves
            masters = [x for group in masters for x in group] if masters else [model["module"][name] for name in names]
            sizes = [(number, master.numel()) for number, master in enumerate(masters)]
        left = list(names)
        for number, size in sizes:
            tensors, fact = self._group(base, number, masters[number], owner[number])
            offset = 0
            while offset < size and left:
                name = left.pop(0)
                self._fragments[name] = [Fragment(tensors, offset, prod(self.shapes[name]))]
                self._facts[name] = fact
                offset += prod(self.shapes[name])
            if offset != size or (not fused and whole(tuple(tensors["exp_avg"].shape)) != self.shapes[name]):
                raise StateError(
                    f"optimizer state {number} of {self._where} has shape "
                    f"{tuple(tensors['exp_avg'].shape)}, which the parameters at its place don't have: "
                    "pass names=[…] in the order in which the optimizer was given its parameters"
                )
        if left:
            raise StateError(
                f"{self._where} has no optimizer state for {left[0]!r}: pass names=[…] as the "
                "optimizer was given its parameters"
            )

    def _group(
        self, base: dict[str, Any], number: int, master: Tensor, group: dict[str, Any]
    ) -> tuple[dict[str, Tensor], tuple[float, dict[str, Any]]]:
        state = base["state"].get(number, {})
        if not {"exp_avg", "exp_avg_sq"} <= state.keys():
            raise StateError(
                f"{self._where} was not saved by AdamW: its optimizer state has {sorted(state)[:6]} "
                "instead of exp_avg and exp_avg_sq"
                + ("; a Celo2 state is converted by save_state and to_adamw" if "momentum_0" in state else "")
            )
        step = float(state.get("step", group.get("step", 0)))
        options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        options["peak_lr"] = max(_peak_lr(group), self._scheduled)
        return {"param": master, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}, (step, options)


class SavedAdamW:
    """The same of a state that `save_state` wrote for an engine with AdamW."""

    def __init__(self, folder: str | Path) -> None:
        self.reader = StateReader(folder)
        self.folder = self.reader.folder
        other = next((name for name, entry in self.reader.tensors.items() if entry["rule"] != "adamw"), None)
        if other is not None:
            raise StateError(f"{str(folder)!r} is a Celo2 state already ({other!r} has the learned rule): load_state takes it")
        self.reader.verify()
        self._index()

    def rename(self, names: Iterable[str]) -> None:
        self.reader.rename(names)
        self._index()

    def _index(self) -> None:
        self.shapes = {name: tuple(entry["shape"]) for name, entry in self.reader.tensors.items()}
        self._options = {name: group["options"] for group in self.reader.groups for name in group["names"]}

    def read(self, name: str) -> dict[str, Tensor]:
        return {key: self.reader.whole(name, key) for key in KEYS}

    def step(self, name: str) -> float:
        return float(self.reader.shared(f"{name}|step"))

    def options(self, name: str) -> dict[str, Any]:
        if "betas" not in self._options.get(name, {}):
            raise StateError(f"{str(self.folder)!r} doesn't say with which betas AdamW ran; save it from an engine with AdamW")
        return self._options[name] | {"peak_lr": _peak_lr(self._options[name])}


def _peak_lr(group: dict[str, Any]) -> float:
    """The highest rate that a param group tells of: torch's schedulers write initial_lr, OneCycleLR max_lr too."""
    return max(float(group.get(key) or 0.0) for key in ("lr", "initial_lr", "max_lr"))


def _scheduled_peak(config: Any) -> float:
    """The highest rate of a DeepSpeed configuration's own scheduler; 0.0 without one."""
    params = ((config or {}).get("scheduler") or {}).get("params") or {}
    rates = [params.get(key) for key in ("warmup_max_lr", "cycle_max_lr")]
    return max((float(rate) for rate in rates if isinstance(rate, (int, float))), default=0.0)


def _find(folder: Path, tag: str | None) -> Path:
    if tag is None and not (folder / "latest").is_file() and list(folder.glob("*_model_states.pt")):
        return folder  # the tagged folder itself
    if tag is None:
        if not (folder / "latest").is_file():
            raise StateError(
                f"no DeepSpeed checkpoint in {str(folder)!r}: it has no file 'latest'; give the folder "
                "that engine.save_checkpoint was given, or a tag"
            )
        tag = (folder / "latest").read_text().strip()
    if not (folder / tag).is_dir():
        raise StateError(f"{str(folder)!r} has no checkpoint {tag!r}")
    return folder / tag


def _rank_of(path: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(found[1]) if found else 0


def load_plain(path: Path, map_location: Any = "cpu", mmap: bool = True) -> dict[str, Any]:
    """What torch.save wrote to a file, where it is plain data: nothing of the file is executed.

    Args: map_location, mmap: as of torch.load. Raises StateError for a file that holds other classes, or is damaged.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def member(kind: type, name: str) -> ZeroStageEnum:
        """What the getattr of an enum's pickle stands for, by Python 3.11.0 to 3.11.3; of nothing else."""
        if kind is not ZeroStageEnum:
            raise pickle.UnpicklingError("GLOBAL getattr")
        return ZeroStageEnum[name]

    plain = [fragment_address, LossScaler, DynamicLossScaler, ZeroStageEnum, (member, "getattr"), (member, "builtins.getattr")]
    try:
        with torch.serialization.safe_globals(plain):
            return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"the class {found[1]}" if found else "something that is not plain data"
        raise StateError(
            f"{path} holds {what}, which is not unpickled for safety; take such client state out of the "
            "checkpoint, or load it in DeepSpeed and call save_state(engine, …)"
        ) from None
    except (OSError, RuntimeError) as error:
        raise StateError(
            f"{path} is damaged ({str(error).splitlines()[0]}); copy it again, or use another checkpoint"
        ) from None
