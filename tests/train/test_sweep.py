"""`sweep` trains once for each learning rate, goes on where it stopped, and chooses and warns by the last losses."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from celo2_pretrain.cli import main
from celo2_pretrain.train.record.metrics import read_metrics
from celo2_pretrain.train.sweep import PAPER_GRID

from support.paths import ROOT
from support.warm import default_signals

# A driver that takes train's arguments and writes what a run writes. Its loss is least at 3e-4; above 3e-3 it diverges.
DRIVER = """
import json, math, os, sys
from pathlib import Path
arguments = sys.argv[1:]
with open("calls.txt", "a") as file:
    print(" ".join(arguments), file=file)
if "--resume" in arguments:
    config = json.loads(Path(arguments[arguments.index("--resume") + 1], "config.yaml").read_text())
else:
    config = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        *section, last = name.split(".")
        if equals:
            (config.setdefault(section[0], {}) if section else config)[last] = value
folder, lr, steps = Path(config["run_dir"]), float(config["optimizer"]["lr"]), int(config["train"]["max_steps"])
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").write_text(json.dumps(config))
if os.environ.get("BREAK") == str(lr):
    (folder / "checkpoints/latest").write_text("step_00000003")
    sys.exit("celo2-pretrain: error: the disk is full")
if lr > 3e-3:
    sys.exit("celo2-pretrain: error: training diverged: loss nan at step 7; lower optimizer.lr")
loss = None if os.environ.get("LOST") == str(lr) else 3 + abs(math.log(lr / 3e-4))
records = [{"step": 0, "val_loss": 6.0, "val_bits_per_byte": 3.0}, {"step": 10, "loss": 3.0, "seconds": 1.5},
           {"step": steps, "val_loss": loss, "val_bits_per_byte": 1}]
(folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\\n" for record in records))
(folder / "checkpoints/latest").write_text(f"step_{steps:08d}")
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch, capfd):
    """Runs the command with the driver above; gives (status, what it printed, the driver's calls)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "driver.py").write_text(DRIVER)

    def call(*arguments: str) -> tuple[int, str, list[str]]:
        Path("calls.txt").write_text("")
        launch = ["--launch", f"{sys.executable} driver.py"]
        status = main(["sweep", "--out", "out", *launch, *arguments, "train.max_steps=10"])
        found = capfd.readouterr()
        return status, found.out + found.err, Path("calls.txt").read_text().splitlines()

    return call


def rows(path: str = "out/sweep.csv") -> dict[str, dict]:
    with open(path) as file:
        return {row["lr"]: row for row in csv.DictReader(file)}


def test_the_papers_grid_is_swept_and_the_best_rate_chosen(sweep):
    status, printed, calls = sweep("model.layers=2")
    assert status == 0 and len(calls) == 5 and PAPER_GRID == [1e-5, 3.16e-5, 1e-4, 3.16e-4, 1e-3]
    assert all("model.layers=2" in call and "--overwrite" in call for call in calls)
    assert "best learning rate: optimizer.lr=0.000316 (validation loss 3.05" in printed and "warning" not in printed
    assert list(rows()) == ["1e-05", "3.16e-05", "0.0001", "0.000316", "0.001"]
    assert {(row["status"], row["step"], row["seconds"]) for row in rows().values()} == {("finished", "10", "1.5")}
    assert Path("out/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in Path("out").glob("lr=*") if path.is_dir()) == sorted(
        f"lr={float(lr):g}" for lr in rows()
    )


def test_finished_runs_are_left_and_others_go_on(sweep, monkeypatch):
    monkeypatch.setenv("BREAK", "0.001")
    status, printed, calls = sweep("--lrs", "1e-3,1e-4,3e-3,1e-2")
    assert status == 2 and len(calls) == 2 and rows()["0.0001"]["status"] == "finished"
    assert "the run with lr=0.001 failed (the disk is full); its output is in out/lr=0.001.log" in printed
    monkeypatch.delenv("BREAK")
    status, printed, calls = sweep("--lrs", "1e-3,1e-4,3e-3,1e-2")
    assert status == 0 and [call.split()[0] for call in calls] == ["--resume", "--overwrite", "--overwrite"]
    assert calls[0] == "--resume out/lr=0.001" and "lr=0.0001: finished already" in printed
    assert rows()["0.01"]["status"] == "diverged" and rows()["0.01"]["val_loss"] == ""
    assert "optimizer.lr=0.0001 " in printed and "warning: it is the smallest of the grid" in printed
    before = Path("out/sweep.csv").read_bytes()
    status, printed, calls = sweep("--lrs", "1e-3,1e-4,3e-3,1e-2")
    assert status == 0 and calls == [] and Path("out/sweep.csv").read_bytes() == before
    assert "lr=0.01: diverged already" in printed


def test_a_run_whose_last_loss_is_no_number_has_diverged(sweep, monkeypatch):
    monkeypatch.setenv("LOST", "0.001")
    status, printed, calls = sweep("--lrs", "1e-4,1e-3")
    assert status == 0 and {lr: row["status"] for lr, row in rows().items()} == {"0.0001": "finished", "0.001": "diverged"}
    status, printed, calls = sweep("--lrs", "1e-4,1e-3")
    assert status == 0 and calls == []


def test_best_at_the_upper_end_is_warned_of_unless_larger_ones_diverged(sweep):
    warning = "warning: it is the largest of the grid, a larger one may be better: add --lrs 0.0006"
    assert warning in sweep("--lrs", "1e-4,2e-4")[1]
    assert "warning" not in sweep("--lrs", "1e-4,2e-4,1e-2")[1]
    status, printed, _ = sweep("--lrs", "1e-2,2e-2")
    assert status == 2 and "every run diverged, at learning rates from 0.01 to 0.02: give smaller ones" in printed


def test_other_arguments_than_the_finished_runs_are_refused(sweep):
    assert sweep("--lrs", "1e-4")[0] == 0
    status, printed, calls = sweep("--lrs", "1e-4,1e-3", "model.layers=3")
    assert status == 2 and calls == [] and not Path("out/lr=0.001").exists()
    assert "out/lr=0.0001 was run with model.layers = 12, this sweep has 3: give the same" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lrs", "1e-3,fast"], "--lrs 1e-3,fast: give numbers separated by commas"),
        (["--lrs", ""], "--lrs : give numbers"),
        (["--lrs", "0,1"], "--lrs 0,1: learning rates must be above 0"),
        (["--lrs", "nan"], "must be above 0 and finite"),
        (["--lrs", "1e-3,0.001"], "one of them is there twice"),
        (["optimizer.lr=1"], "optimizer.lr=1: a sweep sets this itself; give learning rates by --lrs"),
        (["run_dir=x"], "run_dir=x: a sweep sets this itself"),
        (["train.max_stps=1"], "did you mean 'train.max_steps'"),
        (["--launch", "/no/such/driver"], "--launch '/no/such/driver': No such file or directory: give the command"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(sweep, arguments, message):
    status, printed, calls = sweep(*arguments)
    assert status == 2 and calls == []
    assert message in printed and printed.rstrip().splitlines()[-1].startswith("celo2-pretrain: error: ")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_interrupted_sweep_of_the_real_driver_goes_on_in_the_middle_of_a_run(data, tmp_path):
    command = [
        sys.executable,
        "-m",
        "celo2_pretrain.cli",
        "sweep",
        "--out",
        str(tmp_path),
        "--lrs",
        "1e-3,3e-3",
        f"data.path={data}",
        "model.layers=1",
        "model.width=32",
        "model.heads=2",
        "model.context=32",
        "train.micro_batch_size=2",
        "train.global_batch_size=2",
        "train.log_every=10",
        "eval.sequences=4",
        "eval.every=1000",
        "optimizer.adamw_lr_multiplier=2",
        "checkpoint.every=20",
        "train.max_steps=1000",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, preexec_fn=default_signals
    )
    latest = tmp_path / "lr=0.001/checkpoints/latest"
    deadline = time.time() + 900
    while not latest.exists():
        assert time.time() < deadline and running.poll() is None
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)
    assert running.wait() == 130
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "lr=0.001 | resuming at step " in result.stdout and "best learning rate: optimizer.lr=" in result.stdout
    assert {row["status"] for row in rows(str(tmp_path / "sweep.csv")).values()} == {"finished"}
    steps = [record["step"] for record in read_metrics(tmp_path / "lr=0.001") if "loss" in record]
    assert steps == list(range(10, 1001, 10))
    assert json.loads((tmp_path / "lr=0.003/checkpoints/step_00001000/state.json").read_text())["samples"] == 2000
