"""A run that is asked to stop saves, exits with code 75, and goes on as if nothing had been."""

import signal
from pathlib import Path

import pytest

from celo2_pretrain.train.record.metrics import read_metrics

from support.processes import deepspeed, drive
from support.running import Driver

pytestmark = pytest.mark.multiprocess

CONFIG = [
    "model.layers=1",
    "model.width=32",
    "model.heads=2",
    "model.context=32",
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
    "train.log_every=1",
    "eval.sequences=8",
    "optimizer.adamw_lr_multiplier=2",
    "checkpoint.any_world=false",
    "schedule.steps=6",
]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> list[tuple]:
    """The losses of the run that nothing interrupts."""
    run = tmp_path_factory.mktemp("whole") / "run"
    result = drive(*CONFIG, f"data.path={data}", f"run_dir={run}", "train.max_steps=6", "eval.every=2")
    assert result.returncode == 0, result.stdout + result.stderr
    return trajectory(run)


def trajectory(run: Path) -> list[tuple]:
    return [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("val_loss")) for r in read_metrics(run)]


def arguments(data: str, run: Path, *more: str) -> list[str]:
    return [*CONFIG, f"data.path={data}", f"run_dir={run}", "train.max_steps=100000", "eval.every=2", *more]


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signal_saves_and_exits_with_75_and_the_run_goes_on_as_if_nothing_was(data, tmp_path, whole, how):
    run = tmp_path / "run"
    with Driver("train", *arguments(data, run)) as driver:
        driver.read_until("step      2/")
        driver.send(getattr(signal, how))
        assert driver.end() == 75, driver.output
    assert f"{how}: finishing the step, then saving" in driver.output and "Traceback" not in driver.output
    assert f"to go on: celo2-pretrain train --resume {run}" in driver.output
    step = int((run / "checkpoints/latest").read_text()[-8:])
    assert step >= 2
    if how == "SIGTERM":
        result = drive("--resume", str(run), f"train.max_steps={max(6, step + 1)}")
        assert result.returncode == 0, result.stdout + result.stderr
        assert [r for r in trajectory(run) if r[0] <= 6] == whole[:-1] + [whole[-1]]


def test_signal_before_the_first_step_ends_the_run_with_75(data, tmp_path):
    with Driver("train", *arguments(data, tmp_path / "run")) as driver:
        driver.read_until("training: ")
        driver.send(signal.SIGTERM)
        assert driver.end() == 75, driver.output
    assert "Traceback" not in driver.output


def test_second_interrupt_ends_at_once(data, tmp_path):
    with Driver("train", *arguments(data, tmp_path / "run")) as driver:
        driver.read_until("training: ")
        for _ in range(2):
            driver.send(signal.SIGINT)
        assert driver.end() in (130, 75), driver.output  # 75 where the first was obeyed before the second came


@pytest.mark.slow
def test_stop_file_stops_all_ranks_through_the_launcher(data, tmp_path):
    run = tmp_path / "run"
    with Driver(line=deepspeed(*arguments(data, run), ranks=2)) as driver:
        driver.read_until("step      2/")
        (run / "STOP").touch()
        assert driver.end() == 75, driver.output
    assert driver.output.count("stopped on request") == 1 and "Traceback" not in driver.output
    assert (run / "checkpoints/latest").is_file() and not (run / "STOP").exists()
