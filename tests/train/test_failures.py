"""An error on one rank ends all ranks, and what one reads first is that error."""

import json
import subprocess
import sys

import pytest
import torch

from celo2_pretrain import cli
from celo2_pretrain.train.faults import failures
from celo2_pretrain.train.start import prepare, ranks

from support.paths import SUPPORT
from support.processes import deepspeed, environment, torchrun

WORKER = SUPPORT / "failing_worker.py"
SMALL = [
    "model.layers=2",
    "model.width=32",
    "model.heads=2",
    "model.context=32",
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
    "train.log_every=1",
    "eval.sequences=8",
    "optimizer.adamw_lr_multiplier=2",
    "train.max_steps=200",
]


def without_warnings(text: str) -> str:
    """Without what depends on the machine (shared memory, open files), and without the answer to a launcher's SIGTERM."""
    return "".join(
        line
        for line in text.splitlines(keepends=True)
        if "celo2-pretrain: warning: " not in line and ": finishing the step, then saving" not in line
    )


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "launcher, how", [(deepspeed, "raised"), (torchrun, "raised"), (torchrun, "killed"), (deepspeed, "refused")]
)
def test_one_ranks_failure_ends_all_and_is_told_first(data, tmp_path, launcher, how):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / failures.FIRST).write_text("rank 7 of an earlier run\n10 1\n")
    line = launcher("1", "3", how, *SMALL, f"data.path={data}", f"run_dir={run}", "--overwrite", ranks=2, script=WORKER)
    result = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=1500)
    told = without_warnings(result.stderr)
    told = told[max(0, told.find("celo2-pretrain: ")) :]
    ours = [line for line in told.splitlines() if line.startswith("celo2-pretrain: ")]
    assert result.returncode not in (0, 124) and "earlier run" not in told
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()][-1] == 2
    if how == "raised":
        assert told.startswith("celo2-pretrain: error on rank 1: ZeroDivisionError: made to fail\nTraceback ")
        assert "ZeroDivisionError: made to fail" in (run / "error_rank_1.txt").read_text()
        assert told.split("torch/distributed/elastic")[0].count("Traceback") == 1
        assert ranks.LOST.search((run / "error_rank_0.txt").read_text())
        # The launcher may have ended the other rank before it said anything.
        assert all(line.startswith("celo2-pretrain: rank 0 ends too, after rank 1 on ") for line in ours[1:]), told
    elif how == "killed":
        assert all("error on rank 0: the connection to another rank broke" in line for line in ours) and "SIGKILL" in told, (
            told
        )
    else:
        assert result.returncode == 2 and ours[0].endswith("error: this rank alone refuses (found on rank 1)")
        assert "Traceback" not in told


@pytest.mark.slow
@pytest.mark.multiprocess
def test_drift_is_told_in_a_line(data, tmp_path):
    line = torchrun(
        "1",
        "3",
        "drifted",
        *SMALL,
        f"data.path={data}",
        f"run_dir={tmp_path / 'run'}",
        "train.zero_stage=0",
        "optimizer.check_replicas_every=1",
        ranks=2,
        script=WORKER,
    )
    result = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=1500)
    told = [line for line in without_warnings(result.stderr).splitlines() if line.startswith("celo2-pretrain: ")]
    assert result.returncode == 1 and "DriftError: ranks have drifted apart: " in told[0]
    assert "Traceback" not in result.stderr.split("torch/distributed/elastic")[0]


def test_lost_connections_are_told_from_other_errors():
    gloo = "[../third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"
    nccl = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
    assert all(failures.lost_connection(RuntimeError(text)) for text in (gloo, nccl))
    assert failures.lost_connection(ConnectionResetError("Connection reset by peer"))
    assert not failures.lost_connection(RuntimeError("shapes (2, 3) and (4,) don't fit"))
    assert not failures.lost_connection(ValueError(gloo))


def test_the_first_error_keeps_its_place(tmp_path):
    assert failures.first(str(tmp_path)) is None
    (tmp_path / failures.FIRST).write_text("half a li")  # being written
    assert failures.first(str(tmp_path)) is None
    (tmp_path / failures.FIRST).unlink()
    assert failures.claim(str(tmp_path), "rank 3 on a: two\nlines")
    assert not failures.claim(str(tmp_path), "rank 4 on b: later")
    assert failures.first(str(tmp_path)) == ("rank 3 on a: two lines", failures.GRACE_SECONDS, 1)


def test_a_single_process_keeps_its_exception_and_writes_it_down(tmp_path):
    with pytest.raises(ZeroDivisionError), failures.ending_all_ranks(str(tmp_path)):
        raise ZeroDivisionError("alone")
    assert "ZeroDivisionError: alone" in (tmp_path / "error_rank_0.txt").read_text()


def test_a_lack_of_memory_is_told_in_a_line(data, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")

    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr(prepare, "build_model", fails)
    monkeypatch.setattr(failures, "leave", lambda text, code: print(f"celo2-pretrain: {text}", file=sys.stderr))
    assert cli.main(["train", *SMALL, f"data.path={data}", f"run_dir={run}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("celo2-pretrain: error: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "Traceback" in (run / "error_rank_0.txt").read_text()
    monkeypatch.setenv("WORLD_SIZE", "2")
    cli.run(["train", *SMALL, f"data.path={data}", f"run_dir={run}"])  # `main` may end the process
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("celo2-pretrain: error on rank 0: MemoryError: out of memory (CUDA out of memory.")
