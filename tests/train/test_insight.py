"""What a run tells of itself: metrics, trackers, traces, its origin; and what is refused before anything is written."""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from celo2_pretrain.cli import main
from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import Config, load_config, profiled_steps
from celo2_pretrain.train.record import peak_flops, provenance, trackers
from celo2_pretrain.train.record.insight import perplexity
from celo2_pretrain.train.record.metrics import read_metrics
from celo2_pretrain.train.record.norms import CHUNK, sum_of_squares
from celo2_pretrain.train.record.plot import PANELS
from celo2_pretrain.train.record.profiler import Profiler
from celo2_pretrain.train.record.timers import COMMUNICATION, PHASES, Timers

from support.paths import ROOT
from support.processes import drive

SMALL = [
    "model.layers=1",
    "model.width=24",
    "model.heads=2",
    "model.context=16",
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
    "train.log_every=2",
    "train.max_steps=5",
    "eval.sequences=2",
    "eval.every=5",
    "checkpoint.any_world=false",
    "checkpoint.every=4",
]
TRACKED = [name for name, package in (("tensorboard", "tensorboard"), ("wandb", "wandb")) if importlib.util.find_spec(package)]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A run with a trace, and with those trackers that are installed."""
    folder = tmp_path_factory.mktemp("insight") / "run"
    wanted = {"tensorboard": "track.tensorboard=true", "wandb": "track.wandb_project=tests"}
    result = drive(
        *SMALL,
        f"data.path={data}",
        f"run_dir={folder}",
        "profile.steps=2-3",
        *(wanted[name] for name in TRACKED),
        timeout=1500,
        WANDB_MODE="offline",
        WANDB_API_KEY="",
        NCCL_DEBUG="WARN",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.mark.slow
def test_every_field_is_documented_and_every_documented_field_is_there(run):
    text = (ROOT / "docs/insight.md").read_text().partition("## metrics.jsonl")[2].partition("**Norms.**")[0]
    table = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}
    written = {name for record in read_metrics(run) for name in record}
    assert written <= table, written - table
    assert table <= written, table - written


@pytest.mark.slow
def test_logged_steps_tell_where_their_time_went(run):
    records = [record for record in read_metrics(run) if "loss" in record]
    assert [record["step"] for record in records] == [2, 4, 5]
    for record in records:
        times = [record[f"time/{phase}"] for phase in PHASES]
        assert all(seconds >= 0 for seconds in times) and record["time/forward"] > 0 and record["time/backward"] > 0
        assert 0 <= record[f"time/{COMMUNICATION}"] <= sum(times)
        assert 0 < record["mfu"] and 0.01 < record["memory_gib"] < 100
        assert record["perplexity"] == pytest.approx(perplexity(record["loss"]))
        assert record["tokens"] == record["step"] * 4 * 16


@pytest.mark.slow
def test_trace_holds_the_steps_asked_for(run):
    traces = list((run / "profile").iterdir())
    assert [path.name for path in traces] == ["steps_2-3_rank0.json.gz"]
    events = json.loads(gzip.open(traces[0]).read())["traceEvents"]
    # Two steps of two micro-batches, each with one loss.
    assert sum(event.get("name") == "aten::cross_entropy_loss" for event in events) == 4


@pytest.mark.slow
@pytest.mark.skipif("tensorboard" not in TRACKED, reason="tensorboard is not installed")
def test_tensorboard_has_the_records(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("loss", "val_loss", "update_norm/celo2", "time/forward"):
        records = {record["step"]: record[name] for record in read_metrics(run) if name in record}
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(records, rel=1e-5)


@pytest.mark.skipif("tensorboard" not in TRACKED, reason="tensorboard is not installed")
def test_a_replaced_run_s_curves_stay_until_the_new_run_has_a_record(tmp_path):
    old = tmp_path / "tensorboard/events.out.tfevents.1.old"
    old.parent.mkdir()
    old.touch()
    tracker = trackers.open_trackers(load_config(None, [f"run_dir={tmp_path}", "track.tensorboard=true"]), 0)[0]
    assert old.exists()  # loading what the new run goes on from may still fail
    tracker.log({"step": 1, "loss": 2.0})
    tracker.close()
    assert not old.exists() and len(list(old.parent.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.skipif("wandb" not in TRACKED, reason="wandb is not installed")
def test_wandb_offline_writes_its_run(run):
    written = list(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(written) == 1 and written[0].stem == f"run-{(run / 'wandb_id').read_text().strip()}"
    assert written[0].stat().st_size > 1000 and b"update_norm/celo2" in written[0].read_bytes()


@pytest.mark.slow
def test_origin_tells_what_to_repeat(run):
    (record,) = map(json.loads, (run / "origin.jsonl").read_text().splitlines())
    assert record["versions"]["torch"] == torch.__version__ and record["cpu"] and record["peak_source"]
    assert record["environment"]["NCCL_DEBUG"] == "WARN"
    assert not any("KEY" in name or "WANDB" in name for name in record["environment"])  # secrets stay out
    assert (run / "git.diff").exists() == bool(record.get("git_diff"))


@pytest.mark.slow
@pytest.mark.parametrize("x", ["step", "tokens", "time"])
def test_runs_are_compared_in_panels(run, tmp_path, monkeypatch, x):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *to, **how: (figures.append(self), save(self, *to, **how)))
    assert main(["plot", str(run), str(run), "--x", x, "--out", str(tmp_path / "runs.png")]) == 0
    drawn = {axes.get_title(): axes for axes in figures[0].axes if axes.get_visible()}
    assert list(drawn) == [name for name in PANELS if name in drawn] and len(drawn) >= len(PANELS) - 1
    losses = [record["loss"] for record in read_metrics(run) if "loss" in record]
    for line in drawn["training loss (nats per token)"].lines:
        assert list(line.get_ydata()) == losses and list(line.get_xdata()) == sorted(line.get_xdata())
    assert len(drawn["norm of the update"].lines) == 4  # two runs, two rules


def test_missing_packages_are_refused_before_anything_is_written(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for key, package in (("track.tensorboard=true", "tensorboard"), ("track.wandb_project=mine", "wandb")):
        assert main(["train", key, f"run_dir={tmp_path / 'run'}"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{key} needs the package {package}: pip install" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["0", "3-2", "a", "1-", "-3", "1-2-3", "1.5"])
def test_steps_to_trace_are_a_range_from_1_on(text):
    with pytest.raises(UserError, match="profile.steps"):
        load_config(None, [f"profile.steps={text}"])
    with pytest.raises(UserError, match="the run ends before"):
        load_config(None, ["profile.steps=8", "train.max_steps=7"])
    assert profiled_steps("7") == (7, 7) and profiled_steps("10-12") == (10, 12) and profiled_steps("") is None


def test_running_run_is_traced_on_request(tmp_path):
    config = Config(run_dir=str(tmp_path))
    profiler, other = Profiler(config, rank=0), Profiler(config, rank=1)
    assert not any([profiler.before(1), profiler.after(1)])
    (tmp_path / "PROFILE").write_text("2\n")
    told = []
    for step in range(2, 15):
        other.before(step)
        profiler.before(step)
        torch.ones(3).sum()
        told += [text for text in (profiler.after(step), other.after(step)) if text]
    assert len(told) == 1 and "trace of steps 11 to 12" in told[0]  # from the first step after a line of metrics
    assert not (tmp_path / "PROFILE").exists()


def test_git_diff_is_kept_for_each_start(tmp_path, monkeypatch):
    monkeypatch.setattr(
        provenance, "git", lambda *arguments: {"status": " M a.py", "diff": "-a\n+b"}.get(arguments[0], "c0ffee")
    )
    for _ in range(2):
        provenance.write_origin(tmp_path, 1, peak_flops.Peak(None, "unknown"))
    lines = [json.loads(line) for line in (tmp_path / "origin.jsonl").read_text().splitlines()]
    assert [line["git_diff"] for line in lines] == ["git.diff", "git.2.diff"]
    assert (tmp_path / "git.2.diff").read_text() == "-a\n+b\n"
    provenance.remove_origin(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA L40S", None),
        ("NVIDIA A100-PCIE-40GB", None),
    ],
)
def test_peak_is_the_data_sheets_of_a_known_gpu(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    config = load_config(None, ["train.precision=bf16"])
    assert peak_flops.peak_of(config, torch.device("cuda", 0)).flops == (tflops and tflops * 1e12)
    config.track.peak_tflops = 100.0
    assert peak_flops.peak_of(config, torch.device("cuda", 0)).flops == 1e14


def test_a_measured_peak_is_one_a_cpu_can_have():
    assert 1e8 < peak_flops.peak_of(Config(), torch.device("cpu")).flops < 1e14


def test_nothing_is_timed_between_logged_steps():
    timers = Timers(torch.device("cpu"))
    timers.mark("data")
    timers.end()
    assert set(timers.seconds().values()) == {0.0}
    timers.begin()
    for phase in PHASES:
        timers.mark(phase)
    timers.end()
    assert all(timers.seconds()[phase] > 0 for phase in PHASES)


def test_squares_of_many_elements_are_added_exactly_enough():
    x = torch.full((3 * CHUNK + 5,), 0.1)
    assert float(sum_of_squares(x)) == pytest.approx(x.numel() * float(x[0]) ** 2, rel=1e-6)
    assert float(sum_of_squares(torch.empty(0))) == 0


def test_perplexity_that_no_float_holds_is_none():
    assert perplexity(1000.0) is None and perplexity(float("nan")) is None and perplexity(0.0) == 1
