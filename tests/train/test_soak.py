"""The short form of benchmarks/soak.py: the driver on two ranks keeps its memory, its files and its checkpoints."""

import subprocess
import sys

import pytest

from support.paths import ROOT
from support.processes import environment


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_short_run_holds_what_the_long_one_promises(data, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/soak.py"), "--steps", "200", "--data", data, "--out", str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("held") for line in lines) == 7 and "200 steps, none left out" in done.stdout
    assert (tmp_path / "soak.png").stat().st_size > 0 and len((tmp_path / "soak.csv").read_text().splitlines()) > 2
