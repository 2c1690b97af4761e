"""`train --max-restarts` brings a run back from its last checkpoint, and only where that helps."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_failures import SMALL

from celo2_pretrain.cli import main
from celo2_pretrain.train.faults import exit_code, failures, supervisor
from celo2_pretrain.train.faults.stop import StopRequests
from celo2_pretrain.train.record.metrics import read_metrics
from celo2_pretrain.train.start.ranks import free_port

from support.paths import SUPPORT
from support.processes import command, environment


class Supervised:
    """`train --max-restarts` with a driver that does at each start what a line says."""

    def __init__(self, folder: Path, capfd):
        self.folder, self.capfd, self.run_dir = folder, capfd, folder / "run"
        self.script, self.starts_file = folder / "script.txt", folder / "starts.jsonl"

    def __call__(self, *lines: str, arguments: list[str] = (), ranks: str | None = None, restarts: int = 3) -> int:
        self.script.write_text("\n".join(lines))
        launch = shlex.join([sys.executable, "-S", str(SUPPORT / "scripted_driver.py"), str(self.script)])
        with_ranks = ["--ranks", ranks] if ranks else []
        code = main(
            [
                "train",
                "--max-restarts",
                str(restarts),
                "--launch",
                launch + (" --number {ranks}" if ranks else ""),
                *with_ranks,
                *arguments,
                "train.max_steps=4",
                f"run_dir={self.run_dir}",
            ]
        )
        self.told = self.capfd.readouterr().err
        return code

    @property
    def starts(self) -> list[list[str]]:
        """What each start was given, but for the configuration's keys."""
        lines = [json.loads(line) for line in self.starts_file.read_text().splitlines()]
        assert all(line[-2:] == ["train.max_steps=4", f"run_dir={self.run_dir}"] for line in lines)
        return [line[:-2] for line in lines]


@pytest.fixture
def supervised(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(supervisor, "FIRST_WAIT", 0.1)
    monkeypatch.setattr(supervisor, "LOOK_SECONDS", 0.05)
    return Supervised(tmp_path, capfd)


def test_a_failed_run_goes_on_from_its_own_checkpoint(supervised):
    failing = "save(2); (run_dir / 'error_first.txt').write_text('rank 1 on here: ValueError: why\\n10 1\\n'); sys.exit(1)"
    assert supervised("sys.exit(1)", failing, "killed()", "save(4)", arguments=["--overwrite"]) == 0
    auto = ["--resume", "auto"]
    assert supervised.starts == [["--overwrite"], ["--overwrite"], auto, auto]
    assert "exit code 1; starting again in 0.1 s, as before: it had saved nothing" in supervised.told
    assert "exit code 1; rank 1 on here: ValueError: why; starting again in 0.1 s, from step_00000002" in supervised.told
    assert "killed by SIGKILL (out of memory? see `dmesg`)" in supervised.told
    assert supervised.told.endswith("finished after 3 restart(s)\n") and "Traceback" not in supervised.told
    assert supervisor.FIRST_ERROR == failures.FIRST


@pytest.mark.parametrize("given", [["--overwrite"], ["--resume", "another"], []])
def test_an_earlier_runs_checkpoints_are_treated_as_the_command_line_says(supervised, given):
    if "another" in given:
        for run in ("another", "run"):
            (supervised.folder / run).mkdir()
            (supervised.folder / run / "config.yaml").write_text("")
        given = [
            "--resume",
            str(supervised.folder / "another" / "config.yaml"),
            "--config",
            str(supervised.folder / "run" / "config.yaml"),
        ]
    latest = supervised.run_dir / "checkpoints" / "latest"
    latest.parent.mkdir(parents=True)
    latest.write_text("step_00000003")
    assert supervised("sys.exit(1)", "save(4)", arguments=given) == 0
    assert len(supervised.starts) == 2 and all(sorted(start) == sorted(given) for start in supervised.starts)


def test_a_new_run_that_failed_while_it_first_saved_begins_anew(supervised):
    assert supervised("(run_dir / 'checkpoints').mkdir(parents=True); sys.exit(1)", "save(4)") == 0
    assert supervised.starts == [[], ["--resume", "auto"]]


@pytest.mark.parametrize(
    "line, code",
    [
        ("sys.exit(2)", 2),
        ("sys.exit(75)", 75),
        ("sys.exit(130)", 130),
        ("note(2); sys.exit(1)", 2),
        ("save(2); note(75); sys.exit(1)", 75),
        ("note(130); killed()", 130),
    ],
)
def test_what_another_start_would_not_mend_is_not_started_again(supervised, line, code):
    assert supervised(line) == code
    assert len(supervised.starts) == 1


def test_the_end_without_the_last_step_is_a_failure_and_restarts_are_counted(supervised):
    assert supervised("save(3)", "save(3)", restarts=1) == 1
    assert len(supervised.starts) == 2
    assert "exit code 0 before the last step: its launcher was killed" in supervised.told
    assert "--max-restarts 1 is used up; step_00000003 is its newest checkpoint" in supervised.told


@pytest.mark.parametrize(
    "code, why",
    [(247, "ended by SIGKILL"), (137, "ended by SIGKILL"), (134, "ended by SIGABRT"), (76, "a rank made no progress")],
)
def test_launchers_codes_are_told_in_words(supervised, code, why):
    assert supervised(f"os._exit({code})", restarts=0) == code
    assert f"exit code {code}: " in supervised.told and why in supervised.told


def test_fewer_ranks_follow_a_start_that_saved_nothing_new(supervised):
    assert (
        supervised(
            "save(1); sys.exit(1)",
            "save(2); sys.exit(1)",
            "sys.exit(1)",
            "sys.exit(1)",
            "sys.exit(1)",
            "save(4)",
            ranks="4,4,2",
            restarts=5,
        )
        == 0
    )
    assert [start[1] for start in supervised.starts] == ["4", "4", "4", "4", "2", "2"]
    waits = [line.split("starting again in ")[1].split(" s")[0] for line in supervised.told.splitlines() if "again" in line]
    assert waits == ["0.1", "0.1", "0.2", "0.4", "0.8"]  # doubled as long as nothing new is saved


def test_processes_that_a_launcher_left_are_gone_before_the_next_start(supervised, monkeypatch):
    monkeypatch.setattr(supervisor, "GRACE_SECONDS", 0.2)
    leave = "(folder / 'pid').write_text(str(python('import time; time.sleep(200)').pid)); sys.exit(1)"
    assert supervised(leave, "gone((folder / 'pid').read_text()) and save(4)", restarts=1) == 0


@pytest.fixture
def unharmed():
    """A signal that the supervisor doesn't take fails the test, not the tests' process."""
    heard = []
    before = {
        number: signal.signal(number, lambda number, _: heard.append(number))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    assert not heard


RANK = """import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (open({file!r}, 'a').write('saved'), sys.exit(75)))
open({file!r} + '.ready', 'w').close()
time.sleep(200)"""


def rank(path: Path) -> str:
    """A line that starts a rank, which ends with 75 on SIGTERM, and waits for it to be ready."""
    return f"rank = python({RANK.format(file=str(path))!r}, RANK='0'); wait_for({str(path)!r} + '.ready')"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_asks_the_ranks_and_not_their_launcher(supervised, unharmed, name):
    told = supervised.folder / "told"
    line = f"{rank(told)}; save(2); supervisor(signal.{name}); rank.wait(); (folder / 'launcher_lived').touch(); sys.exit(1)"
    assert supervised(line) == 75
    assert told.read_text() == "saved" and (supervised.folder / "launcher_lived").exists()
    assert len(supervised.starts) == 1
    assert f"{name}: the run is asked to save and stop" in supervised.told
    assert "stopped on request, not started again; step_00000002 is its newest checkpoint" in supervised.told


def test_a_signal_between_two_starts_ends_the_supervisor(supervised, unharmed):
    ask = f"import os, time; time.sleep(5); os.kill({os.getpid()}, 15)"
    supervisor.FIRST_WAIT = 200  # the fixture sets it back
    # It isn't one of the run's processes, so that nobody waits for it.
    line = f"subprocess.Popen([sys.executable, '-S', '-c', {ask!r}], env={{}}); sys.exit(1)"
    assert supervised(line) == 75
    assert len(supervised.starts) == 1 and supervised.told.count("starting again") == 1


def test_a_second_signal_ends_a_run_that_does_not_stop(supervised, unharmed):
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN); supervisor(signal.SIGINT); time.sleep(3); "
    assert supervised(stubborn + "supervisor(signal.SIGINT); time.sleep(200)") == 130
    assert len(supervised.starts) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--launch", "deepspeed"], "--launch and --ranks are for --max-restarts N"),
        (["--max-restarts", "-1"], "--max-restarts -1: must be at least 0"),
        (["--max-restarts", "1", "--launch", "/no/such/driver"], "--launch '/no/such/driver"),
        (["--max-restarts", "1", "--ranks", "2,1"], "--ranks and {ranks} in --launch need each other"),
        (["--max-restarts", "1", "--launch", "x {ranks}"], "--ranks and {ranks} in --launch need each other"),
        (["--max-restarts", "1", "--launch", "x {ranks}", "--ranks", "2,0"], "--ranks 2,0: give whole numbers above 0"),
        (
            ["--max-restarts", "1", "--launch", "x {ranks}", "--ranks", "4,3"],
            "no multiple of train.micro_batch_size=8 × 3 ranks",
        ),
        (
            ["--max-restarts", "1", "--launch", "x {ranks}", "--ranks", "2,1", "checkpoint.any_world=false"],
            "checkpoint.any_world=false saves nothing that another number of ranks can resume",
        ),
        (["--max-restarts", "1", "optimizer.lrr=1"], "did you mean 'optimizer.lr'?"),
    ],
)
def test_wrong_arguments_are_refused_before_a_start(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("celo2-pretrain: error: ") and message in error
    assert not list(tmp_path.iterdir())


def test_ranks_note_how_they_end(tmp_path, monkeypatch):
    notes = tmp_path / "notes"
    monkeypatch.setenv(exit_code.NOTES, str(notes))
    assert main(["train", "optimizer.lrr=1"]) == 2
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit):  # in a rank that can't return: it waits for others
        StopRequests(tmp_path / "STOP", 0)._leave(75, "why")
    assert notes.read_text() == "2\n75\n"


def test_the_ranks_of_a_launcher_do_not_supervise(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "--max-restarts", "1"]) == 2
    assert "--max-restarts is not for the ranks of a launcher" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_whose_rank_is_killed_goes_on_with_fewer_ranks(data, tmp_path):
    run = tmp_path / "run"
    launch = shlex.join(
        [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--no_local_rank",
            "--log_level",
            "critical",
            "--master_port",
            str(free_port()),
            "--num_gpus",
        ]
    )
    worker = shlex.join([str(SUPPORT / "restarting_worker.py"), str(tmp_path / "broken")])
    line = command(
        "train",
        "--max-restarts",
        "2",
        "--ranks",
        "2,1",
        "--launch",
        f"{launch} {{ranks}} {worker}",
        *SMALL,
        f"data.path={data}",
        f"run_dir={run}",
        "train.max_steps=4",
        "checkpoint.every=2",
    )
    result = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout + result.stderr
    ours = [line for line in result.stderr.splitlines() if line.startswith("celo2-pretrain: ")]
    assert ours[-1] == "celo2-pretrain: finished after 2 restart(s)"
    failed = [line for line in ours if "the run failed" in line]
    assert len(failed) == 2 and all("from step_00000002" in line for line in failed), failed
    assert "with 2 rank(s)" in failed[0] and "with 1 rank(s)" in failed[1]
    assert "resuming at step 2" in result.stdout and "number of ranks 2 -> 1" in result.stdout
    assert [record["step"] for record in read_metrics(run) if "loss" in record] == [1, 2, 3, 4]
    worlds = [json.loads(line)["world_size"] for line in (run / "origin.jsonl").read_text().splitlines()]
    assert worlds == [2, 1]
