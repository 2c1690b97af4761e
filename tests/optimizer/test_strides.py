"""A tensor is stepped as its contiguous copy is, however it and its gradient lie in memory, and nothing beside it changes."""

import os

import pytest
import torch
from torch import Tensor, nn

from celo2_pretrain import Celo2
from celo2_pretrain.optimizer.matrices.param_groups import TAG, Tag
from celo2_pretrain.optimizer.matrices.views import MatrixView

FILL = 7.0  # what stands in the gaps
# Triton decides at import whether it interprets kernels: test_triton_parity.py runs this file in a process where it does.
BACKENDS = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["compile", "reference"]
RULES = {
    "adamw": {"rule": "adamw", "weight_decay": 0.1},
    "celo2": {"rule": "celo2", "weight_decay": 0.1},
    "celo2_base": {"rule": "celo2", "orthogonalize": False, "weight_decay": 0.1},
}
INTERPRETED = BACKENDS == ["triton"]  # and slow
SHAPES = [(6, 10)] if INTERPRETED else [(6, 10), (1, 7), (5, 1), (13, 5), (3, 5, 4), (11,), (1,)]


def gaps_behind(x: Tensor) -> Tensor:
    """The first columns of a wider tensor."""
    return torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), FILL, dtype=x.dtype)[..., : x.shape[-1]]


def every_other(x: Tensor) -> Tensor:
    return torch.full((*x.shape[:-1], 2 * x.shape[-1]), FILL, dtype=x.dtype)[..., ::2]


def transposed(x: Tensor) -> Tensor:
    return torch.empty(tuple(reversed(x.shape)), dtype=x.dtype).permute(*reversed(range(x.ndim)))


def a_column(x: Tensor) -> Tensor:
    """One of three columns of a tensor."""
    return torch.full((*x.shape, 3), FILL, dtype=x.dtype)[..., 1]


def later(x: Tensor) -> Tensor:
    """Behind an odd number of other elements, so that no address is aligned."""
    return torch.full((x.numel() + 3,), FILL, dtype=x.dtype)[3:].view(x.shape)


LAYOUTS = [gaps_behind, every_other, transposed, a_column, later]


def lay(layout, x: Tensor) -> Tensor:
    return layout(x).copy_(x)


def around(x: Tensor) -> Tensor:
    """All of the memory that a tensor is a part of."""
    return torch.tensor([], dtype=x.dtype).set_(x.untyped_storage())


def stepped(param: Tensor, gradients: list[Tensor], rule: str, state_dtype: str, view: MatrixView | None) -> Tensor:
    param = nn.Parameter(param)
    if view is not None:
        setattr(param, TAG, Tag("p", "hidden", "celo2", view))
    optimizer = Celo2([{"params": [param], **RULES[rule]}], lr=1e-2, adamw_lr_multiplier=1.0, state_dtype=state_dtype)
    for gradient in gradients:
        param.grad = gradient
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_layout_takes_the_step_of_the_contiguous_copy(rule, backend, dtype, shape, monkeypatch):
    monkeypatch.setenv("CELO2_BACKEND", backend)
    p, gradients = torch.randn(shape).to(dtype), [torch.randn(shape).to(dtype) for _ in range(2)]
    for state_dtype in ("fp32",) if INTERPRETED else ("fp32", "bf16", "fp8"):
        expected = stepped(p.clone(), gradients, rule, state_dtype, None)
        pairs = (
            [(every_other, transposed), (a_column, later)]
            if INTERPRETED
            else [
                *((layout, layout) for layout in LAYOUTS),
                *((layout, None) for layout in LAYOUTS),
                *((None, layout) for layout in LAYOUTS),
            ]
        )
        for mine, theirs in pairs:
            param = lay(mine, p) if mine else p.clone()
            ours = stepped(param, [lay(theirs, g) if theirs else g.clone() for g in gradients], rule, state_dtype, None)
            assert torch.equal(ours, expected), (mine, theirs, state_dtype)
            before = around(lay(mine, p)) if mine else None
            if mine and mine is not transposed:  # the gaps, that is where the memory isn't the tensor
                gap = torch.ones_like(before, dtype=torch.bool)
                gap.as_strided(shape, param.stride(), param.storage_offset()).fill_(False)
                assert (around(ours)[gap] == FILL).all(), (mine, theirs, state_dtype)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES[:1] if INTERPRETED else [(6, 10), (11,)])
def test_an_expanded_gradient_takes_the_step_of_its_copy(rule, backend, shape, monkeypatch):
    monkeypatch.setenv("CELO2_BACKEND", backend)
    p = torch.randn(shape)
    gradients = [torch.tensor(float(k)).expand(shape) for k in (1, 2)]
    assert torch.equal(
        stepped(p.clone(), gradients, rule, "fp32", None),
        stepped(p.clone(), [g.contiguous() for g in gradients], rule, "fp32", None),
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_negated_by_a_bit_takes_the_step_of_its_copy(rule, backend, monkeypatch):
    monkeypatch.setenv("CELO2_BACKEND", backend)
    p, gradients = torch.randn(6, 10), [torch.randn(6, 10) for _ in range(2)]
    views = [torch.complex(torch.zeros(6, 10), -g).conj().imag for g in gradients]
    assert all(view.is_neg() and torch.equal(view, g) for view, g in zip(views, gradients))
    assert torch.equal(stepped(p.clone(), views, rule, "fp32", None), stepped(p.clone(), gradients, rule, "fp32", None))


@pytest.mark.parametrize("rule", ["celo2", "celo2_base"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "view",
    [MatrixView(transpose=True, split=(2, 4)), MatrixView(transpose=True), MatrixView(transpose=True, head_dim=3)][
        : 1 if INTERPRETED else 3
    ],
)
def test_a_matrix_view_reads_a_tensor_with_gaps_as_its_copy(rule, backend, view, monkeypatch):
    monkeypatch.setenv("CELO2_BACKEND", backend)
    p, gradients = torch.randn(6, 10), [torch.randn(6, 10) for _ in range(2)]
    expected = stepped(p.clone(), gradients, rule, "fp32", view)
    for layout in LAYOUTS[:1] if INTERPRETED else LAYOUTS:
        assert torch.equal(stepped(lay(layout, p), [lay(layout, g) for g in gradients], rule, "fp32", view), expected), layout


def test_a_state_that_was_saved_with_gaps_goes_on_as_its_copy():
    """torch keeps a tensor's strides when it is moved or saved."""
    p, gradients = torch.randn(6, 10), [torch.randn(6, 10) for _ in range(2)]
    saved = nn.Parameter(p.clone())
    optimizer = Celo2([saved], lr=1e-2)
    saved.grad = gradients[0]
    optimizer.step()
    state = optimizer.state_dict()
    found = []
    for layout in (None, *LAYOUTS):
        entry = {key: lay(layout, x) if layout and x.shape == p.shape else x.clone() for key, x in state["state"][0].items()}
        param = nn.Parameter(saved.detach().clone())
        restored = Celo2([param], lr=1e-2)
        restored.load_state_dict({**state, "state": {0: entry}})
        param.grad = gradients[1]
        restored.step()
        found.append(param.detach())
    assert all(torch.equal(x, found[0]) for x in found)
