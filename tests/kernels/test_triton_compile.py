"""Every Triton kernel compiles for every supported GPU: without spilling, and moving no more bytes than it must."""

import os

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from celo2_pretrain.kernels import resources
from celo2_pretrain.kernels.resources import TARGETS, Kernel, kernels, measure, traffic

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler")
# Parameters and gradients, aligned, accumulators.
LAUNCHES = [
    ("fp32", True, "fp32"),
    ("fp32", False, "fp32"),
    ("fp32", True, "bf16"),
    ("bf16", True, "fp32"),
    ("fp16", False, "bf16"),
    ("fp32", True, "fp8"),
    ("bf16", False, "fp8"),
]
# Registers of a thread, of 255: with 128 threads a program and 65536 registers, 128 leave room for 4 programs, 168 for 3.
MOST = {"accumulate": 168, "fold": 168, "symmetric_product": 255}
SHARED = 6.0  # bytes for an element that neighbours share: vectors and weights from the caches, partial sums


@pytest.mark.parametrize("dtype, aligned, states", LAUNCHES)
@pytest.mark.parametrize(
    "target", [pytest.param(target, marks=() if target == "sm_90" else pytest.mark.slow) for target in TARGETS]
)
@pytest.mark.parametrize("number", range(len(kernels("fp32", True))), ids=[k.name for k in kernels("fp32", True)])
def test_a_kernel_keeps_to_its_bounds(number, target, dtype, aligned, states):
    kernel = kernels(dtype, aligned, target.startswith("gfx"), states)[number]
    found = measure(kernel, target)
    assert found.spilled == 0, found
    most = 136 if kernel.name == "direction" and states == "fp8" else MOST.get(kernel.name, 128)
    assert 0 < found.registers <= most, found
    assert found.streamed == kernel.bound, f"{found}, which should stream {kernel.bound} bytes an element"
    assert found.shared <= SHARED, found


def test_the_bounds_are_those_of_the_design():
    """Bytes an element in float32. Pass A needs 36 (it doesn't read p), below the 40 of the design."""
    bounds = {kernel.name: kernel.bound for kernel in kernels("fp32", True) if kernel.bound}
    assert bounds == {
        "accumulate": 36,
        "repack": 12,
        "norms": 24,
        "direction": 28,
        "output_squares": 4,
        "rescale": 8,
        "apply": 12,
        "adamw": 28,
    }


def test_aligned_tensors_are_loaded_several_elements_at_a_time():
    for name, wide in (("accumulate", "v4"), ("norms", "v2"), ("direction", "v2"), ("apply", "v4"), ("adamw", "v4")):
        for aligned in (True, False):
            (kernel,) = (kernel for kernel in kernels("fp32", aligned) if kernel.name == name)
            code = resources.compiled(kernel, "sm_90").asm["ptx"]
            assert (f"global.{wide}.b32" in code) == aligned, f"{name}, aligned {aligned}"


def test_a_spill_and_a_byte_too_many_would_be_seen():
    (kernel,) = (kernel for kernel in kernels("fp32", False) if kernel.name == "direction")
    crowded = Kernel(**{**vars(kernel), "options": {"maxnreg": 32}})
    assert measure(crowded, "sm_90").spilled > 0
    code = resources.compiled(kernel, "sm_90").asm["ttgir"]
    line = next(line for line in code.splitlines() if "tt.store" in line)
    streamed, _ = traffic(code, kernel.rounds, 2)
    assert traffic(code.replace(line, line + "\n" + line), kernel.rounds, 2)[0] == streamed + 4 * kernel.elements
    with pytest.raises(ValueError, match="can't tell how much"):
        traffic("%1 = tt.load %0 : something new", 1, 2)
