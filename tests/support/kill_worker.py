"""Kills a training again and again with -9, each time at another call of a function, and compares its end with a run that
nobody killed. The ranks are forks of this process, so that nothing is imported twice.

    kill_worker.py DATA FOLDER RANKS KILLS key=value …     prints a line for each kill, and fails where the ends differ
"""

import ctypes
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import transformers.models.gpt2.modeling_gpt2  # noqa: F401  (imported late: here it is once, for all forks)

from celo2_pretrain.cli import quiet_libraries

from support.state_digest import digests

quiet_libraries()

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (late too, with all of torch's compiler)
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.torch import build_shm_op

from celo2_pretrain.config import load_config
from celo2_pretrain.train import finish, loop
from celo2_pretrain.train.checkpoints import checkpoint
from celo2_pretrain.train.faults.failures import ending_all_ranks
from celo2_pretrain.train.record.metrics import read_metrics
from celo2_pretrain.train.start.ranks import announce_compilation, free_port

WHERE = ("loop", "save", "loop", "start", "loop", "save", "loop", "loop")  # one kill after the other, again and again
NEVER = float("inf")
PATIENCE = 10  # seconds for the other ranks to end when one was killed; then they are killed, as a launcher does
PR_SET_PDEATHSIG = 1


class Counter:
    """Counts the calls of functions, Python's and C's, and kills this process at call number `at`."""

    def __init__(self, at: float):
        self.at, self.count = at, 0

    def __call__(self, frame, event, argument) -> None:
        if event == "call" or event == "c_call":
            self.count += 1
            if self.count >= self.at:
                os.kill(os.getpid(), signal.SIGKILL)


def train_counted(config, where: str, at: float) -> dict[str, int]:
    """Train from the newest checkpoint on, to the end or to call number `at`: of all ("start"), of those since the loop
    began ("loop"), or of those since the second checkpoint of this attempt was begun ("save").

    Returns the numbers of calls: before the loop, until the first checkpoint was there, in the second one, and in all.
    """
    counter, steps, save, saves, told = Counter(at), loop.run_steps, checkpoint.save, [], {}

    def count(when: str) -> None:  # it makes Python slow
        if where == when and at < NEVER:
            sys.setprofile(counter)

    def saving(*arguments):
        if len(saves) == 1:
            count("save")
        before = counter.count
        found = save(*arguments)
        saves.append((before, counter.count))
        return found

    def counted(*arguments):
        told["start"] = counter.count
        count("loop")
        return steps(*arguments)

    loop.run_steps, checkpoint.save = counted, saving
    if where == "start":
        sys.setprofile(counter)
    with ending_all_ranks(config.run_dir):
        loop.train(config, resume="auto")
    sys.setprofile(None)
    if len(saves) > 1:
        told |= {"first": saves[0][1], "save": saves[1][1] - saves[1][0], "end": saves[-1][1]}
    return told


def fork_rank(config, log: Path, where: str, at: float, place: dict[str, str]) -> tuple[int, int]:
    """Train in a fork with these launcher's variables; its process id, and where it writes what `train_counted` returns."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank is left behind when this test is given up
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ |= place
        os.write(writer, json.dumps(train_counted(config, where, at)).encode())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def attempt(config, log: Path, where: str, at: list[float]) -> list[dict[str, int]] | None:
    """Train on as many ranks as `at` has elements; what `train_counted` returned on each, None when they were killed."""
    world = str(len(at))
    shared = {"WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = dict(
        fork_rank(config, log, where, call, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, call in enumerate(at)
    )
    ended, until = {}, None
    while len(ended) < len(ranks):
        for child in ranks.keys() - ended.keys():
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                ended[child] = os.waitstatus_to_exitcode(status)
        if until is None and any(ended.values()):
            until = time.monotonic() + PATIENCE
        if until is not None and time.monotonic() > until:
            for child in ranks.keys() - ended.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    told = []
    for reader in ranks.values():
        with os.fdopen(reader) as file:
            told.append(file.read())
    if -signal.SIGKILL in ended.values():
        return None
    assert not any(ended.values()), log.read_text()[-4000:]
    return [json.loads(text) for text in told]


def trajectory(run: str) -> list[tuple]:
    return [
        (r["step"], r.get("loss"), r.get("grad_norm"), r.get("val_loss"))
        for r in read_metrics(run)
        if "loss" in r or "val_loss" in r
    ]


def main(data: str, folder: str, world: str, kills: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    get_accelerator().is_fp16_supported = lambda: True  # slow on a CPU, but it computes
    finish.plot_loss = lambda *arguments: None  # it comes after all that is compared, and takes longer than that
    os.environ.setdefault("RANK", "0")  # for the announcement
    announce_compilation()
    build_shm_op()  # a rank killed in it would leave torch's lock in the cache that all programs share: the next would wait
    Path(folder).mkdir(parents=True, exist_ok=True)
    config = {
        name: load_config(None, [f"data.path={data}", f"run_dir={folder}/{name}", *overrides]) for name in ("whole", "killed")
    }
    steps, nobody = config["whole"].train.max_steps, [NEVER] * int(world)
    calls = attempt(config["whole"], Path(folder, "whole.log"), "start", nobody)
    assert calls
    most = {
        "start": [1.35 * rank["start"] for rank in calls],  # reading a checkpoint comes to it
        # Past the first step, which costs more calls, and up to two steps more.
        "loop": [rank["first"] - rank["start"] + 1.5 * (rank["end"] - rank["first"]) / (steps - 1) for rank in calls],
        "save": [rank["save"] for rank in calls],
    }
    log, choose = Path(folder, "killed.log"), random.Random(" ".join(overrides))
    for done in range(int(kills)):
        where, part = WHERE[done % len(WHERE)], choose.random()
        die = choose.sample(range(int(world)), choose.randint(1, int(world)))
        at = [1 + part * calls if rank in die else NEVER for rank, calls in enumerate(most[where])]
        assert not attempt(config["killed"], log, where, at), f"finished after {done} kills: more steps are needed"
        there = sorted(path.name for path in Path(folder, "killed", "checkpoints").glob("*"))
        print(f"kill {done + 1}: {where}, ranks {sorted(die)}, call {min(at):.0f}: {' '.join(there)}", flush=True)
    assert attempt(config["killed"], log, "loop", nobody)
    last = f"checkpoints/step_{steps:08d}"
    one, other = digests(Path(folder, "whole", last)), digests(Path(folder, "killed", last))
    assert one == other, [name for name in one if one[name] != other.get(name)]
    assert one != digests(Path(folder, "whole", f"checkpoints/step_{steps - 1:08d}"))
    assert trajectory(f"{folder}/whole") == trajectory(f"{folder}/killed")
    print(f"{len(one)} values are the same", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
