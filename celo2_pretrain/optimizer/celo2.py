"""`Celo2`: the learned optimizer as a `torch.optim.Optimizer`, the same class however parameters are sharded."""
from __future__ import annotations

import logging
from dataclasses import dataclass
from math import prod
from typing import Any, Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..weights import load_weights
from . import passes
from .adamw import adamw_step
from .layouts import Layout, Original, Slice, called_to_initialize, collective_device, local, locate
from .orthogonalize import Exchange, Unit, choose_owners, units_of
from .passes import Shape, Tensors
from .reference import MLP, NORM_EPS
from .replicas import check_replicas
from .rules import tag_of
from .views import MatrixView, Piece, pieces

logger = logging.getLogger(__name__)

RULES = ("celo2", "adamw")
NONFINITE = ("error", "skip", "ignore")


@dataclass
class Part:
    """One block of a slice with what the passes need of it."""

    held: int  # which slice of the layout
    shape: Shape
    pieces: list[Piece]
    row_at: int  # where its v_row and v_col begin in the storage's
    col_at: int


@dataclass
class Plan:
    """A layout made ready for the passes."""

    layout: Layout
    parts: list[Part]
    buckets: list[list[int]]  # slices whose directions exist at the same time
    units: list[list[Unit]]  # of each bucket; empty without orthogonalisation

    def parts_of(self, bucket: list[int]) -> list[Part]:
        chosen = set(bucket)
        return [part for part in self.parts if part.held in chosen]


class Celo2(torch.optim.Optimizer):
    """Celo2 (arXiv 2602.19142): a step whose direction a small MLP computes from normalised features of each element.

    The same class serves one process, DDP, DeepSpeed ZeRO 0–3 (also offloaded) and FSDP2, and takes the same step
    in all of them up to float32 round-off. States are float32 whatever the parameters' dtype.

    Args:
        params: tensors, `named_parameters()`, or param groups (dicts). A group may set any argument below that is
            marked (group), and `rule`: `"celo2"` or `"adamw"`. Without a rule, what `param_groups` or `register`
            recorded on a parameter counts; else tensors of 2 or more dims get `"celo2"` and 1-D ones `"adamw"`
            (with `orthogonalize=False` every tensor gets `"celo2"`). A group of mixed tensors is split in up to
            three (matrices, vectors under the learned rule, AdamW), in this order.
        lr: learning rate (group). The learned step has root mean square 1 per matrix.
        weights: theta. `"default"`, a path, a hub repo id, or a dict of arrays; see `load_weights`.
        weight_decay: decoupled (group): `p ← p − lr · (step + weight_decay · p)`.
        orthogonalize: Newton–Schulz on the direction of matrices (group); False is Celo2-base.
        adamw_lr_multiplier: AdamW tensors are stepped at this multiple of lr (group).
        adamw_betas, adamw_eps: of the AdamW rule (group).
        nonfinite: what a NaN or Inf in a gradient does: `"error"` raises FloatingPointError naming the tensors before
            anything is changed, `"skip"` leaves the step out (all ranks alike) with a warning, `"ignore"` doesn't look.
        check_replicas_every: compare checksums of all replicated values over the ranks after every so many steps, and
            raise DriftError where they differ; 0: never.
        bucket_size: matrix elements whose directions are in memory or under way at the same time (4 bytes each).

    Raises:
        ValueError: an argument out of range, an unknown rule, weights of a wrong shape.
        LayoutError: at `step`, for parameters sharded in a way that Celo2 can't place exactly.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weights: Any = "default", weight_decay: float = 0.0,
                 orthogonalize: bool = True, adamw_lr_multiplier: float = 20.0, *,
                 adamw_betas: tuple[float, float] = (0.9, 0.95), adamw_eps: float = 1e-8, nonfinite: str = "error",
                 check_replicas_every: int = 0, bucket_size: int = 1 << 25) -> None:
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {NONFINITE}, got {nonfinite!r}")
        if bucket_size < 1:
            raise ValueError(f"bucket_size must be at least 1 element, got {bucket_size}")
        if weights == "default" and not orthogonalize:
            weights = "default-base"
        self.mlp: MLP = load_weights(weights)
        self.nonfinite, self.bucket_size = nonfinite, bucket_size
        self.check_replicas_every = int(check_replicas_every)
        self.skipped_steps = 0
        self._steps: dict[int, int] = {}  # of each group: DeepSpeed steps them one by one
        self._originals: dict[int, list[Original]] = {}
        self._plans: dict[tuple, tuple[list[Tensor], list[Plan]]] = {}
        self._mlps: dict[torch.device, MLP] = {}
        self._stepped = False
        if isinstance(params, (set, frozenset)):
            raise TypeError("parameters need an order that is the same in every run: pass a list, not a set")
        super().__init__(params, dict(
            lr=lr, weight_decay=weight_decay, orthogonalize=orthogonalize, adamw_lr_multiplier=adamw_lr_multiplier,
            adamw_betas=tuple(adamw_betas), adamw_eps=adamw_eps))

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle; torch's own keeps nothing but groups and states."""
        kept = ("mlp", "nonfinite", "check_replicas_every", "bucket_size", "skipped_steps", "_steps", "_originals",
                "_stepped")
        return {**super().__getstate__(), **{key: getattr(self, key) for key in kept}, "_plans": {}, "_mlps": {}}

    # ---- parameter groups -------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters (also later, in training), split by rule as the class says."""
        options = {**self.defaults, **{key: value for key, value in param_group.items() if key != "params"}}
        _check_options(options)
        named = _named(param_group["params"], offset=sum(len(known) for known in self._originals.values()))
        if not named:
            super().add_param_group({**param_group, "params": [], "rule": options.get("rule") or "adamw"})
            self._originals[len(self.param_groups) - 1] = []
            return
        split: dict[tuple[str, bool], list[Original]] = {}
        for name, param in named:
            tag = tag_of(param)
            dims = len(getattr(param, "ds_shape", param.shape))
            rule = options.get("rule") or (tag.rule if tag and options["orthogonalize"] else None) or (
                "celo2" if dims >= 2 or not options["orthogonalize"] else "adamw")
            original = Original(param, (tag.name if tag and tag.name else name), tag.view if tag else MatrixView())
            if rule == "celo2":
                original.view.blocks(original.shape)  # a view that doesn't fit is refused here
            split.setdefault((rule, rule == "celo2" and dims < 2), []).append(original)
        for rule, vectors in (("celo2", False), ("celo2", True), ("adamw", False)):
            originals = split.get((rule, vectors))
            if originals:
                super().add_param_group({**options, "rule": rule, "params": [o.param for o in originals],
                                         "group": len(self.param_groups)})
                self._originals[len(self.param_groups) - 1] = originals

    def _group_number(self, group: dict[str, Any]) -> int:
        return group["group"] if "group" in group else self.param_groups.index(group)

    # ---- the step ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns what `closure` (if any) returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._stepped and called_to_initialize():
            return loss  # states are made at the first real step
        self._stepped = True
        ready = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                for param in params:
                    if param.grad.is_sparse:
                        raise ValueError("Celo2 doesn't support sparse gradients; use sparse=False in the embedding")
                ready.append((group, params, self._plan(group, params)))
        if self.nonfinite != "ignore" and self._found_nonfinite(ready):
            return loss
        for group, params, plans in ready:
            for param in params:
                self._init_state(group, param, plans)
            if group["rule"] == "adamw":
                adamw_step(group, params, self.state)
            else:
                for plan in plans:
                    self._learned_step(group, plan)
            number = self._group_number(group)
            self._steps[number] = self._steps.get(number, 0) + 1
            if self.check_replicas_every and self._steps[number] % self.check_replicas_every == 0:
                for plan in plans:
                    check_replicas(plan.layout, self.state)
        return loss

    def _found_nonfinite(self, ready: list) -> bool:
        """Whether some rank's gradient has a NaN or Inf; the same answer on every rank."""
        names = []
        for _, _, plans in ready:
            for plan in plans:
                flags = torch.stack([~torch.isfinite(held.of(local(held.storage.grad).reshape(-1))).all()
                                     for held in plan.layout.slices]).to(torch.int32)
                _reduce(flags, plan.layout, dist.ReduceOp.MAX)
                names += [held.name for held, flag in zip(plan.layout.slices, flags.tolist()) if flag]
        if not names:
            return False
        what = f"NaN or Inf in the gradient of {', '.join(names[:5])}" + (
            f" and {len(names) - 5} more tensors" if len(names) > 5 else "")
        if self.nonfinite == "error":
            raise FloatingPointError(f"{what}; nothing was changed. Lower the learning rate, clip gradients, or use "
                                     "nonfinite=\"skip\" to leave such steps out")
        self.skipped_steps += 1
        logger.warning("%s: step skipped (%d so far)", what, self.skipped_steps)
        return True

    def _learned_step(self, group: dict[str, Any], plan: Plan) -> None:
        layout = plan.layout
        device = local(layout.slices[0].storage).device
        mlp = self._mlp_on(device)
        tensors = [self._tensors(held) for held in layout.slices]
        self._accumulate(plan, tensors, device)
        factor = [passes.factors(*self._row_col(plan, part), part.shape) if part.shape.matrix else None
                  for part in plan.parts]
        squares = self._norms(plan, tensors, factor, device)
        layers = [passes.first_layer(square, *self._row_col(plan, part), part.shape, mlp)
                  for part, square in zip(plan.parts, squares)]
        number = {id(part): k for k, part in enumerate(plan.parts)}

        def directions(bucket: list[int]) -> dict[int, Tensor]:
            out = {held: torch.empty(layout.slices[held].stop - layout.slices[held].start, device=device)
                   for held in bucket}
            for part in plan.parts_of(bucket):
                k = number[id(part)]
                for piece in part.pieces:
                    piece.of(out[part.held]).copy_(passes.direction(
                        tensors[part.held], piece, part.shape, factor[k], layers[k], mlp))
            return out

        def apply(out: dict[int, Tensor]) -> None:
            for held, step in out.items():
                _apply(layout.slices[held], tensors[held].p, step, group["lr"], group["weight_decay"])

        if plan.units:
            self._orthogonalized(plan, directions, apply)
        else:
            self._normalized(plan, directions, apply, device)

    def _accumulate(self, plan: Plan, tensors: list[Tensors], device: torch.device) -> None:
        """Pass A and its all-reduce: row and column sums of all tensors in one flat buffer."""
        sizes = [size for part in plan.parts for size in (prod(part.shape.row), prod(part.shape.col))]
        sums = torch.zeros(sum(sizes), device=device)
        chunks = list(sums.split(sizes))
        for k, part in enumerate(plan.parts):
            row, col = chunks[2 * k].view(part.shape.row), chunks[2 * k + 1].view(part.shape.col)
            for piece in part.pieces:
                passes.accumulate(tensors[part.held], piece, part.shape, row, col)
        _reduce(sums, plan.layout)
        for k, part in enumerate(plan.parts):
            if part.shape.matrix:
                d1, d0 = part.shape.block.factored
                v_row, v_col = self._row_col(plan, part)
                passes.update_factored(v_row, chunks[2 * k].view(part.shape.row), part.shape.full[d0])
                passes.update_factored(v_col, chunks[2 * k + 1].view(part.shape.col), part.shape.full[d1])

    def _norms(self, plan: Plan, tensors: list[Tensors], factor: list, device: torch.device) -> list[Tensor]:
        """Pass B and its all-reduce: a few numbers a matrix, of all tensors in one flat buffer."""
        sizes = [len(part.shape.elementwise) * prod(part.shape.lead) for part in plan.parts]
        flat = torch.zeros(sum(sizes), device=device)
        squares = [chunk.view(-1, *part.shape.lead) for chunk, part in zip(flat.split(sizes), plan.parts)]
        for k, part in enumerate(plan.parts):
            for piece in part.pieces:
                passes.norms(tensors[part.held], piece, part.shape, factor[k], squares[k])
        _reduce(flat, plan.layout)
        return squares

    def _orthogonalized(self, plan: Plan, directions: Callable, apply: Callable) -> None:
        """Pass C, Newton–Schulz and the update, in a pipeline: while bucket k travels, k − 1 is orthogonalised."""
        under_way: list[tuple[dict[int, Tensor], Exchange]] = []
        for bucket, units in zip(plan.buckets, plan.units):
            out = directions(bucket)
            exchange = Exchange(units, plan.layout, [out[held] for held in bucket])
            exchange.start()
            under_way.append((out, exchange))
            if len(under_way) > 1:
                under_way[-2][1].turn()
            if len(under_way) > 2:
                out, exchange = under_way.pop(0)
                exchange.finish()
                apply(out)
        under_way[-1][1].turn()
        for out, exchange in under_way:
            exchange.finish()
            apply(out)

    def _normalized(self, plan: Plan, directions: Callable, apply: Callable, device: torch.device) -> None:
        """Pass C and the update of Celo2-base and of vectors: step 8 needs each matrix's sum of squares."""
        for bucket in plan.buckets:
            out, parts = directions(bucket), plan.parts_of(bucket)
            sizes = [prod(part.shape.lead) for part in parts]
            flat = torch.zeros(sum(sizes), device=device)
            squares = [chunk.view(part.shape.lead) for chunk, part in zip(flat.split(sizes), parts)]
            for part, square in zip(parts, squares):
                for piece in part.pieces:
                    piece.within(square).add_(
                        piece.of(out[part.held]).square().sum(part.shape.norm_axes, keepdim=True))
            _reduce(flat, plan.layout)
            for part, square in zip(parts, squares):
                scale = (square / part.shape.per_matrix + NORM_EPS).rsqrt()
                for piece in part.pieces:
                    piece.of(out[part.held]).mul_(piece.within(scale))
            apply(out)

    # ---- states -----------------------------------------------------------------------------------------------

    def _init_state(self, group: dict[str, Any], param: Tensor, plans: list[Plan]) -> None:
        if group["rule"] == "adamw":
            if not self.state[param]:
                self.state[param].update(step=torch.zeros((), dtype=torch.float32, device=local(param).device),
                                         exp_avg=_zeros_like(param), exp_avg_sq=_zeros_like(param))
            return
        if self.state[param]:
            return
        state = self.state[param]
        parts = [part for plan in plans for part in plan.parts if plan.layout.slices[part.held].storage is param]
        for k in range(3):
            state[f"momentum_{k}"] = _zeros_like(param)
        state["rms"] = _zeros_like(param)
        if any(not part.shape.matrix for part in parts):
            for k in range(3):
                state[f"v_full_{k}"] = _zeros_like(param)
        else:
            device = local(param).device
            state["v_row"] = torch.zeros(3, sum(prod(part.shape.row) for part in parts), device=device)
            state["v_col"] = torch.zeros(3, sum(prod(part.shape.col) for part in parts), device=device)

    def _tensors(self, held: Slice) -> Tensors:
        state, storage = self.state[held.storage], held.storage
        flat = lambda x: held.of(local(x).detach().reshape(-1))  # noqa: E731  (a view where the tensor is contiguous)
        return Tensors(flat(storage), flat(storage.grad), [flat(state[f"momentum_{k}"]) for k in range(3)],
                       flat(state["rms"]), [flat(state[f"v_full_{k}"]) for k in range(3)] if "v_full_0" in state else [])

    def _row_col(self, plan: Plan, part: Part) -> tuple[Tensor, Tensor]:
        """v_row (3, *row) and v_col (3, *col) of a block, as views of the storage's state; empty for a vector."""
        shape = part.shape
        if not shape.matrix:
            return torch.empty(0), torch.empty(0)
        state = self.state[plan.layout.slices[part.held].storage]
        return (state["v_row"][:, part.row_at:part.row_at + prod(shape.row)].unflatten(1, shape.row),
                state["v_col"][:, part.col_at:part.col_at + prod(shape.col)].unflatten(1, shape.col))

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, and theta: a run goes on with the weights it began with."""
        return {**super().state_dict(), "theta": {name: x.clone() for name, x in self.mlp._asdict().items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore states bit for bit (torch's own would cast float32 states to a bf16 parameter's dtype).

        Raises ValueError where the groups differ from those that were saved.
        """
        saved = state_dict["param_groups"]
        if len(saved) != len(self.param_groups) or any(
                len(a["params"]) != len(b["params"]) for a, b in zip(saved, self.param_groups)):
            raise ValueError(f"the state has {len(saved)} param groups of {[len(g['params']) for g in saved]} tensors, "
                             f"the optimizer {len(self.param_groups)} of {[len(g['params']) for g in self.param_groups]}; "
                             "construct it as when the state was saved")
        params = {number: param for a, b in zip(saved, self.param_groups)
                  for number, param in zip(a["params"], b["params"])}
        state = {number: entry for number, entry in state_dict["state"].items()}
        super().load_state_dict({"state": {}, "param_groups": saved})
        for number, entry in state.items():
            param = params[number]
            self.state[param] = {key: _moved(value, param) for key, value in entry.items()}
        if "theta" in state_dict:
            theta = load_weights(state_dict["theta"])
            if any(not torch.equal(a, b) for a, b in zip(theta, self.mlp)):
                logger.warning("the restored state was made with other weights (theta) than the optimizer was given; "
                               "going on with the restored ones")
            self.mlp, self._mlps = theta, {}
        self._stepped = True

    # ---- plans ------------------------------------------------------------------------------------------------

    def _plan(self, group: dict[str, Any], params: list[Tensor]) -> list[Plan]:
        key = (self._group_number(group), *map(id, params))
        if key not in self._plans:
            layouts = locate(self._originals[self._group_number(group)], params)
            # With the tensors themselves, so that no other tensor can get an id of the key.
            self._plans[key] = params, [self._make_plan(group, layout) for layout in layouts]
        return self._plans[key][1]

    def _make_plan(self, group: dict[str, Any], layout: Layout) -> Plan:
        plan = Plan(layout, [], [], [])
        if group["rule"] == "adamw":
            return plan
        rows: dict[int, int] = {}
        cols: dict[int, int] = {}
        for number, held in enumerate(layout.slices):
            for block in held.original.view.blocks(held.shape):
                shape, storage = Shape(block), id(held.storage)
                plan.parts.append(Part(number, shape, pieces(block, held.start, held.stop),
                                       rows.get(storage, 0), cols.get(storage, 0)))
                rows[storage] = rows.get(storage, 0) + prod(shape.row)
                cols[storage] = cols.get(storage, 0) + prod(shape.col)
        bucket, size = [], 0
        for number, held in enumerate(layout.slices):
            if bucket and size + prod(held.shape) > self.bucket_size:
                plan.buckets.append(bucket)
                bucket, size = [], 0
            bucket.append(number)
            size += prod(held.shape)
        plan.buckets.append(bucket)
        if group["orthogonalize"] and any(part.shape.matrix for part in plan.parts):
            for bucket in plan.buckets:
                plan.units.append([unit for part in plan.parts_of(bucket)
                                   for unit in units_of(bucket.index(part.held), part.shape, part.held, layout)])
            choose_owners(plan.units, layout.world)
        return plan

    def _mlp_on(self, device: torch.device) -> MLP:
        if device not in self._mlps:
            self._mlps[device] = MLP(*(x.to(device) for x in self.mlp))
        return self._mlps[device]


def _named(params: Any, offset: int) -> list[tuple[str, Tensor]]:
    """(name, tensor) of whatever form `params` has."""
    if isinstance(params, Tensor):
        params = [params]
    named = []
    for number, item in enumerate(params):
        name, param = item if isinstance(item, tuple) else (f"param {offset + number}", item)
        if not isinstance(param, Tensor):
            raise TypeError(f"Celo2 takes tensors, got {type(param).__name__}")
        if not param.dtype.is_floating_point:
            raise ValueError(f"{name} has dtype {param.dtype}; Celo2 optimizes real floating-point tensors")
        named.append((name, param))
    return named


def _check_options(options: Mapping[str, Any]) -> None:
    rule = options.get("rule")
    if rule is not None and rule not in RULES:
        raise ValueError(f"a param group's rule must be one of {RULES}, got {rule!r}")
    for key in ("lr", "weight_decay", "adamw_lr_multiplier", "adamw_eps"):
        value = options[key]
        if isinstance(value, Tensor):
            value = value.item()
        if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise ValueError(f"{key} must be a finite number of at least 0, got {options[key]!r}")
    betas = options["adamw_betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adamw_betas must be two numbers in [0, 1), got {betas!r}")


def _apply(held: Slice, p: Tensor, step: Tensor, lr: float, weight_decay: float) -> None:
    """`p ← p − lr · (step + weight_decay · p)` (step 9); `step` is used up."""
    p32 = p.float()
    if weight_decay:
        step.add_(p32, alpha=weight_decay)
    p32 = p32.sub_(step.mul_(lr)) if p32 is p else p32 - step.mul_(lr)
    if p32 is not p:
        p.copy_(p32)
    storage = local(held.storage).detach()
    if not storage.is_contiguous():  # `p` is a copy then
        storage.copy_(p.view(storage.shape))


def _reduce(x: Tensor, layout: Layout, op: Any = dist.ReduceOp.SUM) -> None:
    """All-reduce in place over the ranks that share the layout's tensors."""
    if layout.world == 1 or x.numel() == 0:
        return
    moved = x.to(collective_device(layout.process_group, x.device))
    dist.all_reduce(moved, op=op, group=layout.process_group)
    if moved is not x:
        x.copy_(moved)


def _zeros_like(param: Tensor) -> Tensor:
    if isinstance(param, DTensor):
        return torch.zeros_like(param, dtype=torch.float32)
    return torch.zeros(param.shape, dtype=torch.float32, device=param.device)


def _moved(value: Any, param: Tensor) -> Any:
    """A state's own copy (the optimizer that it was taken from may go on) where the parameter is."""
    if isinstance(value, DTensor):
        return value.clone()
    return value.to(local(param).device, copy=True) if isinstance(value, Tensor) else value
