"""Layouts that a plain process can show: what is recognised, and what is refused."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

from celo2_pretrain import Celo2, param_groups
from celo2_pretrain.optimizer.sharding.layouts import LayoutError

from support.processes import join, leave, spawn


def _unsharded(scale: float) -> nn.Module:
    """The same training in one plain process, its loss times `scale`."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 5))
    optimizer = Celo2(net.named_parameters(), lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        (scale * net(x).square().sum()).backward()
        optimizer.step()
    return net


def _swapped(rank: int, port: int, world: int, folder: str) -> None:
    """What accelerate does with FSDP2: shard the model after the optimizer was made, and swap its parameters."""
    from torch.distributed.fsdp import fully_shard

    join(rank, port, world)
    net = nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 5))
    optimizer = Celo2(net.named_parameters(), lr=1e-2)
    order = {id(p): name for name, p in net.named_parameters()}
    names = [[order[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    fully_shard(net, mesh=dist.device_mesh.init_device_mesh("cpu", (world,)))
    sharded = dict(net.named_parameters())
    for group, some in zip(optimizer.param_groups, names):
        group["params"] = [sharded[name] for name in some]
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        net(x).square().sum().backward()
        optimizer.step()
    full = {name: p.full_tensor().detach() for name, p in net.named_parameters()}
    if rank == 0:
        torch.save(full, f"{folder}/full.pt")
    leave()


@pytest.mark.multiprocess
def test_fsdp2_parameters_swapped_in_after_construction_take_the_unsharded_step(tmp_path):
    spawn(_swapped, 2, tmp_path)
    net = _unsharded(1.0)
    for name, p in torch.load(tmp_path / "full.pt", weights_only=True).items():
        torch.testing.assert_close(p, net.get_parameter(name).detach(), rtol=1e-4, atol=1e-5)


def _nan_on_one_rank(rank: int, port: int, world: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    join(rank, port, world)
    net = nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 5))
    fully_shard(net, mesh=dist.device_mesh.init_device_mesh("cpu", (world,)))
    messages = []
    for nonfinite in ("error", "skip"):
        optimizer = Celo2(net.named_parameters(), nonfinite=nonfinite)
        before = [p.to_local().clone() for p in net.parameters()]
        net(torch.ones(2, 7)).sum().backward()
        if rank == 1:
            net[1].weight.grad.to_local()[0, 0] = float("nan")
        try:
            optimizer.step()
            messages.append(f"skipped {optimizer.skipped_steps}")
        except FloatingPointError as error:
            messages.append(str(error))
        assert all(torch.equal(a, p.to_local()) for a, p in zip(before, net.parameters()))
        assert not any(optimizer.state[p] for p in net.parameters())
        optimizer.zero_grad()
    torch.save(messages, f"{folder}/{rank}.pt")
    leave()


@pytest.mark.multiprocess
def test_a_nan_in_one_ranks_slice_is_named_and_stops_or_skips_all_ranks(tmp_path):
    spawn(_nan_on_one_rank, 3, tmp_path)
    messages = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    assert messages[0] == messages[1] == messages[2]
    assert "1.weight" in messages[0][0] and messages[0][1] == "skipped 1"


def _ddp(rank: int, port: int, world: int, folder: str) -> None:
    join(rank, port, world)
    net = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 5)))
    optimizer = Celo2(net.named_parameters(), lr=1e-2, check_replicas_every=1)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))[rank::world]
        net(x).square().sum().backward()
        optimizer.step()
    torch.save({name: p.detach() for name, p in net.module.named_parameters()}, f"{folder}/{rank}.pt")
    leave()


@pytest.mark.multiprocess
def test_ddp_takes_the_step_of_one_process(tmp_path):
    spawn(_ddp, 2, tmp_path)
    net = _unsharded(0.5)  # DDP averages the ranks' gradients
    for rank in range(2):
        for name, p in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            torch.testing.assert_close(p, net.get_parameter(name).detach(), rtol=1e-4, atol=1e-5)


def test_fp16_copies_without_zero_are_refused():
    """DeepSpeed's fp16 wrapper without ZeRO puts fp32 copies in the group, and gives them wrong gradients."""
    half = nn.Parameter(torch.randn(4, 5, dtype=torch.float16))
    optimizer = Celo2([half])
    master = half.detach().float().requires_grad_()
    master.grad = torch.randn(4, 5)
    optimizer.param_groups[0]["params"] = [master]
    with pytest.raises(LayoutError, match="stage"):
        optimizer.step()
    optimizer = Celo2([nn.Parameter(torch.randn(4, 5, dtype=torch.bfloat16))])
    optimizer.param_groups[0]["params"] = [master]
    optimizer.step()  # bf16's copies are right


def test_plans_do_not_pile_up_where_other_tensors_have_gradients_each_step():
    params = [nn.Parameter(torch.randn(3, 3)) for _ in range(40)]
    optimizer = Celo2(params)
    for k in range(40):
        for number, p in enumerate(params):
            p.grad = torch.randn(3, 3) if number != k else None
        optimizer.step()
    assert len(optimizer._plans) <= 16


def test_a_changed_orthogonalize_counts_after_loading():
    p = nn.Parameter(torch.randn(6, 8))
    q = nn.Parameter(p.detach().clone())
    base, ours = Celo2([{"params": [p], "orthogonalize": False}]), Celo2([q])
    for optimizer, x in ((base, p), (ours, q)):
        x.grad = torch.ones(6, 8)
        optimizer.step()
    with torch.no_grad():
        q.copy_(p)
    ours.load_state_dict(base.state_dict())
    for optimizer, x in ((base, p), (ours, q)):
        x.grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
        optimizer.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("saved,now", [("fp32", "bf16"), ("bf16", "fp32")])
def test_states_of_the_other_dtype_are_converted(saved, now):
    p = nn.Parameter(torch.randn(6, 8))
    first, second = Celo2([p], state_dtype=saved), Celo2([p], state_dtype=now)
    p.grad = torch.randn(6, 8)
    first.step()
    second.load_state_dict(first.state_dict())
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    assert second.state[p]["rms"].dtype == dtypes[now] and ("step" in second.state[p]) == (now == "bf16")
    second.step()


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def _fsdp1(rank: int, port: int, world: int, folder: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    join(rank, port, world)
    messages = {}
    for use_orig_params in (False, True):
        for made_before in (False, True):
            for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.NO_SHARD):
                net = nn.Sequential(nn.Embedding(13, 12), _Block(), _Block(), nn.Linear(12, 13))
                try:
                    optimizer = Celo2(param_groups(net)) if made_before else None
                    net = FullyShardedDataParallel(
                        net,
                        use_orig_params=use_orig_params,
                        sharding_strategy=strategy,
                        auto_wrap_policy=ModuleWrapPolicy({_Block}),
                        device_id=torch.device("cpu"),
                    )
                    optimizer = optimizer or Celo2(param_groups(net))
                    net(torch.arange(12)).sum().backward()
                    optimizer.step()
                    message = "stepped"
                except LayoutError as error:
                    message = str(error)
                messages[f"use_orig_params={use_orig_params} made_before={made_before} {strategy.name}"] = message
    torch.save(messages, f"{folder}/{rank}.pt")
    leave()


@pytest.mark.multiprocess
def test_fsdp1_is_refused_by_name_in_every_form(tmp_path):
    spawn(_fsdp1, 2, tmp_path)
    for rank in range(2):
        messages = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert len(messages) == 8
        assert all("FSDP1" in message and "fully_shard" in message for message in messages.values()), messages


@pytest.mark.parametrize("kind", ["ShardedTensor", "FlatParameter", "ColoParameter"])
def test_a_tensor_that_stands_for_others_is_refused_when_it_is_given(kind):
    p = nn.Parameter(torch.randn(4, 5))
    p.__class__ = type(kind, (nn.Parameter,), {})
    with pytest.raises(LayoutError, match="'layer.weight'"):
        Celo2([("layer.weight", p)])


class _Unused(nn.Module):
    """A layer that gets no gradient, like an expert that no token is routed to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.unused, self.b = nn.Linear(7, 11), nn.Linear(11, 11), nn.Linear(11, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


def _swapped_unused(rank: int, port: int, world: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    join(rank, port, world)
    net = _Unused()
    optimizer = Celo2(param_groups(net), lr=1e-2)
    order = {id(p): name for name, p in net.named_parameters()}
    names = [[order[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    unsharded = [weakref.ref(p) for p in net.parameters()]
    fully_shard(net, mesh=dist.device_mesh.init_device_mesh("cpu", (world,)))
    sharded = dict(net.named_parameters())
    for group, some in zip(optimizer.param_groups, names):
        group["params"] = [sharded[name] for name in some]
    gc.collect()
    alive = sum(reference() is not None for reference in unsharded)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        net(x).square().sum().backward()
        optimizer.step()
    net.double().float()  # as one moves a sharded model away and back while an optimizer knows it
    full = {name: p.full_tensor().detach() for name, p in net.named_parameters()}
    if rank == 0:
        torch.save({"full": full, "alive": alive}, f"{folder}/full.pt")
    leave()


@pytest.mark.multiprocess
def test_swapped_parameters_may_lack_a_gradient_and_the_unsharded_model_is_freed(tmp_path):
    spawn(_swapped_unused, 2, tmp_path)
    torch.manual_seed(0)
    net = _Unused()
    optimizer = Celo2(param_groups(net), lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        net(x).square().sum().backward()
        optimizer.step()
    found = torch.load(tmp_path / "full.pt", weights_only=True)
    assert found["alive"] == 0
    for name, p in found["full"].items():
        torch.testing.assert_close(p, net.get_parameter(name).detach(), rtol=1e-4, atol=1e-5)


def _partial(rank: int, port: int, world: int, folder: str) -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    join(rank, port, world)
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    messages = []
    for shape in ((6, 4), (6,)):
        for placement, gradient in ((Replicate(), Partial()), (Shard(0), Replicate())):
            p = nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [placement]))
            optimizer = Celo2([p])
            whole = torch.randn(shape)
            p.grad = DTensor.from_local(whole, mesh, [gradient])
            before = p.to_local().clone()
            try:
                optimizer.step()
                messages.append("stepped")
            except LayoutError as error:
                messages.append(str(error))
            assert torch.equal(p.to_local(), before)
    torch.save(messages, f"{folder}/{rank}.pt")
    leave()


@pytest.mark.multiprocess
def test_a_gradient_that_lies_otherwise_than_its_parameter_is_refused(tmp_path):
    """Tensor parallelism leaves gradients that are still to be summed over its ranks."""
    spawn(_partial, 2, tmp_path)
    for rank in range(2):
        messages = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert len(messages) == 4 and all("has placements" in message for message in messages), messages


def test_reordered_tensors_keep_their_names():
    first, second = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    optimizer = Celo2([("first", first), ("second", second)])
    optimizer.param_groups[0]["params"].reverse()
    for p in (first, second):
        p.grad = torch.randn(4, 4)
    optimizer.step()
    originals = optimizer.originals_of(optimizer.param_groups[0])
    assert {id(o.param): o.name for o in originals} == {id(first): "first", id(second): "second"}


def test_tensors_that_torch_swaps_have_no_weak_references():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net = nn.Linear(3, 3)
        optimizer = Celo2(net.parameters())
        net.to(torch.bfloat16)
        net.load_state_dict(nn.Linear(3, 3).state_dict())
        net(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_a_group_whose_tensors_were_exchanged_for_others_is_refused():
    optimizer = Celo2([("w", nn.Parameter(torch.randn(4, 5))), ("v", nn.Parameter(torch.randn(3, 3)))])
    new = nn.Parameter(torch.randn(6, 6))
    optimizer.param_groups[0]["params"] = [new]
    new.grad = torch.randn(6, 6)
    with pytest.raises(LayoutError, match="'w' of shape"):
        optimizer.step()
