"""A run that version 0.1 began goes on with this one: tests/golden/README.md says how it was made."""

import json
import tarfile

import pytest

from celo2_pretrain.cli import main
from celo2_pretrain.config import load_config
from celo2_pretrain.train.checkpoints import select
from celo2_pretrain.train.record.metrics import read_metrics

from support.paths import TESTS
from support.processes import drive


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder of a run that was killed after step 5 of 6, with a checkpoint of step 3."""
    with tarfile.open(TESTS / "golden/run_folder_0.1.tar.xz") as archive:
        archive.extractall(tmp_path)  # ours; before Python 3.11.4 there is no filter
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_files_are_read(folder):
    config = load_config("run/config.yaml")
    assert (config.optimizer.weight_decay, config.model.mlp_width, config.model.from_) == (0.1, 4, None)
    assert [record["step"] for record in read_metrics("run")] == [0, 1, 2, 3, 3, 4, 5]
    assert json.loads((folder / "run/origin.jsonl").read_text())["versions"]["celo2-pretrain"] == "0.1.0"
    checkpoint = select.find("run")
    select.verify(checkpoint)
    assert checkpoint.name == "step_00000003" and select.newest_good("run") == checkpoint


def steps() -> dict[int, list[float]]:
    """What each step of the run did, as far as its accumulators show in it."""
    return {
        record["step"]: [record[name] for name in ("loss", "grad_norm", "update_norm/celo2", "update_norm/adamw")]
        for record in read_metrics("run")
        if "loss" in record
    }


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "ranks, others", [(1, []), (2, ["train.zero_stage=1", "train.micro_batch_size=1"])], ids=["same world", "another world"]
)
def test_it_is_resumed_and_does_the_steps_that_it_did(folder, ranks, others):
    before = steps()
    result = drive("--resume", str(folder / "run"), f"data.path={folder / 'data/tokens'}", *others, ranks=ranks)
    assert result.returncode == 0 and "resuming at step 3" in result.stdout, result.stderr
    assert sorted(steps()) == [1, 2, 3, 4, 5, 6]
    for step in (4, 5):
        assert steps()[step] == pytest.approx(before[step], rel=1e-4)


def test_it_is_evaluated(folder, capsys):
    assert main(["eval", "run", "--sequences", "4"]) == 0
    assert f"{read_metrics('run')[4]['val_loss']:.4f}" in capsys.readouterr().out
