"""Which backend serves GPU tensors; and the optimizer's own launches compile, with Triton's compiler, without a GPU.

Triton is told that there is an H100, and only compiles what would be launched there, so no value is right.
"""

import builtins
import gc
import logging
import os
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from celo2_pretrain import Celo2
from celo2_pretrain.kernels.resources import kernels
from celo2_pretrain.kernels.symmetric_product import symmetric_product
from celo2_pretrain.optimizer.backends import choose
from celo2_pretrain.optimizer.backends import triton as triton_backend
from celo2_pretrain.optimizer.backends.choose import backend_for
from celo2_pretrain.optimizer.matrices.views import MatrixView, pieces
from celo2_pretrain.optimizer.sharding.plan import Part
from celo2_pretrain.optimizer.sharding.shape import BlockShape

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh_choice():
    choose._choose.cache_clear()
    yield
    choose._choose.cache_clear()


@pytest.fixture
def launched(monkeypatch) -> dict[str, list]:
    """What was compiled for an H100, by the kernel's name."""
    found: dict[str, list] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.setdefault(self.fn.__name__, []).append(kernel)
        return kernel

    gpu = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: GPUTarget("cuda", 90, 32)
    )
    before = driver._active
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(triton_backend, "interpreted", lambda: True)  # so that CPU tensors are let through
    driver.set_active(gpu)
    yield found
    driver._active = before


def step(orthogonalize: bool, p_dtype: torch.dtype, state_dtype: str = "fp32") -> None:
    params = [torch.nn.Parameter(torch.randn(shape).to(p_dtype)) for shape in ((16, 32), (5, 7), (16,))]
    optimizer = Celo2(params, orthogonalize=orthogonalize, state_dtype=state_dtype)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()


@pytest.mark.slow
def test_every_launch_of_a_step_compiles_as_it_is_made(launched, monkeypatch):
    monkeypatch.setenv("CELO2_BACKEND", "triton")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        step(True, dtype)
        step(False, dtype)
        symmetric_product(torch.ones(2, 16, 32, dtype=dtype))
    step(True, torch.float32, "bf16")
    step(True, torch.bfloat16, "fp8")
    names = {kernel.function.fn.__name__ for kernel in kernels("fp32", True)}
    assert set(launched) == names  # the gates of test_triton_compile.py leave none out
    for name, compiled in launched.items():
        assert all("cubin" in kernel.asm for kernel in compiled), name


def test_tables_are_kept_as_long_as_the_plan_they_are_for():
    backend, shape = triton_backend.Triton(), BlockShape(MatrixView().blocks((6, 5))[0])
    parts = [Part(0, shape, pieces(shape.block, 0, 30), 0, 0) for _ in range(2)]
    assert backend._tiles(parts, CPU) is backend._tiles(list(parts), CPU)
    assert backend._tiles(parts[:1], CPU) is not backend._tiles(parts, CPU)
    assert len(backend.kept) == 2
    parts.clear()
    gc.collect()
    assert not backend.kept


def test_gpu_tensors_get_triton(monkeypatch, caplog):
    monkeypatch.setenv("CELO2_BACKEND", "auto")
    with caplog.at_level(logging.INFO):
        assert backend_for(CUDA).name == backend_for(CUDA).name == "triton"
    assert caplog.text.count("Celo2 backend on cuda: triton") == 1
    assert backend_for(CPU).name != "triton"
    for name in ("reference", "compile"):
        monkeypatch.setenv("CELO2_BACKEND", name)
        assert backend_for(CUDA).name == "reference"


def test_triton_on_cpu_tensors_is_refused_unless_it_interprets(monkeypatch):
    monkeypatch.setenv("CELO2_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="CELO2_BACKEND=triton, but the tensors are on the CPU.*TRITON_INTERPRET=1"):
        backend_for(CPU)
    with pytest.raises(RuntimeError, match="the tensors are on xpu"):
        backend_for(torch.device("xpu"))


def test_without_triton_plain_torch_takes_over_and_says_so(monkeypatch, caplog):
    real = builtins.__import__

    def missing(name, *args, **options):
        if name == "triton":  # the package, and the backend that needs it
            raise ImportError("No module named 'triton'")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setenv("CELO2_BACKEND", "auto")
    with caplog.at_level(logging.WARNING):
        assert backend_for(CUDA).name == "reference"
    assert "No module named 'triton'" in caplog.text
    monkeypatch.setenv("CELO2_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="install triton"):
        backend_for(CUDA)
