"""The Celo2 update on plain tensors: the specification that every other path is compared with.

Source: "Celo2: Towards Learned Optimization Free Lunch" (arXiv 2602.19142) and its authors' JAX code.
Everything is float32 and functional (no in-place writes), so that it also runs under `torch.func`.
Shapes: a tensor `p` of 2 or more dims is (..., rows, cols); K = 3 decays stand on the *first* axis
of an accumulator here. `batch` counts leading axes that a matrix view made (heads, fused parts):
they hold independent matrices, so the factored axes are looked for among the others.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..weights.mlp import MLP

MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
RMS_DECAY = 0.95
FACTORED_DECAYS = (0.9, 0.99, 0.999)
GRAD_CLAMP = 1000.0
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
NORM_EPS = 1e-9


class State(NamedTuple):
    """Accumulators of one tensor, float32. `v_row`, `v_col` are empty for 1-D, `v_full` for others."""

    momentum: Tensor  # (3, *shape)
    rms: Tensor  # shape
    v_row: Tensor  # (3, *shape without axis d0)
    v_col: Tensor  # (3, *shape without axis d1)
    v_full: Tensor  # (3, n)


def factored_axes(shape: tuple[int, ...], batch: int = 0) -> tuple[int, int]:
    """(d1, d0) = argsort(shape)[-2:], ties in order of the axes: d0 is the larger axis, averaged over for v_row."""
    order = sorted(range(batch, len(shape)), key=lambda axis: shape[axis])
    return order[-2], order[-1]


def init_state(p: Tensor, batch: int = 0) -> State:
    """Zero accumulators for a tensor like `p`."""
    zeros = lambda *shape: torch.zeros(3, *shape, dtype=torch.float32, device=p.device)  # noqa: E731
    shape = tuple(p.shape)
    if p.ndim < 2:
        return State(zeros(*shape), zeros(*shape)[0], zeros(0), zeros(0), zeros(*shape))
    d1, d0 = factored_axes(shape, batch)
    return State(
        zeros(*shape), zeros(*shape)[0], zeros(*shape[:d0], *shape[d0 + 1 :]), zeros(*shape[:d1], *shape[d1 + 1 :]), zeros(0)
    )


def _decays(values: tuple[float, ...], like: Tensor) -> Tensor:
    return _constant(values, like.device).view(3, *[1] * like.ndim)


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 on the device; kept, since to copy it there isn't allowed while a CUDA graph is recorded."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def accumulate(g: Tensor, state: State, batch: int = 0) -> State:
    """Steps 2 and 3 of the rule (docs/how_it_works.md): the accumulators after the (clamped) gradient `g`."""
    beta = _decays(MOMENTUM_DECAYS, g)
    momentum = beta * state.momentum + (1 - beta) * g
    rms = RMS_DECAY * state.rms + (1 - RMS_DECAY) * g * g
    s = g * g + 1e-30
    if g.ndim < 2:
        beta = _decays(FACTORED_DECAYS, g)
        return State(momentum, rms, state.v_row, state.v_col, beta * state.v_full + (1 - beta) * s)
    d1, d0 = factored_axes(tuple(g.shape), batch)
    row, col = s.mean(d0), s.mean(d1)
    beta = _decays(FACTORED_DECAYS, row)
    return State(momentum, rms, beta * state.v_row + (1 - beta) * row, beta * state.v_col + (1 - beta) * col, state.v_full)


def factors(v_row: Tensor, v_col: Tensor, d1: int, d0: int) -> tuple[Tensor, Tensor]:
    """Row and column factor (step 3) in the shapes of `v_row` and `v_col`: (3, …), (3, …)."""
    reduced = d1 - 1 if d1 > d0 else d1  # where axis d1 lies once d0 is gone
    row = (v_row / (v_row.mean(reduced + 1, keepdim=True) + 1e-9)).clamp_min(1e-9).rsqrt()
    return row, v_col.clamp_min(1e-9).rsqrt()


def features(p: Tensor, g: Tensor, state: State, batch: int = 0) -> Tensor:
    """The inputs of the MLP before normalisation (step 4): (30 or 15, *shape), from the updated accumulators."""
    m, v = state.momentum, state.rms
    inverse = (v + 1e-8).rsqrt()
    elementwise = [g[None], g.clamp(-0.1, 0.1)[None], p[None], m, v[None], m * inverse, inverse[None]]
    if p.ndim < 2:
        fac_g = g * (state.v_full + 1e-9).clamp_min(1e-9).rsqrt()
        return torch.cat([*elementwise, fac_g, (g * inverse)[None]])
    d1, d0 = factored_axes(tuple(p.shape), batch)
    row_factor, col_factor = factors(state.v_row, state.v_col, d1, d0)
    row_factor, col_factor = row_factor.unsqueeze(d0 + 1), col_factor.unsqueeze(d1 + 1)
    v_row, v_col = state.v_row.unsqueeze(d0 + 1), state.v_col.unsqueeze(d1 + 1)
    wide = [x.expand(m.shape) for x in (v_row, v_col, (v_row + 1e-8).rsqrt(), (v_col + 1e-8).rsqrt())]
    return torch.cat([*elementwise, g * row_factor * col_factor, (g * inverse)[None], *wide, m * row_factor * col_factor])


def _matrix_axes(x: Tensor) -> tuple[int, ...]:
    return (-2, -1) if x.ndim >= 2 else tuple(range(-x.ndim, 0))


def normalize(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Divide by the root mean square over `axes` (steps 5 and 8)."""
    return x * ((x * x).mean(axes, keepdim=True) + NORM_EPS).rsqrt()


def direction(x: Tensor, mlp: MLP) -> Tensor:
    """The MLP (step 6) on normalised features (30 or 15, *shape) → output 0 (*shape)."""
    x = x.movedim(0, -1)  # (*shape, features)
    h = torch.relu(x @ mlp.w0[: x.shape[-1]] + mlp.b0)
    h = torch.relu(h @ mlp.w1 + mlp.b1)
    return h @ mlp.w2[:, 0] + mlp.b2[0]


def newton_schulz(x: Tensor) -> Tensor:
    """Orthogonalise the last two axes (step 7): 5 quintic iterations, float32."""
    a, b, c = NEWTON_SCHULZ
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    x = x / (x.square().sum((-2, -1), keepdim=True).sqrt() + 1e-8)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


def step(p: Tensor, g: Tensor, state: State, mlp: MLP, orthogonalize: bool = True, batch: int = 0) -> tuple[Tensor, State]:
    """One learned step for one tensor.

    Args: `p`, `g` of one shape and any float dtype; `state` from `init_state` or the last call.
    Returns the unit-RMS `step` (float32; the caller does `p -= lr * (step + weight_decay * p)`)
    and the new state. `orthogonalize` has no meaning for 1-D tensors, which are only normalised.
    """
    p, g = p.float(), g.float().clamp(-GRAD_CLAMP, GRAD_CLAMP)
    state = accumulate(g, state, batch)
    x = features(p, g, state, batch)
    if p.ndim < 2:
        x = normalize(x, tuple(range(1, x.ndim)))
    else:
        x = normalize(x, (-2, -1))
    out = direction(x, mlp)
    if orthogonalize and p.ndim >= 2:
        out = newton_schulz(out)
    return normalize(out, _matrix_axes(out)), state
