"""Kills a training again and again with -9, each time at another call of a function, and compares its end with a run that
nobody killed. One rank; a fork each, so that nothing is imported twice.

    kill_worker.py DATA FOLDER KILLS key=value …     prints a line for each kill, and fails where the ends differ
"""
import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path

import torch
from state_digest import digests

from celo2_pretrain.cli import quiet_libraries

quiet_libraries()

from deepspeed.accelerator import get_accelerator  # noqa: E402

from celo2_pretrain.train import loop  # noqa: E402
from celo2_pretrain.train.config import load_config  # noqa: E402
from celo2_pretrain.train.metrics import read_metrics  # noqa: E402

STEPS = 60


class Counter:
    """Counts the calls of functions, Python's and C's, and kills this process at call number `at`."""

    def __init__(self, at: float):
        self.at, self.count = at, 0

    def __call__(self, frame, event, argument) -> None:
        if event == "call" or event == "c_call":
            self.count += 1
            if self.count >= self.at:
                os.kill(os.getpid(), signal.SIGKILL)


def attempt(config, log: Path, at: float, whole: bool) -> tuple[bool, list[int]]:
    """Train in a fork, from the newest checkpoint on, to the end or to call number `at`: of all, or of the loop's.

    Returns: whether it came to its end; then also the calls before the loop, to the first checkpoint's end, and in all.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(log, "a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            counter, steps, save, saved = Counter(at), loop.run_steps, loop.checkpoint.save, []

            def saving(*arguments):
                found = save(*arguments)
                saved.append(counter.count)
                return found

            if whole:
                sys.setprofile(counter)

            def counted(*arguments):
                before = counter.count
                sys.setprofile(counter if whole or at < float("inf") else None)  # it makes Python slow
                try:
                    return steps(*arguments)
                finally:
                    sys.setprofile(counter if whole else None)
                    os.write(writer, json.dumps([before, saved[0], counter.count]).encode())

            loop.run_steps, loop.checkpoint.save = counted, saving
            loop.train(config, resume="auto")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as file:
        told = file.read()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, log.read_text()[-4000:]
    return not os.WIFSIGNALED(status), json.loads(told) if told else []


def trajectory(run: str) -> list[tuple]:
    return [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("val_loss"))
            for r in read_metrics(run) if "loss" in r or "val_loss" in r]


def main(data: str, folder: str, kills: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    get_accelerator().is_fp16_supported = lambda: True  # slow on a CPU, but it computes
    Path(folder).mkdir(parents=True, exist_ok=True)
    config = {name: load_config(None, [f"data.path={data}", f"run_dir={folder}/{name}", f"train.max_steps={STEPS}", *overrides])
              for name in ("whole", "killed")}
    ended, (start, first, end) = attempt(config["whole"], Path(folder, "whole.log"), float("inf"), whole=True)
    assert ended
    # Past the first step, which costs more calls, and up to two steps more.
    most = first - start + 1.5 * (end - first) / (STEPS - 1)
    done, log, choose = 0, Path(folder, "killed.log"), random.Random(" ".join(overrides))
    while done < int(kills):
        whole = done % 8 == 7  # also while it starts, reads the checkpoint and clears away
        at = choose.uniform(1, start if whole else most)
        ended, _ = attempt(config["killed"], log, at, whole)
        assert not ended, f"finished after {done} kills: more steps are needed"
        done += 1
        there = sorted(path.name for path in Path(folder, "killed", "checkpoints").glob("*"))
        print(f"kill {done}: {'start' if whole else 'loop'}, call {at:.0f}: {' '.join(there)}", flush=True)
    ended, _ = attempt(config["killed"], log, float("inf"), whole=False)
    assert ended
    last = f"checkpoints/step_{STEPS:08d}"
    one, other = digests(Path(folder, "whole", last)), digests(Path(folder, "killed", last))
    assert one == other, [name for name in one if one[name] != other.get(name)]
    assert one != digests(Path(folder, "whole", f"checkpoints/step_{STEPS - 1:08d}"))
    assert trajectory(f"{folder}/whole") == trajectory(f"{folder}/killed")
    print(f"{len(one)} values are the same", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
