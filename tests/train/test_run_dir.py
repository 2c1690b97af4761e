"""Whose the run folder is, and when an old run in it goes."""

import errno
import fcntl
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import deepspeed.comm as dist
import pytest
import torch

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import load_config
from celo2_pretrain.train import finish, loop
from celo2_pretrain.train.checkpoints import checkpoint, manifest, select
from celo2_pretrain.train.faults import failures, run_lock
from celo2_pretrain.train.faults.run_lock import InUse, RunLock
from celo2_pretrain.train.record.metrics import Metrics

from support.fuzz import snapshot

SMALL = [
    "model.layers=1",
    "model.width=16",
    "model.heads=2",
    "model.context=16",
    "train.micro_batch_size=1",
    "train.max_steps=2",
    "train.global_batch_size=2",
    "train.log_every=1",
    "eval.sequences=2",
    "optimizer.adamw_lr_multiplier=2",
    "track.peak_tflops=1",
]


@pytest.fixture
def alone():
    """Training in this process leaves no group of ranks behind."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()  # DeepSpeed's, which forgets its own groups too


def refuse(*_, **__):
    raise UserError("cannot begin")


@pytest.mark.parametrize("fails", ["deepspeed.initialize", "open_trackers"])
def test_an_old_run_stays_when_the_one_that_replaces_it_cannot_begin(data, tmp_path, monkeypatch, alone, fails):
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000002").mkdir(parents=True)
    for name in ("checkpoints/step_00000002/state.json", "metrics.jsonl", "origin.jsonl", "config.yaml"):
        (run / name).write_text("old")
    before = snapshot(run)
    monkeypatch.setattr(f"celo2_pretrain.train.assemble.{fails}", refuse)
    with pytest.raises(UserError, match="cannot begin"):
        loop.train(load_config(None, [*SMALL, f"data.path={data}", f"run_dir={run}"]), overwrite=True)
    assert snapshot(run, leave_out=(".lock",)) == before


def test_a_finished_run_is_finished_also_without_sample_and_picture(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError("no space left\nfor it")

    monkeypatch.setattr(finish, "load_tokenizer", fail)
    monkeypatch.setattr(finish, "plot_loss", fail)
    finish.finish(
        None,
        load_config(None, [f"run_dir={tmp_path}", "eval.prompt=def"]),
        SimpleNamespace(index={}, paths=[""]),
        Metrics(str(tmp_path), 2, 2, True),
    )
    assert capsys.readouterr().out.splitlines()[:2] == [
        "warning: no sample: no space left for it",
        "warning: no loss curve: no space left for it",
    ]


HOLD = """
import sys, time
from celo2_pretrain.train.faults.run_lock import RunLock
from celo2_pretrain.train.record.metrics import Metrics
RunLock(sys.argv[1], 0).take()
print("held", flush=True)
time.sleep(10000)
"""


@pytest.fixture
def other(tmp_path):
    """Another process, whose run is in tmp_path/run."""
    (tmp_path / "run").mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_second_start_leaves_a_live_run_alone(data, tmp_path, other, resume):
    run = tmp_path / "run"
    (run / "checkpoints" / ".tmp-step_00000002").mkdir(parents=True)
    (run / "checkpoints" / ".tmp-step_00000002" / "state.json").write_text("being written")
    for name in ("metrics.jsonl", failures.FIRST):
        (run / name).write_text("live")
    before = snapshot(tmp_path)
    where = f"{re.escape(repr(str(run)))} is in use by another run .process {other.pid} on {re.escape(socket.gethostname())}."
    with pytest.raises(InUse, match=f"run_dir {where}: ") as error, failures.ending_all_ranks(str(run)):
        loop.train(load_config(None, [*SMALL, f"data.path={data}", f"run_dir={run}"]), resume=resume, overwrite=True)
    assert "\n" not in str(error.value) and snapshot(tmp_path) == before and not torch.distributed.is_initialized()


def test_a_killed_run_lets_go_and_so_do_its_forks(tmp_path, other):
    with pytest.raises(InUse):
        RunLock(str(tmp_path / "run"), 0).take()
    RunLock(str(tmp_path / "run"), 1).take()  # the others leave it to rank 0
    other.send_signal(signal.SIGKILL)
    other.wait()
    with RunLock(str(tmp_path / "run"), 0) as lock:
        lock.take()
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.write(writer, b"x")
            time.sleep(10000)
    os.read(reader, 1)  # it runs, and has let go
    try:
        RunLock(str(tmp_path / "run"), 0).take()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("goes", [True, False])
def test_the_lock_of_another_node_is_waited_for_as_long_as_a_server_may_keep_it(tmp_path, monkeypatch, capsys, goes):
    (tmp_path / ".lock").write_text("7 on a node that is gone\n")
    waits, real = [], fcntl.flock

    def busy(*arguments):
        if len(waits) < (3 if goes else math.inf):
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return real(*arguments)

    monkeypatch.setattr(fcntl, "flock", busy)
    monkeypatch.setattr(run_lock, "LEASE_SECONDS", 100.0 if goes else 0.05)
    monkeypatch.setattr(run_lock, "time", SimpleNamespace(monotonic=time.monotonic, sleep=waits.append))
    with RunLock(str(tmp_path), 0) as lock:
        if goes:
            lock.take()
            assert len(waits) == 3 and (tmp_path / ".lock").read_text().startswith(f"{os.getpid()} on ")
        else:
            with pytest.raises(InUse, match="in use by another run .process 7 on a node that is gone."):
                lock.take()
    assert capsys.readouterr().err.count("for process 7 on a node that is gone to let go of ") == 1


def test_a_folder_without_locks_is_passed_over(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    RunLock(str(tmp_path), 0).take()
    RunLock(str(tmp_path / "not there yet"), 0).take()
    assert not (tmp_path / "not there yet").exists()


def test_what_a_run_leaves_by_resuming_from_an_earlier_step_is_not_gone_on_from(tmp_path):
    folder, said = tmp_path / "checkpoints", []
    steps = {step: folder / f"step_{step:08d}" for step in (500, 1000, 1234, 1300)}
    for path in (*steps.values(), folder / ".tmp-step_00001400", folder / "abandoned_step_00001300"):
        path.mkdir(parents=True)
    (folder / "latest").write_text(steps[1234].name)
    checkpoint.go_on_from(steps[1000], said.append)
    assert [select.step_of(path) for path in select.in_order(folder)] == [500, 1000] and select.latest(
        folder
    ) == "step_00001000"
    assert sorted(path.name for path in folder.glob("ab*")) == ["abandoned_step_00001234", "abandoned_step_00001300"]
    assert (
        len(said) == 1
        and "abandoned_step_00001234, abandoned_step_00001300, which are removed when the run has come as far again" in said[0]
    )
    new = folder / "step_00001500"
    new.mkdir()
    early = folder / "step_00001100"
    early.mkdir()
    checkpoint.prune(early, 2, 0, said.append)  # the run hasn't come as far again: what it has given up may still be wanted
    assert len(list(folder.glob("ab*"))) == 2
    early.rmdir()
    checkpoint.prune(new, 2, 0, said.append)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00001000", "step_00001500"]
    checkpoint.go_on_from(new, said.append)
    assert len(said) == 1


def test_a_run_killed_in_its_first_save_is_told_how_to_go_on(tmp_path):
    first = tmp_path / "checkpoints" / "step_00000002"
    first.parent.mkdir()
    with pytest.raises(UserError, match="no checkpoint yet: begin it with --resume auto"):
        select.find(str(tmp_path))
    first.mkdir()
    manifest.write(first, 2, {"state.json": manifest.write_file(first / "state.json", lambda file: file.write(b"{}"))})
    with pytest.raises(
        UserError, match=f"no file checkpoints/latest; the newest whole checkpoint is {first}: --resume {first}$"
    ):
        select.find(str(tmp_path))


@pytest.mark.parametrize(
    "error, kind",
    [
        (RuntimeError("Error(s) in loading state_dict for GPT2:\n\tsize mismatch for wte.weight"), UserError),
        (KeyError("fp32_flat_groups"), UserError),
        (ValueError("expected 3 groups"), UserError),
        (RuntimeError("Connection reset by peer"), RuntimeError),
        (RuntimeError("CUDA error: an illegal access"), RuntimeError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
    ],
)
def test_a_layout_that_has_changed_is_told_in_a_line(tmp_path, monkeypatch, error, kind):
    def load_checkpoint(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint, "files_of", lambda engine: SimpleNamespace())
    monkeypatch.setattr(checkpoint, "forget_gradients", lambda engine: None)
    with pytest.raises(kind) as raised:
        checkpoint.load(SimpleNamespace(load_checkpoint=load_checkpoint), tmp_path / "step_00000002", False)
    if kind is UserError:
        assert f"cannot resume from {tmp_path / 'step_00000002'}: its tensors don't fit this model" in str(raised.value)
        assert "\n" not in str(raised.value)
    else:
        assert raised.value is error
