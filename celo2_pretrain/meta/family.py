"""The inner problems of one task family, and how a truncation takes them on: start, unroll, restart."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import estimators, inner
from .config import MetaConfig
from .estimators import Estimate
from .graphs import Graphed
from .inner import Fixed, Harness, Inner
from .problems import tasks
from .rule import THETA, Variant


def harness_of(config: MetaConfig) -> Harness:
    variant = Variant(config.orthogonalize, config.normalize_inputs, config.rms_decay)
    return Harness(variant, config.adamw, config.adamw_lr, config.schedule, config.weight_decay, config.inner_clip)


class Family:
    """`config.problems` problems of one task, each at its own place in its own unroll.

    With PES a problem is an antithetic pair: two particles that share their start, batches, rate, length and scale.
    """

    def __init__(self, name: str, config: MetaConfig, seed: int) -> None:
        self.config, self.task, self.harness = config, tasks.make(name), harness_of(config)
        self.generator = torch.Generator().manual_seed(seed)
        self.particles = {"pes": 2, "analytic": 1, "evolution": config.population}[config.estimator]  # of each problem
        self.advance = inner.make_advance(self.task, self.harness, shared_theta=config.estimator == "analytic")
        if torch.device(config.device).type == "cuda" and config.estimator != "analytic":
            self.advance = Graphed(self.advance)
        # Shortened at first, so that the problems are not all at the same place of their unrolls.
        self.inner = self._start(torch.rand(config.problems, generator=self.generator))
        self.noise = torch.zeros(config.problems, THETA, device=config.device)

    def truncate(self, theta: Tensor) -> Estimate:
        """Take every problem on by one truncation; the gradient of its mean loss with respect to `theta` (347,)."""
        if self.config.estimator == "pes":
            estimate, self.noise = estimators.pes(theta, self.noise, self.config.sigma, self._unroll, self.generator)
        else:
            estimate = estimators.analytic(theta, self._unroll)
            self.inner = pytree.tree_map(Tensor.detach, self.inner)
        self._restart(estimate.broken)
        return estimate

    @torch.no_grad()
    def evaluate(self, thetas: Tensor) -> Tensor:
        """(particles, problems): the losses of each theta (particles, 347) on the same fresh problems, over a whole unroll."""
        self.inner = self._start(torch.ones(self.config.problems))
        losses = self._unroll(thetas.repeat_interleave(self.config.problems, 0))
        return losses.view(self.particles, self.config.problems)

    def _unroll(self, theta: Tensor) -> Tensor:
        """Each particle's mean loss over the truncation's tail; of a step's loss no more than the task's cap counts."""
        total, counted = 0.0, max(1, round(self.config.truncation * self.config.tail))
        for step in range(self.config.truncation):
            batch = self.task.draw(self.generator, self.config.problems)
            batch = tuple(x.to(theta.device).repeat(self.particles, *[1] * (x.ndim - 1)) for x in batch)
            self.inner, loss = self.advance(theta, self.inner, batch)
            if step >= self.config.truncation - counted:
                total = total + loss.clamp_max(self.task.cap)
        return total / counted

    def _restart(self, broken: Tensor) -> None:
        """Put fresh problems where an unroll is over or broken."""
        n = self.config.problems
        over = broken | (self.inner.step[:n] >= self.inner.fixed.length[:n])
        if over.any():
            self.inner = inner.where(over.repeat(self.particles), self._start(torch.ones(n)), self.inner)
            self.noise = torch.where(over[:, None], torch.zeros(()), self.noise)

    def _start(self, share: Tensor) -> Inner:
        """Fresh problems with `share` of their length, whole truncations of it."""
        config = self.config
        span = config.truncation
        length = self._log_uniform(config.length_min, config.length_max) * share
        length = (length / span - 1e-4).ceil().clamp_min(1) * span  # a hair less: 100.00001 are 100
        fixed = Fixed(
            self._log_uniform(config.lr_min, config.lr_max), length, self._log_uniform(config.scale_min, config.scale_max)
        )
        fresh = inner.start(self.task, self.harness, fixed, self.generator)
        fresh = pytree.tree_map(lambda x: x.repeat(self.particles, *[1] * (x.ndim - 1)), fresh)
        return pytree.tree_map(lambda x: x.to(config.device), fresh)

    def _log_uniform(self, low: float, high: float) -> Tensor:
        u = torch.rand(self.config.problems, generator=self.generator)
        return torch.exp(math.log(low) + u * (math.log(high) - math.log(low)))

    def state_dict(self) -> dict[str, Any]:
        return {"inner": pytree.tree_leaves(self.inner), "noise": self.noise, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner = pytree.tree_unflatten(
            [x.to(self.config.device) for x in state["inner"]], pytree.tree_structure(self.inner)
        )
        self.noise = state["noise"].to(self.config.device)
        self.generator.set_state(state["generator"])
