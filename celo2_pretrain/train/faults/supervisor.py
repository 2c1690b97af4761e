"""`train --max-restarts N`: start the driver, and start it again from its last checkpoint when it fails.

It does not start again after these exit codes:
    0 and the last step's checkpoint   finished      75    stopped on request
    2                                  wrong input   130   interrupted
Launchers replace the exit codes of their ranks. Therefore each rank also writes its code to the file that CELO2_SUPERVISOR
names. The same variable identifies all processes that belong to a start.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from celo2_pretrain.common.console import print_notice
from celo2_pretrain.common.errors import EXIT_HUNG, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from celo2_pretrain.config import Config, accumulation_steps
from celo2_pretrain.train.faults.exit_code import NOTES
from celo2_pretrain.train.faults.signals import INTERRUPTED, SINCE, leave_lost_terminal, not_ignored, stop_file_is_new

FIRST_ERROR = "error_first.txt"  # failures.FIRST; to import it would load DeepSpeed into a process that only waits
FIRST_WAIT, LONGEST_WAIT = 5.0, 300.0  # seconds before a restart; doubled as long as no start brings a new checkpoint
GRACE_SECONDS = 20.0  # for the other ranks, when the launcher has ended
LOOK_SECONDS = 0.5


def parse_ranks(text: str | None, launch: str | None, config: Config) -> list[int]:
    """`--ranks 8,8,4` as numbers; [] if not given. Raises UserError if bad, or if the configuration can't use them."""
    if (text is None) != ("{ranks}" not in (launch or "")):
        raise UserError(
            "--ranks and {ranks} in --launch need each other, for example --ranks 8,4 --launch "
            "'deepspeed --no_local_rank --num_gpus {ranks} launch/pretrain.py'"
        )
    if text is None:
        return []
    try:
        ranks = [int(part) for part in text.split(",")]
    except ValueError:
        ranks = [0]
    if min(ranks) < 1:
        raise UserError(f"--ranks {text}: give whole numbers above 0, separated by commas, for example --ranks 8,8,4")
    for number in ranks:
        accumulation_steps(config, number)
    if len(set(ranks)) > 1 and not config.checkpoint.any_world:
        raise UserError(f"--ranks {text}: checkpoint.any_world=false saves nothing that another number of ranks can resume")
    return ranks


class StopSignals:
    """Context: records signals that ask this process to stop. Also knows the stop file, which the ranks read and remove."""

    def __init__(self, file: Path):
        self.file, self.since = file, time.time()

    def to_stop(self) -> bool:
        """Whether to stop: a signal came, or a stop file that no rank has seen because none was running."""
        return bool(self.names or stop_file_is_new(self.file, self.since))

    def forget_file(self) -> None:
        if stop_file_is_new(self.file, self.since):
            with contextlib.suppress(OSError):
                self.file.unlink()

    def __enter__(self):
        self.names: list[str] = []
        self.before = {number: signal.signal(number, self._hear) for number in not_ignored()}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _) -> None:
        leave_lost_terminal()
        self.names.append(signal.Signals(number).name)


class DriverStart:
    """One start of the driver: all processes that `command` starts."""

    def __init__(self, command: list[str], notes: Path, supervised_since: float):
        self.notes, self.since = notes, time.time()
        notes.write_text("")
        self.signalled: set[int] = set()
        self.saw_ranks = False
        try:  # a process group of its own: Ctrl-C reaches this process only, which asks the ranks
            env = os.environ | {NOTES: str(notes), SINCE: str(supervised_since)}
            self.process = subprocess.Popen(command, env=env, process_group=0)
        except OSError as error:
            raise UserError(f"--launch {shlex.join(command)!r}: {error.strerror}: give the command of a driver") from None

    def living(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(NOTES) == str(self.notes):
                    found.append(process)
        return found

    def ask(self) -> None:
        """Send SIGTERM once to each rank. Launchers don't get it: they kill their ranks seconds later, saved or not."""
        parents, ranks = {}, set()
        for process in self.living():
            with contextlib.suppress(psutil.Error):
                parents[process.pid] = process.ppid()
                if "RANK" in process.environ():
                    ranks.add(process.pid)
        self.saw_ranks |= bool(ranks)
        if ranks:
            targets = {pid for pid in ranks if parents[pid] not in ranks}
        else:  # a driver without a launcher, or a launcher that hasn't started its ranks yet
            targets = set() if self.saw_ranks else parents.keys() - set(parents.values())
        for pid in targets - self.signalled:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM)
        self.signalled |= targets

    def kill(self) -> None:
        while living := self.living():
            for process in living:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            self.process.poll()
            time.sleep(0.1)

    def wait(self, signals: StopSignals) -> int:
        """Wait until all processes have ended; returns the exit code of the first one."""
        told, ended = False, None
        while self.process.poll() is None or self.living():
            ended = ended or (self.process.returncode is not None and time.monotonic())
            if signals.names and not told:
                print_notice(f"{signals.names[0]}: the run is asked to save and stop; a second signal ends it at once")
                told = True
            if len(signals.names) > 1 or (ended and not signals.names and time.monotonic() - ended > GRACE_SECONDS):
                self.kill()
            elif signals.names:
                self.ask()
            time.sleep(LOOK_SECONDS)
        return self.process.returncode

    def exit_codes(self) -> set[int]:
        return {int(line) for line in self.notes.read_text().split() if line.isdecimal()}


class Checkpoints:
    """What this run has saved, from checkpoints/latest. An earlier run's checkpoints don't count.

    Uses the manifest's time: `latest` is rewritten on every resume, so its own time says nothing.
    """

    def __init__(self, run_dir: str):
        self.path = Path(run_dir, "checkpoints", "latest")
        self.old, self.new_run = self._read(), not self.path.parent.exists()

    def _read(self) -> tuple[str, int] | None:
        """The checkpoint's name and time; the time, because another checkpoint of the same step may have replaced it."""
        try:
            name = self.path.read_text().strip()
        except (OSError, ValueError):
            return None
        with contextlib.suppress(OSError, ValueError):
            return name, Path(self.path.parent, name, "manifest.json").stat().st_mtime_ns
        return name, 0

    def newest(self) -> str | None:
        found = self._read()
        return found[0] if found and found != self.old else None

    def half_saved(self) -> bool:
        """Whether this run began to save but `latest` names no checkpoint yet: it would be refused without --overwrite."""
        return self.new_run and self.path.parent.exists() and not self.newest()

    def finished(self, steps: int, auto: bool) -> bool:
        """Whether the last step's checkpoint exists. With `auto` (--resume auto) an earlier run's counts, too."""
        found = self._read()
        if found == self.old and not auto:
            return False
        number = found[0].removeprefix("step_") if found else ""
        return number.isdecimal() and int(number) >= steps


def arguments(args, run_dir: str, go_on: bool, replace: bool) -> list[str]:
    """Train's arguments for the next start.

    Args:
        args: what the command line asked for.
        go_on: resume what is in run_dir. Otherwise the command line decides about an earlier run there.
        replace: overwrite what is in run_dir, even if the command line doesn't say so.
    """
    resume, overwrite = ("auto", False) if go_on else (args.resume, args.overwrite or replace)
    out = ["--config", args.config] if args.config else []
    if args.take_over is not None:
        out += ["--take-over", args.take_over]
    if resume is not None:
        out += ["--resume", resume or run_dir]
    if overwrite:
        out.append("--overwrite")
    named = any(text.startswith("run_dir=") for text in args.overrides)
    return [*out, *args.overrides, *([] if named else [f"run_dir={run_dir}"])]


def final_exit_code(code: int, noted: set[int], asked: bool, finished: bool) -> int | None:
    """The exit code to end with; None to start again."""
    codes = noted | {code}
    if code == 0 and finished:
        return 0
    if EXIT_USER_ERROR in codes:
        return EXIT_USER_ERROR
    if asked or EXIT_STOPPED in codes:
        return EXIT_STOPPED
    return INTERRUPTED if INTERRUPTED in codes else None


def failure_reason(code: int, run_dir: str, since: float) -> str:
    """Why a start failed, as far as this process can tell."""
    number = -code if code < 0 else code - 128 if 128 < code < 192 else 256 - code if code >= 192 else 0
    names = {int(number): number.name for number in signal.Signals}
    text = f"it was killed by {names[number]}" if code < 0 and number in names else f"exit code {code}"
    if code == EXIT_HUNG:
        text += ": a rank made no progress"
    elif code == 0:
        text += " before the last step: its launcher was killed"
    elif code > 0 and number in names:
        text += f": a rank was ended by {names[number]}"
    if number == signal.SIGKILL:
        text += " (out of memory? see `dmesg`)"
    with contextlib.suppress(OSError, IndexError):
        path = Path(run_dir, FIRST_ERROR)
        if path.stat().st_mtime >= since - 1:  # file systems count in up to a second
            text += f"; {path.read_text().splitlines()[0][:300]}"  # the ranks have printed all of it
    return text


def pause(seconds: float, signals: StopSignals) -> None:
    until = time.monotonic() + seconds
    while not signals.to_stop() and time.monotonic() < until:
        time.sleep(min(LOOK_SECONDS, seconds))


def supervise(args, config: Config) -> int:
    """Train, with at most args.max_restarts restarts; returns the exit code.

    Args:
        args: of the command line: config, resume, overwrite and overrides as for `train`; launch, a driver's command that
            they are added to (None: this program); ranks, what {ranks} in it stands for, as "8,8,4": the next number is
            taken when a start has brought no new checkpoint, the last one stays.
        config: what they stand for.

    Raises UserError when the driver can't be started.
    """
    if "RANK" in os.environ:
        raise UserError(
            "--max-restarts is not for the ranks of a launcher: celo2-pretrain train --max-restarts N --launch "
            "'…' starts the launcher"
        )
    if args.max_restarts < 0:
        raise UserError(f"--max-restarts {args.max_restarts}: must be at least 0")
    ranks = parse_ranks(args.ranks, args.launch, config)
    launch = shlex.split(args.launch) if args.launch else [sys.executable, "-m", "celo2_pretrain.cli", "train"]
    checkpoints = Checkpoints(config.run_dir)
    wait, restarts = FIRST_WAIT, 0
    stop_file = Path(config.train.stop_file or Path(config.run_dir, "STOP"))
    with tempfile.TemporaryDirectory(prefix="celo2-supervisor-") as folder, StopSignals(stop_file) as signals:
        while True:
            own = checkpoints.newest()
            command = [part.replace("{ranks}", str(ranks[0])) if ranks else part for part in launch]
            half_saved = restarts > 0 and not args.overwrite and checkpoints.half_saved()
            # A run that began from another run's checkpoint must begin from that one again.
            from_another = args.take_over or args.resume not in (None, "auto")
            replace = half_saved and from_another and not any(checkpoints.path.parent.glob("step_*"))
            command += arguments(args, config.run_dir, bool(own) or (half_saved and not replace), replace)
            print_notice(f"start {restarts + 1} of at most {args.max_restarts + 1}: {shlex.join(command)}")
            start = DriverStart(command, Path(folder, f"start_{restarts + 1}"), signals.since)
            code = start.wait(signals)
            finished = checkpoints.finished(config.train.max_steps, args.resume == "auto")
            end = final_exit_code(code, start.exit_codes(), signals.to_stop(), finished)
            saved = checkpoints.newest()
            if end is None:
                failed = f"the run failed: {failure_reason(code, config.run_dir, start.since)}"
                if restarts == args.max_restarts:
                    print_notice(f"error: {failed}; --max-restarts {args.max_restarts} is used up; {how_to_resume(saved)}")
                    return code if code > 0 else 128 - code if code else 1
                if saved and saved != own:
                    wait = FIRST_WAIT
                elif len(ranks) > 1:
                    ranks = ranks[1:]
                with_ranks = f" with {ranks[0]} rank(s)" if ranks else ""
                print_notice(
                    f"{failed}; starting again in {wait:g} s{with_ranks}, "
                    f"{f'from {saved}' if saved else 'as before: it had saved nothing'}"
                )
                pause(wait, signals)
                wait, restarts = min(2 * wait, LONGEST_WAIT), restarts + 1
                if not signals.to_stop():
                    continue
                end = EXIT_STOPPED
            if end == EXIT_STOPPED:
                signals.forget_file()
                print_notice(f"stopped on request, not started again; {how_to_resume(saved)}")
            elif restarts and end == 0:
                print_notice(f"finished after {restarts} restart(s)")
            return 128 + getattr(signal, signals.names[1]) if end == EXIT_STOPPED and len(signals.names) > 1 else end


def how_to_resume(saved: str | None) -> str:
    return f"{saved} is its newest checkpoint: resume it with --resume auto" if saved else "it has saved nothing"
