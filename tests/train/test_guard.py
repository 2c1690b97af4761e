"""One bad number in one rank's gradient changes no parameter and no state, at any ZeRO stage, in any precision."""

import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import Config, Train
from celo2_pretrain.model import guarded_adamw
from celo2_pretrain.model.guarded_adamw import GuardedAdamW
from celo2_pretrain.train import guard as guards
from celo2_pretrain.train.guard import Guard
from celo2_pretrain.train.record.metrics import read_metrics

from support.guard_worker import BAD, BAD_STEP, STEPS
from support.paths import SUPPORT
from support.processes import on_ranks

WORKER = SUPPORT / "guard_worker.py"
SETTINGS = [
    (stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16", "fp16") if (stage, precision) != (0, "fp16")
]
SKIPPED = [
    f"{optimizer},{stage},{precision},{bad},skip,{clip}"
    for (stage, precision), bad, (optimizer, clip) in product(SETTINGS, BAD, (("celo2", 1.0), ("celo2", 0.0), ("adamw", 1.0)))
]
STOPPED = [f"celo2,{stage},{precision},nan,stop,1.0" for stage, precision in SETTINGS if precision != "fp16"]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_bad_gradient_changes_nothing_and_training_goes_on_or_stops(ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("CASES", json.dumps(SKIPPED + STOPPED))
    on_ranks(ranks, WORKER, str(tmp_path / "result"))
    results = [json.loads((tmp_path / f"result.{rank}").read_text()) for rank in range(ranks)]
    wrong = []
    for name in SKIPPED:
        for rank, found in enumerate(result[name] for result in results):
            digests = found["digest"]
            left_out = ["left out" if step == BAD_STEP else "fine" for step in range(1, STEPS + 1)]
            if found["what"] != left_out or not found["finite"]:
                wrong.append((name, rank, found["what"], found["loss"]))
            elif digests[BAD_STEP - 1] != digests[BAD_STEP - 2] or digests[BAD_STEP] == digests[BAD_STEP - 1]:
                wrong.append((name, rank, "the bad step moved something, or the next one nothing"))
        if any(result[name]["loss"] != results[0][name]["loss"] for result in results):
            wrong.append((name, "the ranks' losses differ"))
    for name in STOPPED:
        for rank, found in enumerate(result[name] for result in results):
            if "training diverged" not in found["stopped"] or f"step {BAD_STEP}" not in found["stopped"]:
                wrong.append((name, rank, found["stopped"], found["what"]))
            elif found["digest"][-1] != found["digest"][-2]:
                wrong.append((name, rank, "the step that stopped the run moved something"))
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(map(str, wrong))


SPIKE = SUPPORT / "spike_worker.py"
RUN = [
    "model.layers=1",
    "model.width=32",
    "model.heads=2",
    "model.context=32",
    "train.micro_batch_size=1",
    "train.max_steps=24",
    "train.global_batch_size=4",
    "train.log_every=1",
    "eval.sequences=4",
    "checkpoint.every=8",
    "checkpoint.keep_last=3",
    "optimizer.adamw_lr_multiplier=2",
    "train.on_spike=rollback",
]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [2, 3])
def test_a_spike_rolls_back_and_the_run_goes_on_with_later_data(stage, data, tmp_path):
    run, again = tmp_path / "run", tmp_path / "again"
    common = [*RUN, f"data.path={data}", f"train.zero_stage={stage}"]
    output, _ = on_ranks(2, SPIKE, str(4 * 19), *common, f"run_dir={run}")  # the batch of step 20
    assert f"rolled back to {run}/checkpoints/step_00000016" in output
    records = [record for record in read_metrics(run) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, 25))
    assert [record["samples"] for record in records] == [4 * k for k in range(1, 17)] + [4 * k for k in range(21, 29)]
    (event,) = (record for record in read_metrics(run) if "event" in record)
    assert event["event"] == "roll back" and event["step"] == 20
    # Interrupted after that, a run comes to the same: from its checkpoint it meets the spike again.
    on_ranks(2, SPIKE, str(4 * 19), "--resume", str(run / "checkpoints/step_00000016"), *common, f"run_dir={again}")
    losses = {record["step"]: record["loss"] for record in read_metrics(again) if "loss" in record}
    assert losses == {record["step"]: record["loss"] for record in records[16:]}


def guard(**keys) -> Guard:
    return Guard(SimpleNamespace(skipped_steps=0), SimpleNamespace(skipped_steps=0), Config(train=Train(**keys)))


@pytest.fixture
def newest(monkeypatch) -> list:
    """What a guard finds to go back to."""
    found = []
    monkeypatch.setattr(guards.checkpoint, "finish", lambda *arguments: True)
    monkeypatch.setattr(guards, "newest_good", lambda *arguments, **_: found[-1] if found else None)
    return found


def test_a_spike_before_the_first_checkpoint_is_told_and_counts_as_no_rollback(newest):
    looking = guard(on_spike="rollback", max_rollbacks=1)
    assert [looking.look(k, 4.0).what for k in range(16)] == ["fine"] * 16
    for step in (16, 17, 18):
        found = looking.look(step, 9.0)
        assert found.what == "spike" and "no checkpoint to go back to yet" in found.why
    assert looking.rollbacks == 0 and list(looking.losses)[-3:] == [9.0] * 3
    newest.append(Path("step_18"))
    assert looking.look(19, 9.0).what == "roll back" and looking.target == Path("step_18")


def test_a_spike_is_what_stands_out_of_the_last_losses(newest):
    newest.append(Path("step_1"))
    looking = guard(on_spike="rollback", spike_nats=1.0, max_rollbacks=1)
    assert [looking.look(k, 9.0 if k == 3 else 4 - k / 10).what for k in range(20)] == ["fine"] * 20  # too early to tell at 3
    assert looking.look(20, 4.5).what == "roll back"
    assert looking.look(21, 2.0).what == "fine"
    with pytest.raises(UserError, match="loss 9 at step 22 is a spike.*after 1 rollbacks"):
        looking.look(22, 9.0)
    assert guard(on_spike="ignore").look(1, 50.0).what == "fine"
    again = guard(on_spike="warn")
    again.restore(json.loads(json.dumps(looking.state())))
    assert again.look(23, 9.0).what == "spike" and again.losses[-1] == 9.0


def test_steps_without_a_number_end_the_run_when_they_pile_up():
    looking = guard(max_skipped=2)
    assert [looking.look(k, float("nan")).what for k in (1, 2)] == ["left out"] * 2
    assert looking.look(3, 4.0).what == "fine"
    looking.engine.skipped_steps = 1
    assert looking.look(4, 4.0).what == "left out"
    assert looking.look(5, float("inf")).what == "left out"
    with pytest.raises(UserError, match="training diverged: .*the loss of step 6.*as in the 2 steps before it"):
        looking.look(6, float("inf"))
    with pytest.raises(UserError, match="training diverged: .*train.on_nonfinite=skip leaves"):
        guard(on_nonfinite="stop").look(1, float("nan"))


def test_a_step_that_was_taken_is_not_said_to_be_left_out():
    stopping = guard(on_nonfinite="stop")
    with pytest.raises(UserError, match="its gradient was not, and the step was taken. Look at") as error:
        stopping.look(1, float("inf"))
    assert "not taken" not in str(error.value)
    stopping.engine.skipped_steps = 1
    with pytest.raises(UserError, match="this step was not taken"):
        stopping.look(2, float("inf"))


def test_a_step_that_was_left_out_counts_once_and_is_still_counted_when_resumed():
    looking = guard()
    for step in range(1, 4):
        looking.optimizer.skipped_steps += 3  # sub-groups of ZeRO-3
        assert looking.look(step, 4.0).what == "left out"
    assert looking.look(4, 4.0).what == "fine" and looking.left_out == 3
    again = guard()
    again.optimizer.skipped_steps = 7
    again.restore(json.loads(json.dumps(looking.state())))
    assert again.look(5, 4.0).what == "fine" and again.left_out == 3


def test_adamw_leaves_a_step_out_that_another_rank_leaves_out(monkeypatch):
    """As with deepspeed.bf16.check_grad_overflow=false, where DeepSpeed asks nobody."""
    told = []

    def all_reduce(flag, op):
        told.append(int(flag))
        flag.fill_(other)

    monkeypatch.setattr(guarded_adamw.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(guarded_adamw.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(guarded_adamw.dist, "all_reduce", all_reduce)
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = GuardedAdamW([p], lr=1.0)
    p.grad, other = torch.ones(2), 0
    optimizer.step()
    assert optimizer.skipped_steps == 1 and not p.any()
    other = 1
    optimizer.step()
    assert optimizer.skipped_steps == 1 and p.all()
    p.grad = None
    optimizer.step()  # a rank with nothing to step is asked too
    assert told == [1, 1, 1]


def test_a_loss_scale_that_cannot_fall_further_is_told_in_a_line():
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(init_scale=1.0, scale_window=10, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False)
    engine = SimpleNamespace(step=lambda: scaler.update_scale(True), optimizer=SimpleNamespace(loss_scale=1.0))
    with pytest.raises(
        UserError, match="training diverged: the gradient of step 2 overflows fp16 at the smallest loss scale .1"
    ):
        guards.take_step(engine, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adamw_leaves_out_what_celo2_would(dtype):
    params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((2, 3), (0,))]  # a rank's part may be empty
    optimizer = GuardedAdamW(params, lr=0.1)
    for bad in (float("nan"), -float("inf"), 1.0, *([-2e19] if dtype != torch.float16 else [])):
        before = params[0].clone()
        for param in params:
            param.grad = torch.ones_like(param)
        params[0].grad[1, 2] = bad
        optimizer.step()
        assert torch.equal(before, params[0]) == (bad != 1.0)
    assert optimizer.skipped_steps == (2 if dtype == torch.float16 else 3)
