"""A saved state loads whatever wrapped the model, when it was saved and when it is loaded."""

import json

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from celo2_pretrain import Celo2, from_adamw, load_state, param_groups, save_state
from celo2_pretrain.optimizer import celo2
from celo2_pretrain.optimizer.matrices import param_groups as rules
from celo2_pretrain.optimizer.matrices.param_groups import tag_of
from celo2_pretrain.optimizer.names import canonical, canonical_names, match
from celo2_pretrain.optimizer.state import local_tensors
from celo2_pretrain.optimizer.state.files import INDEX, StateError


class Net(nn.Module):
    def __init__(self, wrap=lambda module: module):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(wrap(nn.Sequential(wrap(nn.Linear(6, 6)), nn.LayerNorm(6))) for _ in range(2))
        self.lm_head = wrap(nn.Linear(6, 11))


NAMES = {
    "embedding.weight",
    "lm_head.weight",
    "lm_head.bias",
    *(f"blocks.{block}.{rest}" for block in "01" for rest in ("0.weight", "0.bias", "1.weight", "1.bias")),
}
WRAPPERS = {
    "plain": Net,
    "compile": lambda: torch.compile(Net()),
    "ddp": lambda: DistributedDataParallel(Net()),
    "checkpoint": lambda: Net(checkpoint_wrapper),
    "checkpoint at the root": lambda: checkpoint_wrapper(Net(checkpoint_wrapper)),
    "compiled submodules": lambda: Net(torch.compile),
    "compile and ddp": lambda: DistributedDataParallel(torch.compile(Net(checkpoint_wrapper))),
    "ddp and compile": lambda: torch.compile(DistributedDataParallel(Net())),
}


@pytest.fixture(autouse=True)
def group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(wrapper: str, named: bool = False) -> tuple[nn.Module, Celo2]:
    """A wrapped model after one step, and its Celo2 by `param_groups` or from the names."""
    torch.manual_seed(0)
    model = WRAPPERS[wrapper]()
    optimizer = Celo2(model.named_parameters() if named else param_groups(model), lr=0.1)
    for param in model.parameters():
        param.grad = torch.randn(param.shape)
    optimizer.step()
    return model, optimizer


def untrained(wrapper: str, named: bool = False) -> tuple[nn.Module, Celo2]:
    model = WRAPPERS[wrapper]()
    return model, Celo2(model.named_parameters() if named else param_groups(model), lr=0.1)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("named", [False, True], ids=["param_groups", "named_parameters"])
@pytest.mark.parametrize("loaded", WRAPPERS)
@pytest.mark.parametrize("saved", WRAPPERS)
def test_a_state_loads_whatever_wrapped_the_model(saved, loaded, named, tmp_path):
    old, optimizer = trained(saved, named)
    save_state(optimizer, tmp_path / "state")
    assert set(json.loads((tmp_path / "state" / INDEX).read_text())["tensors"]) == NAMES
    new, other = untrained(loaded, named)
    load_state(other, tmp_path / "state")
    assert equal(old, new)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_rules_and_views_are_those_of_the_plain_model(wrapper):
    def tags(model):
        param_groups(model)
        return [tag_of(param) for param in model.parameters()]

    assert tags(WRAPPERS[wrapper]()) == tags(Net())


@pytest.fixture
def raw_names(monkeypatch):
    """Names as earlier versions saved them, until `undo`."""
    with monkeypatch.context() as context:
        for module in (rules, celo2, local_tensors):
            context.setattr(module, "canonical_names", lambda names: {name: name for name in names})
        yield context


@pytest.mark.parametrize("saved, loaded", [("compile", "plain"), ("compile and ddp", "checkpoint"), ("ddp", "ddp")])
def test_a_state_with_the_wrappers_names_loads(saved, loaded, raw_names, tmp_path):
    old, optimizer = trained(saved)
    save_state(optimizer, tmp_path / "state")
    assert not set(json.loads((tmp_path / "state" / INDEX).read_text())["tensors"]) & NAMES
    raw_names.undo()
    new, other = untrained(loaded)
    load_state(other, tmp_path / "state")
    assert equal(old, new)
    for a, b in zip(optimizer.param_groups, other.param_groups):
        for x, y in zip(a["params"], b["params"]):
            assert all(torch.equal(optimizer.state[x][key], other.state[y][key]) for key in other.state[y])


@pytest.mark.parametrize("saved, loaded", [("plain", "compile and ddp"), ("compile", "plain")])
def test_an_adamw_state_is_taken_over_whatever_wrapped_the_model(saved, loaded, tmp_path):
    model = WRAPPERS[saved]()
    adamw = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    for param in model.parameters():
        param.grad = torch.randn(param.shape)
    adamw.step()
    save_state(adamw, tmp_path / "adamw")
    new, optimizer = untrained(loaded)
    from_adamw(tmp_path / "adamw", tmp_path / "celo2", optimizer)
    load_state(optimizer, tmp_path / "celo2")
    assert equal(model, new)


@pytest.mark.parametrize("pattern", ["blocks.0.0.weight", "_orig_mod.blocks.0.0.weight", "*.0.0.weight"])
def test_patterns_match_the_plain_and_the_wrapped_name(pattern):
    model = torch.compile(Net())
    param_groups(model, adamw=[pattern])
    assert tag_of(model.blocks[0][0].weight).rule == "adamw"


@pytest.mark.parametrize(
    "name, plain",
    [
        ("h.0.weight", "h.0.weight"),
        ("_orig_mod.module.h.0.weight", "h.0.weight"),
        ("module._orig_mod.h.0.weight", "h.0.weight"),
        ("module.module.weight", "weight"),
        ("encoder.module.weight", "encoder.module.weight"),
        ("module", "module"),
        ("h._fsdp_wrapped_module._checkpoint_wrapped_module.weight", "h.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
    ],
)
def test_only_what_wrappers_add_is_dropped(name, plain):
    assert canonical(name) == plain


class Clash(nn.Module):
    """A model of its own submodule called `module`, beside a tensor that has the name without it."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(6, 6, bias=False)
        self.weight = nn.Parameter(torch.randn(6, 6))


def test_names_that_would_become_one_are_kept_apart(tmp_path):
    model = Clash()
    optimizer = Celo2(param_groups(model), lr=0.1)
    save_state(optimizer, tmp_path / "state")
    assert set(json.loads((tmp_path / "state" / INDEX).read_text())["tensors"]) == {"module.weight", "weight"}
    new = Clash()
    load_state(Celo2(param_groups(new), lr=0.1), tmp_path / "state")
    assert equal(model, new)
    wrapped = DistributedDataParallel(Clash())  # its names are module.module.weight and module.weight
    with pytest.raises(StateError, match="weight"):
        load_state(Celo2(param_groups(wrapped), lr=0.1), tmp_path / "state")


def test_ambiguous_names_are_never_matched():
    assert canonical_names(["module.a", "a", "module.b"]) == {"module.a": "module.a", "a": "a", "module.b": "b"}
    assert match(["module.module.a", "module.a"], ["module.a", "a"]) == {}
    assert match(["module.a", "a"], ["a"]) == {} == match(["a"], ["module.a", "a"])
    assert match(["module.a", "a"], ["a", "module.a"]) == {"a": "a", "module.a": "module.a"}
    assert match(["a", "module.b"], ["module.a", "b", "c"]) == {"a": "module.a", "module.b": "b"}
