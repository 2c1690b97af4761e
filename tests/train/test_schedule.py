"""Learning rate and batch size are the functions of the step that the config says, also across a resume."""

import math
from pathlib import Path

import pytest

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import Schedule, Train, accumulation_steps, load_config
from celo2_pretrain.train.record.metrics import read_metrics
from celo2_pretrain.train.schedule import BatchSizes, lr_factor

from support.processes import drive


def factors(steps: int = 100, **keys) -> list[float]:
    return [lr_factor(step, Schedule(**keys), steps) for step in range(steps)]


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_every_schedule_warms_up_linearly(name):
    assert factors(name=name, warmup=0.1)[:11] == pytest.approx([k / 10 for k in range(1, 11)] + [1])


def test_cosine_falls_all_the_way():
    found = factors(warmup=0.1, final=0.2)
    assert found[55] == pytest.approx(0.6) and 0.2 < found[99] < 0.21
    assert all(a > b for a, b in zip(found[10:], found[11:]))
    assert lr_factor(150, Schedule(final=0.2, steps=100), 200) == pytest.approx(0.2)


@pytest.mark.parametrize("shape, half", [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_wsd_is_stable_and_decays_at_the_end(shape, half):
    found = factors(name="wsd", warmup=0.1, decay=0.4, shape=shape, final=0.2)
    assert found[10:61] == [1] * 51 and found[80] == pytest.approx(0.2 + 0.8 * half)
    assert all(a > b for a, b in zip(found[60:], found[61:])) and 0.2 < found[99] < 0.25
    assert lr_factor(100, Schedule(name="wsd", final=0.2), 100) == pytest.approx(0.2)


def test_wsd_without_decay_is_constant():
    assert factors(name="wsd", decay=0.0) == factors(name="constant")


def test_constant_never_falls():
    assert factors(name="constant", warmup=0.1)[10:] == [1] * 90


def test_batch_grows_by_steps_and_tokens():
    train = Train(
        batch_warmup=[{"steps": 3, "global_batch_size": 2}, {"tokens": 1000.0, "global_batch_size": 4}], global_batch_size=8
    )
    sizes = BatchSizes(train, context=64)  # 4 × 64 tokens a step: 4 steps for 1,000
    assert [sizes.at(step) for step in range(9)] == [2, 2, 2, 4, 4, 4, 4, 8, 8] and sizes.all() == [2, 4, 8]
    assert [BatchSizes(Train(), 64).at(step) for step in (0, 10**6)] == [32, 32]


@pytest.mark.parametrize(
    "argument, message",
    [
        ("schedule.name=wds", "schedule.name='wds': must be one of cosine, wsd, constant ("),
        ("schedule.shape=root", "schedule.shape='root': must be one of sqrt, linear, cosine"),
        ("schedule.decay=1.5", "schedule.decay=1.5: must be between 0 and 1"),
        ("train.batch_warmup=3", "train.batch_warmup=3: must be a list"),
        ("train.batch_warmup=[3]", "train.batch_warmup: 3 is not of the form {steps: 100, global_batch_size: 8}"),
        ("train.batch_warmup=[{steps: 3}]", "train.batch_warmup: {'steps': 3} is not of the form"),
        ("train.batch_warmup=[{steps: 3, tokens: 3, global_batch_size: 8}]", "is not of the form"),
        ("train.batch_warmup=[{steps: 3, global_batch_size: 0}]", "global_batch_size=0 in "),
        ("train.batch_warmup=[{steps: -3, global_batch_size: 8}]", "train.batch_warmup: steps=-3: must be at least 0"),
        ("train.batch_warmup=[{tokens: many, global_batch_size: 8}]", "train.batch_warmup: tokens='many': must be a number"),
        ("data.mixture=[{path: a}]", "data.mixture: {'path': 'a'} is not of the form {path: data/a, weight: 0.7}"),
        ("data.mixture=[{path: a, weight: 0}]", "data.mixture: weight=0.0 in {'path': 'a', 'weight': 0.0}: must be above 0"),
        ("data.mixture=[{path: a, weight: .nan}]", "data.mixture: weight=nan: must be a finite number"),
        ("data.mixture={path: a, weight: 1}", "must be a list"),
        ("data.mask_documents=1", "data.mask_documents=1: must be true or false"),
    ],
)
def test_wrong_values_are_refused_in_one_line(argument, message):
    with pytest.raises(UserError) as error:
        load_config(None, [argument])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_values_that_contradict_each_other_are_refused():
    with pytest.raises(UserError, match="schedule.warmup=0.5 and schedule.decay=0.6 are more than all steps"):
        load_config(None, ["schedule.name=wsd", "schedule.warmup=0.5", "schedule.decay=0.6"])
    with pytest.raises(UserError, match="data.mask_documents=true needs model.attention=sdpa or eager"):
        load_config(None, ["data.mask_documents=true", "model.attention=flash_attention_2", "train.precision=bf16"])
    config = load_config(None, ["train.batch_warmup=[{tokens: 1e6, global_batch_size: 20}]"])
    assert config.train.batch_warmup == [{"tokens": 1e6, "global_batch_size": 20}]
    with pytest.raises(UserError, match="train.batch_warmup: global_batch_size=20 is no multiple of .* try .*=16"):
        accumulation_steps(config, 2)


CONFIG = [
    "model.layers=1",
    "model.width=32",
    "model.heads=2",
    "model.context=32",
    "train.micro_batch_size=2",
    "train.log_every=1",
    "eval.every=100",
    "eval.sequences=4",
    "optimizer.lr=3e-3",
    "optimizer.adamw_lr_multiplier=2",
    "checkpoint.every=5",
]
WARMUP = (
    "train.batch_warmup=[{steps: 3, global_batch_size: 4}, {tokens: 500, global_batch_size: 8}]",
    "train.global_batch_size=12",
)  # tokens: 2 steps of 8 × 32
STEPS = ("schedule.steps=8", "train.max_steps=8")


def launch(*arguments: str, ranks: int) -> None:
    result = drive(*arguments, ranks=ranks)
    assert result.returncode == 0, result.stdout + result.stderr


def logged(run: Path, name: str) -> list:
    return [record[name] for record in read_metrics(run) if "loss" in record]


@pytest.fixture(scope="module")
def one(data, tmp_path_factory) -> Path:
    """A run with batch warm-up on one rank."""
    run = tmp_path_factory.mktemp("runs") / "one"
    launch(*CONFIG, *WARMUP, *STEPS, f"data.path={data}", f"run_dir={run}", "train.zero_stage=2", ranks=1)
    return run


@pytest.mark.multiprocess
def test_each_step_of_a_batch_warmup_takes_the_windows_of_its_own_batch(one):
    assert logged(one, "global_batch_size") == [4, 4, 4, 8, 8, 12, 12, 12]
    assert logged(one, "samples") == [4, 8, 12, 20, 28, 40, 52, 64]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_batch_warmup_takes_the_same_steps_at_any_number_of_ranks(data, one, tmp_path, stage):
    launch(*CONFIG, *WARMUP, *STEPS, f"data.path={data}", f"run_dir={tmp_path}", f"train.zero_stage={stage}", ranks=2)
    for name in ("lr", "samples", "epochs"):
        assert logged(tmp_path, name) == logged(one, name)
    assert logged(tmp_path, "loss") == pytest.approx(logged(one, "loss"), rel=2e-4)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_batch_warmup_goes_on_exactly_within_a_stage(data, one, tmp_path):
    launch(
        *CONFIG,
        *WARMUP,
        "schedule.steps=8",
        "train.max_steps=4",
        f"data.path={data}",
        f"run_dir={tmp_path}",
        "train.zero_stage=2",
        ranks=1,
    )
    launch("--resume", str(tmp_path), "train.max_steps=8", ranks=1)
    for name in ("loss", "grad_norm", "lr", "samples", "global_batch_size"):
        assert logged(tmp_path, name) == logged(one, name), name


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_stage_is_a_run_with_that_batch_size(data, one, tmp_path):
    launch(
        *CONFIG,
        "train.global_batch_size=4",
        "schedule.steps=8",
        "train.max_steps=3",
        f"data.path={data}",
        f"run_dir={tmp_path}",
        "train.zero_stage=2",
        ranks=1,
    )
    assert logged(tmp_path, "loss") == logged(one, "loss")[:3]
    assert logged(tmp_path, "grad_norm") == logged(one, "grad_norm")[:3]
