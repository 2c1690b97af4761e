"""A run killed with -9 at any moment goes on bit for bit as if nothing was, in each ZeRO stage and precision."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import SUPPORT
from support.processes import environment

pytestmark = pytest.mark.multiprocess

SMALL = [
    "model.layers=1",
    "model.width=16",
    "model.heads=2",
    "model.context=16",
    "train.micro_batch_size=1",
    "train.log_every=1",
    "eval.every=100000",
    "eval.sequences=2",
    "checkpoint.every=1",
    "optimizer.adamw_lr_multiplier=2",
    "track.norms=false",
    "track.peak_tflops=1",
]  # else each start measures it


def kill_and_compare(data: str, folder: Path, ranks: int, kills: int, *overrides: str) -> None:
    worker = SUPPORT / "kill_worker.py"
    result = subprocess.run(
        [sys.executable, str(worker), data, str(folder), str(ranks), str(kills), *SMALL, *overrides],
        capture_output=True,
        text=True,
        timeout=1500,
        env=environment(PYTHONPATH=os.pathsep.join([str(worker.parents[1]), str(worker.parent)])),
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert result.stdout.count("kill ") == kills and "values are the same" in result.stdout


def test_run_killed_three_times_is_the_run_that_nobody_killed(data, tmp_path):
    kill_and_compare(
        data, tmp_path, 1, 3, "train.max_steps=5", "train.global_batch_size=2", "train.zero_stage=2", "train.precision=bf16"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, precision, more",
    [
        (0, "bf16", ["checkpoint.any_world=false"]),
        (
            1,
            "fp16",
            ["checkpoint.any_world=false", "deepspeed.fp16.initial_scale_power=20", "deepspeed.fp16.loss_scale_window=7"],
        ),
        (2, "bf16", ["optimizer.state_dtype=fp8"]),
        (3, "fp32", ["checkpoint.any_world=false", "checkpoint.keep_every=10"]),
    ],
)
def test_run_killed_fifty_times_is_the_run_that_nobody_killed(data, tmp_path, stage, precision, more):
    kill_and_compare(
        data,
        tmp_path,
        1,
        50,
        "train.max_steps=60",
        "train.global_batch_size=2",
        f"train.zero_stage={stage}",
        f"train.precision={precision}",
        *more,
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage, more", [(2, ["checkpoint.any_world=false"]), (3, ["optimizer.state_dtype=bf16"])])
def test_ranks_killed_alone_or_together_go_on_as_if_nobody_was_killed(data, tmp_path, stage, more):
    kill_and_compare(
        data,
        tmp_path,
        2,
        12,
        "train.max_steps=30",
        "train.global_batch_size=4",
        f"train.zero_stage={stage}",
        "train.precision=bf16",
        *more,
    )
