"""metrics.jsonl is JSON, and no record of a run is worth the run."""

import errno
import json
from pathlib import Path

import pytest

from celo2_pretrain.train.record import metrics as module
from celo2_pretrain.train.record.metrics import Metrics, read_metrics

RECORD = {"loss": 5.0, "lr": 1e-3, "tokens_per_s": 100.0}


class Broken:
    def log(self, record):
        raise ConnectionError("no answer\nfrom the server")

    def close(self):
        raise ConnectionError("no answer")


@pytest.fixture
def full(monkeypatch):
    """Switches a full disk on and off: a line is cut in two then."""
    state = {"full": False}

    def opened(path, *arguments, **keys):
        file = open(path, *arguments, **keys)
        if state["full"] and Path(path).name == "metrics.jsonl":
            file.write('{"step": 1')
            file.close()
            raise OSError(errno.ENOSPC, "No space left on device")
        return file

    monkeypatch.setattr(module, "open", opened, raising=False)
    return state


def test_a_full_disk_and_a_broken_tracker_end_no_run_and_are_told_once(tmp_path, capsys, full):
    metrics = Metrics(str(tmp_path), 0, 9, True, [Broken()])
    metrics.log({"step": 1} | RECORD)
    full["full"] = True
    metrics.log({"step": 2} | RECORD)
    metrics.event({"step": 2, "event": "spike", "why": "it is told all the same"})
    full["full"] = False
    metrics.log({"step": 3} | RECORD)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3]
    metrics.rewind(2)
    metrics.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(told) == 2 and "no answer" in told[0] and "No space left on device" in told[1]


def test_what_json_has_no_word_for_is_null(tmp_path):
    metrics = Metrics(str(tmp_path), 0, 9, True)
    metrics.log({"step": 1, "grad_norm": float("inf"), "epochs": {"a": float("nan")}} | RECORD)
    metrics.event({"step": 1, "event": "left out", "why": "", "loss": float("-inf")})
    metrics.close()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["grad_norm"] is None and lines[0]["epochs"] == {"a": None} and lines[1]["loss"] is None
    assert len(read_metrics(tmp_path)) == 2


def test_the_time_left_is_right_after_a_rollback_and_when_the_clock_is_set(tmp_path, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.time, "time", lambda: 0.0)
    metrics = Metrics(str(tmp_path), 50, 100, True)
    now[0] += 120
    metrics.log({"step": 60} | RECORD)
    metrics.rewind(40)
    now[0] += 60
    metrics.log({"step": 45} | RECORD)
    assert [line.split()[-2] for line in capsys.readouterr().out.splitlines()] == ["8m00s", "11m00s"]
