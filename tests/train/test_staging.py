"""A checkpoint that is copied while training goes on is the one that a plain save writes."""

import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import deepspeed.comm as dist
import pytest

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import Checkpoint, Config
from celo2_pretrain.optimizer.state.save_load import StateError
from celo2_pretrain.train.checkpoints import checkpoint, manifest, select, staging
from celo2_pretrain.train.checkpoints.staging import Copy, check_staging, settle
from celo2_pretrain.train.faults import failures
from celo2_pretrain.train.record.metrics import read_metrics

from support.processes import drive

CONFIG = [
    "model.layers=1",
    "model.width=16",
    "model.heads=2",
    "model.context=16",
    "train.micro_batch_size=1",
    "schedule.steps=6",
    "train.global_batch_size=4",
    "train.log_every=1",
    "eval.every=100000",
    "eval.sequences=4",
    "checkpoint.every=2",
    "checkpoint.keep_last=2",
    "optimizer.adamw_lr_multiplier=2",
]


def losses(run: Path) -> list[tuple]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in read_metrics(run) if "loss" in record]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_goes_on_from_staged_checkpoints_bit_for_bit(data, tmp_path):
    plain, staged, fast = tmp_path / "plain", tmp_path / "staged", tmp_path / "fast"
    common = [*CONFIG, f"data.path={data}"]
    for run, more in ((plain, ["train.max_steps=6"]), (staged, ["train.max_steps=4", f"checkpoint.staging={fast}"])):
        result = drive(*common, f"run_dir={run}", *more, ranks=2)
        assert result.returncode == 0, result.stdout + result.stderr
    result = drive("--resume", str(staged), "train.max_steps=6", ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(staged) == losses(plain) and len(losses(plain)) == 6
    assert not list(fast.glob("*")), "the staging folder is empty when the run has ended"
    names = sorted(path.name for path in (staged / "checkpoints").iterdir())
    assert names == ["latest", "step_00000004", "step_00000006"]
    for name in names[1:]:
        assert select.find_damage(staged / "checkpoints" / name) is None
        # Of the same steps: the same files, also byte by byte where nothing but tensors is in them.
        ours, theirs = (manifest.read(run / "checkpoints" / name)["files"] for run in (staged, plain))
        assert ours.keys() == theirs.keys()
        same = [file for file in ours if file.endswith(".safetensors") or file.startswith("random_state")]
        assert same and all(ours[file] == theirs[file] for file in same)
    assert all("checkpoint_seconds" in record for record in read_metrics(staged) if "loss" in record)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A whole checkpoint in a staging folder."""
    staged = tmp_path / "fast" / "staged"
    (staged / "any_world").mkdir(parents=True)
    entries = {
        name: manifest.write_file(staged / name, lambda file: file.write(name.encode() * 100))
        for name in ("state.json", "any_world/index.json")
    }
    manifest.write(staged, 3, entries)
    return staged


def copy(folder: Path) -> tuple[Copy, list]:
    named = []
    run = folder.parents[1] / "run"
    run.mkdir()
    return Copy(folder, run / ".tmp-step_3", run / "step_3", named.append), named


def test_a_copy_is_compared_with_the_manifest_and_then_named(folder):
    before = manifest.structure(folder)["files"]
    copying, named = copy(folder)
    copying.wait()
    assert named == [before] and not folder.exists()
    assert manifest.listing(copying.temporary) == before.keys()


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda folder: (folder / "state.json").write_bytes(b"x" * 1000), "state.json was damaged where it lay in"),
        (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
        (shutil.rmtree, "manifest.json is missing"),
    ],
)
def test_what_was_damaged_on_its_way_gets_no_name(folder, harm, message):
    harm(folder)
    copying, named = copy(folder)
    with pytest.raises((StateError, manifest.Damaged), match=message):
        copying.wait()
    assert not named and not copying.temporary.exists() and not copying.final.exists() and not folder.exists()


def test_a_staging_folder_is_for_one_machine_and_must_be_one(tmp_path, monkeypatch):
    check_staging(None, 8)
    check_staging(str(tmp_path / "new" / "folder"), 2)
    assert (tmp_path / "new" / "folder").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="checkpoint.staging='.*file/x' can't be made"):
        check_staging(str(tmp_path / "file" / "x"), 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="is for ranks on one machine: 4 of 8 are on this one"):
        check_staging(str(tmp_path), 8)


@pytest.fixture
def slow(folder, monkeypatch):
    """A copy that ends when it is let go."""
    go = threading.Event()
    monkeypatch.setattr(staging.manifest, "structure", lambda path, real=manifest.structure: go.wait() and real(path))
    copying, named = copy(folder)
    yield copying, named, go
    go.set()
    copying.wait()


def test_an_error_waits_for_the_copy_so_that_the_checkpoint_is_not_lost(slow, monkeypatch, capfd):
    copying, named, go = slow
    left = []
    monkeypatch.setattr(os, "_exit", lambda code: left.append((code, list(named))))
    monkeypatch.setattr(staging.time, "sleep", lambda seconds: go.set())
    failures.leave("error on rank 0: made to fail", 1)
    assert named and left == [(1, named)]
    assert "waiting up to 60 s for the checkpoint that is being copied" in capfd.readouterr().err


def test_the_other_ranks_stay_as_long_and_all_give_up_in_time(slow, monkeypatch):
    copying, named, go = slow
    monkeypatch.setattr(staging, "WAIT_SECONDS", 0.3)
    said, beats = [], []
    settle(said.append, beat=lambda: beats.append(1))
    assert copying.thread.is_alive() and len(beats) >= 2 and len(said) == 1
    monkeypatch.setattr(Copy, "under_way", None)  # another rank
    monkeypatch.setattr(Copy, "folder", copying.staged)
    settle(said.append)
    assert copying.staged.exists() and len(said) == 2
    go.set()
    monkeypatch.setattr(staging, "WAIT_SECONDS", 60.0)
    settle(said.append)
    assert named and not copying.staged.exists()


def test_a_wait_for_the_copy_is_told_and_is_no_hang(slow, monkeypatch):
    copying, named, go = slow
    said, beats = [], []
    monkeypatch.setattr(checkpoint, "ROUND_SECONDS", 0.1)
    files = SimpleNamespace(newest=copying.final, copying=copying)
    monkeypatch.setattr(checkpoint, "files_of", lambda engine: files)

    def beat():
        beats.append(1)
        if len(beats) == 3:
            go.set()

    assert checkpoint.finish(None, Config(checkpoint=Checkpoint(staging="fast")), said.append, beat)
    assert named and len(beats) >= 3 and said == [f"waiting for the copy of {copying.final.name} from fast"]


def test_verifying_is_no_hang_and_ranks_that_share_it_come_to_one_answer(folder, monkeypatch):
    beats, names = [], sorted(manifest.structure(folder)["files"])
    assert select.find_damage(folder, beat=lambda: beats.append(1)) is None and len(beats) == len(names)
    (folder / names[1]).write_bytes(b"x" * (folder / names[1]).stat().st_size)
    assert f"{names[1]} is damaged" in select.find_damage(folder)
    # Rank 0 of two reads the other file; what rank 1 finds is told to both.
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(select, "gather", lambda value: [value, "found on rank 1" if value is None else value])
    assert select.find_damage(folder, shared=True) == "found on rank 1"
