"""Newton–Schulz in either form is the reference's, within its stated error."""
import pytest
import torch

from celo2_pretrain import Celo2
from celo2_pretrain.kernels.newton_schulz import COEFFICIENTS, newton_schulz, use_gram
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
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (13, 7), (40, 40), (63, 200), (64, 128), (200, 65), (64, 300), (389, 401),
                                   (384, 800)])
def test_error_against_float64(shape, decades):
    torch.manual_seed(0)
    x = matrix(*shape, decades)
    exact = reference.newton_schulz(x.double())
    error = ((ours(x) - exact).norm() / exact.norm()).item()
    assert error < (5e-4 if use_gram(shape) else 1e-5), error


def test_the_gram_form_is_used_where_it_pays_and_for_batches():
    assert use_gram((64, 128)) and use_gram((300, 64)) and not use_gram((64, 127)) and not use_gram((63, 500))
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
    errors = {name: (newton_schulz(x, rows) - u @ v).square().mean().sqrt() / (u @ v).square().mean().sqrt()
              for name, rows in COEFFICIENTS.items()}
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
