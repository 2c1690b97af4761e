"""What exactly is meta-trained? One learned step of one tensor, made of the pieces of `optimizer.reference`.

This is the place to change the rule: add a feature, another width, use outputs 1 and 2 (docs/meta_training.md).
`Variant` holds what the paper's ablations switch; with its defaults a step is `reference.step` up to round-off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..optimizer import reference
from ..optimizer.reference import State
from ..weights.mlp import DIMS, MLP

SHAPES = ((DIMS[0], DIMS[1]), (DIMS[1],), (DIMS[1], DIMS[2]), (DIMS[2],), (DIMS[2], DIMS[3]), (DIMS[3],))
SIZES = tuple(torch.Size(shape).numel() for shape in SHAPES)
THETA = sum(SIZES)  # 347


@dataclass(frozen=True)
class Variant:
    """What the ablations of the paper (arXiv 2602.19142) change."""

    orthogonalize: bool = True
    normalize_inputs: bool = True
    rms_decay: float = reference.RMS_DECAY


def step(p: Tensor, g: Tensor, state: State, mlp: MLP, variant: Variant) -> tuple[Tensor, State]:
    """The step of RMS 1 for `p` (matrix or vector, float32) and gradient `g`, and the accumulators after it."""
    g = g.clamp(-reference.GRAD_CLAMP, reference.GRAD_CLAMP)
    after = reference.accumulate(g, state)
    if variant.rms_decay != reference.RMS_DECAY:
        after = after._replace(rms=variant.rms_decay * state.rms + (1 - variant.rms_decay) * g * g)
    out = _direction(reference.features(p, g, after), mlp, variant.normalize_inputs)
    axes = tuple(range(-min(p.ndim, 2), 0))
    if variant.orthogonalize and p.ndim >= 2:
        out = reference.newton_schulz(out)
    return reference.normalize(out, axes), after


def _direction(x: Tensor, mlp: MLP, normalize: bool) -> Tensor:
    """Output 0 of the MLP for features `x` (30 or 15, *shape), their normalisation folded into the first layer.

    Twin: `reference.direction(reference.normalize(x, …), mlp)`, which writes the 30 features twice more.
    """
    flat = x.flatten(1)  # (features, n)
    w0 = mlp.w0[: len(x)].mT  # (8, features)
    if normalize:
        w0 = w0 * (flat.square().mean(1) + reference.NORM_EPS).rsqrt()
    h = torch.relu(w0 @ flat + mlp.b0[:, None])
    h = torch.relu(mlp.w1.mT @ h + mlp.b1[:, None])
    return (mlp.w2[:, 0] @ h + mlp.b2[0]).view(x.shape[1:])


def unflatten(theta: Tensor) -> MLP:
    """(…, 347) → the MLP's weights, with the same leading axes."""
    parts = theta.split(SIZES, -1)
    return MLP(*(part.unflatten(-1, shape) for part, shape in zip(parts, SHAPES)))


def flatten(mlp: MLP) -> Tensor:
    """(347,)"""
    return torch.cat([part.flatten() for part in mlp])


def random_theta(generator: torch.Generator) -> Tensor:
    """(347,) as haiku's Linear begins: normal with a deviation of 1 / sqrt(fan in), cut at two; zero biases."""
    parts = []
    for shape in SHAPES:
        part = torch.zeros(shape)
        if len(shape) == 2:
            torch.nn.init.trunc_normal_(
                part, 0, shape[0] ** -0.5, -2 * shape[0] ** -0.5, 2 * shape[0] ** -0.5, generator=generator
            )
        parts.append(part.flatten())
    return torch.cat(parts)
