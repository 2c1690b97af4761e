"""What the start of a run refuses or warns of: what this node lacks, and ranks that don't agree."""

import subprocess
from collections import namedtuple
from pathlib import Path

import pytest

from celo2_pretrain import param_groups
from celo2_pretrain.cli import main
from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import load_config
from celo2_pretrain.train.start import preflight
from celo2_pretrain.train.start.ranks import free_port

from support.paths import ROOT
from support.processes import environment, torchrun

SMALL = [
    "model.layers=1",
    "model.width=16",
    "model.heads=1",
    "model.context=16",
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
    "train.max_steps=1",
    "eval.sequences=4",
    "optimizer.adamw_lr_multiplier=2",
]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A finished run on two ranks."""
    folder = tmp_path_factory.mktemp("run") / "run"
    line = torchrun(*SMALL, "train.zero_stage=2", f"data.path={data}", f"run_dir={folder}", ranks=2)
    result = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0 and "warning: the ranks" not in result.stderr, result.stderr
    return folder


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_checkpoint_is_as_large_as_estimated(run, data):
    from celo2_pretrain.data.shards import read_index
    from celo2_pretrain.model.build import build_model

    config, index = load_config(str(run / "config.yaml")), read_index(data)
    model = build_model(config.model, index["vocab_size"], index["eos_id"])
    parameters = sum(p.numel() for p in model.parameters())
    hidden = sum(p.numel() for group in param_groups(model) if group["rule"] == "celo2" for p in group["params"])
    least, most = preflight.checkpoint_bytes(config, parameters, hidden)
    assert least < preflight.folder_bytes(run / "checkpoints") < most + 300_000  # files have headers


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "other, folder, message",
    [
        (["optimizer.lr=0.002"], ".", "the ranks don't agree: the configuration is "),
        ([], "elsewhere", "run_dir 'runs/here' is not the same folder on rank 1 ("),
    ],
)
def test_ranks_that_dont_agree_are_refused_on_all(data, tmp_path, other, folder, message):
    (tmp_path / "elsewhere").mkdir()
    shared = environment(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    ranks = []
    for rank, (more, cwd) in enumerate(((["optimizer.lr=0.001"], "."), (other or ["optimizer.lr=0.001"], folder))):
        # Each as the only rank of its node, so that each says what it finds.
        line = [
            *torchrun(ranks=1)[:1],
            str(ROOT / "launch/pretrain.py"),
            *SMALL,
            *more,
            f"data.path={data}",
            "run_dir=runs/here",
        ]
        env = shared | {"RANK": str(rank), "LOCAL_RANK": "0", "TORCHELASTIC_RESTART_COUNT": str(rank)}
        ranks.append(
            subprocess.Popen(line, cwd=tmp_path / cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    try:
        errors = [process.communicate(timeout=1500)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [2, 2], errors
    assert all(message in error and error.count("\n") == 1 for error in errors), errors
    assert not (tmp_path / "runs/here").exists()


def test_differences_name_values_and_ranks():
    found = [{"torch": "2.13", "python": "3.11"}, {"torch": "2.13", "python": "3.11"}, {"torch": "2.12", "python": "3.11"}]
    assert preflight.differences(found, ["a", "b", "c"]) == ["torch is 2.13 on rank 0 (a and 1 more), 2.12 on rank 2 (c)"]
    assert preflight.differences(found[:2], ["a", "b"]) == []


@pytest.mark.parametrize(
    "where, why",
    [
        ("file", "can't be written ('{}/file': Not a directory): choose another run_dir"),
        ("file/run/1", "can't be made ('{}/file': Not a directory)"),
        ("nowhere", "can't be written ('{}/nowhere': No such file or directory)"),  # a link
        ("x" * 300, "File name too long)"),
        ("/proc/run", "can't be made ('/proc': "),
    ],
)
def test_a_run_dir_that_cannot_be_written_is_refused_in_a_line(data, tmp_path, capsys, where, why):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "far")
    preflight.check_run_dir(str(tmp_path / "not/yet"))
    preflight.check_run_dir(str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    for more in ([], ["--overwrite"], ["--resume", "auto"]):
        assert main(["train", *more, f"data.path={data}", f"run_dir={tmp_path / where}"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and why.format(tmp_path) in error, error
    assert sorted(tmp_path.rglob("*")) == before


def test_disk_space_is_looked_at_before_training(tmp_path):
    config = load_config(None, [f"run_dir={tmp_path}"])
    # 4 for the model's file, twice 4 for float32 weights, 16 for the states of hidden matrices and 8 or 16 for others
    assert preflight.checkpoint_bytes(config, 10**6, 10**6) == (44 * 10**6, 44 * 10**6)
    assert preflight.checkpoint_bytes(config, 10**6, 0) == (28 * 10**6, 44 * 10**6)
    most = 44 * 10**6
    assert preflight.check_disk(config, 10**6, 0, 2 * most) is None
    assert "up to 0.04 GB: there may be no room for two" in preflight.check_disk(config, 10**6, 0, 2 * most - 1)
    assert "0.03 to 0.04 GB: it may not fit" in preflight.check_disk(config, 10**6, 0, 28 * 10**6)
    with pytest.raises(UserError, match="0.03 GB free, and a checkpoint of 1 M parameters takes at least 0.03 GB"):
        preflight.check_disk(config, 10**6, 0, 28 * 10**6 - 1)
    config.checkpoint.on_error = "continue"
    assert "takes at least 0.03 GB" in preflight.check_disk(config, 10**6, 0, 28 * 10**6 - 1)
    assert preflight.free_bytes(str(tmp_path / "not/yet/there")) > 0


@pytest.mark.parametrize(
    "options, least, most",
    [
        (["train.zero_stage=0", "checkpoint.any_world=false"], 20, 24),
        (["train.zero_stage=3", "train.precision=bf16"], 40, 44),
        (["train.zero_stage=2", "train.precision=bf16"], 42, 44),
        (["optimizer.name=adamw"], 28, 28),
        (["optimizer.state_dtype=fp8"], 32, 32),
        (["optimizer.state_dtype=bf16", "checkpoint.any_world=false"], 16, 16),
    ],
)
def test_a_checkpoints_size_follows_from_stage_precision_and_states(options, least, most):
    assert preflight.checkpoint_bytes(load_config(None, options), 1, 1) == (least, most)


def test_memory_that_the_ranks_cannot_have_is_refused(monkeypatch):
    config = load_config(None, ["train.zero_stage=0"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    need = 2 * 10**6 * (4 + 4 + 4 + 16)
    for limit, free, expected in ((need, need, None), (need, need - 1, "are free")):
        monkeypatch.setattr(preflight, "host_memory", lambda: (limit, free))
        warning = preflight.check_memory(config, 10**6, 2)
        assert warning is None if expected is None else expected in warning
    monkeypatch.setattr(preflight, "host_memory", lambda: (need - 1, 0))
    with pytest.raises(UserError, match="need at least 0.06 GB of its memory for 1 M parameters"):
        preflight.check_memory(config, 10**6, 2)


def test_the_machines_memory_is_found():
    total, free = preflight.host_memory()
    assert 0 <= free <= total and total > 1e8


def test_small_shared_memory_is_warned_of(monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: Usage(64 << 20, 0, 64 << 20))
    assert preflight.check_shared_memory("/") is None  # one rank
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert "has 64 MiB, and 2 ranks may use" in preflight.check_shared_memory("/")


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    class Accelerator:
        def device_name(self):
            return "cuda"

        def device_count(self):
            return 2

    monkeypatch.setattr(preflight, "get_accelerator", Accelerator)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    preflight.check_gpus()
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="4 ranks on .*, but 2 GPU.s. are visible there"):
        preflight.check_gpus()


def test_open_files_are_raised_to_what_is_allowed(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(preflight.resource, "setrlimit", lambda kind, limits: given.append(limits))
    for limits in ((256, 65536), (256, 512), (8192, 8192)):
        monkeypatch.setattr(preflight.resource, "getrlimit", lambda kind: limits)
        preflight.raise_open_files()
    assert given == [(4096, 65536), (512, 512)]
    assert capsys.readouterr().err.count("allows 512 open files a process") == 1
