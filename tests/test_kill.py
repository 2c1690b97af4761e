"""A run killed with -9 at any moment goes on bit for bit as if nothing was, in each ZeRO stage and precision."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

SMALL = ["model.layers=1", "model.width=16", "model.heads=2", "model.context=16", "train.micro_batch_size=1",
         "train.global_batch_size=2", "train.log_every=1", "eval.every=100000", "eval.sequences=2", "checkpoint.every=1",
         "optimizer.adamw_lr_multiplier=2"]
KILLS = 50


@pytest.mark.parametrize("stage, precision, more", [
    (0, "bf16", ["checkpoint.any_world=false"]),
    (1, "fp16", ["checkpoint.any_world=false", "deepspeed.fp16.initial_scale_power=20", "deepspeed.fp16.loss_scale_window=7"]),
    (2, "bf16", ["optimizer.state_dtype=fp8"]),
    (3, "fp32", ["checkpoint.any_world=false", "checkpoint.keep_every=10"]),
])
def test_run_killed_fifty_times_is_the_run_that_nobody_killed(data, tmp_path, stage, precision, more):
    worker = Path(__file__).parent / "kill_worker.py"
    result = subprocess.run(
        [sys.executable, str(worker), data, str(tmp_path), str(KILLS), *SMALL, f"train.zero_stage={stage}",
         f"train.precision={precision}", *more], capture_output=True, text=True, timeout=1500,
        env=environment(PYTHONPATH=os.pathsep.join([str(worker.parents[1]), str(worker.parent)])))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert result.stdout.count("kill ") == KILLS and "values are the same" in result.stdout
