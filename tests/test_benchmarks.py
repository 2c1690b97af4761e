"""The benchmark scripts run, and what they count is what happens."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=BENCHMARKS, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.multiprocess
def test_the_planned_bytes_are_the_bytes_handed_to_the_collectives():
    assert run("wire.py", "--check").count("planned") == 2


@pytest.mark.parametrize("script", sorted(path.name for path in BENCHMARKS.glob("*.py") if path.name != "report.py"))
def test_every_script_says_what_it_answers(script):
    assert "?" in run(script, "--help") or "results" in run(script, "--help")
