"""Processes that start at once: forks of one process in which everything has been imported (`preload.py`)."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from support.paths import ROOT, TESTS

PR_SET_PDEATHSIG = 1
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["support.preload"])

cpu_seconds: dict[int, float] = {}  # that each of these processes has computed, as far as `watch` has seen


def start() -> None:
    """Start the process that forks, if it isn't there. Python has one for all uses of "forkserver": the first start stays."""
    with mock.patch.dict(
        os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(TESTS)]), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu"
    ):  # what it imports reads these
        ensure_running()


def fork(
    call: Callable[..., Any],
    *arguments: Any,
    environment: dict[str, str],
    output: Path,
    errors: Path | None = None,
    folder: Path | None = None,
) -> multiprocessing.Process:
    """Run `call(*arguments)` in a new process; its `exitcode` is what the call returns.

    What it prints goes to the file or FIFO `output`, and what it writes to standard error to `errors`, if given. It begins
    in `folder`, or in this process's. It leads a session of its own and has the signal handlers of a program started in a
    terminal.
    """
    start()
    process = context.Process(
        target=_run, args=(call, arguments, environment, output, errors or output, folder or os.getcwd())
    )
    process.start()
    return process


def watch(processes: list[multiprocessing.Process]) -> None:
    """Note what these processes have computed so far."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            cpu_seconds[process.pid] = sum(psutil.Process(process.pid).cpu_times()[:2])


def cli(*arguments: str) -> int:
    """`celo2-pretrain` with these arguments."""
    from celo2_pretrain.cli import main

    sys.argv = ["celo2-pretrain", *arguments]
    return main(list(arguments))


def script(path: Path, *arguments: str) -> int:
    """`python path`, with these arguments."""
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")
    return 0


def default_signals() -> None:
    """What a process started in a terminal has (one started in the background by a script ignores SIGINT, by nohup SIGHUP)."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _run(
    call: Callable[..., Any], arguments: tuple, environment: dict[str, str], output: Path, errors: Path, folder: Path
) -> None:
    import support.preload  # noqa: F401  (it is there already, unless the import failed: then this says how)

    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing outlives the tests
    default_signals()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as Python sets it at its start
    for number, stream, path in ((1, sys.stdout, output), (2, sys.stderr, errors)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
        stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.exit(call(*arguments) or 0)
