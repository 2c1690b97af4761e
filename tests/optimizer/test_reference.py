"""The reference update is the authors' update: every parameter and accumulator of the golden trajectories."""

import pytest
import torch

from celo2_pretrain import Celo2
from celo2_pretrain.optimizer import reference
from celo2_pretrain.weights.mlp import FEATURES_ND

from support.golden import CASES, TOLERANCE, Case, close, repeat


@pytest.mark.parametrize("name", CASES)
def test_the_reference_repeats_the_golden_trajectories(golden, name):
    case = Case(golden, name)
    mlp = reference.MLP(**case.theta)
    for i in range(case.tensors):
        p = case.tensor(f"t{i}/p0")
        state = reference.init_state(p)
        for k in range(1, case.steps + 1):
            step, state = reference.step(p, case.tensor(f"t{i}/g{k}"), state, mlp, case.orthogonalize)
            p = p - case.lr * (step + case.weight_decay * p)
            error = (p - case.tensor(f"t{i}/p{k}")).abs().max().item() / case.lr
            assert error < TOLERANCE[name], f"tensor {i} of shape {tuple(p.shape)} at step {k}: {error}"
        close(state.momentum.movedim(0, -1), case.tensor(f"t{i}/momentum"))
        close(state.rms[..., None], case.tensor(f"t{i}/rms"))
        for key in ("v_full",) if p.ndim < 2 else ("v_row", "v_col"):
            close(getattr(state, key).movedim(0, -1), case.tensor(f"t{i}/{key}"))


@pytest.mark.parametrize("name", CASES)
def test_the_optimizer_repeats_the_golden_trajectories(golden, name):
    repeat(Case(golden, name), torch.device("cpu"))


def test_a_feature_that_the_weights_ignore_still_counts(golden):
    """The golden cases with random weights see every feature: zeroing any row of w0 must show."""
    case = Case(golden, "celo2_random")
    p, g = case.tensor("t0/p0"), case.tensor("t0/g1")
    steps = []
    for row in range(-1, FEATURES_ND):
        theta = {key: x.clone() for key, x in case.theta.items()}
        if row >= 0:
            theta["w0"][row] = 0
        steps.append(reference.step(p, g, reference.init_state(p), reference.MLP(**theta))[0])
    for row, step in enumerate(steps[1:]):
        assert (step - steps[0]).abs().max() > 1e-3, f"feature {row} has no influence"


@pytest.mark.parametrize("shape", [(1,), (5,), (1, 1), (1, 9), (9, 1), (6, 6), (2, 3, 5), (4, 1, 3, 3), (2, 1, 2, 3, 4)])
@pytest.mark.parametrize("orthogonalize", [True, False])
def test_one_to_five_dims_and_the_optimizer_agrees_with_the_reference(shape, orthogonalize):
    torch.manual_seed(sum(shape))
    theta = {
        key: torch.randn(size) / 3 for key, size in zip(reference.MLP._fields, [(30, 8), (8,), (8, 8), (8,), (8, 3), (3,)])
    }
    p = torch.nn.Parameter(torch.randn(shape))
    optimizer = Celo2(
        [{"params": [p], "rule": "celo2"}],
        lr=1e-2,
        weights=theta,
        weight_decay=0.1,
        adamw_weight_decay=None,
        orthogonalize=orthogonalize,
    )
    state, mlp = reference.init_state(p.detach()), reference.MLP(**theta)
    for _ in range(4):
        p.grad = torch.randn(shape)
        before = p.detach().clone()
        step, state = reference.step(before, p.grad, state, mlp, orthogonalize)
        optimizer.step()
        expected = before - 1e-2 * (step + 0.1 * before)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)  # 1e-4 of a step
    assert torch.isfinite(p).all()
