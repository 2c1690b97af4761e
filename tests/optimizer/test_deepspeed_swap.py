"""A DeepSpeed config that names Celo2 trains as a plain process does, however many ranks and whatever ZeRO stage."""

import json
from pathlib import Path

import pytest
import torch

from celo2_pretrain import Celo2
from celo2_pretrain.optimizer.sharding.layouts import LayoutError

from support.paths import SUPPORT
from support.processes import on_ranks
from support.swap_worker import unsharded

WORKER = SUPPORT / "swap_worker.py"


# (name, ZeRO stage, client optimizer instead of one named in the config)
RUNS = [("config-0", 0, False), ("config-1", 1, False), ("config-2", 2, False), ("client-2", 2, True)]


def launch(world: int, folder: Path) -> None:
    """Run every one of RUNS on `world` ranks; each rank leaves its parameters in `folder`."""
    (folder / "job.json").write_text(json.dumps({"runs": RUNS, "out": str(folder)}))
    on_ranks(world, WORKER, str(folder / "job.json"))


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_swapped_run_is_the_unsharded_run(world, tmp_path):
    expected = unsharded()
    launch(world, tmp_path)
    for run, _, _ in RUNS:
        for rank in range(world):
            for name, p in torch.load(tmp_path / f"{run}-rank{rank}.pt", weights_only=True).items():
                # Gradients are summed in another order, which AdamW's first steps amplify where they are tiny.
                torch.testing.assert_close(
                    p, expected[name], rtol=1e-3, atol=2e-4, msg=lambda m: f"{run} rank {rank} {name}: {m}"
                )


def test_a_wrapper_that_hides_the_tensors_is_refused_by_name():
    """Not even one wrong step: a flat copy of the parameters that nobody explained."""
    p = torch.nn.Parameter(torch.randn(4, 5))
    optimizer = Celo2([p, torch.nn.Parameter(torch.randn(3, 3))])
    flat = torch.nn.Parameter(torch.randn(29))
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.randn(29)
    with pytest.raises(LayoutError, match="a wrapper that Celo2\\s+doesn't know"):
        optimizer.step()


@pytest.mark.parametrize(
    "mark,word", [("tensor_model_parallel", "tensor parallelism"), ("_is_flat_param", "FSDP1"), ("ds_id", "ZeRO-3")]
)
def test_what_is_not_supported_is_refused_by_name(mark, word):
    p = torch.nn.Parameter(torch.randn(4, 5))
    optimizer = Celo2([p])
    setattr(p, mark, True)
    p.grad = torch.randn(4, 5)
    before = p.detach().clone()
    with pytest.raises(LayoutError, match=word):
        optimizer.step()
    assert torch.equal(p, before)
