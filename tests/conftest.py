"""Shared by the tests: the reference trajectories of the authors' implementation (tests/golden/README.md)."""

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from support import fuzz, warm
from support.paths import TESTS

GOLDEN = TESTS / "golden/celo2_reference.npz"
MOST_CPU_SECONDS = 20.0  # of a test without the mark `slow`
TOLERATED = 2.0  # times as many: the same test takes more beside others
LOOP_SECONDS = 0.25  # of `slowness` on the machine that the limit is meant for
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def pytest_addoption(parser) -> None:
    parser.addoption("--everything", action="store_true", help="run the tests that are marked slow, too")


def pytest_configure(config) -> None:
    fuzz.EVERYTHING = config.getoption("everything")


def pytest_collection_modifyitems(config, items) -> None:
    """Leave out what is marked slow, unless asked for by `--everything`, `-m`, or the test's own name."""
    if config.getoption("everything") or config.option.markexpr or any("::" in argument for argument in config.args):
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("slow")])
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_collection_finish(session) -> None:
    """Let the process that all others are forked from import while the first tests run."""
    option = session.config.option
    runs_no_tests = option.collectonly or (getattr(option, "numprocesses", 0) and not hasattr(session.config, "workerinput"))
    if not runs_no_tests and any(
        item.get_closest_marker("multiprocess") or "data" in item.fixturenames for item in session.items
    ):
        warm.start()


def cpu_seconds() -> float:
    """Of this process and of those that the tests in it have started and waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system + sum(warm.cpu_seconds.values())


def slowness() -> float:
    """How many times as long as the machine that the limit is meant for this one computes; at least 1."""
    before = time.process_time()
    sum(k * k for k in range(3_000_000))
    return max((time.process_time() - before) / LOOP_SECONDS, 1.0)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    """A test that computes for more than 20 seconds has the mark `slow`. Its seconds depend little on what else runs."""
    before = cpu_seconds()
    outcome = yield
    spent = cpu_seconds() - before
    slow = item.get_closest_marker("slow") or os.environ.get("TRITON_INTERPRET") == "1"  # its parent is marked
    if slow or outcome.excinfo is not None or spent <= TOLERATED * MOST_CPU_SECONDS:
        return
    if spent > TOLERATED * MOST_CPU_SECONDS * slowness():
        outcome.force_exception(AssertionError(f"{item.nodeid} computed for {spent:.0f} s: mark it slow, or make it smaller"))


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
    with np.load(GOLDEN) as file:
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
    before = {number: signal.getsignal(number) for number in warm.SIGNALS}
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
