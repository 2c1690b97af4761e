"""No pass or kernel is called with tensors of other sizes than it takes: a ValueError names them, before anything changes."""

import copy

import pytest
import torch
from torch import Tensor, nn

from celo2_pretrain import Celo2
from celo2_pretrain.optimizer import celo2
from celo2_pretrain.optimizer.matrices.param_groups import TAG, Tag
from celo2_pretrain.optimizer.matrices.views import MatrixView
from celo2_pretrain.optimizer.step.sizes import check_step

RULES = {"adamw": {"rule": "adamw"}, "celo2": {"rule": "celo2"}, "celo2_base": {"rule": "celo2", "orthogonalize": False}}
STATE_DTYPES = ("fp32", "bf16", "fp8")


def optimizer_of(param: Tensor, rule: str, state_dtype: str = "fp32") -> Celo2:
    return Celo2([{"params": [("blocks.0.weight", param)], **RULES[rule]}], lr=1e-2, state_dtype=state_dtype)


def stepped(shape: tuple[int, ...], rule: str, state_dtype: str = "fp32") -> tuple[nn.Parameter, Celo2]:
    param = nn.Parameter(torch.randn(shape))
    optimizer = optimizer_of(param, rule, state_dtype)
    param.grad = torch.randn(shape)
    optimizer.step()
    return param, optimizer


def everything(optimizer: Celo2) -> list:
    return [copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]]


def same(a, b) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def refused_without_a_change(optimizer: Celo2, work, match: str) -> str:
    before = everything(optimizer)
    with pytest.raises(ValueError, match=match) as refusal:
        work()
    assert same(everything(optimizer), before)
    return str(refusal.value)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize(
    "theirs,ours",
    [
        ((8, 16), (16, 8)),
        ((64, 64), (512, 512)),
        ((8, 8), (8, 16)),
        ((4, 6), (24,)),
        ((24,), (4, 6)),
        ((5,), (500,)),
        ((2, 3, 4), (6, 4)),
    ],
)
def test_a_state_of_another_shape_is_refused_when_it_is_loaded(rule, state_dtype, theirs, ours):
    _, saved = stepped(theirs, rule, state_dtype)
    for fresh in (True, False):
        optimizer = (
            optimizer_of(nn.Parameter(torch.randn(ours)), rule, state_dtype) if fresh else stepped(ours, rule, state_dtype)[1]
        )
        message = refused_without_a_change(optimizer, lambda: optimizer.load_state_dict(saved.state_dict()), "blocks.0.weight")
        if len(theirs) == len(ours):
            assert str(theirs) in message and str(ours) in message, message


@pytest.mark.parametrize("key", ["v_row", "v_col", "rms", "momentum_1"])
def test_each_state_is_compared(key):
    _, optimizer = stepped((6, 4), "celo2")
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0][key] = state["state"][0][key][..., :-1].contiguous()
    refused_without_a_change(optimizer, lambda: optimizer.load_state_dict(state), f"'{key}' of 'blocks.0.weight'")
    del state["state"][0][key]
    # Without v_row a state would be a vector's, which then lacks v_full.
    refused_without_a_change(optimizer, lambda: optimizer.load_state_dict(state), "blocks.0.weight")


@pytest.mark.parametrize(
    "change,match",
    [
        (lambda s: s["state"][0].update(rms=s["state"][0]["rms"].double()), "dtype"),
        (lambda s: s["state"][0].update(rms=s["state"][0]["rms"].bfloat16()), "dtype"),
        (lambda s: s["state"][0].update(rms="lost"), "'rms'"),
        (lambda s: s["param_groups"][0].update(lr=float("nan")), "lr must be"),
        (lambda s: s["param_groups"][0].update(rule="adamw"), "'adamw'"),
        (lambda s: s["state"][0].update(v_row=s["state"][0]["v_row"].bfloat16()), "'v_row'.* must be float32"),
        (lambda s: s["theta"].update(w0=torch.zeros(2)), "w0"),
        (lambda s: s["state"].update({7: {}}), "7"),
    ],
)
def test_a_damaged_state_is_refused_when_it_is_loaded(change, match):
    _, optimizer = stepped((6, 4), "celo2")
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    refused_without_a_change(optimizer, lambda: optimizer.load_state_dict(state), match)


def test_another_optimizers_state_is_refused_when_it_is_loaded():
    param = nn.Parameter(torch.randn(4, 5))
    theirs = torch.optim.AdamW([param])
    param.grad = torch.ones(4, 5)
    theirs.step()
    for rule in RULES:
        optimizer = optimizer_of(nn.Parameter(torch.randn(4, 5)), rule)
        refused_without_a_change(optimizer, lambda: optimizer.load_state_dict(theirs.state_dict()), "another optimizer's")
    optimizer = optimizer_of(nn.Parameter(torch.randn(4, 5)), "celo2")
    mixed = {**optimizer.state_dict(), "state": theirs.state_dict()["state"]}
    refused_without_a_change(optimizer, lambda: optimizer.load_state_dict(mixed), "another optimizer's")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("before,after", [((4, 4), (64, 64)), ((64, 64), (4, 4)), ((8, 16), (16, 8)), ((5,), (500,))])
def test_a_parameter_that_changed_its_shape_is_refused_at_the_step(rule, before, after):
    param, optimizer = stepped(before, rule)
    param.data = torch.randn(after)
    param.grad = torch.randn(after)
    message = refused_without_a_change(optimizer, optimizer.step, "blocks.0.weight")
    assert str(before) in message and str(after) in message


@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_of_another_shape_is_refused_at_the_step(rule):
    param, optimizer = stepped((8, 16), rule)
    param.grad = torch.randn(8, 16)
    param.grad.data = torch.randn(2, 2)
    refused_without_a_change(optimizer, optimizer.step, r"gradient of shape \(2, 2\)")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_a_state_that_was_exchanged_is_refused_at_the_step(rule, state_dtype):
    param, optimizer = stepped((8, 16), rule, state_dtype)
    for key, value in list(optimizer.state[param].items()):
        if key == "step" and rule != "adamw":
            continue  # counts for stochastic rounding: a number
        optimizer.state[param][key] = torch.zeros((2, *value.shape), dtype=value.dtype)
        refused_without_a_change(optimizer, optimizer.step, "blocks.0.weight")
        optimizer.state[param][key] = value
    optimizer.step()


def test_a_state_on_another_device_is_refused_at_the_step():
    param, optimizer = stepped((8, 16), "celo2")
    kept = optimizer.state[param]["momentum_0"]
    optimizer.state[param]["momentum_0"] = kept.to("meta")
    param.grad = torch.randn(8, 16)
    with pytest.raises(ValueError, match="'momentum_0' of 'blocks.0.weight' is on meta, the parameter on cpu"):
        optimizer.step()


def test_a_state_of_an_earlier_version_that_read_other_matrices_is_refused():
    """Sizes alone don't tell: Q, K, V of each head have as many rows and columns as three matrices."""
    param = nn.Parameter(torch.randn(12, 5))
    setattr(param, TAG, Tag("qkv", "hidden", "celo2", MatrixView(transpose=True, split=(2, 2, 2), repeats=2)))
    optimizer = Celo2([param])
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    del state["param_groups"][0]["adamw_weight_decay"]
    refused_without_a_change(
        optimizer, lambda: optimizer.load_state_dict(state), "earlier version, which read 'qkv'.*save_state"
    )


def test_one_bad_tensor_stops_the_whole_step():
    good, bad = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(7))
    optimizer = Celo2([good, bad], lr=1e-2)
    good.grad, bad.grad = torch.randn(4, 5), torch.randn(7)
    optimizer.step()
    optimizer.state[bad]["exp_avg"] = torch.zeros(3)
    refused_without_a_change(optimizer, optimizer.step, "exp_avg")


def test_every_step_is_checked_before_a_pass_is_called(monkeypatch):
    """Whatever the rule: without the check, neither would stop."""
    seen = []
    monkeypatch.setattr(celo2, "check_step", lambda plans, rule, state: (seen.append(rule), check_step(plans, rule, state)))
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    optimizer = Celo2(net.parameters(), lr=1e-2)
    for _ in range(3):
        net(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    assert seen == ["celo2", "adamw"] * 3


def test_tensors_without_elements_are_left_alone():
    params = [nn.Parameter(torch.randn(shape)) for shape in ((0, 5), (4, 5), (0,), (3, 0))]
    for options in ({}, {"orthogonalize": False}):
        optimizer = Celo2(params, lr=1e-2, **options)
        for p in params:
            p.grad = torch.randn_like(p)
        before = params[1].detach().clone()
        optimizer.step()
        assert not torch.equal(params[1], before)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()


def test_a_scalar_is_a_vector_of_one_element():
    for options in ({}, {"orthogonalize": False}):
        param = nn.Parameter(torch.tensor(2.0))
        optimizer = Celo2([param], lr=1e-2, **options)
        param.grad = torch.tensor(1.0)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        assert param < 2
