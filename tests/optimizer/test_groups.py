"""Param groups: nothing in them is ignored in silence, the user is told how they were split, decay acts where it should."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from celo2_pretrain import Celo2, param_groups
from celo2_pretrain.optimizer.groups import CONSTRUCTOR_ONLY, OPTIONS, OTHERS
from celo2_pretrain.optimizer.matrices.param_groups import tag_model, tag_of

from support.processes import join, leave, spawn


def matrix() -> nn.Parameter:
    return nn.Parameter(torch.randn(3, 4))


def network() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 7), nn.LayerNorm(7), nn.Linear(7, 5))


# ---- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [*OTHERS, *CONSTRUCTOR_ONLY])
def test_what_another_optimizer_would_act_on_is_refused_by_name(key):
    with pytest.raises(ValueError, match=repr(key)):
        Celo2([{"params": [matrix()], key: 0.5}])
    p = matrix()
    optimizer = Celo2([p])
    optimizer.param_groups[0][key] = 0.5
    p.grad = torch.ones(3, 4)
    before = p.detach().clone()
    with pytest.raises(ValueError, match=repr(key)):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize(
    "key,meant",
    [
        ("weight_decy", "weight_decay"),
        ("weightdecay", "weight_decay"),
        ("wd", "weight_decay"),
        ("learning_rate", "lr"),
        ("adamw_lr_mult", "adamw_lr_multiplier"),
        ("adamw_beta", "adamw_betas"),
        ("orthogonalise", "orthogonalize"),
        ("newton_shulz", "newton_schulz"),
        ("newton_schulz_steps", "newton_schulz"),
        ("state_dtypes", "state_dtype"),
        ("rules", "rule"),
    ],
)
def test_a_near_miss_of_an_option_is_refused_with_what_was_meant(key, meant):
    with pytest.raises(ValueError, match=f"did you mean '{meant}"):
        Celo2([{"params": [matrix()], key: 0.5}])


@pytest.mark.parametrize(
    "key",
    [
        "moe",
        "name",
        "initial_lr",
        "lr_scale",
        "lr_mult",
        "max_lr",
        "min_lr",
        "layer",
        "tag",
        "base_lr",
        "swa_lr",
        "weight_decay_mult",
        "wd_scale",
        7,
    ],
)
def test_what_others_keep_in_a_group_passes_untouched(key):
    p = matrix()
    optimizer = Celo2([{"params": [p], key: 0.5}])
    p.grad = torch.ones(3, 4)
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0][key] == 0.5


def test_groups_can_be_added_to_a_restored_or_copied_optimizer():
    """torch gives an optimizer that is restored a default that Celo2 has no option for."""
    optimizer = Celo2([matrix()])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for other in (optimizer, copy.deepcopy(optimizer)):
        new = matrix()
        other.add_param_group({"params": [new]})
        new.grad = torch.ones(3, 4)
        other.step()
        assert other.state[new]


def test_a_parameter_that_is_given_twice_is_refused_and_adds_nothing():
    p = matrix()
    optimizer = Celo2([p])
    with pytest.raises(ValueError, match="in another param group already"):
        optimizer.add_param_group({"params": [matrix(), p]})
    assert len(optimizer.param_groups) == len(optimizer.user_groups) == 1


def test_options_that_earlier_versions_ignored_are_dropped_from_their_states(caplog):
    optimizer = Celo2([matrix()])
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0] |= {"maximize": True, "state_dtype": "bf16", "moe": True}
    optimizer.load_state_dict(state)
    assert "['maximize', 'state_dtype'], on which Celo2 does not act: dropped" in caplog.text
    assert optimizer.param_groups[0]["moe"] and "maximize" not in optimizer.param_groups[0]
    optimizer.step()


def test_every_option_of_a_group_is_one_of_the_constructor():
    defaults = Celo2([matrix()]).defaults
    assert set(OPTIONS) <= set(defaults) and all(key in Celo2.__doc__ for key in OPTIONS)


# ---- how groups are split -----------------------------------------------------------------------------------------


def test_user_groups_say_what_each_group_became():
    net = network()
    optimizer = Celo2(
        [
            {"params": list(net[1].parameters()), "lr": 0.1},
            {"params": [net[3].weight], "lr": 0.2},
            {"params": [], "lr": 0.3},
            {"params": list(net[2].parameters()), "lr": 0.4},
        ]
    )
    assert [[(g["rule"], g["lr"], len(g["params"])) for g in groups] for groups in optimizer.user_groups] == [
        [("celo2", 0.1, 1), ("adamw", 0.1, 1)],
        [("celo2", 0.2, 1)],
        [("adamw", 0.3, 0)],
        [("adamw", 0.4, 2)],
    ]
    assert [g for groups in optimizer.user_groups for g in groups] == optimizer.param_groups
    optimizer.add_param_group({"params": list(net[0].parameters())})
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(optimizer.user_groups) == 5
    assert all(a is b for a, b in zip([g for groups in optimizer.user_groups for g in groups], optimizer.param_groups))
    assert copy.deepcopy(optimizer).user_groups[4][0]["rule"] == "celo2"


def test_the_users_names_stay_with_their_tensors():
    net = network()
    optimizer = Celo2(net.named_parameters())
    names = {id(p): name for name, p in net.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]
    assert "param_names" in optimizer.state_dict()["param_groups"][0]
    optimizer.add_param_group({"params": [matrix()]})  # torch alone refuses groups without names among others with names
    assert len(optimizer.param_groups[-1]["param_names"]) == 1
    assert "param_names" not in Celo2(net.parameters()).param_groups[0]
    with pytest.raises(ValueError, match="1 of a group's 2 parameters have names"):
        Celo2([("a", matrix()), matrix()])


SCHEDULERS = {
    "LambdaLR": lambda optimizer, n: lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5] * n),
    "MultiplicativeLR": lambda optimizer, n: lr_scheduler.MultiplicativeLR(optimizer, [lambda step: 0.5] * n),
    "OneCycleLR": lambda optimizer, n: lr_scheduler.OneCycleLR(optimizer, [0.1] * n, total_steps=9, cycle_momentum=False),
    "CyclicLR": lambda optimizer, n: lr_scheduler.CyclicLR(optimizer, [0.1] * n, [0.2] * n, cycle_momentum=False),
    "ReduceLROnPlateau": lambda optimizer, n: lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=[0.1] * n),
    "SWALR": lambda optimizer, n: torch.optim.swa_utils.SWALR(optimizer, [0.1] * n),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_list_with_a_value_for_each_of_the_users_groups_is_refused_with_how_they_were_split(name):
    net = network()
    make = lambda: Celo2([{"params": net[1].parameters()}, {"params": net[3].parameters()}])
    with pytest.raises(ValueError, match=r"group 0 into 2 \(celo2: 1 tensor, adamw: 1 tensor\); group 1 into 2"):
        SCHEDULERS[name](make(), 2)
    with pytest.raises(ValueError, match="group 0 into 2"):
        SCHEDULERS[name](make(), 3)
    SCHEDULERS[name](make(), 4)
    sorted_groups = Celo2(param_groups(net))
    assert len(sorted_groups.param_groups) == len(sorted_groups.user_groups)
    SCHEDULERS[name](sorted_groups, len(sorted_groups.user_groups))


def test_deepspeeds_schedulers_are_refused_likewise():
    schedules = pytest.importorskip("deepspeed.runtime.lr_schedules")
    with pytest.raises(ValueError, match="group 0 into 2"):
        schedules.WarmupLR(Celo2(nn.Linear(3, 3).parameters()), warmup_max_lr=[0.1])


def train_with_a_schedule(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(3):
        optimizer.zero_grad()
        net(torch.arange(11)).square().sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1)
        optimizer.step()


def _zero_redundancy(rank: int, port: int, world: int, folder: str) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    join(rank, port, world)
    net = network()
    groups = param_groups(net)
    optimizer = ZeroRedundancyOptimizer([dict(group) for group in groups], Celo2, lr=1e-2)
    split = ""
    try:
        ZeroRedundancyOptimizer(network().parameters(), Celo2, lr=1e-2).step()
    except Exception as error:
        split = f"{type(error).__name__}: {error}"
    train_with_a_schedule(net, optimizer)
    torch.save({"params": [p.detach() for p in net.parameters()], "split": split}, f"{folder}/{rank}.pt")
    leave()


@pytest.mark.multiprocess
def test_zero_redundancy_optimizer_takes_the_step_of_one_process(tmp_path):
    spawn(_zero_redundancy, 2, tmp_path)
    torch.manual_seed(0)
    net = network()
    optimizer = Celo2(param_groups(net), lr=1e-2)
    train_with_a_schedule(net, optimizer)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for p, q in zip(net.parameters(), found["params"]):
            torch.testing.assert_close(p.detach(), q, rtol=1e-5, atol=1e-6)
        assert "splits groups by rule" in found["split"], found["split"]


# ---- what is told -------------------------------------------------------------------------------------------------


def told(caplog, make) -> tuple[list[str], list[str]]:
    """(warnings, other messages) while `make()` runs."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "celo2_pretrain"):
        make()
    records = [r for r in caplog.records if r.name == "celo2_pretrain.optimizer.groups"]
    return (
        [r.getMessage() for r in records if r.levelno >= logging.WARNING],
        [r.getMessage() for r in records if r.levelno < logging.WARNING],
    )


def test_untagged_matrices_are_told_once(caplog):
    net = network()
    (warning,), _ = told(caplog, lambda: Celo2(net.parameters()))
    assert warning.startswith("Celo2: 3 matrices, AdamW: 4 tensors. No tensor is tagged") and "param_groups(model)" in warning
    tag_model(net)
    warnings, (summary,) = told(caplog, lambda: Celo2(net.parameters()))
    matrices = sum(tag_of(p).rule == "celo2" for p in net.parameters())
    assert (
        not warnings and summary == f"Celo2: {matrices} matri{'x' if matrices == 1 else 'ces'}, AdamW: {7 - matrices} tensors"
    )
    net[0].weight = nn.Parameter(torch.randn(20, 6))  # as resize_token_embeddings does
    (warning,), _ = told(caplog, lambda: Celo2(net.named_parameters()))
    assert "1 matrix is not tagged" in warning and "'0.weight' (20, 6)" in warning


def test_a_rule_that_a_group_names_needs_no_tag(caplog):
    net = network()
    warnings, _ = told(
        caplog,
        lambda: Celo2(
            [{"params": [net[1].weight], "rule": "celo2"}, {"params": [net[0].weight, net[1].bias], "rule": "adamw"}]
        ),
    )
    assert not warnings


def test_a_group_that_is_added_later_is_told_of_too_but_once(caplog):
    net = network()
    optimizer = Celo2(param_groups(net[1]))
    warnings, _ = told(caplog, lambda: [optimizer.add_param_group({"params": [matrix()]}) for _ in range(3)])
    assert len(warnings) == 1 and "1 matrix is not tagged" in warnings[0]


def test_tensors_without_two_dims_may_have_been_flattened(caplog):
    (warning,), _ = told(caplog, lambda: Celo2([nn.Parameter(torch.randn(100)), nn.Parameter(torch.randn(7))]))
    assert "No tensor has two dims" in warning and "(100,)" in warning and "flattened" in warning


def test_only_the_first_rank_speaks(caplog, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert told(caplog, lambda: Celo2(network().parameters())) == ([], [])


# ---- weight decay -------------------------------------------------------------------------------------------------


def decays(net: nn.Module, make) -> dict[str, float]:
    """By which weight decay each parameter shrinks: two equal steps, one of them without any decay.

    `make(**decay)` gives the optimizer; learned steps divide by RMS, so only decay tells one from the other.
    """
    ended = []
    for none in (False, True):
        torch.manual_seed(1)
        optimizer = make(none)
        start = {name: p.detach().clone() for name, p in net.named_parameters()}
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        ended.append({name: p.detach().clone() for name, p in net.named_parameters()})
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.copy_(start[name])
    return {name: round(((ended[1][name] - ended[0][name]) / start[name]).median().item() / 0.1, 3) for name in ended[0]}


def decay_network() -> nn.Module:
    net = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 7), nn.LayerNorm(7))
    with torch.no_grad():
        for p in net.parameters():
            p.uniform_(1, 2)
    return net


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("backend", ["compile", "reference"])
def test_weight_decay_acts_on_hidden_matrices_and_adamw_weight_decay_on_the_rest(tagged, base, backend, monkeypatch):
    monkeypatch.setenv("CELO2_BACKEND", backend)
    net = decay_network()
    if tagged:
        tag_model(net)
    for decay, other in ((0.5, 0.0), (0.0, 0.25), (0.5, 0.25), (0.5, None)):
        found = decays(
            net,
            lambda none: Celo2(
                net.parameters(),
                lr=0.1,
                adamw_lr_multiplier=1.0,
                orthogonalize=not base,
                weight_decay=0.0 if none else decay,
                adamw_weight_decay=0.0 if none else other,
            ),
        )
        rest = decay if other is None else other
        assert found == {
            "0.weight": rest if tagged else decay,
            "1.weight": decay,
            "1.bias": rest,
            "2.weight": rest,
            "2.bias": rest,
        }, (decay, other)


def test_a_group_that_names_adamw_and_its_decay_means_it():
    net = decay_network()
    hidden, rest = [net[1].weight], [p for p in net.parameters() if p is not net[1].weight]
    make = lambda none: Celo2(
        [{"params": hidden, "rule": "celo2"}, {"params": rest, "rule": "adamw", "weight_decay": 0.0 if none else 0.25}],
        lr=0.1,
        adamw_lr_multiplier=1.0,
        weight_decay=0.0 if none else 0.5,
    )
    assert decays(net, make) == {"0.weight": 0.25, "1.weight": 0.5, "1.bias": 0.25, "2.weight": 0.25, "2.bias": 0.25}
    make = lambda none: Celo2(
        [{"params": net.parameters(), "weight_decay": 0.0 if none else 0.25}], lr=0.1, adamw_lr_multiplier=1.0
    )
    assert decays(net, make) == {"0.weight": 0.25, "1.weight": 0.25, "1.bias": 0.0, "2.weight": 0.0, "2.bias": 0.0}


def test_a_state_of_an_earlier_version_keeps_the_decay_that_it_was_made_with():
    """Its groups have one weight decay for all of their tensors."""
    net = decay_network()

    def make(none: bool) -> Celo2:
        optimizer = Celo2(net.parameters(), lr=0.1, adamw_lr_multiplier=1.0)
        state = copy.deepcopy(optimizer.state_dict())
        for group in state["param_groups"]:
            del group["adamw_weight_decay"]
            group["weight_decay"] = 0.0 if none else 0.5
        optimizer.load_state_dict(state)
        return optimizer

    assert set(decays(net, make).values()) == {0.5}


def test_the_multiplier_of_none_is_the_rules_own():
    net = network()
    for optimizer in (Celo2(net.parameters()), Celo2([{"params": net.parameters(), "adamw_lr_multiplier": None}])):
        assert {g["adamw_lr_multiplier"] for g in optimizer.param_groups} == {20.0}


@pytest.mark.parametrize(
    "options",
    [
        {"adamw_weight_decay": -1.0},
        {"adamw_weight_decay": float("nan")},
        {"weight_decay": None},
        {"adamw_weight_decay": False},
        {"orthogonalize": 0.5},
        {"lr": True},
    ],
)
def test_a_bad_value_is_refused_by_its_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Celo2([matrix()], **options)
    with pytest.raises(ValueError, match=next(iter(options))):
        Celo2([{"params": [matrix()], **options}])
