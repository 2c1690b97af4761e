"""Whose the run folder is, and when an old run in it goes."""
from pathlib import Path

import pytest
import torch
from fuzz import snapshot

from celo2_pretrain.train import loop
from celo2_pretrain.train.config import load_config
from celo2_pretrain.train.errors import UserError

SMALL = ["model.layers=1", "model.width=16", "model.heads=2", "model.context=16", "train.micro_batch_size=1", "train.max_steps=2",
         "train.global_batch_size=2", "train.log_every=1", "eval.sequences=2", "optimizer.adamw_lr_multiplier=2",
         "track.peak_tflops=1"]


@pytest.fixture
def alone():
    """Training in this process leaves no group of ranks behind."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def refuse(*_, **__):
    raise UserError("cannot begin")


@pytest.mark.parametrize("fails", ["deepspeed.initialize", "open_trackers"])
def test_an_old_run_stays_when_the_one_that_replaces_it_cannot_begin(data, tmp_path, monkeypatch, alone, fails):
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000002").mkdir(parents=True)
    for name in ("checkpoints/step_00000002/state.json", "metrics.jsonl", "origin.jsonl", "config.yaml"):
        (run / name).write_text("old")
    before = snapshot(run)
    monkeypatch.setattr(f"celo2_pretrain.train.loop.{fails}", refuse)
    with pytest.raises(UserError, match="cannot begin"):
        loop.train(load_config(None, [*SMALL, f"data.path={data}", f"run_dir={run}"]), overwrite=True)
    assert snapshot(run) == before
