"""Newton–Schulz orthogonalisation, iterated on the small Gram matrix where the shape makes that cheaper.

Plain twin: `newton_schulz` in celo2_pretrain/optimizer/reference.py. With X = P X₀ and A = X Xᵀ, an iteration
X ← (a + bA + cA²) X only needs P and A, which are of the shorter side's size and commute: the long side
takes part in the first and the last product alone.

Relative error against float64 (256 × 1024, singular values falling over 0 … 5 decades): direct 2e-6 … 4e-6, Gram
2e-6 … 7e-5 (up to 3e-4 at 64 rows), both in float32; the five iterations themselves stay off from the polar factor by up to 0.7 then (benchmarks/newton_schulz.py).
"""
from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

Triple = tuple[float, float, float]
# One (a, b, c) for each iteration. "celo2": the paper's, the same five times. "polar_express": arXiv 2505.16932,
# Algorithm 1, the first five of its degree-5 polynomials with its safety factor of 1.01.
COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    "celo2": ((3.4445, -4.7750, 2.0315),) * 5,
    "polar_express": tuple((a / 1.01, b / 1.01 ** 3, c / 1.01 ** 5) for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673))),
}
SYMMETRIC_ROWS = 384  # from this size on half of a symmetric product is left out on the CPU
GRAM_ASPECT, GRAM_ROWS = 2.0, 64  # from this long/short ratio on the Gram form needs fewer multiplications


def use_gram(shape: tuple[int, ...]) -> bool:
    """Whether matrices (…, rows, cols) are iterated in Gram form."""
    short, long = sorted(shape[-2:])
    return short >= GRAM_ROWS and long >= GRAM_ASPECT * short


def newton_schulz(x: Tensor, coefficients: Sequence[Triple]) -> Tensor:
    """Orthogonalise the last two axes of `x` (…, rows, cols), float32, in as many iterations as there are coefficients."""
    if x.device.type == "cpu" and x.ndim > 2:  # one after the other: what a matrix needs stays in the cache
        return torch.stack([newton_schulz(y, coefficients) for y in x]) if len(x) else x
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-8)
    x = (_gram if use_gram(x.shape) else _direct)(x, coefficients)
    return x.mT if transposed else x


def _direct(x: Tensor, coefficients: Sequence[Triple]) -> Tensor:
    for a, b, c in coefficients:
        gram = _symmetric(x, x.mT)
        x = a * x + (b * gram + c * _symmetric(gram, gram)) @ x
    return x


def _gram(x: Tensor, coefficients: Sequence[Triple]) -> Tensor:
    # All of these are polynomials of one symmetric matrix: they commute, and their products are symmetric.
    gram, product = _symmetric(x, x.mT), None
    for step, (a, b, c) in enumerate(coefficients):
        square = _symmetric(gram, gram)
        factor = b * gram + c * square
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else _symmetric(factor, product)
        if step < len(coefficients) - 1:
            gram = _symmetric(a * gram + b * square + c * _symmetric(square, gram), factor)
            gram = 0.5 * (gram + gram.mT)  # round-off must not make it lopsided
    return product @ x


def _symmetric(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, which is known to be symmetric: for a large matrix on the CPU 5/8 of the multiplications, and a mirror."""
    if a.ndim > 2 or a.device.type != "cpu" or a.dtype != torch.float32 or a.shape[0] < SYMMETRIC_ROWS:
        return a @ b
    out = a.new_empty(a.shape[0], a.shape[0])

    def fill(low: int, high: int, depth: int) -> None:
        if depth == 0:
            torch.mm(a[low:high], b[:, low:high], out=out[low:high, low:high])
            return
        middle = (low + high) // 2
        fill(low, middle, depth - 1)
        fill(middle, high, depth - 1)
        torch.mm(a[middle:high], b[:, low:middle], out=out[middle:high, low:middle])
        out[low:middle, middle:high] = out[middle:high, low:middle].mT

    fill(0, a.shape[0], 2)
    return out
