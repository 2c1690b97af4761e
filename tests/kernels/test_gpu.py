"""On a GPU: the Triton kernels, compiled, take the step of plain torch on the CPU, and all that the driver does there runs.

Without a GPU everything here is skipped; `python -m tests.equivalence --device cuda` runs the matrix on one.
"""

import subprocess
import sys

import pytest
import torch

from celo2_pretrain import Celo2
from celo2_pretrain.meta.config import MetaConfig
from celo2_pretrain.meta.evolution import Evolution
from celo2_pretrain.meta.family import Family
from celo2_pretrain.meta.rule import flatten
from celo2_pretrain.optimizer.backends.choose import backend_for
from celo2_pretrain.optimizer.matrices.param_groups import TAG, Tag
from celo2_pretrain.optimizer.matrices.views import MatrixView
from celo2_pretrain.optimizer.step.finite import nonfinite
from celo2_pretrain.weights import load_weights

from equivalence.model import theta
from support.golden import CASES, Case, close, repeat
from support.paths import ROOT
from support.processes import environment

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

SHAPES = [
    ((1, 1), MatrixView()),
    ((1, 300), MatrixView()),
    ((300, 1), MatrixView()),
    ((7, 13), MatrixView()),
    ((257, 129), MatrixView()),
    ((128, 512), MatrixView(transpose=True)),
    ((768, 2304), MatrixView(split=(768, 768, 768))),
    ((192, 64), MatrixView(transpose=True, split=(64, 64, 64))),
    ((511, 230), MatrixView(split=(160, 40, 30))),
    ((240, 100), MatrixView(transpose=True, head_dim=40)),
    ((3, 90, 71), MatrixView(batch=1)),
    ((1000,), MatrixView()),
    ((4, 50, 3, 3), MatrixView()),
    ((2, 2, 60, 50), MatrixView()),
    ((2000, 96), MatrixView()),
]


def trajectory(device: str, dtype: torch.dtype, steps: int = 4, **options) -> list[torch.Tensor]:
    """Parameters before and after each step, and the last accumulators, of every shape."""
    generator, params = torch.Generator().manual_seed(0), []
    for k, (shape, view) in enumerate(SHAPES):
        p = torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        setattr(p, TAG, Tag(f"p{k}", "hidden", "celo2", view))
        params.append(p)
    optimizer = Celo2(
        [{"params": params, "rule": "celo2"}],
        lr=0.05,
        weight_decay=0.1,
        weights=theta(),
        newton_schulz_dtype="fp32",
        **options,
    )
    out = [[p.detach().float().cpu().clone() for p in params]]
    for _ in range(steps):
        for p in params:
            scale = 10.0 ** torch.randint(-4, 3, p.shape, generator=generator)
            p.grad = (torch.randn(p.shape, generator=generator) * scale).to(device, dtype)
        optimizer.step()
        out.append([p.detach().float().cpu().clone() for p in params])
    states = [{key: x.detach().cpu() for key, x in optimizer.state[p].items()} for p in params]
    return out, states


@pytest.mark.parametrize("name", CASES)
def test_the_golden_trajectories(golden, name):
    assert backend_for(torch.device("cuda")).name == "triton"
    repeat(Case(golden, name), torch.device("cuda"), 2e-5)  # it fuses multiplications and additions


@pytest.mark.parametrize("orthogonalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_gpu_takes_the_step_of_the_cpu(dtype, orthogonalize, backend, monkeypatch):
    monkeypatch.setenv("CELO2_BACKEND", "reference")
    expected, states = trajectory("cpu", dtype, orthogonalize=orthogonalize)
    monkeypatch.setenv("CELO2_BACKEND", backend)
    got, found = trajectory("cuda", dtype, orthogonalize=orthogonalize)
    rounding = torch.finfo(dtype).eps
    for k in range(1, len(expected)):
        for (shape, _), before, after, ours in zip(SHAPES, expected[k - 1], expected[k], got[k]):
            excess = ((ours - after).abs() - k * rounding * after.abs().max()).clamp_min(0).norm()
            assert excess <= 1e-4 * (after - before).norm(), f"{shape} at step {k}: {excess / (after - before).norm()}"
    if dtype == torch.float32:
        for (shape, _), a, b in zip(SHAPES, states, found):
            for key in a:
                if a[key].is_floating_point():
                    close(b[key].view(a[key].shape), a[key], 2e-5)


@pytest.mark.parametrize("state_dtype", ["bf16", "fp8"])
def test_small_states_are_rounded_like_plain_torch_s(state_dtype, monkeypatch):
    monkeypatch.setenv("CELO2_BACKEND", "reference")
    expected, states = trajectory("cpu", torch.float32, 1, orthogonalize=False, state_dtype=state_dtype)
    monkeypatch.setenv("CELO2_BACKEND", "triton")
    got, found = trajectory("cuda", torch.float32, 1, orthogonalize=False, state_dtype=state_dtype)
    for (shape, _), a, b in zip(SHAPES, states, found):
        for key in a:
            if a[key].dtype in (torch.bfloat16, torch.int32):  # a fused multiply-add may cross a rounding threshold
                different = (a[key] != b[key].view(a[key].shape)).float().mean().item()
                assert different <= 5e-3 + 1.5 / a[key].numel(), f"{key} of {shape}: {different}"
            else:
                close(b[key].view(a[key].shape), a[key], 2e-5)


def test_the_same_step_twice_is_the_same_bits():
    one, two = (trajectory("cuda", torch.float32, orthogonalize=True)[0][-1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bad_gradients_are_found(dtype):
    tensors = [torch.randn(n, device="cuda").to(dtype) for n in (1, 4096, 100_003, 0, 777)]
    assert not nonfinite(tensors).any()
    for bad in (float("nan"), float("inf"), -float("inf"), *([1e30] if dtype != torch.float16 else [])):
        for place in (0, 70_000, 100_002):
            some = [x.clone() for x in tensors]
            some[2][place] = bad
            assert nonfinite(some).tolist() == [False, False, True, False, False]


def test_a_tensor_of_more_than_2_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 70e9:
        pytest.skip("needs 70 GB of GPU memory")
    p = torch.nn.Parameter(torch.zeros(2**16 + 1, 2**15, device="cuda", dtype=torch.bfloat16))
    p.grad = torch.empty_like(p).normal_()
    Celo2([{"params": [p], "rule": "celo2"}], lr=1.0, orthogonalize=False, state_dtype="fp8").step()
    last = p.detach()[-1].float()
    assert 0.3 < last.square().mean().sqrt() < 3 and p.detach()[0].float().square().mean().sqrt() < 3


def test_the_adamw_rule_is_torch_adamw():
    params = [torch.nn.Parameter(torch.randn(n, device="cuda")) for n in (1, 5, 4096, 100_003)]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = Celo2([{"params": params, "rule": "adamw", "weight_decay": 0.1}], lr=1e-3, adamw_lr_multiplier=4.0)
    theirs = torch.optim.AdamW(twins, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(5):
        for p, q in zip(params, twins):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step(), theirs.step()
    for p, q in zip(params, twins):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def evolution_on(device: str, **more) -> tuple[MetaConfig, torch.Tensor]:
    """A small evolution's configuration, and four candidates (4, 347)."""
    config = MetaConfig(
        problems=3, population=4, estimator="evolution", device=device, scale_min=1.0, scale_max=1.0, tail=0.2, **more
    )
    return config, flatten(load_weights("constructed")).repeat(4, 1).to(device)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("family", ["transformer", "quadratic", "conv/photos"])
def test_meta_training_s_graph_is_the_step_on_the_cpu(family):
    losses = []
    for device in ("cpu", "cuda"):
        config, thetas = evolution_on(device, truncation=5)
        losses.append(Family(family, config, 0).evaluate(thetas).cpu())
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)


def test_families_side_by_side_end_as_one_after_the_other():
    config, thetas = evolution_on(
        "cuda", families="quadratic transformer text", init="constructed", truncation=20, length_min=20, length_max=20
    )
    one, other = Evolution(config), Evolution(config)
    for search in (one, other):
        search.advance()  # records the graphs
    for aside, alone in zip(one._evaluate(thetas), [family.evaluate(thetas) for family in other.families]):
        torch.testing.assert_close(aside, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("world", [1, 2])
def test_a_part_of_the_matrix(world):
    done = subprocess.run(
        [sys.executable, "-m", "tests.equivalence", "--world", str(world), "--few", "--device", "cuda"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
