"""Checkpoints that are written to fast storage first, and copied into the run's folder while training goes on.

    checkpoint.staging/celo2-…/   the one checkpoint that is being written or copied, so that the room taken is bounded

The copy is a thread of rank 0. It gives the checkpoint its name, and has `latest` name it, as a save without staging does.
"""

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from celo2_pretrain.common.errors import UserError, one_line
from celo2_pretrain.optimizer.state.save_load import StateError
from celo2_pretrain.train.checkpoints import manifest
from celo2_pretrain.train.start.ranks import ranks_here

WAIT_SECONDS = 60.0  # of a run that ends with an error, for the copy
POLL_SECONDS = 0.1


def check_staging(staging: str | None, world_size: int) -> None:
    """Raises UserError when `staging` can't be a folder that all ranks see, or can't be written."""
    if staging is None:
        return
    here = ranks_here(world_size)
    if here < world_size:
        raise UserError(f"checkpoint.staging={staging!r} is for ranks on one machine: {here} of {world_size} are on this one")
    try:
        Path(staging).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"checkpoint.staging={staging!r} can't be made: {error.strerror}; give a folder on fast storage, such as "
            "/dev/shm/celo2"
        ) from None
    if not os.access(staging, os.W_OK):
        raise UserError(f"checkpoint.staging={staging!r} can't be written: give a folder on fast storage that can")


def staged_folder(staging: str, run_dir: str) -> Path:
    """This run's place in the staging folder."""
    return Path(staging, f"celo2-{hashlib.sha256(os.path.abspath(run_dir).encode()).hexdigest()[:12]}")


def settle(print_line: Callable[[str], None], beat: Callable[[], None] = lambda: None) -> None:
    """Before this process leaves with an error: wait up to WAIT_SECONDS for the copy that rank 0 has under way.

    Nothing is exchanged, as the others may be anywhere. A rank without the thread looks at the folder, which goes when
    the copy ends, and stays as long: a launcher ends all ranks when one has left.
    """

    def copying() -> bool:
        return Copy.under_way.thread.is_alive() if Copy.under_way else Copy.folder is not None and Copy.folder.exists()

    until = time.monotonic() + WAIT_SECONDS
    if copying():
        print_line(f"waiting up to {WAIT_SECONDS:g} s for the checkpoint that is being copied")
    while copying() and time.monotonic() < until:
        beat()
        time.sleep(POLL_SECONDS)
    if Copy.under_way and Copy.under_way.error:
        print_line(f"warning: {Copy.under_way.final} could not be copied: {one_line(Copy.under_way.error)}")


class Copy:
    """A whole checkpoint on its way from `staged` to `temporary`; then `publish(entries)` gives it its name.

    An error of the run waits for it, on every rank and up to WAIT_SECONDS (`settle`); a process that is killed doesn't.
    """

    under_way: "Copy | None" = None  # this process's
    folder: Path | None = None  # where rank 0's is staged, once this run has saved

    def __init__(self, staged: Path, temporary: Path, final: Path, publish: Callable[[dict], None]):
        self.staged, self.temporary, self.final, self.publish = staged, temporary, final, publish
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, name=f"copy {final.name}")
        Copy.under_way = self
        self.thread.start()

    def _run(self) -> None:
        try:
            self.publish(self._copied())
        except Exception as error:
            self.error = error
            shutil.rmtree(self.temporary, ignore_errors=True)
        shutil.rmtree(self.staged, ignore_errors=True)

    def _copied(self) -> dict:
        """Copy every file, and compare what was read with the manifest; returns its entries."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        entries = manifest.structure(self.staged)["files"]
        for name, entry in entries.items():
            target = self.temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(self.staged / name, "rb") as source:
                written = manifest.write_file(target, lambda file: shutil.copyfileobj(source, file, 1 << 20))
            if written != entry:
                raise StateError(f"{name} was damaged where it lay in {self.staged}")
        return entries

    def goes_on(self, seconds: float) -> bool:
        """Whether it is still under way after so many seconds; it returns as soon as the copy has ended."""
        self.thread.join(seconds)
        return self.thread.is_alive()

    def wait(self) -> None:
        """Until the copy has ended. Raises what went wrong."""
        self.thread.join()
        Copy.under_way = None
        if self.error:
            raise self.error
