"""How does one step of inner training go, for many inner problems at once?

A problem is a task's parameters with their accumulators and its own learning rate, length and scale. `advance` is
written for one problem; `torch.vmap` runs it over n of them, each with its own theta or all with the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..optimizer import reference
from ..optimizer.reference import State
from . import rule
from .problems.tasks import Batch, Params, Task
from .rule import Variant

ADAMW_BETAS, ADAMW_EPS = (0.9, 0.95), 1e-8
ROOT_FLOOR = 1e-24  # under a root, whose derivative at zero is infinite


@dataclass(frozen=True)
class Harness:
    """What surrounds the rule in an inner problem.

    The paper meta-trains with the rule on every tensor, a constant rate and no decay; in deployment 1-D tensors,
    embeddings and heads get AdamW (`adamw`), the rate has a warm-up and a cosine, and gradients are clipped.
    """

    variant: Variant = Variant()
    adamw: bool = False
    adamw_lr: float = 5e-3  # of the AdamW part: its peak rate doesn't follow the learned rule's
    schedule: str = "constant"  # or "cosine", after 5 % linear warm-up
    weight_decay: float = 0.0
    clip: float = 0.0  # global norm of the gradients; 0: not


class Fixed(NamedTuple):
    """What a problem keeps over its unroll; one number each (n of them under vmap), float32."""

    lr: Tensor
    length: Tensor  # steps
    scale: Tensor  # reparametrisation: the task sees parameters times this


class Inner(NamedTuple):
    """A problem on its way. Every tensor has the leading axis n."""

    params: Params
    learned: dict[str, State]
    adam: dict[str, tuple[Tensor, Tensor]]
    step: Tensor  # float32
    fixed: Fixed


def start(task: Task, harness: Harness, fixed: Fixed, generator: torch.Generator) -> Inner:
    """n fresh problems, as many as `fixed` has."""
    scale = fixed.scale
    each = [task.init(generator) for _ in range(len(scale))]
    params = {name: torch.stack([p[name] for p in each]) for name in each[0]}
    params = {name: p / scale.view(-1, *[1] * (p.ndim - 1)) for name, p in params.items()}
    learned = {
        name: torch.vmap(reference.init_state)(p) for name, p in params.items() if not _by_adamw(task, harness, name, p[0])
    }
    adam = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in params.items() if name not in learned}
    return Inner(params, learned, adam, torch.zeros(len(scale)), fixed)


def _by_adamw(task: Task, harness: Harness, name: str, p: Tensor) -> bool:
    return harness.adamw and (p.ndim < 2 or name in task.adamw)


def make_advance(task: Task, harness: Harness, shared_theta: bool) -> Callable[[Tensor, Inner, Batch], tuple[Inner, Tensor]]:
    """`advance(theta, inner, batch) -> (inner, loss)`: one step of n problems. `theta` (n, 347), or (347,) if shared.

    `loss` (n,) is that of the batch before the step.
    """

    def advance(theta: Tensor, inner: Inner, batch: Batch) -> tuple[Inner, Tensor]:
        mlp, fixed = rule.unflatten(theta), inner.fixed

        def loss_of(params: Params) -> Tensor:
            return task.loss({name: p * fixed.scale for name, p in params.items()}, batch)

        grads, loss = torch.func.grad_and_value(loss_of)(inner.params)
        if harness.clip:
            norm = (sum(g.square().sum() for g in grads.values()) + ROOT_FLOOR).sqrt()
            grads = {name: g * harness.clip * norm.clamp_min(harness.clip).reciprocal() for name, g in grads.items()}
        share = _schedule(harness.schedule, inner.step, fixed.length)
        params, learned, adam = {}, {}, {}
        for name, p in inner.params.items():
            if name in inner.learned:
                step, learned[name] = rule.step(p, grads[name], inner.learned[name], mlp, harness.variant)
                step = step + harness.weight_decay * p
                params[name] = p - fixed.lr * share * step
            else:
                step, adam[name] = _adamw(grads[name], inner.adam[name], inner.step)
                params[name] = p - harness.adamw_lr / fixed.scale * share * step
        return Inner(params, learned, adam, inner.step + 1, fixed), loss

    return torch.vmap(advance, in_dims=(None if shared_theta else 0, 0, 0))


def _schedule(name: str, step: Tensor, length: Tensor) -> Tensor:
    if name == "constant":
        return torch.ones_like(step)
    warm = ((step + 1) / (0.05 * length)).clamp_max(1)
    return warm * 0.5 * (1 + torch.cos(math.pi * (step / length).clamp_max(1)))


def _adamw(g: Tensor, state: tuple[Tensor, Tensor], step: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    (b1, b2), (m, v) = ADAMW_BETAS, state
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    return (m / (1 - b1 ** (step + 1))) / ((v / (1 - b2 ** (step + 1)) + ROOT_FLOOR).sqrt() + ADAMW_EPS), (m, v)


def where(mask: Tensor, yes: Inner, no: Inner) -> Inner:
    """Problem by problem `yes` where `mask` (n,), else `no`."""
    pick = lambda a, b: torch.where(mask.view(-1, *[1] * (a.ndim - 1)), a, b)  # noqa: E731
    return torch.utils._pytree.tree_map(pick, yes, no)
