"""The benchmark scripts run, and what they count is what happens."""

import pytest
import torch

from support.paths import ROOT
from support.processes import run_script

BENCHMARKS = ROOT / "benchmarks"


def run(script: str, *arguments: str) -> str:
    done = run_script(BENCHMARKS / script, *arguments, folder=BENCHMARKS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.multiprocess
def test_the_planned_bytes_are_the_bytes_handed_to_the_collectives():
    assert run("wire.py", "--check").count("planned") == 2


def test_a_spike_that_the_batch_makes_is_not_the_settings_own(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import stability

    generator = torch.Generator().manual_seed(0)
    runs = [({"seed": 0, "number": number}, 2 + 0.05 * torch.randn(600, generator=generator)) for number in range(3)]
    for _, losses in runs:
        losses[300] += 1  # a hard batch
    runs[1][1][400:460] += 1  # one spike, and it lasts
    runs[2] = (runs[2][0], torch.cat([runs[2][1][:350], torch.tensor([torch.nan])]))
    rows = stability.table(runs, steps=600)
    assert [(row["spikes"], row["own_spikes"]) for row in rows] == [(1, 0), (2, 1), (1, 0)]
    assert rows[0]["lasting_rise"] < 0.1 < 0.9 < rows[1]["lasting_rise"] < 1.1
    assert [row["final"] == float("inf") for row in rows] == [False, False, True]


@pytest.mark.parametrize("script", sorted(path.name for path in BENCHMARKS.glob("*.py") if path.name != "report.py"))
def test_every_script_says_what_it_answers(script):
    assert "?" in run(script, "--help") or "results" in run(script, "--help")
