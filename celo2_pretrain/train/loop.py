"""The training run, from a config to a trained model: prepare, assemble, run the steps."""

from pathlib import Path

import deepspeed.comm as dist

from celo2_pretrain.common.errors import Stopped, UserError
from celo2_pretrain.config import Config
from celo2_pretrain.train.assemble import assemble
from celo2_pretrain.train.checkpoints.staging import settle
from celo2_pretrain.train.faults import out_of_memory
from celo2_pretrain.train.faults.run_lock import RunLock
from celo2_pretrain.train.faults.stop import StopRequests
from celo2_pretrain.train.faults.watchdog import Watchdog
from celo2_pretrain.train.finish import finish
from celo2_pretrain.train.record.backend import telling_backend
from celo2_pretrain.train.start.prepare import prepare
from celo2_pretrain.train.start.ranks import world_from_environment
from celo2_pretrain.train.start.resume_command import resume_command
from celo2_pretrain.train.start.take_over import TakeOver
from celo2_pretrain.train.trainer import Trainer


def train(config: Config, resume: str | None = None, overwrite: bool = False, take_over: TakeOver | None = None) -> None:
    """Train as `config` says; every rank of the launched world calls it.

    Args:
        resume: a run folder or checkpoint to continue from, or "auto": config.run_dir's newest whole one, if there is one.
        overwrite: replace a run that is already in config.run_dir.
        take_over: the AdamW run to begin from.

    Raises UserError, alike on every rank and before any process waits for another, when the data, the checkpoint or the
    number of ranks don't fit the config; Stopped when it was asked to stop and has saved.
    """
    rank, _ = world_from_environment()
    stop_file = Path(config.train.stop_file or Path(config.run_dir, "STOP"))
    with (
        StopRequests(stop_file, rank) as requests,
        out_of_memory.explained(config),
        RunLock(config.run_dir, rank) as lock,
        Watchdog(config.run_dir, rank, config.train.watchdog_seconds) as watchdog,
    ):
        run(config, resume, overwrite, requests, watchdog, lock, take_over)


def run(
    config: Config,
    resume: str | None,
    overwrite: bool,
    requests: StopRequests,
    watchdog: Watchdog,
    lock: RunLock,
    take_over: TakeOver | None = None,
) -> None:
    prepared = prepare(config, resume, overwrite, lock, take_over)
    if prepared is None:
        return
    trainer = assemble(prepared, requests, watchdog, lock)
    metrics = trainer.metrics
    try:
        with trainer.insight.installed(), telling_backend(metrics):
            run_steps(trainer, prepared.start.validation_due)
    except UserError:  # it may be this rank's alone
        settle(metrics.print_line, lambda: watchdog.beat("ending with an error"))
        raise
    except Stopped:
        dist.destroy_process_group()
        raise
    finally:
        metrics.close()
    if config.data.mixture:
        epochs = trainer.loader.epochs(trainer.samples)
        metrics.print_line("epochs: " + ", ".join(f"{path} {n:.2f}" for path, n in epochs.items()))
    finish(trainer.engine, config, prepared.mixture, metrics)
    dist.destroy_process_group()


def run_steps(trainer: Trainer, validation_due: bool) -> None:
    """Train to the last step. `validation_due`: a validation comes before the first one.

    Raises Stopped when a rank was asked to stop: a checkpoint of the last step taken is there then.
    """
    config, agreement = trainer.config, trainer.agreement
    agreement.requests.at_boundaries = True  # from here on a signal is obeyed between steps
    if agreement.exchange()[1] or (validation_due and not trainer.validate()):
        agreement.stop(f"before the first step: nothing to save; to go on: {resume_command(config)}")
    trainer.begin_record()
    while not trainer.finished:
        loss, stopping = agreement.exchange(trainer.train_step())
        if trainer.rolled_back(loss):
            continue
        if trainer.due(config.train.log_every):
            trainer.record()
        with trainer.paused():
            validation_due = trainer.due(config.eval.every)
            if validation_due and (trainer.finished or not stopping):
                validation_due = not trainer.validate()
                stopping |= validation_due
            if trainer.checkpoint_due or stopping:
                saved, stopping = trainer.save(validation_due)
            if stopping and not trainer.finished:
                agreement.stop(
                    f"at step {trainer.step}, {f'saved {saved}' if saved else 'not saved'}; to go on: {resume_command(config)}"
                )
    trainer.metrics.print_line(f"training waited {trainer.saving_in_all:.1f} s for checkpoints to be saved")
