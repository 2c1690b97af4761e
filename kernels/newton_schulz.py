"""Newton–Schulz orthogonalisation in float32 or bfloat16, iterated on the small Gram matrix where that is cheaper.

Plain twin: `newton_schulz` in celo2_pretrain/optimizer/reference.py. With X = P X₀ and A = X Xᵀ, an iteration
X ← (a + bA + cA²) X only needs P and A, which are of the shorter side's size and commute: the long side
takes part in the first and the last product alone.

docs/newton_schulz.md has the measured errors and times, and why which form and dtype is chosen.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

Triple = tuple[float, float, float]
# One (a, b, c) for each iteration. "celo2": the paper's, the same five times. "polar_express": arXiv 2505.16932,
# Algorithm 1, the first five of its degree-5 polynomials with its safety factor of 1.01.
COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    "celo2": ((3.4445, -4.7750, 2.0315),) * 5,
    "polar_express": tuple(
        (a / 1.01, b / 1.01**3, c / 1.01**5)
        for a, b, c in (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        )
    ),
}
DTYPES = ("auto", "fp32", "bf16")  # what the optimizer's newton_schulz_dtype may be
GRAM_ASPECT, GRAM_ROWS = 2.0, 64  # from this long/short ratio on the Gram form needs fewer multiplications
# In bfloat16 the Gram form must begin again from X after so many iterations, and even so it serves the paper's
# coefficients only: with polar_express's small singular values come out wrong by more than their size.
BF16_GRAM_ITERATIONS = 3
# On the CPU, matrices of at least SYMMETRIC_ROWS rows skip half of each symmetric product. They are halved recursively; a
# diagonal block is multiplied whole once half of it has fewer rows than SYMMETRIC_BLOCK.
SYMMETRIC_ROWS = {torch.float32: 192, torch.bfloat16: 512}
SYMMETRIC_BLOCK = {torch.float32: 96, torch.bfloat16: 192}


def dtype_for(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of the products. `wanted` is one of DTYPES; "auto" takes bfloat16 where GPUs have it in matrix units."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" and _has_bf16_units(device) else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[wanted]


def _has_bf16_units(device: torch.device) -> bool:
    """NVIDIA from compute capability 8.0 on, AMD from MI200 (gfx90a) on."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.startswith(("gfx90a", "gfx94", "gfx95"))
    return torch.cuda.get_device_capability(device) >= (8, 0)


def use_gram(
    shape: tuple[int, ...], coefficients: Sequence[Triple] = COEFFICIENTS["celo2"], dtype: torch.dtype = torch.float32
) -> bool:
    """Whether matrices (…, rows, cols) are iterated in Gram form."""
    short, long = sorted(shape[-2:])
    exact = dtype != torch.bfloat16 or tuple(coefficients) == COEFFICIENTS["celo2"]
    return exact and short >= GRAM_ROWS and long >= GRAM_ASPECT * short


def newton_schulz(x: Tensor, coefficients: Sequence[Triple], dtype: torch.dtype = torch.float32) -> Tensor:
    """Orthogonalise the last two axes of `x` (…, rows, cols), in as many iterations as there are coefficients.

    `dtype`: of the products. The norm that x is divided by, and the result, have x's dtype (float32).
    """
    if x.numel() == 0:
        return x
    if x.device.type == "cpu" and x.ndim > 2:  # one after the other: what a matrix needs stays in the cache
        return torch.stack([newton_schulz(y, coefficients, dtype) for y in x])
    matrices = x.mT if x.shape[-2] > x.shape[-1] else x
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True) + 1e-8
    unit = torch.div(matrices, norm, out=torch.empty(matrices.shape, dtype=dtype, device=x.device))
    unit = unit.view(-1, *unit.shape[-2:]) if unit.ndim > 3 else unit
    if not use_gram(unit.shape, coefficients, dtype):
        unit = _direct(unit, coefficients)
    elif dtype == torch.bfloat16:
        for start in range(0, len(coefficients), BF16_GRAM_ITERATIONS):
            unit = _gram(unit, coefficients[start : start + BF16_GRAM_ITERATIONS])
    else:
        unit = _gram(unit, coefficients)
    unit = unit.view(matrices.shape)
    return (unit.mT if matrices is not x else unit).to(x.dtype)


def _direct(x: Tensor, coefficients: Sequence[Triple]) -> Tensor:
    gram, other = x.new_empty(*x.shape[:-1], x.shape[-2]), torch.empty_like(x)
    factor, spare = torch.empty_like(gram), torch.empty_like(x)
    for a, b, c in coefficients:
        gram = _outer(x, gram)
        factor = _outer(gram, factor, c, b)
        _add_product(x, factor, x, other, a)
        x, other, spare = other, spare, other  # the caller's x is never written to
    return x


def _gram(x: Tensor, coefficients: Sequence[Triple]) -> Tensor:
    # All of these are polynomials of one symmetric matrix: they commute, and their products are symmetric.
    gram = _outer(x, x.new_empty(*x.shape[:-1], x.shape[-2]))
    square, factor, cube, spare, product = (torch.empty_like(gram) for _ in range(5))
    for step, (a, b, c) in enumerate(coefficients):
        _symmetric(gram, gram, square)
        torch.mul(gram, b, out=factor).add_(square, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        if step == 0:
            product.copy_(factor)
        else:
            _symmetric(factor, product, spare)
            product, spare = spare, product
        if step < len(coefficients) - 1:
            torch.mul(gram, a, out=spare).add_(square, alpha=b)  # aA + bA² + cA³, times the factor once more
            _symmetric(square, gram, cube)
            _symmetric(spare.add_(cube, alpha=c), factor, cube)
            torch.add(cube, cube.mT, out=gram).mul_(0.5)  # round-off must not make it lopsided
    return product @ x


def _outer(x: Tensor, out: Tensor, scale: float = 1.0, add: float = 0.0) -> Tensor:
    """`scale · x xᵀ + add · x` (…, n, n), in `out` or, by the Triton kernel, in a new tensor. With `add`, x is symmetric."""
    if _triton_product(x):
        from .symmetric_product import symmetric_product

        return symmetric_product(x.reshape(-1, *x.shape[-2:]), scale, add).view(out.shape)
    if add and x.device.type != "cpu":  # in one pass; the CPU skips half of the product instead
        return (torch.addmm if x.ndim == 2 else torch.baddbmm)(x, x, x.mT, beta=add, alpha=scale, out=out)
    _symmetric(x, x.mT, out)
    return out.mul_(scale).add_(x, alpha=add) if add else out


def _triton_product(x: Tensor) -> bool:
    """Whether CELO2_SYMMETRIC_PRODUCT=1 asks for the Triton kernel; on an H200 it pays in float32 only."""
    return (
        os.environ.get("CELO2_SYMMETRIC_PRODUCT") == "1"
        and x.dtype != torch.float64
        and (x.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
    )


def _add_product(x: Tensor, a: Tensor, b: Tensor, out: Tensor, beta: float) -> None:
    """out ← beta · x + a @ b, rounded once."""
    (torch.addmm if a.ndim == 2 else torch.baddbmm)(x, a, b, beta=beta, out=out)


def _symmetric(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out ← a @ b, which is known to be symmetric: for a large matrix on the CPU half of it, and a mirror."""
    rows = a.shape[-2]
    if a.ndim > 2 or a.device.type != "cpu" or rows < SYMMETRIC_ROWS.get(a.dtype, rows + 1):
        torch.matmul(a, b, out=out)
        return

    def fill(low: int, high: int) -> None:
        middle = (low + high) // 2
        if middle - low < SYMMETRIC_BLOCK[a.dtype]:
            torch.mm(a[low:high], b[:, low:high], out=out[low:high, low:high])
            return
        fill(low, middle)
        fill(middle, high)
        torch.mm(a[middle:high], b[:, low:middle], out=out[middle:high, low:middle])
        out[low:middle, middle:high] = out[middle:high, low:middle].mT

    fill(0, rows)
