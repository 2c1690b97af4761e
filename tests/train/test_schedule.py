"""Learning rate and batch size are the functions of the step that the config says, also across a resume."""

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import Schedule, Train, accumulation_steps, load_config
from celo2_pretrain.train.checkpoints import manifest
from celo2_pretrain.train.record.metrics import read_metrics
from celo2_pretrain.train.schedule import BatchSizes, LearningRate, lr_factor, rate_ends_early

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


def resumed(step: int, steps: int, before: dict, after: dict | None = None, begun: int = 1000) -> list[float]:
    """The factors of a run of `begun` steps that is resumed at `step` to take `steps`, through a checkpoint's JSON."""
    old = LearningRate.of(Schedule(**before), begun)
    old = LearningRate.restore(json.loads(json.dumps(old.saved())))
    new = old.resumed(Schedule(**(before if after is None else after)), steps, step)
    assert LearningRate.restore(json.loads(json.dumps(new.saved()))) == new
    return [(old if k < step else new).curve.at(k) for k in range(steps)]


COSINE, WSD, CONSTANT = ({"name": name} for name in ("cosine", "wsd", "constant"))  # warm-up: 50 of 1000 steps


@pytest.mark.parametrize("keys", [COSINE, WSD, CONSTANT])
@pytest.mark.parametrize("step", [1, 49, 50, 500, 800, 900, 999, 1000])
@pytest.mark.parametrize("steps", [600, 1001, 1100, 2000, 50000])
def test_a_resume_with_another_length_neither_jumps_nor_warms_up_again(keys, step, steps):
    if step >= steps:
        return
    found, fresh = resumed(step, steps, keys), factors(steps, **keys)
    assert found[:50] == factors(1000, **keys)[:50]
    moves = [abs(b - a) for a, b in itertools.pairwise(found)]
    few = min(50, steps - step)  # as steep as the warm-up, or as wsd's decay in the steps that are left
    root = math.sqrt(1 / few) if keys is WSD else 0
    assert max(moves[max(0, step - 1) :]) <= max(1 / few, root) + 1e-9
    if keys is not CONSTANT and steps > step + 50:
        assert found[-1] == pytest.approx(fresh[-1], abs=0.01)


def test_wsd_made_longer_before_its_decay_stays_at_the_peak_until_the_new_one():
    for step in (50, 500, 800):
        found = resumed(step, 2000, WSD)
        assert set(found[50:1601]) == {1.0} and found[1600:] == factors(2000, **WSD)[1600:]


def test_wsd_made_shorter_decays_from_where_it_is():
    assert resumed(700, 900, WSD) == [*factors(1000, **WSD)[:700], *factors(900, **WSD)[700:]]
    found = resumed(700, 800, WSD)  # the decay of 160 steps would have begun at 640
    assert found[700] == 1 and found[701:] == pytest.approx([1 - math.sqrt(k / 100) for k in range(1, 100)])


def test_a_finished_schedule_rises_again_in_as_many_steps_as_a_warm_up():
    found, fresh = resumed(1000, 2000, COSINE), factors(2000, warmup=0.025)  # 50 steps
    assert found[999] < 1e-5 and found[1000:1049] == pytest.approx(
        [fresh[k] * (k - 999) / 50 for k in range(1000, 1049)], abs=1e-5
    )
    assert found[1049:] == fresh[1049:]
    found = resumed(1000, 2000, WSD)
    assert found[1024] == pytest.approx(0.5, abs=0.01) and set(found[1049:1601]) == {1.0}


def test_a_run_that_goes_on_as_it_was_takes_the_same_rates():
    first = LearningRate.of(Schedule(), 1000).resumed(Schedule(), 2000, 1000)
    for step in (1010, 1049, 1500):
        assert first.resumed(Schedule(), 2000, step) is first
    again = first.resumed(Schedule(), 3000, 1010)  # while the rate rises
    assert again.curve.warmup == 50 and again.curve.at(1009) == first.curve.at(1009) == again.curve.moved_from


def test_another_schedule_begins_where_the_rate_is():
    found = resumed(600, 1000, CONSTANT, COSINE)
    assert found[600] == 1 and found[800] == pytest.approx(0.5)
    assert resumed(600, 1000, CONSTANT, WSD)[600:] == factors(1000, **WSD)[600:]
    assert resumed(1000, 1200, CONSTANT, WSD)[1100] == pytest.approx(1 - math.sqrt(0.5))
    assert set(resumed(900, 1500, WSD, CONSTANT)[1000:]) == {1.0}
    assert resumed(600, 1000, WSD, WSD | {"warmup": 0.5}) == factors(1000, **WSD)  # it is over
    assert resumed(600, 1000, WSD, WSD | {"decay": 0.3}) == factors(1000, **WSD, decay=0.3)
    found = resumed(20, 1000, WSD, WSD | {"warmup": 0.1})
    assert found[19] == 0.4 and found[150] == 1


def test_what_a_resume_does_to_the_rate_is_said():
    def said(step: int, steps: int, before: dict, after: dict | None = None) -> str | None:
        old = LearningRate.of(Schedule(**before), 1000)
        new = old.resumed(Schedule(**(before if after is None else after)), steps, step)
        return new.describe_change(old, step, 2e-3)

    assert said(1000, 2000, COSINE) == (
        "another schedule (length 1000 -> 2000): the learning rate goes from 5.5e-09 to 0.00096 in 50 step(s), and then "
        "follows the new one"
    )
    assert said(500, 2000, WSD).endswith("the learning rate falls from step 1600 to step 2000")
    assert said(500, 2000, COSINE | {"warmup": 0.0}).endswith("goes from 0.001 to 0.0017 at once")
    assert said(20, 2000, COSINE).endswith("goes on warming up, to step 50")
    assert said(500, 2000, CONSTANT).endswith("stays at 0.002")
    assert said(500, 1000, COSINE, COSINE | {"warmup": 0.5}).endswith("goes on as before")
    assert said(500, 1000, COSINE) is None


def test_a_rate_of_0_before_the_last_step_is_warned_of():
    for keys, early in ((["schedule.steps=10"], True), (["schedule.steps=10", "schedule.final=0.1"], False), ([], False)):
        config = load_config(None, [*keys, "train.max_steps=20"])
        found = rate_ends_early(config, LearningRate.of(config.schedule, 20))
        assert (found is not None) == early
    assert "0 from step 10 of 20 on" in rate_ends_early(
        load_config(None, ["train.max_steps=20"]), LearningRate.of(Schedule(steps=10), 20)
    )


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


@pytest.mark.multiprocess
def test_wsd_keeps_the_checkpoint_from_before_its_decay_and_goes_on_from_it(data, tmp_path):
    run, longer = tmp_path / "run", tmp_path / "longer"
    wsd = ["schedule.name=wsd", "schedule.warmup=0.3", "schedule.decay=0.4", "train.global_batch_size=2"]
    keep = ["checkpoint.every=4", "checkpoint.keep_last=1", "train.max_steps=10"]
    launch(*CONFIG, *wsd, *keep, f"data.path={data}", f"run_dir={run}", ranks=1)
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == ["step_00000006", "step_00000010"]
    before = run / "checkpoints/step_00000006"
    result = drive("--resume", str(before), f"run_dir={longer}", "train.max_steps=12")
    assert result.returncode == 0 and "the learning rate falls from step 7 to step 12" in result.stdout
    assert logged(longer, "lr") == pytest.approx([3e-3] * 2 + [3e-3 * (1 - math.sqrt(k / 5)) for k in range(1, 5)])
    result = drive("--resume", str(run), "train.max_steps=20")
    assert result.returncode == 0 and f"{before} is from before the decay: --resume goes on from there" in result.stdout
    left = 1 - math.sqrt(3 / 4)  # the decay's last step
    rises = [3e-3 * (left + (1 - left) * k / 3) for k in (1, 2, 3)]
    assert logged(run, "lr")[10:14] == pytest.approx([*rises, 3e-3 * (1 - math.sqrt(1 / 8))])


@pytest.mark.multiprocess
def test_a_checkpoint_of_an_earlier_version_has_its_runs_schedule(data, tmp_path):
    wsd = ["schedule.name=wsd", "schedule.warmup=0.25", "train.global_batch_size=2", "train.max_steps=4"]
    launch(*CONFIG, *wsd, f"data.path={data}", f"run_dir={tmp_path}", ranks=1)
    found = tmp_path / "checkpoints/step_00000003"
    entries = json.loads((found / manifest.NAME).read_bytes())["files"]
    state = json.loads((found / "state.json").read_bytes())
    del state["extra"]["learning_rate"]
    (found / "state.json").unlink()
    text = json.dumps(state).encode()
    entries["state.json"] = manifest.write_file(found / "state.json", lambda file: file.write(text))
    (found / manifest.NAME).unlink()
    manifest.write(found, 3, entries)
    shutil.rmtree(tmp_path / "checkpoints/step_00000004")
    launch("--resume", str(found), "train.max_steps=40", "schedule.steps=40", "train.max_steps=5", ranks=1)
    assert logged(tmp_path, "lr")[-2:] == [3e-3] * 2  # without a second warm-up of 10 steps


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
