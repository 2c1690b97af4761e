"""Whatever lies in a run's folder, a saved state, an interrupted prepare or a model's folder: it is used or refused, and
nothing outside the folder changes."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from celo2_pretrain import Celo2, param_groups
from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import Model, load_config
from celo2_pretrain.data.prepare import fingerprint, prepare
from celo2_pretrain.data.sources import Files, Interrupted
from celo2_pretrain.data.tokenizer import load_tokenizer
from celo2_pretrain.model.build import build_model
from celo2_pretrain.optimizer.state.save_load import StateError, load_state, save_state
from celo2_pretrain.train.record.metrics import Metrics, read_metrics
from celo2_pretrain.train.record.plot import plot_runs

from support.fuzz import PATHS, cases, snapshot, spoiled_trees, spoilers, works_or_refuses

RECORDS = [{"step": 0, "val_loss": 6.2, "val_bits_per_byte": 4.0}] + [
    {"step": k, "loss": 6.0 - k / 10, "lr": 1e-3, "grad_norm": 1.0, "samples": 4 * k, "tokens_per_s": 100.0}
    for k in range(1, 6)
]


def spoiled(data: bytes, spoils) -> bytes:
    for change in spoils:
        data = change(data)
    return data


spoil_lists = st.lists(spoilers(), min_size=1, max_size=2)


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


def use_metrics(run: Path) -> None:
    """What a resumed run and `plot` do with it."""
    records = read_metrics(run)
    assert all(isinstance(record["step"], int) for record in records)
    Metrics(str(run), 3, 10, active=True).close()
    assert all(record["step"] <= 3 for record in read_metrics(run))


def test_a_spoiled_metrics_file_is_used_or_refused(tmp_path):
    text = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()

    @cases(800)
    @given(spoil_lists)
    def check(spoils):
        (tmp_path / "metrics.jsonl").write_bytes(spoiled(text, spoils))
        works_or_refuses(lambda: use_metrics(tmp_path))

    check()


def test_any_metrics_are_used_or_refused(tmp_path):
    @cases(600)
    @given(spoiled_trees(RECORDS))
    def check(records):
        lines = map(json.dumps, records if isinstance(records, list) else [records])
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
        works_or_refuses(lambda: use_metrics(tmp_path))

    check()


def test_odd_metrics_are_drawn_or_refused(tmp_path):
    """Drawing is slow, so fewer."""

    @cases(12)
    @given(spoiled_trees(RECORDS))
    def check(records):
        lines = map(json.dumps, records if isinstance(records, list) else [records])
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
        works_or_refuses(lambda: plot_runs([str(tmp_path)], str(tmp_path / "loss.png")))

    check()


# --- a saved optimizer state ------------------------------------------------------------------------------------------


def small_optimizer() -> Celo2:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 4))
    optimizer = Celo2(param_groups(model))
    model(torch.randn(3, 4)).square().mean().backward()
    optimizer.step()
    return optimizer


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("around") / "state"
    save_state(small_optimizer(), folder, extra={"step": 1})
    return folder


def load(folder: Path) -> None:
    """A refused state changes nothing."""
    optimizer = small_optimizer()
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    try:
        load_state(optimizer, folder)
    except StateError:
        assert all(torch.equal(a, b) for a, b in zip(before, (p for g in optimizer.param_groups for p in g["params"])))
        raise


def test_any_index_of_a_state_is_used_or_refused(state, tmp_path):
    folder = tmp_path / "around" / "state"
    shutil.copytree(state, folder)
    index = json.loads((folder / "index.json").read_text())
    before = snapshot(tmp_path, leave_out=("around",))

    @cases(1000)
    @given(spoiled_trees(index))
    def check(tree):
        (folder / "index.json").write_text(json.dumps(tree))
        works_or_refuses(lambda: load(folder), StateError)

    check()
    assert snapshot(tmp_path, leave_out=("around",)) == before


@pytest.mark.parametrize("pattern", ["index.json", "rank_*.safetensors", "shared.safetensors"])
def test_a_spoiled_file_of_a_state_is_used_or_refused(state, tmp_path, pattern):
    folder = tmp_path / "state"
    shutil.copytree(state, folder)
    path = next(folder.glob(pattern))
    whole = path.read_bytes()

    @cases(200)
    @given(spoil_lists)
    def check(spoils):
        path.write_bytes(spoiled(whole, spoils))
        works_or_refuses(lambda: load(folder), StateError)

    check()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b"])
def test_a_state_file_that_leads_out_of_the_folder_is_refused(state, tmp_path, name):
    folder = tmp_path / "state"
    shutil.copytree(state, folder)
    shutil.copy(folder / "shared.safetensors", tmp_path / "outside.safetensors")
    index = json.loads((folder / "index.json").read_text())
    index["files"][name] = index["files"].pop("shared.safetensors")
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(StateError, match="leads out of the folder"):
        load(folder)


# --- an interrupted prepare -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(data, tmp_path_factory) -> Path:
    """A prepare that stopped half way, with something beside it that a path could lead to."""
    around = tmp_path_factory.mktemp("prepare")
    (around / "corpus").mkdir()
    for k in range(8):
        (around / "corpus" / f"{k}.txt").write_text(f"def f{k}():\n    return {k}\n" * 20)
    source = Files([str(around / "corpus")], 0.3, "text")

    def stop(*_, **__):
        raise Interrupted("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("celo2_pretrain.data.prepare.Progress.add", stop)
        with pytest.raises(Interrupted):
            prepare(source, str(around / "out"), tokenizer=f"{data}/tokenizer.model")
    (around / "outside.bin").write_bytes(b"x" * 100)
    return around


def test_the_progress_of_an_interrupted_prepare_is_used_or_refused(interrupted, data, tmp_path):
    record = json.loads((interrupted / ".out.unfinished" / "progress.json").read_text())

    @cases(150)
    @given(spoiled_trees(record))
    def check(tree):
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        shutil.copytree(interrupted, tmp_path / "work")
        (tmp_path / "work/.out.unfinished/progress.json").write_text(json.dumps(tree))
        around = snapshot(tmp_path / "work", leave_out=("out", ".out.unfinished", ".out.unfinished.lock"))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            source = Files([str(interrupted / "corpus")], 0.3, "text")
            works_or_refuses(lambda: prepare(source, "work/out", tokenizer=f"{data}/tokenizer.model"))
        assert snapshot(tmp_path / "work", leave_out=("out", ".out.unfinished", ".out.unfinished.lock")) == around

    check()


@pytest.mark.parametrize(
    "name, message", [("../outside.bin", "progress.json is damaged"), ("train-00000.bin", "is missing, or not")]
)
def test_progress_that_leads_out_of_the_folder_is_refused_and_cuts_nothing(interrupted, data, tmp_path, name, message):
    work = tmp_path / "work"
    shutil.copytree(interrupted, work)
    path = work / ".out.unfinished" / "progress.json"
    record = json.loads(path.read_text())
    record["splits"]["train"] = {"tokens": 2, "documents": 1, "bytes": 4, "shards": [{"file": name, "tokens": 2}]}
    del record["sha256"]
    path.write_text(json.dumps(record | {"sha256": fingerprint(record)}))
    (work / ".out.unfinished/train-00000.bin").unlink(missing_ok=True)
    os.symlink(work / "outside.bin", work / ".out.unfinished/train-00000.bin")
    with pytest.raises(UserError, match=message):
        prepare(Files([str(interrupted / "corpus")], 0.3, "text"), str(work / "out"), tokenizer=f"{data}/tokenizer.model")
    assert (work / "outside.bin").read_bytes() == b"x" * 100


# --- a model to train on, and its tokenizer ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub_like(data, tmp_path_factory) -> Path:
    """What `export` writes: config.json, model.safetensors, tokenizer files."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    config = load_config(None, ["model.layers=1", "model.width=8", "model.heads=1", "model.context=32"])
    build_model(config.model, 512, 1).save_pretrained(folder)
    load_tokenizer(data).save_for_transformers(folder, 32)
    return folder


def build_from(folder: Path) -> None:
    model = build_model(Model(from_=str(folder), context=32), 512, 1)
    with torch.no_grad():
        assert model(input_ids=torch.arange(32)[None]).logits.shape[-1] >= 512


@pytest.mark.parametrize("name, count", [("config.json", 200), ("model.safetensors", 150)])
def test_a_spoiled_model_folder_is_used_or_refused(hub_like, tmp_path, name, count):
    folder = tmp_path / "inner" / "model"
    shutil.copytree(hub_like, folder)
    whole = (folder / name).read_bytes()

    @cases(count)
    @given(spoil_lists)
    def check(spoils):
        (folder / name).write_bytes(spoiled(whole, spoils))
        works_or_refuses(lambda: build_from(folder))

    check()
    assert os.listdir(tmp_path) == ["inner"]


def test_any_config_of_a_model_is_used_or_refused(hub_like, tmp_path):
    folder = tmp_path / "inner" / "model"
    shutil.copytree(hub_like, folder)
    config = json.loads((folder / "config.json").read_text())

    @cases(250)
    @given(spoiled_trees(config))
    def check(tree):
        (folder / "config.json").write_text(json.dumps(tree))
        works_or_refuses(lambda: build_from(folder))

    check()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_spoiled_transformers_tokenizer_is_used_or_refused(hub_like, tmp_path, name):
    folder = tmp_path / "tokenizer"
    shutil.copytree(hub_like, folder)
    whole = (folder / name).read_bytes()

    def use():
        tokenizer = load_tokenizer(folder)
        assert all(0 <= id < tokenizer.vocab_size for id in tokenizer.encode(["def main(): é"])[0])

    @cases(120)
    @given(spoil_lists)
    def check(spoils):
        (folder / name).write_bytes(spoiled(whole, spoils))
        works_or_refuses(use)

    check()


def test_names_of_models_and_data_are_used_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in PATHS:
        if name.isprintable():
            works_or_refuses(lambda: build_model(Model(from_=name, context=32), 512, 1))
            works_or_refuses(lambda: load_tokenizer(name))
    assert not list(tmp_path.iterdir())
