"""`train --take-over`: Celo2 goes on from the driver's own AdamW run, at its place and with steps of its size."""

from pathlib import Path

import pytest
import yaml

from celo2_pretrain.cli import main
from celo2_pretrain.config import Schedule
from celo2_pretrain.train.checkpoints import select
from celo2_pretrain.train.record.metrics import read_metrics
from celo2_pretrain.train.schedule import lr_factor

from support.processes import drive

SMALL = [
    "model.layers=1",
    "model.width=32",
    "model.heads=2",
    "model.context=32",
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
    "train.log_every=1",
    "eval.every=100",
    "eval.sequences=4",
    "schedule.steps=12",
]
LR, MULTIPLIER = 2e-3, 1.5


@pytest.fixture(scope="module")
def adamw(data, tmp_path_factory) -> Path:
    """An AdamW run whose rate has fallen to a quarter of its peak."""
    run = tmp_path_factory.mktemp("runs") / "adamw"
    rates = ["optimizer.name=adamw", f"optimizer.lr={LR}", f"optimizer.adamw_lr_multiplier={MULTIPLIER}"]
    result = drive(*SMALL, *rates, f"data.path={data}", f"run_dir={run}", "train.max_steps=9", "train.zero_stage=1")
    assert result.returncode == 0, result.stdout + result.stderr
    return run


def logged(run: Path, name: str) -> list:
    return [record[name] for record in read_metrics(run) if "loss" in record]


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_it_goes_on_where_adamw_was_with_steps_of_the_same_size(adamw, tmp_path, ranks):
    run = tmp_path / "celo2"
    result = drive(
        "--take-over",
        str(adamw),
        f"run_dir={run}",
        "train.max_steps=12",
        "train.zero_stage=2",
        "checkpoint.every=10",
        ranks=ranks,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"taking over {adamw / 'checkpoints/step_00000009'}" in result.stdout
    assert "beside AdamW's peak rate of 0.002, the peak lr=" in result.stdout
    config = yaml.safe_load((run / "config.yaml").read_text())
    lr, multiplier = (config["optimizer"][name] for name in ("lr", "adamw_lr_multiplier"))
    assert config["optimizer"]["name"] == "celo2" and 0.1 * LR < lr < 1.2 * LR
    assert lr * multiplier == pytest.approx(LR * MULTIPLIER)  # embeddings and vectors keep their rate
    assert logged(run, "samples") == [40, 44, 48]
    assert logged(run, "lr") == pytest.approx([lr * lr_factor(step, Schedule(), 12) for step in (9, 10, 11)])
    assert max(logged(run, "loss")) < min(logged(adamw, "loss")[:3])  # it has learned
    assert not (run / ".taken_over").exists()
    again = drive("--take-over", str(adamw), "--resume", "auto", f"run_dir={run}", "train.max_steps=13", ranks=ranks)
    assert again.returncode == 0 and "resuming at step 12" in again.stdout  # its own checkpoint, at its own rates
    assert yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["lr"] == lr


@pytest.mark.multiprocess
def test_rates_that_are_given_are_kept(adamw, tmp_path):
    result = drive("--take-over", str(adamw), f"run_dir={tmp_path}", "train.max_steps=10", "optimizer.lr=1e-3")
    assert result.returncode == 0, result.stdout + result.stderr
    assert logged(tmp_path, "lr") == pytest.approx([1e-3 * lr_factor(9, Schedule(), 12)])


def test_what_cannot_be_taken_over_is_refused_in_one_line(adamw, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")

    def refused(*arguments: str) -> str:
        assert main(["train", "--take-over", *arguments]) == 2
        return capsys.readouterr().err

    assert "give the new run a folder of its own" in refused(str(adamw))
    assert "--take-over is for Celo2" in refused(str(adamw), f"run_dir={tmp_path}", "optimizer.name=adamw")
    assert "give one of them" in refused(str(adamw), "--resume", str(adamw), f"run_dir={tmp_path}")
    assert "train.max_steps is 9: to train on" in refused(str(adamw), f"run_dir={tmp_path / 'new'}")
    assert "written with model.layers = 1" in refused(str(adamw), f"run_dir={tmp_path / 'new'}", "model.layers=2")
    monkeypatch.setattr(select, "ANY_WORLD", "elsewhere")
    assert "resume the AdamW run for some steps with checkpoint.any_world=true" in refused(
        str(adamw), f"run_dir={tmp_path / 'new'}"
    )
    (tmp_path / "config.yaml").write_text((adamw / "config.yaml").read_text().replace("name: adamw", "name: celo2"))
    (tmp_path / "checkpoints").symlink_to(adamw / "checkpoints")
    assert "its optimizer is celo2 already" in refused(str(tmp_path), "run_dir=x")
    assert not (tmp_path / "new").exists()
