"""A driver that a test talks to while it runs."""

import os
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

from support import warm
from support.processes import environment

TIMEOUT = 600  # seconds


class Driver:
    """A running driver whose output is read line by line; it is killed at the end, whatever happens.

    Args:
        arguments: of `celo2-pretrain`, in a process of its own that starts at once; or none, and
        line: the command line of a launcher.
    """

    def __init__(self, *arguments: str, line: list[str] | None = None):
        self.folder, self.output, self.ended = tempfile.TemporaryDirectory(), "", False
        pipe = Path(self.folder.name, "output")
        os.mkfifo(pipe)
        more = environment(PYTHONUNBUFFERED="1")
        reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        if line is None:
            process = warm.fork(warm.cli, *arguments, environment=more, output=pipe)
            self.pid, self._wait = process.pid, lambda: process.join() or process.exitcode
        else:
            with open(pipe, "w") as file:
                child = subprocess.Popen(
                    line,
                    env=more,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    preexec_fn=warm.default_signals,
                    start_new_session=True,
                )
            self.pid, self._wait = child.pid, child.wait
        self.lines = open(pipe)  # waits for the writer
        os.close(reading)
        self.timer = threading.Timer(TIMEOUT, self.kill)
        self.timer.start()

    def kill(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def send(self, number: int) -> None:
        """A signal to the process that was started."""
        os.kill(self.pid, number)

    def read_until(self, text: str) -> str:
        """The line that has `text` in it."""
        for line in self.lines:
            self.output += line
            if text in line:
                return line
        raise AssertionError(f"the driver ended without {text!r}:\n{self.output}")

    def end(self) -> int:
        """The exit code, once the driver has ended."""
        self.output += self.lines.read()
        self.ended = True
        return self._wait()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.timer.cancel()
        self.kill()
        if not self.ended:
            self._wait()
        self.lines.close()
        self.folder.cleanup()
