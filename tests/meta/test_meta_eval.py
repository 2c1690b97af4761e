"""The evaluation suite keeps its promises: fair, repeatable runs, a queue that resumes, figures that are right."""

import argparse
import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from celo2_pretrain import cli
from celo2_pretrain.common.errors import UserError
from celo2_pretrain.meta.evaluation import analysis, evaluate, optimizers, runner
from celo2_pretrain.meta.evaluation import job as jobs
from celo2_pretrain.meta.evaluation.job import Job
from celo2_pretrain.meta.evaluation.report import write_report
from celo2_pretrain.meta.evaluation.suite.problem import Problem, Task
from celo2_pretrain.meta.evaluation.suite.tasks import TASKS

from support.paths import ROOT, TESTS

ADAMW = optimizers.SPECS["adamw"]


pytestmark = pytest.mark.usefixtures("one_thread")


def build_toy(seed: int) -> Problem:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    x = torch.randn(32, 4)

    def loss(step: int):
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    return Problem(model, loss, lambda: loss(0).item())


def build_broken(seed: int) -> Problem:
    raise RuntimeError("no such data")


def build_deadly(seed: int) -> Problem:
    os._exit(3)


def build_slow(seed: int) -> Problem:
    problem = build_toy(seed)
    measure = problem.measure
    problem.measure = lambda: (time.sleep(0.5), measure())[1]
    return problem


TOYS = {
    name: Task(name, "", build, 20, "", seconds=1.0)
    for name, build in (("toy", build_toy), ("broken", build_broken), ("deadly", build_deadly), ("slow", build_slow))
}


def toy_jobs(*names: str, lrs=(1e-2,), seeds=(0,)) -> list[Job]:
    return [Job(name, ADAMW, lr, seed, 20) for name in names for lr in lrs for seed in seeds]


# ---- tasks and optimizers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_a_task_runs_and_a_seed_fixes_all_of_it(name):
    task = TASKS[name]
    if task.missing():
        pytest.skip(f"{name} {task.missing()}")
    first, again = (jobs.run(Job(name, ADAMW, 1e-3, 0, 3), task) for _ in range(2))
    assert first["status"] == "ok", first
    assert len(first["curve"]) == 3 and all(math.isfinite(value) for _, value in first["curve"])
    assert first["curve"] == again["curve"]
    losses = [task.build(seed).loss(0).item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("name", optimizers.SPECS)
def test_an_optimizer_lowers_the_loss_at_the_middle_of_its_grid(name):
    spec = optimizers.SPECS[name]
    if spec.missing():
        pytest.skip(f"{name} {spec.missing()}")
    result = jobs.run(Job("toy", optimizers.with_weights(spec), spec.middle, 0, 200), TOYS["toy"])
    assert result["status"] == "ok", result
    assert result["loss"] < 0.9 * build_toy(0).measure()


@pytest.mark.parametrize("place", range(len(optimizers.FACTORS)))
def test_embeddings_are_stepped_at_the_same_rate_by_every_hybrid_optimizer(place):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.hidden, self.head = nn.Embedding(5, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 5)

    rates = set()
    for spec in optimizers.SPECS.values():
        if spec.missing() or spec.name in ("celo2-base", "velo"):
            continue
        lr = spec.grid()[place]
        model = Model()
        optimizer, _ = optimizers.build(optimizers.with_weights(spec), model, lr, 10)
        for group in optimizer.param_groups:
            if any(p is model.tokens.weight or p is model.head.weight or p is model.head.bias for p in group["params"]):
                assert not any(p is model.hidden.weight for p in group["params"])
                rates.add(f"{group['lr'] * group.get('adamw_lr_multiplier', 1.0):.2g}")
    assert len(rates) == 1


def test_muon_rates_are_five_times_celo2s():
    muon, celo2 = optimizers.SPECS["muon"], optimizers.SPECS["celo2"]
    assert np.allclose(np.array(muon.grid()) / celo2.grid(), 5, rtol=0.02)


def test_theta_is_read_from_an_npz_case_and_a_changed_one_is_noticed(golden):
    path = TESTS / "golden/celo2_reference.npz"
    official = optimizers.named_theta("celo2", f"official={path}:celo2_official")
    other = optimizers.named_theta("celo2", f"other={path}:celo2_random")
    assert official.name == "celo2[official]"
    assert np.array_equal(official.weights["w0"], golden["celo2_official/theta/w0"])
    assert official.fingerprint != other.fingerprint
    with pytest.raises(UserError, match="celo2_official"):
        optimizers.named_theta("celo2", f"mine={path}")
    with pytest.raises(UserError, match="NAME=PATH"):
        optimizers.named_theta("celo2", str(path))
    done = [jobs.record(Job("toy", official, 1e-3, 0, 20), "ok", 1.0)]
    with pytest.raises(UserError, match="other weights"):
        runner.remaining([Job("toy", optimizers.with_weights(other, name="celo2[official]"), 1e-3, 0, 20)], done)


def test_a_task_whose_package_is_missing_is_named_and_skipped(capsys, monkeypatch):
    absent = Task("absent", "", build_toy, 10, "", needs=(("no_such_module", "no-such-package"),))
    monkeypatch.setitem(evaluate.TASKS, "absent", absent)
    assert evaluate.choose_tasks(arguments(tasks="absent,lm-byte-small")) == [TASKS["lm-byte-small"]]
    assert "skipping absent: needs no-such-package" in capsys.readouterr().out


def arguments(**given) -> argparse.Namespace:
    return argparse.Namespace(
        **{
            "tasks": None,
            "optimizers": None,
            "quick": False,
            "lrs": None,
            "seeds": None,
            "theta": [],
            "theta_base": [],
            **given,
        }
    )


# ---- the queue ----------------------------------------------------------------------------------------------------


def test_a_diverging_run_is_recorded_as_such():
    result = jobs.run(Job("toy", optimizers.SPECS["adamw"], 1e30, 0, 20), TOYS["toy"])
    assert (result["status"], result["loss"]) == ("diverged", None)
    assert math.isinf(analysis.entries([result])["toy", "adamw"].best)


@pytest.mark.multiprocess
def test_a_failing_job_and_a_dying_process_stop_no_others(tmp_path):
    said = []
    rows = runner.run_all(toy_jobs("broken", "deadly", "toy", seeds=(0, 1)), tmp_path, 1, said.append, TOYS)
    status = {(row["task"], row["seed"]): row["status"] for row in rows}
    assert status == {
        (name, seed): "ok" if name == "toy" else "failed" for name in ("broken", "deadly", "toy") for seed in (0, 1)
    }
    assert any("no such data" in line for line in said) and any("code 3" in line for line in said)


@pytest.mark.multiprocess
def test_a_second_call_runs_only_what_is_missing_or_failed(tmp_path):
    runner.run_all(toy_jobs("toy", "broken", lrs=(1e-2,)), tmp_path, 1, lambda _: None, TOYS)
    with open(tmp_path / runner.RESULTS, "a") as file:
        file.write('{"task": "toy", "optim')  # a crash in the middle of a line
    said = []
    rows = runner.run_all(toy_jobs("toy", "broken", lrs=(1e-2, 1e-3)), tmp_path, 2, said.append, TOYS)
    assert said[0] == "1 of 4 jobs were done before"
    assert len(said) == 4 and not any("toy adamw lr 0.01" in line for line in said)
    assert sorted((row["task"], row["lr"]) for row in rows) == [
        ("broken", 1e-3),
        ("broken", 1e-2),
        ("toy", 1e-3),
        ("toy", 1e-2),
    ]


def test_results_of_another_length_are_not_mixed():
    done = [jobs.record(Job("toy", ADAMW, 1e-2, 0, 20), "ok", 1.0)]
    with pytest.raises(UserError, match="--steps-scale"):
        runner.remaining([Job("toy", ADAMW, 1e-2, 0, 10)], done)


@pytest.mark.multiprocess
def test_control_c_ends_the_workers_and_keeps_what_was_done(tmp_path):
    code = (
        "import signal, sys; sys.path[:0] = ['tests', 'tests/meta']; import test_meta_eval as t; from pathlib import Path\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it\n"
        "    try: t.runner.run_all(t.toy_jobs('toy', 'slow', 'toy', seeds=(0,)), Path(sys.argv[1]), 1, "
        "t.runner.print_line, t.TOYS)\n"
        "    except KeyboardInterrupt: sys.exit(130)\n"
    )
    (tmp_path / "script.py").write_text(code)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "out")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "toy adamw" in process.stdout.readline()
    process.send_signal(2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and "1 of 3 jobs are done" in output
    assert len(runner.read_results(tmp_path / "out")) == 1


def test_the_time_left_follows_what_jobs_took():
    queue = toy_jobs("toy", lrs=(1e-3, 1e-2, 1e-1, 1.0))
    clock = runner.Clock(queue, 2, TOYS)
    assert clock.seconds_left() == pytest.approx(4 * 1.0 / 2)
    clock.finished(queue[0], 3.0)
    assert clock.seconds_left() == pytest.approx(3 * 3.0 / 2)


# ---- figures ------------------------------------------------------------------------------------------------------


def row(optimizer: str, lr: float, seed: int, loss: float | None, curve=(), task="toy", steps=100) -> dict:
    return {
        "task": task,
        "optimizer": optimizer,
        "lr": lr,
        "seed": seed,
        "steps": steps,
        "theta": "",
        "loss": loss,
        "status": "diverged" if loss is None else "ok",
        "curve": list(curve),
        "seconds": 1.0,
    }


def test_the_best_rate_has_the_least_mean_and_no_diverged_seed():
    entry = analysis.entries(
        [row("a", 1e-3, 0, 2.0), row("a", 1e-3, 1, 3.0), row("a", 1e-2, 0, 1.0), row("a", 1e-2, 1, None)]
    )["toy", "a"]
    assert (entry.best_lr, entry.best) == (1e-3, 2.5)
    assert entry.deviation == pytest.approx(0.5 * math.sqrt(2))


def test_speed_up_is_the_baselines_steps_over_those_to_its_final_loss():
    found = analysis.entries(
        [
            row("adamw", 1, 0, 2.0, [(50, 3.0), (100, 2.0)]),
            row("fast", 1, 0, 1.0, [(20, 3.0), (60, 1.0), (100, 1.0)]),
            row("slow", 1, 0, 2.5, [(100, 2.5)]),
        ]
    )
    baseline = found["toy", "adamw"]
    assert analysis.speed_up(found["toy", "fast"], baseline) == pytest.approx(100 / 40)  # 2.0 halfway from 20 to 60
    assert analysis.speed_up(found["toy", "slow"], baseline) is None
    assert analysis.speed_up(baseline, baseline) == pytest.approx(1.0)


def test_curves_of_other_spacing_are_averaged_only_at_steps_that_all_have():
    found = analysis.entries(
        [
            row("adamw", 1, 0, 2.0, [(100, 2.0)]),
            row("adamw", 1, 1, 2.0, [(100, 2.0)]),
            row("fast", 1, 0, 1.0, [(20, 5.0), (40, 4.0), (80, 2.0), (100, 1.0)]),
            row("fast", 1, 1, 1.0, [(40, 4.0), (60, 3.0), (80, 2.0), (100, 1.0)]),
        ]
    )
    fast = found["toy", "fast"]
    assert fast.points() == [(40, [4.0, 4.0]), (80, [2.0, 2.0]), (100, [1.0, 1.0])]
    assert fast.curve() == [(40, 4.0), (80, 2.0), (100, 1.0)]
    assert analysis.speed_up(fast, found["toy", "adamw"]) == pytest.approx(100 / 80)


@pytest.mark.parametrize(
    "losses, span, expected",
    [
        ({1e-3: 1.04, 1e-2: 1.0, 1e-1: 1.08}, None, (0.5 + 0.25, False)),  # 2 % of 1.0, interpolated on both sides
        ({1e-3: 1.01, 1e-2: 1.0, 1e-1: 2.0}, None, (1 + 0.02, True)),  # still good at the lower end of the grid
        ({1e-3: 1.04, 1e-2: 1.0, 1e-1: math.inf}, None, (0.5, False)),  # nothing is granted towards a diverged rate
        ({1e-3: -490.0, 1e-2: -500.0, 1e-1: -450.0}, 500.0, (1 + 0.2, True)),  # of a range of returns
        ({1e-3: math.inf}, None, (0.0, False)),
    ],
)
def test_width_is_in_decades_around_the_best_rate(losses, span, expected):
    decades, open_ended = analysis.width(losses, span)
    assert (decades, open_ended) == (pytest.approx(expected[0]), expected[1])


def test_beats_counts_the_tasks_that_both_have():
    found = analysis.entries(
        [row("a", 1, 0, 1.0, task=t) for t in "xyz"] + [row("b", 1, 0, loss, task=t) for t, loss in (("x", 2.0), ("y", 0.5))]
    )
    assert (analysis.beats(found, "a", "b"), analysis.beats(found, "b", "a")) == ((1, 2), (1, 2))


def test_the_report_holds_the_figures_and_the_plots(tmp_path):
    for name, gain in (("adamw", 0.0), ("celo2", 0.5)):
        for lr in (1e-3, 1e-2, 1e-1):
            for seed in (0, 1):
                loss = None if (name, lr) == ("celo2", 1e-1) else 2.0 - gain + abs(math.log10(lr) + 2) + 0.1 * seed
                curve = [(50, 3.0 - gain), (100, loss)] if loss else []
                runner.append(tmp_path, row(name, lr, seed, loss, curve))
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "**1.55 ± 0.071** (0.01)" in text and "| celo2 |  | 1 of 1 |" in text
    assert "1.36 ×" in text  # of the mean curve: 100 / (50 + 50 · (2.5 − 2.05) / (2.5 − 1.55))
    assert (tmp_path / "results.csv").read_text().count("inf") == 2
    for plot in ("curves.png", "learning_rates.png", "seeds.png"):
        assert (tmp_path / plot).stat().st_size > 3000


# ---- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tasks", "lm"], "there is no lm; there are lm-byte-small"),
        (["--optimizers", "sgd"], "there is no sgd; there are celo2"),
        (["--lrs", "fast"], "give numbers with commas"),
        (["--seeds", "-1"], "must not be negative"),
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--steps-scale", "0"], "must be above 0"),
        (["--theta", "x=nowhere.pt"], "nowhere.pt"),
        (["--report", "nowhere"], "has no results"),
    ],
)
def test_bad_options_give_one_line_and_leave_nothing(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [option if option != "-1" else "0,-1" for option in options]
    assert cli.main(["meta-eval", "--out", "out", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_command_runs_resumes_and_reports(tmp_path, capsys):
    options = [
        "meta-eval",
        "--out",
        str(tmp_path),
        "--tasks",
        "lm-byte-small",
        "--optimizers",
        "celo2,adamw",
        "--lrs",
        "1",
        "--seeds",
        "0",
        "--steps-scale",
        "0.02",
        "--jobs",
        "1",
    ]
    assert cli.main(options) == 0
    assert "[2/2] lm-byte-small adamw lr 0.003 seed 0" in capsys.readouterr().out
    assert cli.main(options) == 0
    assert "2 of 2 jobs were done before" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["optimizer"] for row in rows] == ["celo2", "adamw"] and all(row["loss"] < 6 for row in rows)
