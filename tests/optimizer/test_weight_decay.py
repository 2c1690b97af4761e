"""Weight decay acts on hidden matrices only, and a run of an earlier version keeps the decay that it was made with."""

import json

import pytest
import torch
from torch import nn

from celo2_pretrain import Celo2, load_state, param_groups, register, save_state
from celo2_pretrain.config import Optimizer, load_config
from celo2_pretrain.model.build_optimizer import build_optimizer
from celo2_pretrain.optimizer.state.files import INDEX, StateError
from celo2_pretrain.train.rates import Rates

LR, DECAY = 0.01, 0.5
OTHERS = {"embedding.weight", "norm.weight", "norm.bias", "lm_head.weight"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.hidden = nn.Linear(6, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 7, bias=False)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def set_gradients(model: nn.Module) -> None:
    for number, param in enumerate(model.parameters()):
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(number))


def decays(make) -> dict[str, float]:
    """Each tensor's decay: how a step of the optimizer `make(model, DECAY)` differs from one of `make(model, 0.0)`."""
    models, steps = (net(), net()), []
    for model, decay in zip(models, (0.0, DECAY)):
        optimizer = make(model, decay)
        set_gradients(model)
        before = [param.detach().clone() for param in model.parameters()]
        optimizer.step()
        steps.append([a - b.detach() for a, b in zip(before, model.parameters())])
    found = {}
    for (name, param), plain, decayed in zip(net().named_parameters(), *steps):
        nonzero = param.detach().abs() > 0.1  # a layer norm's bias is zeros
        found[name] = float(((decayed - plain)[nonzero] / param.detach()[nonzero]).mean()) if nonzero.any() else 0.0
    return {name: round(value / LR, 2) for name, value in found.items()}


WAYS = {
    "param_groups": lambda model, **options: Celo2(param_groups(model), lr=LR, adamw_lr_multiplier=1.0, **options),
    "in param_groups": lambda model, **options: Celo2(param_groups(model, **options), lr=LR, adamw_lr_multiplier=1.0),
    "register": lambda model, **options: (
        register(model) or Celo2(model.parameters(), lr=LR, adamw_lr_multiplier=1.0, **options)
    ),
    "Celo2-base": lambda model, **options: register(model) or Celo2(model.parameters(), lr=LR, orthogonalize=False, **options),
    "driver, celo2": lambda model, **options: build_optimizer(model, Optimizer(lr=LR, adamw_lr_multiplier=1.0, **options)),
    "driver, celo2_base": lambda model, **options: build_optimizer(model, Optimizer(name="celo2_base", lr=LR, **options)),
    "driver, adamw": lambda model, **options: build_optimizer(
        model, Optimizer(name="adamw", lr=LR, adamw_lr_multiplier=1.0, **options)
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_weight_decay_acts_on_the_hidden_matrix_only(way):
    found = decays(lambda model, decay: WAYS[way](model, weight_decay=decay))
    assert found == {"hidden.weight": DECAY} | dict.fromkeys(OTHERS, 0.0)


@pytest.mark.parametrize("way", WAYS)
def test_adamw_weight_decay_acts_on_all_others(way):
    found = decays(lambda model, decay: WAYS[way](model, adamw_weight_decay=decay))
    assert found == dict.fromkeys(OTHERS - {"norm.bias"}, DECAY) | {"hidden.weight": 0.0, "norm.bias": 0.0}


def earlier(state_dict: dict) -> dict:
    """A state dict as an earlier version made it."""
    groups = [
        {key: value for key, value in group.items() if key != "adamw_weight_decay"} for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def without_decay_key(folder) -> None:
    index = json.loads((folder / INDEX).read_text())
    for group in index["groups"]:
        del group["options"]["adamw_weight_decay"]
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("through", ["state_dict", "save_state", "the driver"])
def test_a_celo2_base_state_of_an_earlier_version_goes_on_decaying_all_tensors(through, tmp_path):
    way = WAYS["driver, celo2_base" if through == "the driver" else "Celo2-base"]

    def make(model, decay):
        old, optimizer = way(net(), weight_decay=decay), way(model, weight_decay=decay)
        rates = Rates(optimizer)
        if through == "save_state":
            folder = tmp_path / f"decay {decay}"
            save_state(old, folder)
            without_decay_key(folder)
            load_state(optimizer, folder)
        else:
            optimizer.load_state_dict(earlier(old.state_dict()))
        if through == "the driver":
            rates.set(1.0)
        return optimizer

    assert decays(make) == dict.fromkeys(OTHERS - {"norm.bias"}, DECAY) | {"hidden.weight": DECAY, "norm.bias": 0.0}


def test_a_celo2_checkpoint_of_an_earlier_driver_goes_on_decaying_the_hidden_matrix_only():
    """Its groups of AdamW's tensors had a weight_decay of their own, 0; this run's options count after a resume."""

    def make(model, decay):
        saved = earlier(build_optimizer(net(), Optimizer(lr=LR, weight_decay=decay)).state_dict())
        for group in saved["param_groups"]:
            group["weight_decay"] = decay if group["rule"] == "celo2" else 0.0
        optimizer = build_optimizer(model, Optimizer(lr=LR, weight_decay=decay, adamw_lr_multiplier=1.0))
        rates = Rates(optimizer)
        optimizer.load_state_dict(saved)
        rates.set(1.0)
        return optimizer

    assert decays(make) == {"hidden.weight": DECAY} | dict.fromkeys(OTHERS, 0.0)


def test_saved_decays_are_restored_also_none(tmp_path):
    optimizer = Celo2(param_groups(net()), weight_decay=0.1, adamw_weight_decay=0.2)
    save_state(optimizer, tmp_path / "number")
    other = Celo2([{**group, "weight_decay": 0.3} for group in param_groups(net())])  # a group that says adamw and a decay
    assert [group["adamw_weight_decay"] for group in other.param_groups if group["rule"] == "adamw"] == [None, None]
    save_state(other, tmp_path / "none")
    load_state(other, tmp_path / "number")
    load_state(optimizer, tmp_path / "none")
    assert {group["adamw_weight_decay"] for group in other.param_groups} == {0.2}
    assert [group["adamw_weight_decay"] for group in optimizer.param_groups] == [0.0, None, None]
    index = json.loads((tmp_path / "none" / INDEX).read_text())
    index["groups"][0]["options"]["adamw_weight_decay"] = "0.1"
    (tmp_path / "none" / INDEX).write_text(json.dumps(index))
    with pytest.raises(StateError, match="adamw_weight_decay"):
        load_state(optimizer, tmp_path / "none")


def test_a_configuration_of_an_earlier_version_loads(tmp_path):
    (tmp_path / "config.yaml").write_text("optimizer: {name: celo2_base, weight_decay: 0.1}\n")
    optimizer = load_config(str(tmp_path / "config.yaml"), []).optimizer
    assert (optimizer.weight_decay, optimizer.adamw_weight_decay) == (0.1, 0.0)
