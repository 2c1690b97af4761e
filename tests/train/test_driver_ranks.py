"""The driver on two DeepSpeed ranks with real text: a resumed run is the uninterrupted one, bit for bit."""

from pathlib import Path

import pytest
import torch

from celo2_pretrain.train.record.metrics import read_metrics

from support.processes import drive

pytestmark = pytest.mark.multiprocess

CONFIG = [
    "model.layers=2",
    "model.width=48",
    "model.heads=4",
    "model.context=64",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    "train.log_every=1",
    "train.zero_stage=2",
    "schedule.steps=8",
    "eval.every=4",
    "eval.sequences=13",
    "optimizer.lr=3e-3",
    "optimizer.adamw_lr_multiplier=2",
]


def trajectory(run: Path) -> list[tuple]:
    """All losses and gradient norms of a run, without the timings."""
    return [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("val_loss")) for r in read_metrics(run)]


def tensors(tree) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else []
    return [tensor for part in parts for tensor in tensors(part)]


def test_resumed_run_is_the_uninterrupted_run_bit_for_bit(data, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    common = [*CONFIG, f"data.path={data}"]
    for run, steps in ((whole, 8), (halves, 4)):
        result = drive(*common, f"run_dir={run}", f"train.max_steps={steps}", ranks=2)
        assert result.returncode == 0, result.stdout + result.stderr
    result = drive("--resume", str(halves), "train.max_steps=8", ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resuming at step 4" in result.stdout

    assert trajectory(whole) == trajectory(halves)
    losses = [loss for _, loss, _, _ in trajectory(whole) if loss is not None]
    assert len(losses) == 8 and len(set(losses)) == 8 and losses[-1] < losses[0]
    optimizer = [f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
    for name in ("mp_rank_00_model_states.pt", *optimizer):
        a, b = (
            tensors(torch.load(next((run / "checkpoints/step_00000008").glob(name)), weights_only=False))
            for run in (whole, halves)
        )
        assert len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b)), name
    # The comparison must be able to fail: training did change the weights.
    files = [halves / "checkpoints/step_00000004", whole / "checkpoints/step_00000008"]
    early, late = (tensors(torch.load(file / "mp_rank_00_model_states.pt", weights_only=False)["module"]) for file in files)
    assert not all(torch.equal(x, y) for x, y in zip(early, late))

    # The same checkpoint goes on in another world: fewer ranks, another ZeRO stage.
    result = drive(
        "--resume",
        str(halves / "checkpoints/step_00000004"),
        "train.max_steps=8",
        f"run_dir={tmp_path / 'one'}",
        "train.zero_stage=3",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "number of ranks 2 -> 1" in result.stdout
    other = {step: loss for step, loss, _, _ in trajectory(tmp_path / "one") if loss is not None}
    here = {step: loss for step, loss, _, _ in trajectory(whole) if loss is not None}
    assert sorted(other) == [5, 6, 7, 8] and all(abs(other[k] - here[k]) < 1e-3 for k in other), (other, here)


def test_error_is_told_once_and_without_a_traceback(data, tmp_path):
    result = drive(*CONFIG, f"data.path={data}", f"run_dir={tmp_path / 'run'}", "train.micro_batch_size=8", ranks=2)
    assert result.returncode != 0
    output = result.stdout + result.stderr
    assert output.count("train.global_batch_size=8 is no multiple of train.micro_batch_size=8 × 2 ranks") == 1
    assert "Traceback" not in output and not (tmp_path / "run").exists()
