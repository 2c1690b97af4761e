"""Ranks that drift apart are found, and named alike on every rank."""

import pytest
import torch
import torch.distributed as dist

from celo2_pretrain import Celo2
from celo2_pretrain.optimizer.sharding.replicas import DriftError, checksum

from support.processes import join, leave, spawn


def test_the_checksum_sees_one_bit():
    x = torch.randn(1000)
    y = x.clone()
    assert checksum(x) == checksum(y)
    y.view(torch.int32)[17] ^= 1
    assert checksum(x) != checksum(y)
    z = x.to(torch.bfloat16)
    assert checksum(z) == checksum(z.clone()) != checksum(-z)


def drift(optimizer: Celo2) -> str:
    """Take a step; the message with which it reports drift, "" without."""
    try:
        optimizer.step()
    except DriftError as error:
        return str(error)
    return ""


def _rank(rank: int, port: int, world: int, folder: str) -> None:
    join(rank, port, world)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    optimizer = Celo2(net.named_parameters(), check_replicas_every=2)
    messages = []
    for step in range(6):
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        if step == 3 and rank == 1:
            optimizer.state[net[1].weight]["rms"][0, 0] += 1e-3  # a rank goes wrong
        messages.append(drift(optimizer))
    torch.save(messages, f"{folder}/{rank}.pt")
    leave()


@pytest.mark.multiprocess
def test_drift_is_found_at_the_next_check_by_all_ranks(tmp_path):
    spawn(_rank, 3, tmp_path)
    messages = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    assert messages[0] == messages[1] == messages[2]
    assert [bool(m) for m in messages[0]] == [False, False, False, True, False, True]
    assert "1.weight: rms" in messages[0][3] and "go back to the last checkpoint" in messages[0][3]


def _hybrid(rank: int, port: int, world: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    join(rank, port, world)
    net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Linear(8, 4))
    fully_shard(net, mesh=dist.device_mesh.init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    optimizer = Celo2(net.named_parameters(), check_replicas_every=1, adamw_lr_multiplier=1.0)
    messages = []
    for step in range(3):
        optimizer.zero_grad()
        net(torch.randn(3, 5, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        if step == 2 and rank == world - 1:  # one replica of one slice goes wrong
            optimizer.state[net[1].weight]["rms"].to_local().view(-1)[0] += 1e-3
        messages.append(drift(optimizer))
    torch.save(messages, f"{folder}/{rank}.pt")
    leave()


@pytest.mark.multiprocess
def test_drift_between_replicas_of_hybrid_sharding_is_found_by_all_ranks(tmp_path):
    spawn(_hybrid, 4, tmp_path)
    messages = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(4)]
    assert messages[0] == messages[1] == messages[2] == messages[3]
    assert messages[0][:2] == ["", ""] and "1.weight: rms" in messages[0][2]
