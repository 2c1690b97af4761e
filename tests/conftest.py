"""Shared by the tests: the reference trajectories of the authors' implementation (tests/data/README.md)."""
import contextlib
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

DATA = Path(__file__).parent / "data"
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def mapped_buffers() -> set[str]:
    """Names of DeepSpeed's buffers in /dev/shm that some process has mapped."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            found |= set(re.findall(r"/dev/shm/(deepspeed_allreduce_buffer_\S+)", maps.read_text()))
        except OSError:  # it has ended
            continue
    return found


def pytest_runtest_teardown(item) -> None:
    """Remove the buffers of ranks that are gone: DeepSpeed leaves 66 MB a rank in memory, and the tests start hundreds."""
    if item.get_closest_marker("multiprocess") or item.get_closest_marker("slow"):
        mapped = mapped_buffers()
        for path in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"):
            with contextlib.suppress(OSError):
                if path.name not in mapped and time.time() - path.stat().st_mtime > 60:
                    path.unlink()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Forget the launcher's variables of a training in this process: a test's processes would take its port."""
    for name in LAUNCHED:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """All arrays of `celo2_reference.npz` by their keys, e.g. golden["celo2_official/t0/p1"]."""
    with np.load(DATA / "celo2_reference.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    """A small corpus as tokens; tests read it only."""
    from celo2_pretrain.cli import main

    out = str(tmp_path_factory.mktemp("data") / "tokens")
    assert main(["prepare", "--stdlib", "--max-mb", "0.3", "--vocab-size", "512", "--out", out]) == 0
    return out


@pytest.fixture(autouse=True)
def signals_as_before():
    """What a test makes of signals in this process ends with it: processes that later tests start would inherit it."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if handler is not None:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """One torch thread for the test, as the processes that it compares with have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
