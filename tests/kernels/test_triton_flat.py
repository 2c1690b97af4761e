"""The elementwise Triton kernels and the symmetric product do what their plain-torch twins do."""

import os

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl

from celo2_pretrain import (
    Celo2,
    kernels,
)
from celo2_pretrain.kernels import flat, tiles
from celo2_pretrain.kernels.adamw import adamw, adamw_twin
from celo2_pretrain.kernels.apply import apply_twin
from celo2_pretrain.kernels.newton_schulz import COEFFICIENTS, newton_schulz
from celo2_pretrain.kernels.symmetric_product import symmetric_product, symmetric_product_twin
from celo2_pretrain.optimizer.backends.triton import DTYPES, Triton

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton_parity.py, in a process with TRITON_INTERPRET=1"
)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter cuts off where a GPU rounds to bfloat16: one unit in the last place, of 8 bits.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SIZES = [1, 0, 7, flat.BLOCK, flat.BLOCK + 4, 2 * flat.BLOCK + 1]


def draw(n: int, dtype: torch.dtype = torch.float32, odd: int = 0) -> torch.Tensor:
    return torch.randn(n + odd).to(dtype)[odd:]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("odd", [0, 1])
def test_the_update_is_its_twin_on_slices_of_any_size_and_place(dtype, odd):
    torch.manual_seed(0)
    slices = [(draw(n, dtype, odd), draw(n, odd=odd)) for n in SIZES]
    before = [p.clone() for p, _ in slices]
    Triton().apply(slices, 0.1, 0.3)
    for p, (ours, step) in zip(before, slices):
        apply_twin(p, step, 0.1, 0.3)
        torch.testing.assert_close(ours, p, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_slices_of_several_dtypes_are_updated_at_once():
    slices = [(torch.ones(5, dtype=dtype), torch.full((5,), 2.0)) for dtype in FLOATS]
    Triton().apply(slices, 0.25, 0.0)
    assert all((p == 0.5).all() for p, _ in slices)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("aligned", [True, False])
def test_adamw_is_torchs(dtype, aligned):
    torch.manual_seed(1)
    sizes = [4, 0, flat.BLOCK, flat.BLOCK + 8] if aligned else SIZES
    ours = [(draw(n, dtype), draw(n, dtype), torch.zeros(n), torch.zeros(n)) for n in sizes]
    twins = [[x.clone() for x in tensors] for tensors in ours]
    counts = torch.tensor([float(k) for k in range(len(sizes))])  # tensors may have made different numbers of steps
    chunks = flat.make_chunks(sizes, torch.device("cpu"))
    slices = torch.tensor([[x.data_ptr() for x in tensors] + [len(tensors[0])] for tensors in ours])
    for _ in range(3):
        for tensors, twin, count in zip(ours, twins, counts):
            twin[1].copy_(torch.randn(len(twin[1])))
            tensors[1].copy_(twin[1])
            adamw_twin(*twin, count.clone(), 0.1, (0.9, 0.95), 1e-8, 0.2)
        counts += 1
        adamw(chunks, slices, counts, 0.1, (0.9, 0.95), 1e-8, 0.2, DTYPES[dtype], DTYPES[dtype], aligned)
    for tensors, twin in zip(ours, twins):
        for x, y, kind in zip(tensors, twin, (dtype, dtype, torch.float32, torch.float32)):
            torch.testing.assert_close(x, y, rtol=3 * TOLERANCE[kind], atol=3 * TOLERANCE[kind])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_optimizers_adamw_needs_no_copy_of_low_precision_parameters(dtype, monkeypatch):
    stepped = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("CELO2_BACKEND", backend)
        torch.manual_seed(3)
        params = [torch.nn.Parameter(draw(n, dtype)) for n in (9, 16, 100)]
        optimizer = Celo2([{"params": params, "rule": "adamw", "weight_decay": 0.1}], lr=1e-3)
        for _ in range(3):
            for p in params:
                p.grad = draw(p.numel(), dtype)
            optimizer.step()
        stepped.append(params)
        assert all(optimizer.state[p]["step"] == 3 and optimizer.state[p]["exp_avg"].dtype == torch.float32 for p in params)
    for ours, twin in zip(*stepped):
        torch.testing.assert_close(ours, twin, rtol=3 * TOLERANCE[dtype], atol=3 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 9), (2, 48, 80), (1, 70, 33), (1, 144, 16), (0, 3, 4), (2, 4, 0)])
def test_the_symmetric_product_is_its_twin_and_symmetric(shape, dtype):
    torch.manual_seed(2)
    x = torch.randn(shape).to(dtype)
    ours = symmetric_product(x)
    torch.testing.assert_close(
        ours, symmetric_product_twin(x.float()).to(dtype), rtol=TOLERANCE[dtype], atol=30 * TOLERANCE[dtype]
    )
    assert torch.equal(ours, ours.mT)
    lopsided = symmetric_product(x.mT)  # any strides
    torch.testing.assert_close(
        lopsided, symmetric_product_twin(x.mT.float()).to(dtype), rtol=TOLERANCE[dtype], atol=30 * TOLERANCE[dtype]
    )


@pytest.mark.parametrize("n", [1, 17, 64, 100])
def test_a_newton_schulz_polynomial_is_one_symmetric_product(n):
    a = symmetric_product_twin(torch.randn(2, n, 3 * n) / n)
    ours = symmetric_product(a, scale=2.0315, add=-4.775)
    torch.testing.assert_close(ours, symmetric_product_twin(a, 2.0315, -4.775), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours, ours.mT)


def test_newton_schulz_takes_its_products_by_the_kernel_when_asked(monkeypatch):
    """In float32: the interpreter's products of bfloat16 are wrong."""
    torch.manual_seed(4)
    x = torch.randn(2, 20, 33)
    plain = newton_schulz(x, COEFFICIENTS["celo2"])
    launched, launch = [], kernels.symmetric_product.symmetric_product

    def counted(*args):
        launched.append(args)
        return launch(*args)

    monkeypatch.setattr(kernels.symmetric_product, "symmetric_product", counted)
    monkeypatch.setenv("CELO2_SYMMETRIC_PRODUCT", "1")
    ours = newton_schulz(x, COEFFICIENTS["celo2"])
    assert len(launched) == 2 * 5 * 2  # matrices, iterations, products that are symmetric
    assert (ours - plain).norm() < 1e-5 * plain.norm()


def test_what_is_no_batch_of_matrices_is_refused():
    with pytest.raises(ValueError, match=r"\(batch, n, k\), got \(3, 4\)"):
        symmetric_product(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"with add n = k, got \(1, 3, 4\)"):
        symmetric_product(torch.ones(1, 3, 4), add=1.0)


@triton.jit
def find_last(chunks, where, BLOCK: tl.constexpr):
    _, i = flat.find_chunk(chunks, BLOCK)
    tl.store(where + tl.arange(0, BLOCK), i)


@triton.jit
def find_corner(table, boxes, where, ROWS: tl.constexpr, COLS: tl.constexpr):
    *_, at, stride = tiles.find_tile(table, boxes, ROWS, COLS, False)
    tl.store(where, at)
    tl.store(where + 1, stride)


def test_elements_beyond_2_31_are_found():
    """Offsets are int64 throughout (memory of that size is not needed to see it)."""
    chunks = flat.make_chunks([3 << 30], torch.device("cpu"))
    assert chunks[-1].tolist() == [0, (3 << 30) // flat.BLOCK - 1]
    where = torch.zeros(flat.BLOCK, dtype=torch.int64)
    find_last[(1,)](chunks[-1:].contiguous(), where, flat.BLOCK)
    assert where[-1].item() == (3 << 30) - 1
    box = tiles.TileBox(
        part=0, matrix=0, offset=1 << 32, row=50000, rows=20, col=0, cols=8, stride=100000, height=60000, width=8
    )
    made = tiles.make_tiles([box], tiles.Size(16, 16), torch.device("cpu"))
    last = made.tiles[-1:].contiguous()
    find_corner[(1,)](last, made.boxes, where, 16, 16)
    assert where[:2].tolist() == [(1 << 32) + (last[0, 1].item() * 16 - 50000) * 100000, 100000]
