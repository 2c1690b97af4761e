"""The training run, from a config to a trained model: the loop itself is `run_steps`."""
import json
import math
import random
import shutil
import time
from functools import partial
from pathlib import Path

import deepspeed
import deepspeed.comm as dist
import numpy as np
import torch

from celo2_pretrain.data.documents import mask_documents
from celo2_pretrain.data.loader import TrainLoader, ValLoader
from celo2_pretrain.data.mixture import Mixture, open_mixture
from celo2_pretrain.data.tokenizer import load_tokenizer
from celo2_pretrain.model.build import build_model, vocab_rows
from celo2_pretrain.model.sample import sample
from celo2_pretrain.optimizer.state import gather
from celo2_pretrain.plan.step_time import flops_per_token
from celo2_pretrain.train import checkpoint, choose, memory
from celo2_pretrain.train.checks import check_node, check_ranks, check_run_dir, warn
from celo2_pretrain.train.config import Config, dump_config
from celo2_pretrain.train.deepspeed_config import deepspeed_config
from celo2_pretrain.train.errors import Stopped, UserError, one_line
from celo2_pretrain.train.evaluate import training_loss, validation_loss
from celo2_pretrain.train.failures import join_and_look
from celo2_pretrain.train.flops import Peak, peak_of
from celo2_pretrain.train.guard import Guard, guarded, take_step
from celo2_pretrain.train.insight import Insight, perplexity
from celo2_pretrain.train.launcher import resume_command
from celo2_pretrain.train.metrics import Metrics
from celo2_pretrain.train.optim import Rates, build_optimizer, telling_backend
from celo2_pretrain.train.origin import remove_origin, write_origin
from celo2_pretrain.train.plot import plot_loss
from celo2_pretrain.train.profiler import Profiler
from celo2_pretrain.train.ranks import world_from_environment
from celo2_pretrain.train.run_lock import InUse, RunLock
from celo2_pretrain.train.schedule import BatchSizes, lr_factor
from celo2_pretrain.train.staging import check_staging
from celo2_pretrain.train.stop import Agreement, StopRequests
from celo2_pretrain.train.trackers import check_installed, open_trackers
from celo2_pretrain.train.watchdog import Watchdog, forget

LONG_SECONDS = 10.0  # a save that takes longer is announced the next time


def train(config: Config, resume: str | None = None, overwrite: bool = False) -> None:
    """Train as `config` says; every rank of the launched world calls it.

    Args:
        resume: a run folder or checkpoint to continue from, or "auto": config.run_dir's newest whole one, if there is one.
        overwrite: replace a run that is already in config.run_dir.

    Raises UserError, alike on every rank and before any process waits for another, when the data, the checkpoint or the
    number of ranks don't fit the config; Stopped when it was asked to stop and has saved.
    """
    rank, _ = world_from_environment()
    stop_file = Path(config.train.stop_file or Path(config.run_dir, "STOP"))
    with (StopRequests(stop_file, rank) as requests, memory.explained(config),
          RunLock(config.run_dir, rank) as lock, Watchdog(config.run_dir, rank, config.train.watchdog_seconds) as watchdog):
        run(config, resume, overwrite, requests, watchdog, lock)


def run(config: Config, resume: str | None, overwrite: bool, requests: StopRequests, watchdog: Watchdog, lock: RunLock) -> None:
    # Everything that can be refused is refused here, before the ranks meet.
    rank, world_size = world_from_environment()
    check_installed(config)
    check_staging(config.checkpoint.staging, world_size)
    check_run_dir(config.run_dir)
    ds_config = deepspeed_config(config, world_size)
    mixture = open_mixture(config.data.path, config.data.mixture)
    index = mixture.index
    vocab_rows(config.model, index["vocab_size"])
    size, context = config.train, config.model.context
    loader = TrainLoader(mixture, context, size.micro_batch_size, max(BatchSizes(size, context).all()), size.seed, rank,
                         world_size)
    val_loader = ValLoader(mixture, context, size.micro_batch_size, config.eval.sequences, rank, world_size)
    description = checkpoint.describe(config, index, world_size)
    start = {"step": 0, "samples": 0, "other_world": [], "extra": {}}
    tell = partial(print, flush=True) if rank == 0 else lambda text: None  # it may be long until the next line
    if resume == choose.AUTO:
        lock.take()
        join_and_look(config.run_dir)  # they share the reading
        resume_from = choose.automatic(config.run_dir, overwrite, tell)
    else:
        resume_from = choose.find(resume) if resume else None
    own = resume_from is not None and resume_from.parent.resolve() == Path(config.run_dir, "checkpoints").resolve()
    if own and not choose.NAMED.fullmatch(resume_from.name):
        raise UserError(f"{resume_from} has no checkpoint's name, as one that was given up: rename it to step_ and its step to "
                        f"go on from it")
    if resume_from:
        start = choose.read_state(resume_from, description)
        if rank == 0 and start["extra"].get("data") not in (None, mixture.digest):  # None: an older checkpoint's
            warn(f"the data is not what {resume_from} was trained on (prepared again, or mixed otherwise): its order is "
                 "another from here on, so that some windows come again and some never")
        if start["step"] >= size.max_steps and resume == choose.AUTO:
            tell(f"{resume_from} is at step {start['step']} of {size.max_steps}: nothing left to do")
            return dist.destroy_process_group()
        if start["step"] >= size.max_steps:
            raise UserError(
                f"{resume_from} is already at step {start['step']}, train.max_steps is {size.max_steps}: to train on, "
                f"give a larger one, for example train.max_steps={2 * start['step']}"
            )
    elif resume == choose.AUTO:
        tell(f"{config.run_dir} has no checkpoint yet: beginning anew")
    if Path(config.run_dir, "checkpoints").exists() and not (own or overwrite or resume == choose.AUTO):
        raise UserError(f"run_dir {config.run_dir!r} already holds a run: pass --resume to continue it, --overwrite to "
                        f"replace it, or choose another run_dir=…")
    check_node(config, index, replaced=overwrite and not own)
    model = build_seeded(config, index)
    parameters = sum(p.numel() for p in model.parameters())
    per_token = flops_per_token(model, context)
    optimizer = build_optimizer(model, config.optimizer)  # reads the weights file, so it may refuse too

    lock.take()  # if the folder is there yet: another run's files must not be touched
    join_and_look(config.run_dir)
    check_ranks(config, index)
    if resume_from and resume != choose.AUTO:
        tell(f"reading {resume_from}, to see whether it is whole")
        choose.verify(resume_from)
    device = torch.device(deepspeed.accelerator.get_accelerator().current_device_name())
    peak, trackers = peak_of(config, device), []
    make_run_dir(config.run_dir, lock)
    watchdog.begin()
    agreement = Agreement(requests, world_size)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    if config.model.compile:
        engine.compile()
    rates = Rates(engine.optimizer)
    if rank == 0:  # before the seeds: they may draw random numbers
        trackers = open_trackers(config, start["step"] if own else 0)
    set_seeds(size.seed + start["step"], rank)
    if resume_from:
        watchdog.beat(f"loading {resume_from}")
        tell(f"loading {resume_from}")
        checkpoint.load(engine, resume_from, bool(start["other_world"]))
    if rank == 0:
        start_run_dir(config, ds_config, world_size, resume_from if own else None, peak)
    dist.barrier()

    metrics = Metrics(config.run_dir, start["step"], size.max_steps, rank == 0, trackers)
    guarded(engine)
    guard = Guard(engine, optimizer, config, start["extra"].get("guard"), resume_from, metrics.say,
                  lambda: watchdog.beat("looking for a checkpoint to go back to"))
    insight, profiler = Insight(engine, optimizer, config, parameters, per_token, peak), Profiler(config, rank)
    metrics.say(
        f"{'resuming at step ' + str(start['step']) if resume_from else 'training'}: {model.config.model_type} with "
        f"{parameters / 1e6:.1f} M parameters, {config.optimizer.name}, ZeRO-{size.zero_stage}, {size.precision}, "
        f"{world_size} rank(s), {size.global_batch_size * context:,} tokens a step, {loader.count:,} windows"
    )
    if start["other_world"]:
        metrics.say(f"going on in another world ({', '.join(start['other_world'])}): equal to round-off, not bit for bit")
    try:
        with insight.installed(), telling_backend(metrics):
            end = run_steps(engine, rates, config, loader, val_loader, metrics, description, start, insight, profiler,
                            guard, watchdog, agreement)
    except UserError:  # it may be this rank's alone
        checkpoint.leave(engine, config, metrics.say, lambda: watchdog.beat("ending with an error"))
        raise
    except Stopped:
        dist.destroy_process_group()
        raise
    finally:
        metrics.close()
    if config.data.mixture:
        metrics.say("epochs: " + ", ".join(f"{path} {n:.2f}" for path, n in loader.epochs(end).items()))
    finish(engine, config, mixture, metrics)
    dist.destroy_process_group()


def run_steps(engine, rates, config, loader, val_loader, metrics, description, start, insight, profiler, guard, watchdog,
              agreement) -> int:
    """The loop; returns the samples it has seen. DeepSpeed accumulates and clips the gradients, and steps after the last
    micro-batch. Raises Stopped when a rank was asked to stop: a checkpoint of this step is there then."""
    size, context = config.train, config.model.context
    batch_sizes = BatchSizes(size, context)
    bits_per_byte = loader.mixture.val_tokens_per_byte / math.log(2)

    def validate(step: int) -> bool:
        """False: given up half-way, because the run is to stop (not after the last step, which has nothing left to do)."""
        def stopping() -> bool:
            watchdog.beat(f"validating after step {step}")
            return step < size.max_steps and agreement.exchange()[1]

        loss = validation_loss(engine, val_loader, engine.device, stopping)
        if loss is not None:
            metrics.log({"step": step, "val_loss": loss, "val_bits_per_byte": loss * bits_per_byte,
                         "val_perplexity": perplexity(loss), "tokens": samples * context})
        return loss is not None

    def waiting() -> None:
        watchdog.beat("waiting for a checkpoint to be copied")

    step, samples = start["step"], start["samples"]
    agreement.requests.at_boundaries = True  # from here on a signal is obeyed in the loop
    if agreement.exchange()[1] or ((step == 0 or start["extra"].get("validation_due")) and not validate(step)):
        agreement.stop(f"before the first step: nothing to save; to go on: {resume_command(config)}")
    recent, since, samples_then = [], time.monotonic(), samples  # losses of steps that were taken since the last record
    # Seconds that training waited for checkpoints: for the last one, since the last record, and in all.
    saving_once = saving = saving_in_all = 0.0
    while step < size.max_steps:
        rates.set(lr_factor(step, config.schedule, size.max_steps))
        accumulation = batch_sizes.set(engine, step)
        step_loss = torch.zeros((), device=engine.device)
        profiler.before(step + 1)
        insight.begin(step + 1)
        for micro in range(accumulation):
            watchdog.beat(f"taking step {step + 1}")
            insight.mark("data")
            windows = loader.batch(samples, micro).to(engine.device)
            insight.mark("forward")
            loss, cross_entropy = training_loss(engine, windows, size.z_loss)
            insight.mark("backward")
            engine.backward(loss)
            insight.mark("optimizer")
            take_step(engine, step + 1)
            step_loss += cross_entropy.detach() / accumulation
        insight.end()
        if traced := profiler.after(step + 1):
            metrics.say(traced)
        step, samples = step + 1, samples + batch_sizes.at(step)
        loss, stopping = agreement.exchange(float(step_loss))
        found = guard.look(step, loss)
        if found.what != "fine":
            metrics.event({"step": step, "event": found.what, "why": found.why, "samples": samples})
        if found.what == "roll back":
            step = guard.roll_back(description, metrics)
            recent, since, samples_then = [], time.monotonic(), samples
            continue
        if found.what != "left out":
            recent.append(loss)
        metrics.step(step)

        last = step == size.max_steps
        if (step % size.log_every == 0 or last) and recent:
            mean = sum(recent) / len(recent)
            seconds, norm = time.monotonic() - since, engine.get_global_grad_norm()
            speed = (samples - samples_then) * context / seconds
            metrics.log({
                "step": step, "loss": mean, "lr": rates.optimizer.param_groups[0]["lr"],
                "grad_norm": None if norm is None else float(norm),
                "samples": samples, "tokens": samples * context,
                "global_batch_size": batch_sizes.at(step - 1), "epochs": loader.epochs(samples),
                "tokens_per_s": round(speed, 1), "seconds": round(seconds, 3),
                "skipped_steps": guard.left_out, "checkpoint_seconds": round(saving, 3), **insight.record(mean, speed),
            })
            recent, since, samples_then, saving = [], time.monotonic(), samples, 0.0
        paused = time.monotonic()
        due = step % config.eval.every == 0 or last
        if due and (last or not stopping):
            due = not validate(step)
            stopping |= due
        if step % config.checkpoint.every == 0 or last or stopping:
            watchdog.beat(f"saving step {step}")
            if saving_once > LONG_SECONDS:
                metrics.say(f"saving step {step}; the save before took {saving_once:.0f} s")
            began = time.monotonic()
            extra = {"validation_due": due, "guard": guard.state(), "data": loader.mixture.digest}
            saved = checkpoint.save(engine, config, description, step, samples, extra, metrics.say, waiting)
            stopping = agreement.exchange()[1]  # asked for while saving
            if (stopping or last) and not checkpoint.finish(engine, config, metrics.say, waiting):
                saved = None
            saving_once = time.monotonic() - began
            saving, saving_in_all = saving + saving_once, saving_in_all + saving_once
        if stopping and not last:
            agreement.stop(f"at step {step}, {f'saved {saved}' if saved else 'not saved'}; to go on: {resume_command(config)}")
        since += time.monotonic() - paused  # tokens/s counts training only
    metrics.say(f"training waited {saving_in_all:.1f} s for checkpoints to be saved")
    return samples


def build_seeded(config: Config, index: dict):
    """The model with the initial weights that train.seed stands for, the same on every rank."""
    set_seeds(config.train.seed, 0)
    model = build_model(config.model, index["vocab_size"], index["eos_id"])
    if config.data.mask_documents:
        mask_documents(model, index["eos_id"])
    return model


def set_seeds(seed: int, rank: int) -> None:
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


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
        checkpoint.go_on_from(resume_from, print)
    else:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        remove_origin(folder)
    checkpoint.write_atomically(folder / "config.yaml", dump_config(config))
    checkpoint.write_atomically(folder / "deepspeed.json", json.dumps(ds_config, indent=1) + "\n")
    write_origin(folder, world_size, peak)


def finish(engine, config: Config, mixture: Mixture, metrics: Metrics) -> None:
    """A sample, the picture of the losses, and how to go on. The run is saved: what fails here is told and no more."""
    def sampled() -> None:
        index, tokenizer = mixture.index, load_tokenizer(mixture.paths[0])
        ids = tokenizer.encode([config.eval.prompt])[0]
        new = sample(engine.module, ids, config.eval.sample_tokens, context=config.model.context,
                     eos_id=index["eos_id"], vocab_size=index["vocab_size"], seed=config.train.seed)
        text = tokenizer.decode(ids + new)
        metrics.say("a sample of the model's text:\n" + "\n".join(f"    | {line}" for line in text.splitlines()))

    def drawn() -> None:
        picture = Path(config.run_dir, "loss.png")
        plot_loss(config.run_dir, str(picture))
        metrics.say(f"loss curve: {picture}")

    for what, work, wanted in (("sample", sampled, config.eval.prompt), ("loss curve", drawn, metrics.active)):
        try:
            if wanted:
                work()
        except Exception as error:
            metrics.say(f"warning: no {what}: {one_line(error)}")
    if metrics.active:
        metrics.say(f"to train further: {resume_command(config, 2 * config.train.max_steps)}")
