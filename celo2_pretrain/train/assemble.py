"""From a prepared run to one that can take steps: the ranks meet, DeepSpeed makes its engine, a checkpoint is loaded."""

import json
import shutil
from pathlib import Path

import deepspeed
import deepspeed.comm as dist
import torch

from celo2_pretrain.common.console import print_line
from celo2_pretrain.common.durable import write_atomically
from celo2_pretrain.config import Config, dump_config
from celo2_pretrain.optimizer.state.collective import gather
from celo2_pretrain.train.checkpoints import checkpoint, select
from celo2_pretrain.train.faults.failures import join_and_look
from celo2_pretrain.train.faults.run_lock import InUse, RunLock
from celo2_pretrain.train.faults.stop import Agreement, StopRequests
from celo2_pretrain.train.faults.watchdog import Watchdog, forget
from celo2_pretrain.train.guard import Guard, guarded
from celo2_pretrain.train.rates import Rates
from celo2_pretrain.train.record.insight import Insight
from celo2_pretrain.train.record.metrics import Metrics
from celo2_pretrain.train.record.peak_flops import Peak, peak_of
from celo2_pretrain.train.record.profiler import Profiler
from celo2_pretrain.train.record.provenance import remove_origin, write_origin
from celo2_pretrain.train.record.trackers import open_trackers
from celo2_pretrain.train.start import take_over
from celo2_pretrain.train.start.preflight import check_ranks
from celo2_pretrain.train.start.prepare import Prepared, set_seeds
from celo2_pretrain.train.trainer import Trainer


def assemble(run: Prepared, requests: StopRequests, watchdog: Watchdog, lock: RunLock) -> Trainer:
    """Every rank calls it. An old run in the folder is replaced only when nothing can fail any more."""
    config, start = run.config, run.start
    meet(run, lock)
    peak = peak_of(config, torch.device(deepspeed.accelerator.get_accelerator().current_device_name()))
    make_run_dir(config.run_dir, lock)
    watchdog.begin()
    agreement = Agreement(requests, run.world_size)
    converted = None
    if start.take_over:
        watchdog.beat(f"taking over {start.checkpoint}")
        run.print_line(f"taking over {start.checkpoint}")
        converted = take_over.convert(start.take_over, start.checkpoint, config, run.optimizer)
    engine = make_engine(run)
    rates = Rates(engine.optimizer)  # before a checkpoint brings its own
    # Before the seeds: trackers may draw random numbers.
    trackers = open_trackers(config, start.step if start.own else 0) if run.rank == 0 else []
    set_seeds(config.train.seed + start.step, run.rank)
    if converted:
        take_over.load(start.take_over, engine, converted)
    elif start.checkpoint:
        watchdog.beat(f"loading {start.checkpoint}")
        run.print_line(f"loading {start.checkpoint}")
        checkpoint.load(engine, start.checkpoint, bool(start.other_world))
    if run.rank == 0:
        start_run_dir(config, run.ds_config, run.world_size, start.checkpoint if start.own else None, peak)
    dist.barrier()

    metrics = Metrics(config.run_dir, start.step, config.train.max_steps, run.rank == 0, trackers)
    guarded(engine)
    guard = Guard(
        engine,
        run.optimizer,
        config,
        start.extra.get("guard"),
        None if start.take_over else start.checkpoint,  # AdamW's
        metrics.print_line,
        lambda: watchdog.beat("looking for a checkpoint to go back to"),
    )
    insight = Insight(engine, run.optimizer, config, run.parameters, run.flops_per_token, peak)
    announce(run, metrics)
    return Trainer(
        engine,
        rates,
        run.learning_rate,
        config,
        run.loader,
        run.val_loader,
        metrics,
        run.description,
        insight,
        Profiler(config, run.rank),
        guard,
        watchdog,
        agreement,
        start.step,
        start.samples,
    )


def meet(run: Prepared, lock: RunLock) -> None:
    """Join the ranks, and look at what they can find out only together."""
    lock.take()  # if the folder is there yet: another run's files must not be touched
    join_and_look(run.config.run_dir)
    check_ranks(run.config, run.mixture.index)
    if run.start.checkpoint and not run.start.verified:
        run.print_line(f"reading {run.start.checkpoint}, to see whether it is whole")
        select.verify(run.start.checkpoint)


def make_engine(run: Prepared) -> deepspeed.DeepSpeedEngine:
    engine, _, _, _ = deepspeed.initialize(model=run.model, optimizer=run.optimizer, config=run.ds_config)
    if run.config.model.compile:
        engine.compile()
    return engine


def announce(run: Prepared, metrics: Metrics) -> None:
    """Say what begins."""
    config, start, size = run.config, run.start, run.config.train
    metrics.print_line(
        f"{f'resuming at step {start.step}' if start.checkpoint else 'training'}: {run.model.config.model_type} with "
        f"{run.parameters / 1e6:.1f} M parameters, {config.optimizer.name}, ZeRO-{size.zero_stage}, {size.precision}, "
        f"{run.world_size} rank(s), {size.global_batch_size * config.model.context:,} tokens a step, "
        f"{run.loader.count:,} windows"
    )
    if run.changed_schedule:
        metrics.print_line(run.changed_schedule)
    if start.other_world:
        metrics.print_line(f"going on in another world ({', '.join(start.other_world)}): equal to round-off, not bit for bit")


def make_run_dir(run_dir: str, lock: RunLock) -> None:
    """Have the folder and its lock, on all ranks. Raises InUse on all of them: another run may have begun there meanwhile."""
    taken = None
    if lock.rank == 0:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        try:
            lock.take()
        except InUse as error:
            taken = str(error)
        else:
            forget(Path(run_dir))
    if taken := gather(taken)[0]:
        raise InUse(taken)


def start_run_dir(config: Config, ds_config: dict, world_size: int, resume_from: Path | None, peak: Peak) -> None:
    """Record what is about to run: a new run, or this folder's own from checkpoint `resume_from` on.

    An old run goes only now: the trackers are open, the engine is made and has loaded what it goes on from.
    """
    folder = Path(config.run_dir)
    if resume_from:
        checkpoint.go_on_from(resume_from, print_line)
    else:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        remove_origin(folder)
    write_atomically(folder / "config.yaml", dump_config(config))
    write_atomically(folder / "deepspeed.json", json.dumps(ds_config, indent=1) + "\n")
    write_origin(folder, world_size, peak)
