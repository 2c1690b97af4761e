"""The compiled CPU kernels do what their plain-torch twins do: any shape, view, slice and dtype."""

import logging

import pytest
import torch

from celo2_pretrain.kernels import cpu
from celo2_pretrain.optimizer.backends import boxes, choose
from celo2_pretrain.optimizer.backends.choose import backend_for
from celo2_pretrain.optimizer.backends.compiled import Compiled
from celo2_pretrain.optimizer.backends.passes import Tensors
from celo2_pretrain.optimizer.backends.plain import TorchBackend
from celo2_pretrain.optimizer.matrices.views import MatrixView, pieces
from celo2_pretrain.optimizer.sharding.plan import Part
from celo2_pretrain.optimizer.sharding.shape import BlockShape
from celo2_pretrain.weights.mlp import DIMS, MLP

from support.three_passes import step

CASES = [
    ((1, 1), MatrixView()),
    ((1, 9), MatrixView()),
    ((9, 1), MatrixView()),
    ((7, 13), MatrixView()),
    ((16, 16), MatrixView()),
    ((16, 16), MatrixView(transpose=True)),
    ((37, 31), MatrixView(transpose=True)),
    ((5, 100), MatrixView()),
    ((130, 17), MatrixView(transpose=True)),
    ((12, 36), MatrixView(split=(12, 12, 12))),
    ((36, 12), MatrixView(transpose=True, split=(12, 12, 12))),
    ((11, 23), MatrixView(split=(16, 4, 3))),
    ((24, 10), MatrixView(transpose=True, head_dim=4)),
    ((3, 17, 19), MatrixView(batch=1)),
    ((13,), MatrixView()),
    ((6, 5, 3, 3), MatrixView()),
    ((2, 3, 10, 6), MatrixView()),
    ((18, 10), MatrixView(transpose=True, split=(3, 3, 3), repeats=2)),
    ((40, 9), MatrixView(transpose=True, split=(6, 2, 2), repeats=4)),
    ((9, 40), MatrixView(split=(6, 2, 2), repeats=4)),
    ((2, 5, 14), MatrixView(split=(1, 1), repeats=7, batch=1)),
    ((5, 12), MatrixView(split=(1, 2), repeats=4)),
    ((6, 5, 3, 3), MatrixView(transpose=True, flatten=True)),
    ((6, 5, 3, 3), MatrixView(flatten=True)),
]


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return Compiled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape,view", CASES)
def test_the_kernels_are_their_twins(compiled, shape, view, dtype, monkeypatch):
    monkeypatch.setattr(boxes, "JOB", 64)  # so that small matrices are cut into several calls as well
    torch.manual_seed(len(shape) + shape[0])
    total = torch.Size(shape).numel()
    mlp = MLP(*(torch.randn(s) / 3 for s in [DIMS[:2], DIMS[1:2], DIMS[1:3], DIMS[2:3], DIMS[2:], DIMS[3:]]))
    for start, stop in {(0, total), (0, total // 3), (total // 3, total), (total // 2, total // 2)}:
        n = stop - start
        for block in view.blocks(shape):
            cut = pieces(block, start, stop, most=50)
            made = []
            for backend in (compiled, TorchBackend()):
                generator = torch.Generator().manual_seed(n)
                draw = lambda scale=1.0: torch.randn(n, generator=generator) * scale
                t = Tensors(
                    draw().to(dtype),
                    (draw() * 10.0 ** torch.randint(-4, 4, (n,), generator=generator)).to(dtype),
                    [draw() for _ in range(3)],
                    draw().square(),
                    [draw().square() for _ in range(3)] if len(shape) == 1 else [],
                )
                made.append(step(backend, t, BlockShape(block), cut, mlp))
            for ours, twin in zip(*made):
                scale = twin.abs().max().item() if twin.numel() else 0.0
                # Sums in another order: round-off relative to the largest, the MLP's amplified by cancelling terms.
                torch.testing.assert_close(ours, twin, rtol=2e-5, atol=2e-5 * scale + 1e-30)


@pytest.mark.parametrize("shape,view", [case for case in CASES if len(case[0]) >= 2])  # vectors stay float32
def test_bfloat16_accumulators_are_rounded_alike_in_any_slice(compiled, shape, view, monkeypatch):
    """Kernel and twin use the same random bits, and cutting a tensor into slices changes none of them."""
    monkeypatch.setattr(boxes, "JOB", 64)
    total = torch.Size(shape).numel()
    mlp = MLP(*(torch.randn(s) / 3 for s in [DIMS[:2], DIMS[1:2], DIMS[1:3], DIMS[2:3], DIMS[2:], DIMS[3:]]))
    base = 1 << 33  # of the slice in a huge tensor: indices are of 64 bits
    values = [torch.randn(total, generator=torch.Generator().manual_seed(k)) for k in range(6)]
    values[5] = values[5].square()

    def slice_of(start: int, stop: int) -> Tensors:
        p, g, *accumulators = (x[start:stop].clone() for x in values)
        return Tensors(
            p, g, [x.bfloat16() for x in accumulators[:3]], accumulators[3].bfloat16(), [], base + start, (11, 22, 33, 44)
        )

    for block in view.blocks(shape):
        made = []
        for backend, cuts in ((compiled, [0, total]), (TorchBackend(), [0, total]), (compiled, [0, total // 3, total])):
            slices = [slice_of(a, b) for a, b in zip(cuts, cuts[1:])]
            for t, start, stop in zip(slices, cuts, cuts[1:]):
                out = step(backend, t, BlockShape(block), pieces(block, start, stop, most=50), mlp)
                if len(slices) == 1:
                    assert out[3].isfinite().all()
            made.append([torch.cat([t.momentum[k] for t in slices]) for k in range(3)] + [torch.cat([t.rms for t in slices])])
        for ours, twin, cut in zip(*made):
            assert torch.equal(ours, cut)
            # A fused multiply-add may move a value across a rounding threshold, once in ten thousand.
            assert (ours != twin).float().mean() <= 2e-3
            torch.testing.assert_close(ours, twin, rtol=2**-7, atol=1e-30)


def test_the_kernels_cover_every_matrix_of_a_transformer():
    assert all(BlockShape(block).inner_axis is not None for shape, view in CASES[:14] for block in view.blocks(shape))
    assert BlockShape(MatrixView().blocks((6, 5, 3, 3))[0]).inner_axis is None  # plain torch


def test_a_nan_passes_through_a_kernel_as_through_its_twin(compiled):
    shape = BlockShape(MatrixView().blocks((4, 20))[0])
    for backend in (compiled, TorchBackend()):
        t = Tensors(torch.ones(80), torch.ones(80), [torch.zeros(80) for _ in range(3)], torch.zeros(80), [])
        t.g[33] = float("nan")
        row, col = torch.zeros(shape.row), torch.zeros(shape.col)
        backend.accumulate([Part(0, shape, pieces(shape.block, 0, 80), 0, 0)], [t], [(row, col)])
        assert row.isnan().flatten().tolist() == [False, True, False, False]
        assert col.isnan().flatten().nonzero().item() == 13
        assert t.rms.isnan().sum() == t.momentum[0].isnan().sum() == 1


def test_the_backend_is_chosen_by_name_and_said(monkeypatch, caplog):
    cpu_device = torch.device("cpu")
    choose._choose.cache_clear()
    with caplog.at_level(logging.INFO):
        monkeypatch.setenv("CELO2_BACKEND", "auto")
        assert backend_for(cpu_device).name == "compile"
        monkeypatch.setenv("CELO2_BACKEND", "reference")
        assert backend_for(cpu_device).name == "reference"
    assert caplog.text.count("Celo2 backend on cpu") == 2
    monkeypatch.setenv("CELO2_BACKEND", "fast")
    with pytest.raises(ValueError, match="'fast' is none of auto"):
        backend_for(cpu_device)


def test_without_a_compiler_plain_torch_takes_over_and_says_so(monkeypatch, caplog):
    def missing():
        raise cpu.Unavailable("no C++ compiler found")

    monkeypatch.setattr(cpu, "library", missing)
    choose._choose.cache_clear()
    monkeypatch.setenv("CELO2_BACKEND", "auto")
    with caplog.at_level(logging.WARNING):
        assert backend_for(torch.device("cpu")).name == backend_for(torch.device("cpu")).name == "reference"
    assert caplog.text.count("no C++ compiler found") == 1
    monkeypatch.setenv("CELO2_BACKEND", "compile")
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        backend_for(torch.device("cpu"))
    choose._choose.cache_clear()


def test_a_compiler_that_fails_is_reported(monkeypatch, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho nonsense in line 3 >&2; exit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cpu.library.cache_clear()
    with pytest.raises(cpu.Unavailable, match="nonsense in line 3"):
        cpu.library()
    assert not list((tmp_path / "cache").rglob("*.so"))
    cpu.library.cache_clear()
