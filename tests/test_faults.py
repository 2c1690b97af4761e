"""A run that is asked to stop, that hangs or that loses a rank ends in bounded time, says why, and goes on."""
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from processes import ROOT, command, deepspeed, drive, environment

from celo2_pretrain.train.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

CONFIG = ["model.layers=1", "model.width=32", "model.heads=2", "model.context=32", "train.micro_batch_size=2",
          "train.global_batch_size=4", "train.log_every=1", "eval.sequences=8", "optimizer.adamw_lr_multiplier=2",
          "checkpoint.any_world=false", "schedule.steps=6"]


def default_signals() -> None:
    """What a process started in a terminal has (one started in the background by a script ignores SIGINT)."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Driver:
    """A running driver whose output is read line by line; it is killed at the end, whatever happens."""

    def __init__(self, line: list[str], **more: str):
        self.process = subprocess.Popen(line, env=environment(PYTHONUNBUFFERED="1", **more), text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, preexec_fn=default_signals, start_new_session=True)
        self.output = ""
        self.timer = threading.Timer(400, self.kill)
        self.timer.start()

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def read_until(self, text: str) -> str:
        """The line that has `text` in it."""
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return line
        raise AssertionError(f"the driver ended without {text!r}:\n{self.output}")

    def end(self) -> int:
        self.output += self.process.stdout.read()
        return self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.timer.cancel()
        self.kill()
        self.process.wait()


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
    with Driver(command("train", *arguments(data, run))) as driver:
        driver.read_until("step      2/")
        driver.process.send_signal(getattr(signal, how))
        assert driver.end() == 75, driver.output
    assert f"{how}: finishing the step, then saving" in driver.output and "Traceback" not in driver.output
    assert f"to go on: celo2-pretrain train --resume {run}" in driver.output
    step = int((run / "checkpoints/latest").read_text()[-8:])
    assert step >= 2
    if how == "SIGTERM":
        result = drive("--resume", str(run), f"train.max_steps={max(6, step + 1)}")
        assert result.returncode == 0, result.stdout + result.stderr
        assert [r for r in trajectory(run) if r[0] <= 6] == whole[:-1] + [whole[-1]]
