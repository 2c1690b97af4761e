"""What an optimizer holds on this rank, tensor by tensor, in whatever form a wrapper keeps it: for `state`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..celo2 import Celo2
from ..matrices.views import MatrixView
from ..names import canonical_names
from ..sharding.layouts import Original, Slice, local, locate
from ..step.accumulators import element_keys
from .collective import gather, together
from .files import StateError, tensor_entry


@dataclass
class LocalTensor:
    """One tensor as this rank holds it."""

    group: dict[str, Any]
    rule: str
    slice: Slice
    kind: str  # of the layout
    state: dict[str, Any]  # of the storage that the slice lies in
    rows: tuple[int, int] = (0, 0)  # the tensor's columns of the storage's v_row, v_col
    cols: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        return self.slice.name

    @property
    def vector(self) -> bool:
        return self.rule == "celo2" and self.rows[1] == 0

    @property
    def keys(self) -> tuple[str, ...]:
        return element_keys(self.rule, self.vector)

    @property
    def factored(self) -> tuple[Tensor, Tensor]:
        """The tensor's v_row and v_col, views of the storage's."""
        return self.state["v_row"][:, slice(*self.rows)], self.state["v_col"][:, slice(*self.cols)]

    def tensor(self, key: str) -> Tensor | None:
        """The local part of the storage's parameter or state; None for a state that no step has made yet."""
        value = self.slice.storage if key == "param" else self.state.get(key)
        return None if value is None else local(value).detach()

    def describe(self) -> dict[str, Any]:
        return tensor_entry(self.slice.shape, self.rule, self.slice.original.view)


def examine(optimizer: Any) -> tuple[torch.optim.Optimizer, Any, list[LocalTensor]]:
    """(the innermost optimizer, DeepSpeed's wrapper around it or None, its tensors in an order all ranks share)."""
    inner, wrapper = optimizer, None
    while not isinstance(inner, Celo2) and hasattr(inner, "optimizer"):
        inner, wrapper = inner.optimizer, inner
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"expected a Celo2 or a DeepSpeed engine, got {type(optimizer).__name__}")
    for part in (optimizer, wrapper):
        if getattr(part, "swap_optimizer", False):
            raise StateError(
                "the optimizer's states are offloaded to NVMe, which can't be read here; use "
                "engine.save_checkpoint, or offload to the CPU"
            )
    tensors = list(of_celo2(inner) if isinstance(inner, Celo2) else _of_adamw(inner, wrapper, optimizer))
    names = [t.name for t in tensors]

    def check() -> None:
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise StateError(f"two parameters are called {twice!r}; give them names: param_groups(model) does")
        if not names:
            raise StateError("the optimizer has no trainable parameters")

    together(check)
    everyone = gather(hashlib.sha256(json.dumps([t.describe() | {"name": t.name} for t in tensors]).encode()).hexdigest())
    if any(other != everyone[0] for other in everyone):
        rank = next(rank for rank, other in enumerate(everyone) if other != everyone[0])
        raise StateError(
            f"rank {rank} has other parameters than rank 0 (names, order, shapes, rules or views); "
            "construct model and optimizer alike on all ranks"
        )
    return inner, wrapper, tensors


def of_celo2(optimizer: Celo2) -> Iterator[LocalTensor]:
    for group, params in at_rest(optimizer):
        plans = optimizer.plans_of(group, params)
        for param in params:
            optimizer._init_state(group, param, plans)
        for plan in plans:
            for number, piece in enumerate(plan.layout.slices):
                yield LocalTensor(
                    group, group["rule"], piece, plan.layout.kind, optimizer.state[piece.storage], *plan.columns(number)
                )


def at_rest(optimizer: Celo2) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
    """(param group, tensors as a step would find them); between steps ZeRO-3 leaves the groups empty."""
    originals = [
        original for group in optimizer.param_groups for original in optimizer.originals_of(group) if original.trainable
    ]
    zero3 = getattr(originals[0].param, "_z3_optimizer", None) if originals else None
    if zero3 is not None:
        for number, flat in enumerate(zero3.fp32_partitioned_groups_flat):
            yield optimizer.param_groups[zero3.sub_group_to_group_id[number]], [flat]
        return
    for group in optimizer.param_groups:
        params = [param for param in group["params"] if param.requires_grad and param.numel()]
        if params:
            yield group, params


def _of_adamw(optimizer: torch.optim.Optimizer, wrapper: Any, engine: Any) -> Iterator[LocalTensor]:
    """The same for AdamW under DeepSpeed (or given named parameters), whose original parameters the wrapper keeps."""
    if not hasattr(engine, "module") and not all("param_names" in group for group in optimizer.param_groups):
        raise StateError(
            f"the parameters of {type(optimizer).__name__} have no names: pass the DeepSpeed engine, or "
            "construct the optimizer from model.named_parameters()"
        )
    named = (
        list(engine.module.named_parameters())
        if hasattr(engine, "module")
        else [pair for group in optimizer.param_groups for pair in zip(group["param_names"], group["params"])]
    )
    forms = canonical_names(name for name, _ in named)
    names = {param: forms[name] for name, param in named}
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):  # ZeRO-3
        found = [
            (optimizer.param_groups[wrapper.sub_group_to_group_id[number]], wrapper.fp16_groups[number], [flat])
            for number, flat in enumerate(wrapper.fp32_partitioned_groups_flat)
        ]
    else:
        kept = next(
            (getattr(wrapper, key) for key in ("bit16_groups", "bf16_groups", "fp16_groups") if hasattr(wrapper, key)), None
        )
        found = []
        for number, group in enumerate(optimizer.param_groups):
            params = [param for param in group["params"] if param.requires_grad]
            found.append((group, kept[number] if kept else params, params))
    for group, originals, params in found:
        for layout in locate([Original(param, names[param], MatrixView()) for param in originals], params, params):
            for piece in layout.slices:
                storage, state = piece.storage, optimizer.state[piece.storage]
                if "exp_avg" not in state:
                    whole = isinstance(optimizer, torch.optim.Adam)  # DeepSpeed's own count in a plain int
                    state.update(
                        step=torch.zeros((), dtype=torch.float32) if whole else 0,
                        exp_avg=torch.zeros_like(storage),
                        exp_avg_sq=torch.zeros_like(storage),
                    )
                yield LocalTensor(group, "adamw", piece, layout.kind, state)
