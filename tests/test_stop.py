"""How a run is asked to stop: by the stop file and by signals, of a rank or of its supervisor, without a training."""
import os
from pathlib import Path

import pytest
from test_restarts import supervised  # noqa: F401

from celo2_pretrain.train import restarts
from celo2_pretrain.train.errors import Stopped
from celo2_pretrain.train.stop import Agreement, StopRequests


@pytest.mark.parametrize("when", ["just before a failure", "between two starts"])
def test_a_stop_file_is_not_lost_between_two_starts(supervised, when):
    stop = supervised.run_dir / "STOP"
    line = "save(2); (run_dir / 'STOP').touch(); sys.exit(1)"
    if when == "between two starts":
        restarts.FIRST_WAIT = 5  # the fixture sets it back
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
    monkeypatch.setenv(restarts.SINCE, (tmp_path / "since").read_text())
    began, stop = float((tmp_path / "since").read_text()), tmp_path / "STOP"
    for age, asked in ((5, False), (-5, True)):
        stop.touch()
        os.utime(stop, (began - age, began - age))
        assert StopRequests(stop, 0).asked() == asked and stop.exists() == asked
    assert capfd.readouterr().err == f"celo2-pretrain: removed {stop}, which is older than this run: to stop it, make the " \
                                     "file again\n"
    monkeypatch.delenv(restarts.SINCE)  # without a supervisor: than its own process
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
