"""Newton–Schulz in either form is the reference's, within its stated error."""

import pytest
import torch

from celo2_pretrain import Celo2
from celo2_pretrain.config import Optimizer
from celo2_pretrain.kernels.newton_schulz import COEFFICIENTS, _gram, dtype_for, newton_schulz, use_gram
from celo2_pretrain.model.build_optimizer import build_optimizer
from celo2_pretrain.optimizer import reference


def matrix(rows: int, cols: int, decades: float, batch: tuple[int, ...] = ()) -> torch.Tensor:
    """Random, with singular values falling evenly over `decades` powers of ten."""
    short = min(rows, cols)
    u = torch.linalg.qr(torch.randn(*batch, rows, short))[0]
    v = torch.linalg.qr(torch.randn(*batch, cols, short))[0]
    return u * 10 ** -(decades * torch.linspace(0, 1, short)) @ v.mT


def ours(x: torch.Tensor) -> torch.Tensor:
    return newton_schulz(x, COEFFICIENTS["celo2"])


@pytest.mark.parametrize("decades", [0, 1, 3, 5])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 9), (13, 7), (40, 40), (63, 200), (64, 128), (200, 65), (64, 300), (389, 401), (384, 800)]
)
def test_error_against_float64(shape, decades):
    torch.manual_seed(0)
    x = matrix(*shape, decades)
    exact = reference.newton_schulz(x.double())
    error = ((ours(x) - exact).norm() / exact.norm()).item()
    assert error < (5e-4 if use_gram(shape) else 1e-5), error


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("decades", [0, 1, 3, 5])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (13, 7), (40, 40), (64, 128), (200, 65), (64, 300), (520, 530)])
def test_bfloat16_products_stay_near_float64_and_add_little_to_what_the_iterations_are_off(shape, decades, name):
    torch.manual_seed(0)
    x = matrix(*shape, decades)
    got = newton_schulz(x, COEFFICIENTS[name], torch.bfloat16)
    assert got.dtype == torch.float32
    exact = newton_schulz(x.double(), COEFFICIENTS[name], torch.float64)
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    size = (u @ v).norm()
    assert ((got - exact).norm() / exact.norm()).item() < 0.3
    # Equal singular values are all off alike, by as much as a single one.
    more = 0.1 if decades == 0 or min(shape) == 1 else 0.05
    assert ((got - u @ v).norm() / size).item() < ((exact - u @ v).norm() / size).item() + more


def test_the_gram_form_in_bfloat16_begins_again_after_three_iterations_because_it_fails_otherwise():
    torch.manual_seed(0)
    x = matrix(64, 256, 4)
    x = x / x.norm()
    exact = newton_schulz(x.double(), COEFFICIENTS["celo2"], torch.float64)
    through = _gram(x.bfloat16(), COEFFICIENTS["celo2"]).double()
    assert (through - exact).norm() > exact.norm()
    assert (newton_schulz(x, COEFFICIENTS["celo2"], torch.bfloat16) - exact).norm() < 0.2 * exact.norm()


def test_the_gram_form_is_used_where_it_pays_and_for_batches():
    assert use_gram((64, 128)) and use_gram((300, 64)) and not use_gram((64, 127)) and not use_gram((63, 500))
    assert use_gram((64, 128), COEFFICIENTS["celo2"], torch.bfloat16)
    assert not use_gram((64, 128), COEFFICIENTS["polar_express"], torch.bfloat16)
    torch.manual_seed(0)
    stack = matrix(70, 200, 2, batch=(3, 2))
    single = torch.stack([torch.stack([ours(x) for x in row]) for row in stack])
    torch.testing.assert_close(ours(stack), single, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(20, 30), (64, 200)])
def test_a_transposed_matrix_gives_the_transposed_result(shape):
    torch.manual_seed(0)
    x = matrix(*shape, 1)
    torch.testing.assert_close(ours(x.mT.contiguous()), ours(x).mT, rtol=1e-4, atol=1e-6)


def test_the_papers_coefficients_are_the_references():
    assert COEFFICIENTS["celo2"] == (reference.NEWTON_SCHULZ,) * reference.NEWTON_SCHULZ_STEPS


@pytest.mark.parametrize("shape", [(40, 60), (64, 200)])
def test_polar_express_comes_closer_to_the_polar_factor(shape):
    torch.manual_seed(0)
    x = matrix(*shape, 2)
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    errors = {
        name: (newton_schulz(x, rows) - u @ v).square().mean().sqrt() / (u @ v).square().mean().sqrt()
        for name, rows in COEFFICIENTS.items()
    }
    assert errors["polar_express"] < 0.5 * errors["celo2"], errors


def test_the_coefficients_are_a_choice_of_the_optimizer():
    p = torch.nn.Parameter(torch.randn(12, 20))
    steps = {}
    for name in COEFFICIENTS:
        q = torch.nn.Parameter(p.detach().clone())
        q.grad = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
        Celo2([q], lr=1e-2, newton_schulz=name).step()
        steps[name] = (p - q).detach() / 1e-2
        assert steps[name].square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-3)
    assert (steps["celo2"] - steps["polar_express"]).abs().max() > 1e-2
    with pytest.raises(ValueError, match="'muon'"):
        Celo2([p], newton_schulz="muon")


class Gpu:
    """What torch says of a GPU, on a machine without one."""

    def __init__(self, monkeypatch, capability=(0, 0), arch=None):
        monkeypatch.setattr(torch.version, "hip", "7.0" if arch else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: self)
        self.gcnArchName = arch


@pytest.mark.parametrize(
    "capability, arch, bf16",
    [
        ((7, 5), None, False),
        ((8, 0), None, True),
        ((9, 0), None, True),
        ((10, 0), None, True),
        ((9, 0), "gfx906", False),
        ((9, 0), "gfx90a:sramecc+:xnack-", True),
        ((9, 4), "gfx942", True),
        ((11, 0), "gfx1100", False),
    ],
)
def test_auto_takes_bfloat16_where_a_gpu_has_it_in_matrix_units(monkeypatch, capability, arch, bf16):
    Gpu(monkeypatch, capability, arch)
    cuda = torch.device("cuda")
    assert dtype_for("auto", cuda) == (torch.bfloat16 if bf16 else torch.float32)
    assert dtype_for("fp32", cuda) == torch.float32 and dtype_for("bf16", cuda) == torch.bfloat16


def test_auto_takes_float32_on_the_cpu():
    assert dtype_for("auto", torch.device("cpu")) == torch.float32


def stepped(dtype: str) -> torch.Tensor:
    p = torch.nn.Parameter(torch.zeros(70, 200))
    p.grad = torch.randn(70, 200, generator=torch.Generator().manual_seed(0))
    Celo2([p], lr=1.0, newton_schulz_dtype=dtype).step()
    return p.detach()


def test_the_dtype_is_a_choice_of_the_optimizer_and_of_a_config():
    fp32, bf16 = stepped("fp32"), stepped("bf16")
    assert torch.equal(stepped("auto"), fp32)
    assert 1e-3 < ((bf16 - fp32).norm() / fp32.norm()).item() < 0.1
    assert bf16.square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-3)
    with pytest.raises(ValueError, match="newton_schulz_dtype must be one of .*'fp16'"):
        Celo2([torch.nn.Parameter(torch.zeros(2, 2))], newton_schulz_dtype="fp16")
    built = build_optimizer(torch.nn.Sequential(torch.nn.Linear(3, 4)), Optimizer(newton_schulz_dtype="bf16"))
    assert {group["newton_schulz_dtype"] for group in built.param_groups} == {"bf16"}


def test_a_state_saved_before_the_option_existed_goes_on():
    p = torch.nn.Parameter(torch.zeros(4, 6))
    p.grad = torch.ones(4, 6)
    optimizer = Celo2([p])
    optimizer.step()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["newton_schulz_dtype"]
    optimizer.load_state_dict(saved)
    optimizer.step()
