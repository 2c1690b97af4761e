"""One cell: train five steps, and compare everything with the reference update fed the same gradients."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from celo2_pretrain.kernels.newton_schulz import COEFFICIENTS, newton_schulz
from celo2_pretrain.optimizer import reference
from celo2_pretrain.optimizer.matrices.param_groups import tag_of
from celo2_pretrain.optimizer.state.local_tensors import at_rest
from celo2_pretrain.weights.mlp import MLP

from . import packed
from .cells import Cell
from .engines import DeepSpeedRun, FSDP2Run, start
from .limits import TOLERANCE
from .model import Awkward, micro_batch, uses_sometimes

STEPS = 5
OVERFLOW_STEP = 3


class Unsharded:
    """The reference trajectory of one tensor: its own states throughout, parameters taken over before each step."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        options: dict[str, Any],
        view: Any,
        mlp: MLP,
        bf16_products: bool = False,
        packed_states: bool = False,
    ) -> None:
        self.name, self.options, self.mlp, self.bf16_products = name, options, mlp, bf16_products
        self.shape = shape or (1,)
        self.packed, self.steps = packed_states and options["rule"] == "celo2" and len(self.shape) >= 2, 0
        if options["rule"] == "celo2":
            self.blocks = view.blocks(self.shape)
            self.states = [reference.init_state(torch.zeros(b.shape), b.batch) for b in self.blocks]
        else:
            self.copy = torch.nn.Parameter(torch.zeros(self.shape))
            self.adamw = torch.optim.AdamW(
                [self.copy],
                lr=options["lr"] * options["adamw_lr_multiplier"],
                betas=(0.9, 0.95),
                eps=1e-8,
                weight_decay=options["weight_decay"],
                foreach=False,
            )

    def step(self, before: Tensor, gradient: Tensor) -> Tensor:
        """The parameter after the step, in the shape of `before`."""
        p, g = before.reshape(self.shape).clone(), gradient.reshape(self.shape)
        if self.options["rule"] == "adamw":
            self.copy.data.copy_(p)
            self.copy.grad = g.clone()
            self.adamw.step()
            return self.copy.detach().clone().view(before.shape)
        after = p.clone()
        self.steps += 1
        for k, block in enumerate(self.blocks):
            own = block.select(p)
            orthogonalize = self.options["orthogonalize"] and own.ndim >= 2
            if self.packed:
                update, self.states[k] = packed.step(
                    self.name, self.steps, block, self.shape, own, block.select(g), self.states[k], self.mlp, orthogonalize
                )
            else:
                update, self.states[k] = reference.step(
                    own, block.select(g), self.states[k], self.mlp, orthogonalize and not self.bf16_products, block.batch
                )
            if orthogonalize and self.bf16_products:
                update = reference.normalize(newton_schulz(update, COEFFICIENTS["celo2"], torch.bfloat16), (-2, -1))
            block.assign(after, own - self.options["lr"] * (update + self.options["weight_decay"] * own))
        return after.view(before.shape)

    def accumulators(self) -> dict[str, Tensor]:
        """What the optimizer should have stored, by its keys, in the tensor's shape."""
        if self.options["rule"] == "adamw":
            state = self.adamw.state[self.copy]
            return {key: state[key] for key in ("exp_avg", "exp_avg_sq") if key in state}
        out = {f"momentum_{k}": torch.zeros(self.shape) for k in range(3)} | {"rms": torch.zeros(self.shape)}
        for block, state in zip(self.blocks, self.states):
            for k in range(3):
                block.assign(out[f"momentum_{k}"], state.momentum[k])
            block.assign(out["rms"], state.rms)
        if len(self.shape) < 2:
            out |= {f"v_full_{k}": self.states[0].v_full[k] for k in range(3)}
        return out

    def factored(self, key: str) -> Tensor:
        """`v_row` or `v_col` of all blocks one after the other: (3, numbers)."""
        return torch.cat([getattr(state, key).reshape(3, -1) for state in self.states], 1)


def error(got: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """Largest |got − expected| over the largest |scale| (default: expected); inf where anything is not finite."""
    if got.numel() != expected.numel():
        return float("inf")
    difference = (got.reshape(-1) - expected.reshape(-1)).abs().max()
    size = (expected if scale is None else scale).abs().max()
    if not torch.isfinite(difference) or not torch.isfinite(size):
        return float("inf")
    return (difference / size).item() if size > 0 else (0.0 if difference == 0 else float("inf"))


def relative(got: list[Tensor], expected: list[Tensor]) -> float:
    """‖got − expected‖ / ‖expected‖ of tensors taken together."""
    flat = [torch.cat([x.float().reshape(-1) for x in tensors]) for tensors in (got, expected)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


def update_error(before: Tensor, after: Tensor, expected: Tensor) -> float:
    """‖after − expected‖ over ‖expected − before‖, leaving out one rounding of the stored parameter."""
    difference = (after - expected).abs() - torch.finfo(torch.float32).eps * expected.abs().max()
    excess, update = difference.clamp_min(0).norm(), (expected - before).norm()
    return error(excess, torch.zeros(()), update)


def digest(tensors: list[Tensor]) -> str:
    """A hash of their bits."""
    whole = hashlib.sha256()
    for x in tensors:
        whole.update(x.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def replicated(run: DeepSpeedRun | FSDP2Run) -> list[Tensor]:
    """The states that every rank keeps whole, in the order of the optimizer's groups."""
    states = run.celo2.state
    return [
        states[p][key]
        for group in run.celo2.param_groups
        for p in group["params"]
        for key in ("v_row", "v_col", "step")
        if key in states[p]
    ]


def everything(run: DeepSpeedRun | FSDP2Run) -> str:
    """A hash of all that this rank's optimizer stores."""
    states, found = run.celo2.state, []
    for group in run.celo2.param_groups:
        for p in group["params"]:
            found += [getattr(x, "_local_tensor", x).detach() for x in (p, *states[p].values())]
    return digest(found)


class Plain:
    """The same model in one process on the whole batch, float32."""

    def __init__(self, scalar_shape: tuple[int, ...]) -> None:
        self.model = Awkward(scalar_shape)

    def gradients(
        self, values: dict[str, Tensor], step: int, use_sometimes: bool, cell: Cell, world: int
    ) -> dict[str, Tensor]:
        self.model.load_state_dict({**values, "head.weight": values["emb.weight"]})
        self.model.zero_grad(set_to_none=True)
        for micro in range(cell.accumulation):
            for rank in range(world):
                loss = self.model(micro_batch(step, micro, rank), use_sometimes, 1.0)
                (loss / (cell.accumulation * world)).backward()
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }


def compare(cell: Cell) -> dict[str, Any]:
    """Run one cell on this rank. Returns the largest error of each kind over all ranks, and which tensor had it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    run = start(cell)
    worst: dict[str, tuple[float, str]] = dict.fromkeys(TOLERANCE, (0.0, ""))

    def note(kind: str, value: float, where: str) -> None:
        if not value <= worst[kind][0]:
            worst[kind] = (value, where)

    names = list(run.params)
    mine = set(names[rank::world])  # the ranks share the work of comparing
    unsharded = {
        name: Unsharded(
            name,
            run.shape(name),
            run.options[name],
            tag_of(run.params[name]).view,
            run.mlp,
            cell.extra == "bf16_products",
            cell.extra == "fp8",
        )
        for name in names
    }
    plain = Plain(run.shape("gain")) if rank == 0 or cell.gradients_from_plain else None
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(cell.precision, torch.bfloat16)

    gradients: dict[str, Tensor | None] = {}
    after: dict[str, Tensor] = {}
    for step in range(STEPS):
        overflow = cell.precision == "fp16" and step == OVERFLOW_STEP
        use_sometimes = uses_sometimes(step) or cell.gradients_from_plain
        for micro in range(cell.accumulation):
            # The last rank alone overflows, in its last micro-batch: all must skip the step.
            factor = 1e30 if overflow and rank == world - 1 and micro == cell.accumulation - 1 else 1.0
            run.backward(micro_batch(step, micro, rank), use_sometimes, factor, micro == cell.accumulation - 1)
        before = after or {name: run.parameter(name) for name in names}
        values = run.model_values()
        expected = plain.gradients(values, step, use_sometimes, cell, world) if plain else {}
        previous = gradients
        gradients = expected if cell.gradients_from_plain else {name: run.gradient(name) for name in names}
        if overflow:
            expected = {}
        if cell.precision != "fp32" and expected:  # right in size and direction
            used = [name for name in expected if name != "sometimes" or use_sometimes]
            note(
                "gradient",
                relative([gradients[name] for name in used], [expected[name] for name in used]),
                f"all together at step {step}",
            )
            expected = {}
        for name, gradient in expected.items():
            got = gradients[name] if gradients[name] is not None else torch.zeros_like(gradient)
            wrong = error(got, gradient)
            if cell.may_be_stale and name == "sometimes" and not use_sometimes:
                wrong = min(wrong, error(got, previous[name]))
            note("gradient", wrong, f"{name} at step {step}")
        stored = everything(run) if overflow else ""
        run.step()
        after = {name: run.parameter(name) for name in names}
        if overflow:
            note("overflow", float(not run.overflowed()), "the step was not skipped")
            note("overflow", float(stored != everything(run)), "the skipped step changed a state")
            note("overflow", max(error(after[name], before[name]) for name in names), "a skipped step's parameters")
            continue
        for name in names:
            if gradients[name] is None:
                note("update", error(after[name], before[name]), f"{name} at step {step}, without gradient")
            elif name in mine:
                expected = unsharded[name].step(before[name], gradients[name])
                note("update", update_error(before[name], after[name], expected), f"{name} at step {step}")

    _compare_states(run, unsharded, mine, note)
    values = run.model_values()
    if cell.stage != "fsdp2":
        for name in names:
            note("model", error(values[name].float(), after[name].to(dtype).float()), name)
    hashes: list[Any] = [None] * world
    dist.all_gather_object(hashes, (digest(list(values.values())), digest(replicated(run))))
    note("ranks", float(len({h[0] for h in hashes}) > 1), "parameters differ between ranks")
    note("ranks", float(len({h[1] for h in hashes}) > 1), "v_row, v_col differ between ranks")
    run.close()
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, worst)
    return {
        kind: max((found[kind] for found in gathered), key=lambda pair: pair[0] if pair[0] == pair[0] else 1e300)
        for kind in TOLERANCE
    }


def _compare_states(run: DeepSpeedRun | FSDP2Run, unsharded: dict[str, Unsharded], mine: set[str], note: Any) -> None:
    """Accumulators at the end. `note(kind, error, where)`."""
    run.ready_to_read_states()
    keys = {"adamw": ("exp_avg", "exp_avg_sq"), "celo2": ("momentum_0", "momentum_1", "momentum_2", "rms")}
    for name, one in unsharded.items():
        if run.cell.gradients_from_plain:
            continue
        expected = one.accumulators()
        for key in () if one.packed else (*keys[one.options["rule"]], *(k for k in expected if k.startswith("v_full"))):
            got = run.state(name, key)  # a collective: every rank asks
            if name in mine:
                note("state", error(got, expected[key]), f"{key} of {name}")
    # v_row and v_col are whole on every rank, those of one storage (group, sub-group) one after the other.
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        parts,
        {
            name: {key: unsharded[name].factored(key) for key in ("v_row", "v_col")}
            for name in mine
            if unsharded[name].options["rule"] == "celo2"
        },
    )
    expected = {name: both for part in parts for name, both in part.items()}
    for key, got, names in _factored(run):
        note("state", error(got, torch.cat([expected[name][key] for name in names], 1)), f"{key} of {', '.join(names)}")


def _factored(run: DeepSpeedRun | FSDP2Run) -> list[tuple[str, Tensor, list[str]]]:
    """("v_row" or "v_col", the state, the parameters it covers in order) of every storage."""
    by_param = {id(p): name for name, p in run.params.items()}
    found = []
    for group, params in at_rest(run.celo2):
        for plan in run.celo2.plans_of(group, params):
            storages: dict[int, list] = {}
            for shard in plan.layout.slices:
                storages.setdefault(id(shard.storage), []).append(shard)
            for slices in storages.values():
                state = run.celo2.state[slices[0].storage]
                names = [by_param[id(shard.original.param)] for shard in slices]
                found += [(key, state[key].cpu(), names) for key in ("v_row", "v_col") if key in state]
    return found
