"""The training run, from a config to a trained model: the loop itself is `run_steps`."""
import json
import math
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import deepspeed.comm as dist
import numpy as np
import torch

from celo2_pretrain.common import errors
from celo2_pretrain.common.errors import Stopped, UserError, one_line
from celo2_pretrain.config import Config, dump_config
from celo2_pretrain.data.documents import mask_documents
from celo2_pretrain.data.loader import TrainLoader, ValLoader
from celo2_pretrain.data.mixture import Mixture, open_mixture
from celo2_pretrain.data.tokenizer import load_tokenizer
from celo2_pretrain.deepspeed_config import deepspeed_config
from celo2_pretrain.model.build import build_model, vocab_rows
from celo2_pretrain.model.build_optimizer import build_optimizer
from celo2_pretrain.model.flops import flops_per_token
from celo2_pretrain.model.loss import training_loss, validation_loss
from celo2_pretrain.model.sample import sample
from celo2_pretrain.optimizer.state.collective import gather
from celo2_pretrain.train.checkpoints import checkpoint, select
from celo2_pretrain.train.checkpoints.manifest import write_atomically
from celo2_pretrain.train.checkpoints.staging import check_staging, settle
from celo2_pretrain.train.faults import out_of_memory
from celo2_pretrain.train.faults.failures import join_and_look
from celo2_pretrain.train.faults.run_lock import InUse, RunLock
from celo2_pretrain.train.faults.stop import Agreement, StopRequests
from celo2_pretrain.train.faults.watchdog import Watchdog, forget
from celo2_pretrain.train.guard import Guard, guarded, take_step
from celo2_pretrain.train.rates import Rates
from celo2_pretrain.train.record.backend import telling_backend
from celo2_pretrain.train.record.insight import Insight, perplexity
from celo2_pretrain.train.record.metrics import Metrics
from celo2_pretrain.train.record.peak_flops import Peak, peak_of
from celo2_pretrain.train.record.plot import plot_loss
from celo2_pretrain.train.record.profiler import Profiler
from celo2_pretrain.train.record.provenance import remove_origin, write_origin
from celo2_pretrain.train.record.trackers import check_installed, open_trackers
from celo2_pretrain.train.schedule import BatchSizes, lr_factor
from celo2_pretrain.train.start.preflight import check_node, check_ranks, check_run_dir, warn
from celo2_pretrain.train.start.ranks import world_from_environment
from celo2_pretrain.train.start.resume_command import resume_command

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
    with (StopRequests(stop_file, rank) as requests, out_of_memory.explained(config),
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
    tell = errors.tell if rank == 0 else lambda text: None
    if resume == select.AUTO:
        lock.take()
        join_and_look(config.run_dir)  # they share the reading
        resume_from = select.automatic(config.run_dir, overwrite, tell)
    else:
        resume_from = select.find(resume) if resume else None
    own = resume_from is not None and resume_from.parent.resolve() == Path(config.run_dir, "checkpoints").resolve()
    if own and not select.NAMED.fullmatch(resume_from.name):
        raise UserError(f"{resume_from} has no checkpoint's name, as one that was given up: rename it to step_ and its step to "
                        f"go on from it")
    if resume_from:
        start = select.read_state(resume_from, description)
        if rank == 0 and start["extra"].get("data") not in (None, mixture.digest):  # None: an older checkpoint's
            warn(f"the data is not what {resume_from} was trained on (prepared again, or mixed otherwise): its order is "
                 "another from here on, so that some windows come again and some never")
        if start["step"] >= size.max_steps and resume == select.AUTO:
            tell(f"{resume_from} is at step {start['step']} of {size.max_steps}: nothing left to do")
            return dist.destroy_process_group()
        if start["step"] >= size.max_steps:
            raise UserError(
                f"{resume_from} is already at step {start['step']}, train.max_steps is {size.max_steps}: to train on, "
                f"give a larger one, for example train.max_steps={2 * start['step']}"
            )
    elif resume == select.AUTO:
        tell(f"{config.run_dir} has no checkpoint yet: beginning anew")
    if Path(config.run_dir, "checkpoints").exists() and not (own or overwrite or resume == select.AUTO):
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
    if resume_from and resume != select.AUTO:
        tell(f"reading {resume_from}, to see whether it is whole")
        select.verify(resume_from)
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
            loop = Loop(engine, rates, config, loader, val_loader, metrics, description, insight, profiler, guard, watchdog,
                        agreement, start["step"], start["samples"])
            end = run_steps(loop, start["step"] == 0 or start["extra"].get("validation_due", False))
    except UserError:  # it may be this rank's alone
        settle(metrics.say, lambda: watchdog.beat("ending with an error"))
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


@dataclass
class Loop:
    """What the training loop works with and where it is; the same on every rank but for the rank's own windows."""

    engine: deepspeed.DeepSpeedEngine
    rates: Rates
    config: Config
    loader: TrainLoader
    val_loader: ValLoader
    metrics: Metrics
    description: dict  # checkpoint.describe's
    insight: Insight
    profiler: Profiler
    guard: Guard
    watchdog: Watchdog
    agreement: Agreement
    step: int  # that was taken last
    samples: int  # windows that were seen

    def __post_init__(self):
        self.size, self.context = self.config.train, self.config.model.context
        self.batch_sizes = BatchSizes(self.size, self.context)
        # Seconds that training waited for checkpoints: for the last one, since the last record, and in all.
        self.saving_once = self.saving = self.saving_in_all = 0.0
        self.begin_record()

    @property
    def last(self) -> bool:
        return self.step == self.size.max_steps

    def begin_record(self) -> None:
        """What the next record tells of begins here."""
        self.recent: list[float] = []  # losses of the steps that were taken
        self.since, self.samples_then = time.monotonic(), self.samples

    def train_step(self) -> float:
        """Take the next step; this rank's loss. DeepSpeed accumulates and clips, and steps after the last micro-batch."""
        engine, insight, number = self.engine, self.insight, self.step + 1
        self.rates.set(lr_factor(self.step, self.config.schedule, self.size.max_steps))
        accumulation = self.batch_sizes.set(engine, self.step)
        step_loss = torch.zeros((), device=engine.device)
        self.profiler.before(number)
        insight.begin(number)
        for micro in range(accumulation):
            self.watchdog.beat(f"taking step {number}")
            insight.mark("data")
            windows = self.loader.batch(self.samples, micro).to(engine.device)
            insight.mark("forward")
            loss, cross_entropy = training_loss(engine, windows, self.size.z_loss)
            insight.mark("backward")
            engine.backward(loss)
            insight.mark("optimizer")
            take_step(engine, number)
            step_loss += cross_entropy.detach() / accumulation
        insight.end()
        if traced := self.profiler.after(number):
            self.metrics.say(traced)
        self.step, self.samples = number, self.samples + self.batch_sizes.at(self.step)
        return float(step_loss)

    def record(self) -> None:
        """Log the steps since the last record."""
        mean = sum(self.recent) / len(self.recent)
        seconds, norm = time.monotonic() - self.since, self.engine.get_global_grad_norm()
        speed = (self.samples - self.samples_then) * self.context / seconds
        self.metrics.log({
            "step": self.step, "loss": mean, "lr": self.rates.optimizer.param_groups[0]["lr"],
            "grad_norm": None if norm is None else float(norm),
            "samples": self.samples, "tokens": self.samples * self.context,
            "global_batch_size": self.batch_sizes.at(self.step - 1), "epochs": self.loader.epochs(self.samples),
            "tokens_per_s": round(speed, 1), "seconds": round(seconds, 3), "skipped_steps": self.guard.left_out,
            "checkpoint_seconds": round(self.saving, 3), **self.insight.record(mean, speed),
        })
        self.saving = 0.0
        self.begin_record()

    def validate(self) -> bool:
        """False: given up half-way, because the run is to stop (not after the last step, which has nothing left to do)."""
        def stopping() -> bool:
            self.watchdog.beat(f"validating after step {self.step}")
            return not self.last and self.agreement.exchange()[1]

        loss = validation_loss(self.engine, self.val_loader, self.engine.device, stopping)
        if loss is not None:
            bits_per_byte = loss * (self.loader.mixture.val_tokens_per_byte / math.log(2))
            self.metrics.log({"step": self.step, "val_loss": loss, "val_bits_per_byte": bits_per_byte,
                              "val_perplexity": perplexity(loss), "tokens": self.samples * self.context})
        return loss is not None

    def save(self, validation_due: bool) -> tuple[Path | None, bool]:
        """(the checkpoint of this step, None where it couldn't be saved; whether the run is to stop)."""
        def waiting() -> None:
            self.watchdog.beat("waiting for a checkpoint to be copied")

        self.watchdog.beat(f"saving step {self.step}")
        if self.saving_once > LONG_SECONDS:
            self.metrics.say(f"saving step {self.step}; the save before took {self.saving_once:.0f} s")
        began = time.monotonic()
        extra = {"validation_due": validation_due, "guard": self.guard.state(), "data": self.loader.mixture.digest}
        saved = checkpoint.save(self.engine, self.config, self.description, self.step, self.samples, extra, self.metrics.say,
                                waiting)
        stopping = self.agreement.exchange()[1]  # asked for while saving
        if (stopping or self.last) and not checkpoint.finish(self.engine, self.config, self.metrics.say, waiting):
            saved = None
        self.saving_once = time.monotonic() - began
        self.saving, self.saving_in_all = self.saving + self.saving_once, self.saving_in_all + self.saving_once
        return saved, stopping


def run_steps(loop: Loop, validation_due: bool) -> int:
    """Train to the last step; returns the samples it has seen then. `validation_due`: of the step that it begins from.

    Raises Stopped when a rank was asked to stop: a checkpoint of this step is there then."""
    size, agreement, guard, metrics = loop.size, loop.agreement, loop.guard, loop.metrics
    agreement.requests.at_boundaries = True  # from here on a signal is obeyed in the loop
    if agreement.exchange()[1] or (validation_due and not loop.validate()):
        agreement.stop(f"before the first step: nothing to save; to go on: {resume_command(loop.config)}")
    loop.begin_record()
    while not loop.last:
        loss, stopping = agreement.exchange(loop.train_step())
        found = guard.look(loop.step, loss)
        if found.what != "fine":
            metrics.event({"step": loop.step, "event": found.what, "why": found.why, "samples": loop.samples})
        if found.what == "roll back":
            loop.step = guard.roll_back(loop.description, metrics)
            loop.begin_record()
            continue
        if found.what != "left out":
            loop.recent.append(loss)
        metrics.step(loop.step)
        if (loop.step % size.log_every == 0 or loop.last) and loop.recent:
            loop.record()

        paused = time.monotonic()
        due = loop.step % loop.config.eval.every == 0 or loop.last
        if due and (loop.last or not stopping):
            due = not loop.validate()
            stopping |= due
        if loop.step % loop.config.checkpoint.every == 0 or loop.last or stopping:
            saved, stopping = loop.save(validation_due=due)
        if stopping and not loop.last:
            agreement.stop(f"at step {loop.step}, {f'saved {saved}' if saved else 'not saved'}; to go on: "
                           f"{resume_command(loop.config)}")
        loop.since += time.monotonic() - paused  # tokens/s counts training only
    metrics.say(f"training waited {loop.saving_in_all:.1f} s for checkpoints to be saved")
    return loop.samples


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
        checkpoint.go_on_from(resume_from, errors.tell)
    else:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        remove_origin(folder)
    write_atomically(folder / "config.yaml", dump_config(config))
    write_atomically(folder / "deepspeed.json", json.dumps(ds_config, indent=1) + "\n")
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
            if work is sampled and config.train.zero_stage == 3 and dist.get_world_size() > 1:
                raise  # the ranks gather the weights together: the others wait for this one
            metrics.say(f"warning: no {what}: {one_line(error)}")
    if metrics.active:
        metrics.say(f"to train further: {resume_command(config, 2 * config.train.max_steps)}")
