"""A driver that a test talks to while it runs."""
import os
import signal
import subprocess
import threading

from processes import environment


def default_signals() -> None:
    """What a process started in a terminal has (one started in the background by a script ignores SIGINT, by nohup SIGHUP)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)


class Driver:
    """A running driver whose output is read line by line; it is killed at the end, whatever happens."""

    def __init__(self, line: list[str], **more: str):
        self.process = subprocess.Popen(
            line, env=environment(PYTHONUNBUFFERED="1", **more), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=default_signals, start_new_session=True)
        self.output = ""
        self.timer = threading.Timer(1500, self.kill)
        self.timer.start()

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def read_until(self, text: str) -> str:
        """The line that has `text` in it."""
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return line
        raise AssertionError(f"the driver ended without {text!r}:\n{self.output}")

    def end(self) -> int:
        self.output += self.process.stdout.read()
        return self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.timer.cancel()
        self.kill()
        self.process.wait()
