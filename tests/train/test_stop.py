"""How a run is asked to stop: by the stop file and by signals, of a rank or of its supervisor, without a training."""

import os
import pty
import signal
import sys
import time
from pathlib import Path

import pytest
from test_restarts import supervised  # noqa: F401

from celo2_pretrain.common.errors import Stopped
from celo2_pretrain.train.faults import signals, supervisor
from celo2_pretrain.train.faults.stop import Agreement, StopRequests


@pytest.mark.parametrize("when", ["just before a failure", "between two starts"])
def test_a_stop_file_is_not_lost_between_two_starts(supervised, when):
    stop = supervised.run_dir / "STOP"
    line = "save(2); (run_dir / 'STOP').touch(); sys.exit(1)"
    if when == "between two starts":
        supervisor.FIRST_WAIT = 5  # the fixture sets it back
        later = f"import pathlib, time; time.sleep(1); pathlib.Path({str(stop)!r}).touch()"
        line = f"save(2); subprocess.Popen([sys.executable, '-S', '-c', {later!r}], env={{}}); sys.exit(1)"
    assert supervised(line) == 75
    assert len(supervised.starts) == 1 and not stop.exists()
    assert "stopped on request, not started again; step_00000002 is its newest checkpoint" in supervised.told


def test_a_stop_file_from_before_the_supervisor_is_left_to_the_ranks(supervised):
    supervised.run_dir.mkdir()
    stop = supervised.run_dir / "STOP"
    stop.touch()
    os.utime(stop, (1e9, 1e9))
    assert supervised("sys.exit(1)", "save(4)") == 0
    assert len(supervised.starts) == 2 and stop.exists()


def test_a_rank_obeys_a_stop_file_that_is_newer_than_its_supervisor(supervised, tmp_path, monkeypatch, capfd):
    assert supervised("(folder / 'since').write_text(os.environ['CELO2_SUPERVISOR_SINCE']); save(4)") == 0
    monkeypatch.setenv(signals.SINCE, (tmp_path / "since").read_text())
    began, stop = float((tmp_path / "since").read_text()), tmp_path / "STOP"
    for age, asked in ((5, False), (-5, True)):
        stop.touch()
        os.utime(stop, (began - age, began - age))
        assert StopRequests(stop, 0).asked() == asked and stop.exists() == asked
    assert (
        capfd.readouterr().err == f"celo2-pretrain: removed {stop}, which is older than this run: to stop it, make the "
        "file again\n"
    )
    monkeypatch.delenv(signals.SINCE)  # without a supervisor: than its own process
    os.utime(stop, (1e9, 1e9))
    assert not StopRequests(stop, 0).asked()
    stop.touch()
    assert StopRequests(stop, 0).asked()


def test_a_stop_file_that_cannot_be_removed_stops_the_run_all_the_same(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    requests = StopRequests(tmp_path / "STOP", 0)
    (tmp_path / "STOP").touch()
    assert requests.asked()
    monkeypatch.setattr(Path, "unlink", refuse)  # root may remove anything
    with pytest.raises(Stopped, match="stopped on request .the file .*STOP. at step 3"):
        Agreement(requests, 1).stop("at step 3")
    assert capsys.readouterr().err.startswith(f"celo2-pretrain: cannot remove {tmp_path / 'STOP'}: Permission denied; ")


@pytest.fixture
def defaults():
    """The signals as in a terminal, however the tests were started."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in signals.SIGNALS if number != signal.SIGINT}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_is_heard_unless_it_was_ignored_before(defaults, tmp_path, number):
    with StopRequests(tmp_path / "STOP", 0) as requests:
        requests.at_boundaries = True
        os.kill(os.getpid(), number)
        until = time.monotonic() + 20
        while not requests.asked() and time.monotonic() < until:
            time.sleep(0.01)
        assert requests.reason == number.name
    signal.signal(number, signal.SIG_IGN)
    with StopRequests(tmp_path / "STOP", 0) as requests:
        requests.at_boundaries = True
        os.kill(os.getpid(), number)
        time.sleep(0.2)
        assert not requests.asked()
    assert signal.getsignal(number) is signal.SIG_IGN


HUNG_UP = """
import sys, time
from pathlib import Path
from celo2_pretrain.train.faults.stop import StopRequests
with StopRequests(Path(sys.argv[1], "STOP"), 0) as requests:
    requests.at_boundaries = True
    print("ready", flush=True)
    while not requests.asked():
        time.sleep(0.01)
    time.sleep(0.2)  # for the line that says so
    print("step 3", flush=True)
    Path(sys.argv[1], "saved").touch()
"""


def test_a_run_whose_terminal_closes_can_still_print_and_save(defaults, tmp_path):
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-c", HUNG_UP, str(tmp_path)])
    told = b""
    while not told.endswith(b"\n"):  # or the terminal closes while that line is written
        told += os.read(terminal, 1000)
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 0 and (tmp_path / "saved").exists()
