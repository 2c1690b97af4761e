"""What a run's model is worth, and that exporting changes nothing of it: both model families, both kinds of tokenizer."""

import json
import math
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from celo2_pretrain.cli import main
from celo2_pretrain.data.loader import Windows
from celo2_pretrain.data.shards import TokenArray
from celo2_pretrain.data.tokenizer import load_tokenizer
from celo2_pretrain.train.checkpoints.export import load_trained
from celo2_pretrain.train.record.metrics import read_metrics

from support.processes import drive

TEXT = "def main(argv: list[str]) -> int:\n\n    return 'ü €'  # 25\n"


def byte_level_tokenizer(folder: Path) -> str:
    """A transformers tokenizer as GPT-2's: byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([Path(json.__file__).read_text()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def trained(request, data, tmp_path_factory) -> tuple[str, str]:
    """(run folder, data folder): GPT-2 on sentencepiece's tokens, Llama on those of a transformers tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        data = str(folder / "tokens")
        assert (
            main(
                [
                    "prepare",
                    "--stdlib",
                    "--max-mb",
                    "0.1",
                    "--tokenizer",
                    byte_level_tokenizer(folder / "tokenizer"),
                    "--out",
                    data,
                ]
            )
            == 0
        )
    result = drive(
        f"model.family={request.param}",
        "model.layers=2",
        "model.width=32",
        "model.heads=2",
        "model.context=32",
        f"data.path={data}",
        f"run_dir={folder / 'run'}",
        "train.max_steps=2",
        "train.micro_batch_size=4",
        "train.global_batch_size=4",
        "eval.sequences=10",
    )
    assert result.returncode == 0, result.stderr
    return str(folder / "run"), data


@pytest.mark.slow
def test_eval_counts_every_token_once_and_the_bytes_they_stand_for(trained, tmp_path, capsys):
    run, data = trained
    assert main(["eval", run, "--json", str(tmp_path / "eval.json")]) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "eval.json").read_text())["validation"]
    model, tokenizer, _ = load_trained(run)
    windows = Windows(data, "val", 32)
    total = 0.0
    with torch.no_grad():
        for k in range(windows.count):
            row = windows.batch(np.array([k]))
            total += float(torch.nn.functional.cross_entropy(model(row[:, :-1]).logits[0], row[0, 1:], reduction="sum"))
    tokens = TokenArray(data, "val")
    ids = tokens.read(0, len(tokens))
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    text = [tokenizer.decode(part[part != tokenizer.eos_id].tolist()) for part in np.split(ids, ends + 1)]
    tokens_per_byte = len(ids) / sum(len(part.encode()) for part in text)
    nats = total / (windows.count * 32)
    assert found["windows"] == windows.count
    assert found["loss"] == pytest.approx(nats, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats * tokens_per_byte / math.log(2), rel=1e-5)
    assert f"{found['bits_per_byte']:.4f} bits per byte, perplexity {found['perplexity']:.2f}" in printed


@pytest.mark.slow
def test_eval_of_some_windows_is_what_the_run_measured(trained, capsys):
    run, _ = trained
    assert main(["eval", run, "--sequences", "10"]) == 0
    last = [record["val_loss"] for record in read_metrics(run) if "val_loss" in record][-1]
    assert float(re.search(r"validation loss ([\d.]+)", capsys.readouterr().out)[1]) == pytest.approx(last, abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_exported_model_has_equal_logits_and_the_tokenizer_the_same_ids(trained, dtype, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, data = trained
    out = str(tmp_path / "exported")
    assert main(["export", run, "--out", out, "--dtype", dtype]) == 0
    ours, tokenizer, _ = load_trained(run)
    for parameter in ours.parameters():  # not the buffers: Llama's frequencies of position stay float32
        parameter.data = parameter.data.to(getattr(torch, dtype))
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    assert theirs.dtype == getattr(torch, dtype)
    windows = Windows(data, "val", 32).batch(np.arange(3))[:, :-1]
    with torch.no_grad():
        assert torch.equal(ours(input_ids=windows).logits, theirs(input_ids=windows).logits)
    hf = AutoTokenizer.from_pretrained(out)
    ids = load_tokenizer(data).encode([TEXT])[0]
    assert hf(TEXT)["input_ids"] == ids == tokenizer.encode([TEXT])[0]
    assert hf.decode(ids) == TEXT
    assert hf.eos_token_id == tokenizer.eos_id == theirs.config.eos_token_id


class Manager:
    """lm_eval's TaskManager, as far as it is used."""

    def __init__(self, include_path=None):
        self.tasks = {"hellaswag"} | ({path.stem for path in Path(include_path).glob("*.yaml")} if include_path else set())

    def match_tasks(self, names):
        return [name for name in names if name in self.tasks]


def stand_in(monkeypatch, simple_evaluate) -> None:
    """A module lm_eval with this function."""
    lm_eval, tasks, utils = (types.ModuleType(name) for name in ("lm_eval", "lm_eval.tasks", "lm_eval.utils"))
    lm_eval.simple_evaluate, tasks.TaskManager = simple_evaluate, Manager
    utils.make_table = lambda scores: f"|{scores['results']}|"
    for module in (lm_eval, tasks, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.slow
def test_tasks_are_scored_by_the_harness_on_the_exported_model(trained, tmp_path, monkeypatch, capsys):
    run, _ = trained
    (tmp_path / "mine.yaml").write_text("task: mine\n")
    calls = []

    def simple_evaluate(**arguments):
        from transformers import AutoModelForCausalLM

        calls.append(arguments)
        model = AutoModelForCausalLM.from_pretrained(arguments["model_args"]["pretrained"])
        return {
            "results": {"mine": {"acc,none": 0.25}},
            "versions": {"mine": 1},
            "config": {"width": model.config.hidden_size},
        }

    stand_in(monkeypatch, simple_evaluate)
    assert (
        main(
            [
                "eval",
                run,
                "--sequences",
                "4",
                "--tasks",
                "hellaswag,mine",
                "--task-folder",
                str(tmp_path),
                "--limit",
                "3",
                "--json",
                str(tmp_path / "all.json"),
            ]
        )
        == 0
    )
    assert "0.25" in capsys.readouterr().out
    (call,) = calls
    assert (call["model"], call["tasks"], call["limit"]) == ("hf", ["hellaswag", "mine"], 3)
    assert not Path(call["model_args"]["pretrained"]).exists()
    assert json.loads((tmp_path / "all.json").read_text())["tasks"]["results"] == {"mine": {"acc,none": 0.25}}


@pytest.mark.slow
def test_what_the_harness_cannot_fetch_is_told_in_a_line(trained, monkeypatch, capsys):
    def simple_evaluate(**arguments):
        raise ConnectionError("Couldn't reach the Hub\nand more")

    stand_in(monkeypatch, simple_evaluate)
    assert main(["eval", trained[0], "--sequences", "4", "--tasks", "hellaswag"]) == 2
    assert capsys.readouterr().err == ("celo2-pretrain: error: --tasks hellaswag: ConnectionError: Couldn't reach the Hub\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sequences", "0"], "--sequences 0: must be at least 1"),
        (["--tasks", "a,,b"], "--tasks 'a,,b': give names separated by commas"),
        (["--limit", "3"], "--limit 3 is for benchmark tasks: give --tasks, too"),
        (["--json", "/no/such/folder/x.json"], "there is no folder '/no/such/folder'"),
        (["--tasks", "helaswag"], "--tasks helaswag: the lm-evaluation-harness has no such task"),
        (["--tasks", "x", "--task-folder", "/no/such"], "--task-folder '/no/such' is not a folder"),
    ],
)
def test_wrong_arguments_of_eval_are_refused_in_one_line(arguments, message, monkeypatch, capsys):
    stand_in(monkeypatch, None)
    assert main(["eval", "/no/such/run", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_missing_harness_is_named_with_what_installs_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "lm_eval.tasks", raising=False)
    assert main(["eval", "/no/such/run", "--tasks", "hellaswag"]) == 2
    assert "pip install 'celo2-pretrain[eval]'" in capsys.readouterr().err
