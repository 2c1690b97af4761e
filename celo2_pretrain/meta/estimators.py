"""How does the outer gradient come about? Persistent evolution strategies, or back-propagation through a truncation.

Both advance a family's inner problems by one truncation and give the gradient of the mean inner loss in it with
respect to theta. They differ in what a problem's noise is: PES (Vicol et al., arXiv 2112.13835, Algorithm 1,
antithetic) perturbs theta and remembers the noise over the whole unroll, which makes it unbiased for it;
back-propagation is exact but sees one truncation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Unroll = Callable[[Tensor], Tensor]  # theta (n, 347) or (347,) -> each problem's mean loss over the truncation (n,)


class Estimate(NamedTuple):
    gradient: Tensor  # (347,)
    loss: Tensor  # mean over the problems that stayed finite, scalar
    broken: Tensor  # (problems,) whether a problem's loss wasn't finite: it counts for nothing, start it afresh


def pes(theta: Tensor, noise: Tensor, sigma: float, unroll: Unroll, generator: torch.Generator) -> tuple[Estimate, Tensor]:
    """One PES estimate from n antithetic pairs.

    Args: `noise` (n, 347), the noise each pair has gathered since its unroll began; `unroll` takes the 2 n thetas, first
    the n positive ones. Returns the estimate and the noise gathered now.
    """
    fresh = torch.randn(noise.shape, generator=generator).to(noise.device) * sigma
    noise = noise + fresh
    with torch.no_grad():
        losses = unroll(torch.cat([theta + fresh, theta - fresh]))
    plus, minus = losses.chunk(2)
    good = plus.isfinite() & minus.isfinite()
    weight = torch.where(good, plus - minus, plus.new_zeros(())) / (2 * sigma**2)
    count = good.sum().clamp_min(1)
    mean = torch.where(good, (plus + minus) / 2, plus.new_zeros(())).sum() / count
    return Estimate((noise * weight[:, None]).sum(0) / count, mean, ~good), noise


def analytic(theta: Tensor, unroll: Unroll) -> Estimate:
    """Back-propagation through the truncation, from the problems' present state (which is taken as given)."""
    theta = theta.detach().requires_grad_()
    losses = unroll(theta)
    good = losses.detach().isfinite()
    count = good.sum().clamp_min(1)
    loss = torch.where(good, losses, torch.zeros(())).sum() / count
    (gradient,) = torch.autograd.grad(loss, theta)
    if not gradient.isfinite().all():
        return Estimate(torch.zeros_like(theta), loss.detach(), torch.ones_like(good))
    return Estimate(gradient, loss.detach(), ~good)
