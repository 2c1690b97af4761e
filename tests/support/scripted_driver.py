"""A stand-in for a launcher and its driver, which imports nothing: scripted_driver.py SCRIPT, then train's arguments.

SCRIPT holds a line of Python for each start; beside it this process leaves what it was given, a line for each start. The
lines may use what is defined here, `folder` (of SCRIPT) and `run_dir`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

script = Path(sys.argv[1])
folder = script.parent
run_dir = Path(next(text for text in reversed(sys.argv) if text.startswith("run_dir=")).removeprefix("run_dir="))


def save(step):
    manifest = run_dir / "checkpoints" / f"step_{step:08d}" / "manifest.json"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text("")
    name(step)


def name(step):
    """As a start does that goes on from this step."""
    (run_dir / "checkpoints" / "latest").write_text(f"step_{step:08d}")


def note(code):
    """As a rank does whose launcher ends with another code."""
    with open(os.environ["CELO2_SUPERVISOR"], "a") as file:
        file.write(f"{code}\n")


def python(code, **environment):
    return subprocess.Popen([sys.executable, "-S", "-c", code], env=os.environ | environment)


def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.05)


def gone(pid):
    """Also when nobody has asked for its exit code yet."""
    path = Path("/proc", pid, "stat")
    return not path.exists() or path.read_text().rpartition(") ")[2].startswith("Z")


def supervisor(number):
    os.kill(os.getppid(), number)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


starts = folder / "starts.jsonl"
with open(starts, "a") as file:
    file.write(json.dumps(sys.argv[2:]) + "\n")
exec(script.read_text().splitlines()[len(starts.read_text().splitlines()) - 1])
sys.exit(0)
