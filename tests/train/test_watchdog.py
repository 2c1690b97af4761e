"""A rank without progress ends all ranks with code 76 and their stacks; failed allocations say what saves memory."""

import shlex
import subprocess
import sys

import pytest
import torch

from celo2_pretrain.config import load_config
from celo2_pretrain.train.faults.out_of_memory import explained

from support.paths import SUPPORT
from support.processes import deepspeed, environment

WATCHED = """
import sys, time
from celo2_pretrain.train.faults.watchdog import Watchdog
with Watchdog(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])) as watchdog:
    watchdog.begin()
    watchdog.beat("testing")
    time.sleep(10000)
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_one_rank_without_progress_makes_the_others_dump_their_stacks(tmp_path):
    ranks = [
        subprocess.Popen([sys.executable, "-c", WATCHED, str(tmp_path), rank, seconds], env=environment())
        for rank, seconds in (("0", "3600"), ("1", "2"))
    ]
    try:
        assert [rank.wait(timeout=1500) for rank in ranks] == [76, 76]
    finally:
        for rank in ranks:
            rank.kill()
    assert {path.name for path in tmp_path.iterdir()} == {".hung", "stacks_rank_0.txt", "stacks_rank_1.txt"}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_hanging_rank_ends_the_run_with_76_through_the_launcher(data, tmp_path):
    run = tmp_path / "run"
    config = [
        "model.layers=1",
        "model.width=32",
        "model.heads=2",
        "model.context=32",
        "train.micro_batch_size=2",
        "train.global_batch_size=4",
        "eval.sequences=8",
        "optimizer.adamw_lr_multiplier=2",
        f"data.path={data}",
        f"run_dir={run}",
        "train.max_steps=8",
        "train.watchdog_seconds=25",
    ]
    line = deepspeed("1", "3", "hung", *config, ranks=2, script=SUPPORT / "failing_worker.py")
    result = subprocess.run(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1500)
    assert result.returncode == 76, f"{shlex.join(line)}\n{result.stdout}"
    assert result.stdout.count("made no progress in 25 s") == 1, result.stdout
    assert "failing_worker.py" in (run / "stacks_rank_1.txt").read_text()
    assert "Thread" in (run / "stacks_rank_0.txt").read_text()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 800000000000 bytes."),
    ],
)
def test_lack_of_memory_says_what_to_do(error):
    with pytest.raises(MemoryError, match="out of memory .*try a smaller train.micro_batch_size .now 8."):
        with explained(load_config(None)):
            raise error
    with pytest.raises(RuntimeError, match="something else"):
        with explained(load_config(None)):
            raise RuntimeError("something else")
