"""A trace is of one stretch of steps."""

import torch

from celo2_pretrain.config import load_config
from celo2_pretrain.train.record.profiler import Profiler


def test_a_rollback_inside_of_the_trace_starts_no_second_one(tmp_path):
    profiler = Profiler(load_config(None, [f"run_dir={tmp_path}", "profile.steps=2-3"]), rank=0)
    told, running = [], []
    for step in (1, 2, 2, 3):
        profiler.before(step)
        running.append(profiler.running)
        torch.ones(3).sum()
        told.append(profiler.after(step))
    assert (
        running[0] is None
        and running[1] is running[2] is running[3]
        and told[:3] == [None] * 3
        and "trace of steps 2 to 3" in told[3]
    )
