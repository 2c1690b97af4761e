"""Damage to a checkpoint is found, named, and never executed; a save that fails leaves the earlier checkpoints as they are."""

import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from celo2_pretrain.cli import main
from celo2_pretrain.common.errors import UserError
from celo2_pretrain.optimizer.state.adamw_checkpoint import load_plain
from celo2_pretrain.optimizer.state.files import StateError
from celo2_pretrain.train.checkpoints import manifest, select

from support.processes import drive

SMALL = [
    "model.layers=1",
    "model.width=16",
    "model.heads=2",
    "model.context=16",
    "train.micro_batch_size=1",
    "train.global_batch_size=2",
    "train.log_every=1",
    "eval.every=100000",
    "eval.sequences=2",
    "optimizer.adamw_lr_multiplier=2",
]
OLD, NEW = "step_00000002", "step_00000004"
FILES = [
    "any_world/index.json",
    "any_world/rank_00000_000.safetensors",
    "any_world/shared.safetensors",
    "manifest.json",
    "mp_rank_00_model_states.pt",
    "random_state_rank_0.pt",
    "state.json",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run with two checkpoints."""
    run = tmp_path_factory.mktemp("checkpoint") / "run"
    result = drive(*SMALL, f"data.path={data}", f"run_dir={run}", "train.max_steps=4", "checkpoint.every=2")
    assert result.returncode == 0, result.stderr
    return run


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def refused(path: Path) -> str:
    """The line with which a checkpoint is refused."""
    with pytest.raises(UserError) as error:
        select.verify(select.find(str(path)))
    assert "\n" not in str(error.value)
    return str(error.value)


def flip(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def truncate(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def delete(path: Path, other: Path) -> None:
    path.unlink()


def mix(path: Path, other: Path) -> None:
    shutil.copyfile(other, path)


def test_whole_checkpoint_has_the_files_that_are_damaged_here(run):
    assert select.find_damage(run / "checkpoints" / NEW) is None
    assert sorted(manifest.listing(run / "checkpoints" / NEW)) == FILES


@pytest.mark.parametrize("harm", [flip, truncate, delete, mix])
@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_named_and_the_older_checkpoint_offered_and_taken(run, name, harm):
    folder = run / "checkpoints"
    if harm is mix and (folder / NEW / name).read_bytes() == (folder / OLD / name).read_bytes():
        assert name == "random_state_rank_0.pt"  # the model draws no random numbers
        (folder / OLD / name).write_bytes(b"other")
        shutil.copyfile(folder / OLD / name, folder / NEW / name)
        assert name in refused(run)
        return
    harm(folder / NEW / name, folder / OLD / name)
    message = refused(run)
    if harm is mix and name == "manifest.json":
        assert "is damaged" in message
    else:
        assert f"damaged: {name}" in message
    if harm is mix and name != "manifest.json":
        assert f"it is the one of {OLD}" in message
    assert message.endswith(f"the newest whole checkpoint is {folder / OLD}: --resume {folder / OLD}")
    said = []
    assert select.newest_good(run, print_line=said.append) == folder / OLD
    assert len(said) == 1 and said[0].startswith(f"passing over {folder / NEW}: ")


def test_file_that_does_not_belong_there_is_named(run):
    (run / "checkpoints" / NEW / "extra.pt").write_bytes(b"")
    assert "extra.pt is not a file of this checkpoint" in refused(run)


def test_links_and_paths_out_of_the_folder_are_refused(run):
    folder = run / "checkpoints" / NEW
    shutil.move(folder / "state.json", run.parent / "state.json")
    os.symlink(run.parent / "state.json", folder / "state.json")
    assert "state.json is a symbolic link" in refused(run)
    for name in ("../state.json", "/etc/passwd", "a/../../b", "a//b", "."):
        content = json.loads((run / "checkpoints" / OLD / "manifest.json").read_text())
        content["files"][name] = content["files"].pop("state.json")
        (folder / "manifest.json").write_text(manifest.as_text(content))
        assert "is no path inside the checkpoint" in refused(run)


@pytest.mark.parametrize("text", ["../../elsewhere", "", "step_9", "\0", "step_00000004/../.."])
def test_latest_that_names_no_checkpoint_is_refused(run, text):
    (run / "checkpoints/latest").write_text(text)
    assert "latest names no checkpoint of the run; the newest whole checkpoint is" in refused(run)


class Evil:
    """Pickles as a call that makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".pt")])
def test_code_in_a_checkpoint_is_not_executed(run, tmp_path, name, capsys):
    folder, mark = run / "checkpoints" / NEW, tmp_path / "executed"
    torch.save({"module": Evil(mark)}, folder / name)
    content = json.loads((folder / "manifest.json").read_text())
    content["files"][name] = {"size": (folder / name).stat().st_size, "sha256": manifest.sha256(folder / name)}
    (folder / "manifest.json").write_text(manifest.as_text(content))
    assert "which is not unpickled for safety" in refused(run)
    assert main(["eval", str(run)]) == 2 and "not unpickled for safety" in capsys.readouterr().err
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))  # the test can fail: it would have made the file
    assert mark.exists()


def test_automatic_resume_does_not_overwrite_checkpoints_that_are_all_damaged(run):
    for folder in (run / "checkpoints").glob("step_*"):
        (folder / "state.json").unlink()
    result = drive("--resume", "auto", f"run_dir={run}", "train.max_steps=6")
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert f"passing over {run / 'checkpoints' / NEW}: state.json is missing" in result.stdout
    assert "has no whole checkpoint: pass --overwrite to begin anew" in result.stderr
    assert len(list((run / "checkpoints").glob("step_*"))) == 2


def test_data_that_was_prepared_again_is_told_of_in_a_line(run, data, tmp_path, capsys):
    def resumed(path: str) -> list[str]:
        """What is said before the run is refused: it has all its steps."""
        assert main(["train", "--resume", str(run), f"data.path={path}", f"run_dir={tmp_path / 'next'}"]) == 2
        return capsys.readouterr().err.splitlines()[:-1]

    more = str(tmp_path / "more")
    assert main(["prepare", "--stdlib", "--max-mb", "0.4", "--tokenizer", data, "--out", more]) == 0
    assert resumed(str(shutil.copytree(data, tmp_path / "moved"))) == []
    (line,) = resumed(more)
    assert line.startswith(f"celo2-pretrain: warning: the data is not what {run}/checkpoints/{NEW} was trained on")
    folder = run / "checkpoints" / NEW
    state, content = (json.loads((folder / name).read_text()) for name in ("state.json", "manifest.json"))
    del state["extra"]["data"]  # as it was written before the data was recorded
    (folder / "state.json").write_text(json.dumps(state))
    content["files"]["state.json"] = {
        "size": (folder / "state.json").stat().st_size,
        "sha256": manifest.sha256(folder / "state.json"),
    }
    (folder / "manifest.json").write_text(manifest.as_text(content))
    assert resumed(more) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for one checkpoint and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("on_error, ranks", [("stop", 1), ("continue", 2)])
def test_full_disk_leaves_the_earlier_checkpoint(data, tmp_path, small_disk, on_error, ranks, staged):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(small_disk)
    result = drive(
        "--overwrite",
        "--resume",
        "auto",
        *SMALL,
        f"data.path={data}",
        f"run_dir={run}",
        "train.max_steps=3",
        "checkpoint.every=1",
        f"checkpoint.on_error={on_error}",
        "checkpoint.keep_last=5",
        *([f"checkpoint.staging={tmp_path / 'fast'}"] if staged else []),
        ranks=ranks,
    )
    output = result.stdout + result.stderr
    assert result.returncode != 0 and "Traceback" not in output, output
    told = output.count("step_00000002: ")
    assert told == 1 and "cannot save" in output and "the newest whole checkpoint is" in output, output
    assert ("training goes on" in output) == (on_error == "continue")
    assert [path.name for path in (run / "checkpoints").glob("*step_*")] == ["step_00000001"]
    assert select.find_damage(run / "checkpoints" / "step_00000001") is None


class Reduced:
    """Pickled as a call of getattr, as the enums of Python 3.11.0 to 3.11.3 are."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


def test_an_enum_of_deepspeeds_is_read_as_every_python_writes_it(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    torch.save({"stage": Reduced(ZeroStageEnum, "weights")}, tmp_path / "enum.pt")
    assert load_plain(tmp_path / "enum.pt") == {"stage": ZeroStageEnum.weights}
    torch.save({"stage": Reduced(LossScaler, "__init__")}, tmp_path / "other.pt")
    with pytest.raises(StateError, match="holds the class getattr, which is not unpickled for safety"):
        load_plain(tmp_path / "other.pt")
