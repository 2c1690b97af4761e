"""The command line in one process: bad input is refused in one line, and a run's checkpoint is the model it trained."""

import json
import logging
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from celo2_pretrain.cli import main
from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import Optimizer
from celo2_pretrain.data.loader import Windows
from celo2_pretrain.model.build_optimizer import build_optimizer
from celo2_pretrain.optimizer.backends import choose
from celo2_pretrain.train.checkpoints import deepspeed_files
from celo2_pretrain.train.faults import once
from celo2_pretrain.train.rates import Rates
from celo2_pretrain.train.record.backend import telling_backend
from celo2_pretrain.train.record.metrics import read_metrics
from celo2_pretrain.train.start.ranks import free_port

from support.processes import drive

MODEL = ["model.layers=2", "model.width=32", "model.heads=2", "model.context=32"]
SMALL = [
    *MODEL,
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
    "train.log_every=1",
    "eval.sequences=8",
    "optimizer.adamw_lr_multiplier=2",
]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> str:
    run_dir = str(tmp_path_factory.mktemp("runs") / "small")
    result = drive(
        *SMALL,
        f"data.path={data}",
        f"run_dir={run_dir}",
        "train.max_steps=6",
        "checkpoint.every=2",
        "eval.every=3",
        "eval.prompt=def ",
        "eval.sample_tokens=5",
        "eval.sequences=1000000",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Celo2 backend on ") == 1, result.stdout
    return run_dir


def refused(capsys, *arguments: str) -> str:
    """The one line that the command refuses its arguments with."""
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("celo2-pretrain: error: "), error
    return error


def write_corpus(folder: Path, kind: str) -> Path:
    lines = [json.dumps({"text": f"a line of text, number {k}"}) for k in range(500)]
    texts = {
        "empty.txt": "",
        "blank.jsonl": "\n",
        "one.jsonl": lines[0],
        "small.jsonl": "\n".join(lines),
        "broken.jsonl": "\n".join([*lines, "{not json"]),
        "other-field.jsonl": '{"body": "x"}\n{"body": "y"}',
    }
    path = folder / kind
    path.write_bytes(b"\xff\xfe\x00latin \xe4" * 100) if kind == "binary.txt" else path.write_text(texts[kind])
    return path


@pytest.mark.parametrize(
    "kind, message",
    [
        ("empty.txt", "the corpus is empty"),
        ("blank.jsonl", "the corpus is empty"),
        ("one.jsonl", "single document"),
        ("small.jsonl", "cannot train a vocabulary of 4096 pieces: the text supports at most"),
        ("broken.jsonl", "broken.jsonl, line 501: not valid JSON"),
        ("other-field.jsonl", "no text field 'text' (found ['body'])"),
        ("binary.txt", "binary.txt is not UTF-8 text"),
    ],
)
def test_unusable_corpus_is_refused_and_nothing_is_left(tmp_path, capsys, kind, message):
    path = write_corpus(tmp_path, kind)
    assert message in refused(capsys, "prepare", str(path), "--out", str(tmp_path / "out" / "tokens"))
    assert not (tmp_path / "out").exists()


def test_failure_after_the_tokenizer_leaves_nothing(data, tmp_path, capsys):
    path = write_corpus(tmp_path, "broken.jsonl")
    out, tokenizer = str(tmp_path / "tokens"), f"{data}/tokenizer.model"
    message = refused(capsys, "prepare", str(path), "--tokenizer", tokenizer, "--out", out)
    assert "line 501" in message and [p.name for p in tmp_path.iterdir()] == ["broken.jsonl"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["prepare", "/no/such/corpus", "--out", "x"], "corpus path '/no/such/corpus' does not exist"),
        (["prepare", "--out", "x"], "give one corpus"),
        (["prepare", "--stdlib", "--val-fraction", "2", "--out", "x"], "--val-fraction 2.0"),
        (["prepare", "--stdlib", "--vocab-size", "10", "--out", "x"], "vocabulary of 10 is too small"),
        (["prepare", "--stdlib", "--tokenizer", "/no/such.model", "--out", "x"], "'/no/such.model' does not exist"),
        (["train", "--config", "none.yaml"], "config 'none.yaml' does not exist"),
        (["train", "optimizer.lrr=1"], "did you mean 'optimizer.lr'?"),
        (["train", "data.path=/no/such/data"], "data folder '/no/such/data' does not exist: make it with"),
        (["train", "--resume", "/no/such/run"], "no run or checkpoint at '/no/such/run'"),
        (["eval", "/no/such/run"], "no run or checkpoint"),
        (["export", "/no/such/run", "--out", "x"], "no run or checkpoint"),
        (["plot", "/no/such/run"], "has no metrics.jsonl"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_existing_output_is_not_overwritten_unasked(data, capsys):
    assert "exists: choose another --out" in refused(capsys, "prepare", "--stdlib", "--out", data)


@pytest.mark.parametrize(
    "world_size, arguments, message",
    [
        (1, ["model.vocab_size=300"], "model.vocab_size=300 is smaller than the data's vocabulary of 512"),
        (3, [], "train.global_batch_size=4 is no multiple of train.micro_batch_size=2 × 3 ranks"),
        (4096, ["train.global_batch_size=8192"], "not enough data"),
        (1, ["optimizer.weights=/no/such/weights.safetensors"], "optimizer.weights='/no/such/weights.safetensors'"),
    ],
)
def test_config_that_does_not_fit_data_or_ranks_is_refused(
    data, tmp_path, capsys, monkeypatch, world_size, arguments, message
):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    assert message in refused(capsys, "train", *SMALL, f"data.path={data}", f"run_dir={tmp_path / 'run'}", *arguments)
    assert not (tmp_path / "run").exists()


def test_ranks_of_a_node_say_the_same_once_and_what_only_one_found_too(monkeypatch, capsys):
    monkeypatch.setenv("MASTER_PORT", str(free_port()))  # one launch
    monkeypatch.setattr(once, "WAIT_SECONDS", 0.1)
    for rank, key in (("0", "lrr"), ("1", "lrr"), ("1", "lrrr"), ("2", "lrrr")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["train", f"optimizer.{key}=1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "'optimizer.lrr'" in lines[0] and "'optimizer.lrrr'" in lines[1], lines
    assert "rank" not in lines[0] and lines[1].endswith(" (found on rank 1)")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["model.layers=3"], "was written with model.layers = 2, this run has 3"),
        (["optimizer.name=adamw"], "was written with optimizer.name = 'celo2', this run has 'adamw'"),
        ([], "is already at step 6, train.max_steps is 6: to train on"),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused(run, capsys, arguments, message):
    before = {p: p.read_bytes() for p in Path(run).rglob("*") if p.is_file()}
    assert message in refused(capsys, "train", "--resume", run, *arguments)
    assert before == {p: p.read_bytes() for p in Path(run).rglob("*") if p.is_file()}


def test_run_is_not_replaced_unasked(run, data, capsys):
    assert "already holds a run" in refused(capsys, "train", *SMALL, f"data.path={data}", f"run_dir={run}")


def test_run_folder_tells_what_was_run(run, data):
    records = read_metrics(run)
    losses = [r["loss"] for r in records if "loss" in r]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "val_loss" in r] == [0, 3, 6]
    assert losses[-1] < losses[0]
    origin = json.loads((Path(run) / "origin.jsonl").read_text())
    assert origin["world_size"] == 1 and origin["versions"]["torch"] and "train" in origin["command"]
    assert f"path: {data}" in (Path(run) / "config.yaml").read_text()
    assert (Path(run) / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (Path(run) / "checkpoints").glob("step_*")) == ["step_00000004", "step_00000006"]


def test_eval_of_the_checkpoint_is_the_validation_loss_of_the_run(run, capsys):
    assert main(["eval", run]) == 0
    last = [r["val_loss"] for r in read_metrics(run) if "val_loss" in r][-1]
    assert float(re.search(r"validation loss ([\d.]+)", capsys.readouterr().out)[1]) == pytest.approx(last, abs=2e-4)


def test_generate_continues_the_prompt(run, capsys):
    assert main(["generate", run, "--prompt", "import os", "--tokens", "8"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("import os") and len(first) > len("import os\n")
    assert main(["generate", run, "--prompt", "import os", "--tokens", "8"]) == 0
    assert capsys.readouterr().out == first


def test_exported_model_gives_equal_logits_and_the_same_text(run, data, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from celo2_pretrain.train.checkpoints.export import load_trained

    out = str(tmp_path / "exported")
    assert main(["export", run, "--out", out]) == 0
    ours, tokenizer, _ = load_trained(run)
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    windows = Windows(data, "val", 32).batch(np.arange(4))[:, :-1]
    with torch.no_grad():
        assert torch.equal(ours(input_ids=windows).logits, theirs(input_ids=windows).logits)
    hf = AutoTokenizer.from_pretrained(out)
    text = "def main(argv: list[str]) -> int:\n    return 0\n"
    assert hf(text)["input_ids"] == tokenizer.encode([text])[0] and hf.decode(hf(text)["input_ids"]) == text
    assert "exists: choose another --out" in refused(capsys, "export", run, "--out", out)


def test_plot_draws_several_runs_or_refuses(run, tmp_path, capsys):
    assert main(["plot", run, run, "--out", str(tmp_path / "both.png")]) == 0
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert "must end in .png, .pdf or .svg" in refused(capsys, "plot", run, "--out", str(tmp_path / "both.txt"))


def test_random_states_are_restored():
    saved = deepspeed_files.random_states()
    first = random.random(), np.random.rand(), torch.rand(3).tolist()
    deepspeed_files.set_random_states(saved)
    assert first == (random.random(), np.random.rand(), torch.rand(3).tolist())


def test_srun_without_a_launcher_is_refused(monkeypatch):
    from celo2_pretrain.train.start.ranks import world_from_environment

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(UserError, match="srun started 8 tasks"):
        world_from_environment()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert world_from_environment() == (3, 8)


@pytest.mark.parametrize("active", [True, False])
def test_rank_0_says_which_backend_computes_the_passes(monkeypatch, active):
    monkeypatch.setenv("CELO2_BACKEND", "reference")
    choose._choose.cache_clear()  # it is said once in a process
    said = []
    with telling_backend(SimpleNamespace(active=active, print_line=said.append)):
        choose.backend_for(torch.device("cpu"))
        choose.backend_for(torch.device("cpu"))
    assert said == ["Celo2 backend on cpu: reference (CELO2_BACKEND asks for it)"] * active
    assert not logging.getLogger(choose.__name__).handlers


def test_this_runs_options_count_after_a_checkpoint_brought_its_own():
    model = torch.nn.Linear(3, 3)
    saved = build_optimizer(
        model, Optimizer(lr=9.0, weight_decay=9.0, adamw_lr_multiplier=9.0, newton_schulz_dtype="bf16", check_replicas_every=9)
    ).state_dict()
    optimizer = build_optimizer(
        model,
        Optimizer(lr=1e-3, weight_decay=0.1, adamw_lr_multiplier=4.0, newton_schulz_dtype="fp32", check_replicas_every=5),
    )
    rates, built = Rates(optimizer), [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 9.0
    rates.set(0.5)
    for group, before in zip(optimizer.param_groups, built, strict=True):
        assert {**group, "params": 0} == {**before, "lr": 5e-4, "initial_lr": 1e-3, "params": 0}
    assert (optimizer.check_replicas_every, optimizer.nonfinite) == (5, "skip")
