"""A sweep that is interrupted lets its run save, and says that the same command goes on."""

import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from celo2_pretrain.cli import main

from support.processes import command, environment
from support.warm import default_signals

# It saves a second after Ctrl-C, and says so before and after.
SAVING = """
import os, signal, sys, time
def save(*_):
    print("saving", flush=True)
    time.sleep(1)
    print("saved", flush=True)
    open("saved", "w").close()
    sys.exit(75)
signal.signal(signal.SIGINT, save)
print("training", flush=True)
time.sleep(100)
"""


def test_ctrl_c_waits_for_the_run_to_save(tmp_path):
    (tmp_path / "driver.py").write_text(SAVING)
    line = command("sweep", "--out", "out", "--lrs", "1e-3,1e-2", "--launch", f"{sys.executable} -S driver.py")
    process = subprocess.Popen(
        line,
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=default_signals,
    )
    timer = threading.Timer(60, process.kill)
    timer.start()
    told = ""
    while "training" not in told:
        told += process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    told += process.stdout.read()
    timer.cancel()
    assert process.wait() == 130 and (tmp_path / "saved").exists(), told
    assert "lr=0.001 | saved\n" in told and "Traceback" not in told and "lr=0.01" not in told, told
    assert told.endswith("stopped in the run with lr=0.001: the same command goes on\n"), told
    assert (tmp_path / "out/lr=0.001.log").read_text() == "training\nsaving\nsaved\n"


@pytest.mark.parametrize(
    "code, status, message",
    [
        ("sys.exit(75)", 75, "celo2-pretrain: stopped in the run with lr=0.001: the same command goes on"),
        (
            "sys.stdout.buffer.write(b'\\xff\\xfe error: why \\xe4\\n'); sys.exit(1)",
            2,
            "the run with lr=0.001 failed (why \ufffd); its output is in out/lr=0.001.log",
        ),
    ],
)
def test_how_a_run_ended_is_told(tmp_path, monkeypatch, capfd, code, status, message):
    monkeypatch.chdir(tmp_path)
    launch = shlex.join([sys.executable, "-S", "-c", f"import sys; {code}"])
    assert main(["sweep", "--out", "out", "--lrs", "1e-3", "--launch", launch]) == status
    assert message in capfd.readouterr().err and Path("out/lr=0.001.log").exists()
