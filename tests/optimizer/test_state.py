"""A saved optimizer state goes on in any world: any ZeRO stage, precision, offload, FSDP2, number of ranks."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from celo2_pretrain import Celo2
from celo2_pretrain.optimizer.matrices.views import MatrixView
from celo2_pretrain.optimizer.state import files as state_files
from celo2_pretrain.optimizer.state.files import StateReader
from celo2_pretrain.optimizer.state.save_load import StateError, load_state, save_state
from celo2_pretrain.optimizer.step.accumulators import element_keys

from support.paths import SUPPORT
from support.processes import on_ranks
from support.state_worker import batch, build, celo2, train

WORKER = SUPPORT / "state_worker.py"
ROUND_OFF = 1e-5  # relative to the largest element; measured: below 2e-6
EXTRA = {"step": 3}


def launch(world, jobs):
    """Run the worker's jobs on `world` ranks."""
    on_ranks(world, WORKER, json.dumps(jobs))


def difference(a, b):
    """The largest difference of two models, relative to the largest element of each tensor."""
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max() / a[name].float().abs().max()) for name in a)


CONTINUED = {  # name: (ranks, job); reread: made to read tensors as other matrices, as an earlier version may have
    "ZeRO-3 on 2": (2, dict(kind="ds", stage=3, reread=True)),
    "ZeRO-3 on 2, small parameters kept whole": (2, dict(kind="ds", stage=3, persist=10**5)),
    "ZeRO-3 on 2, offload": (2, dict(kind="ds", stage=3, offload=True)),
    "ZeRO-2 on 2, round robin": (2, dict(kind="ds", stage=2, round_robin=True)),
    "ZeRO-1 on 2": (2, dict(kind="ds", stage=1, reread=True)),
    "FSDP2 on 2": (2, dict(kind="fsdp", reread=True)),
    "DDP on 2": (2, dict(kind="ds", stage=0, reread=True)),
    "ZeRO-2 on 3, offload": (3, dict(kind="ds", stage=2, offload=True)),
    "plain process": (1, dict(kind="plain")),
}


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    """Trained 3 steps on 4 ranks at ZeRO-2, saved, and gone on with for 3 steps in every other world."""
    folder = tmp_path_factory.mktemp("states")
    common = dict(first=3, steps=3, seed=5, lr=0.3, load=str(folder / "zero2"), extra=EXTRA)  # another start and lr
    launch(
        4,
        [
            dict(
                kind="ds",
                stage=2,
                first=0,
                steps=3,
                save=str(folder / "zero2"),
                more=3,
                extra=EXTRA,
                out=str(folder / "uninterrupted.pt"),
            )
        ],
    )
    for world in sorted({world for world, _ in CONTINUED.values()}):
        launch(
            world,
            [
                {**common, **job, "out": str(folder / f"{name}.pt"), "save": str(folder / f"{name} state")}
                for name, (ranks, job) in CONTINUED.items()
                if ranks == world
            ],
        )
    return folder


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", CONTINUED)
def test_a_state_saved_on_four_ranks_at_zero_2_goes_on_elsewhere(continued, name):
    assert difference(continued / "uninterrupted.pt", continued / f"{name}.pt") < ROUND_OFF


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", CONTINUED)
def test_each_world_saves_what_the_others_save(continued, name):
    """After the same 6 steps, every accumulator of every tensor agrees, so each world's save can be loaded by any."""
    one, other = StateReader(continued / "plain process state"), StateReader(continued / f"{name} state")
    other.verify()
    assert one.tensors == {name: other.tensors[name] for name in one.tensors}  # in any order of the files
    for tensor, entry in one.tensors.items():
        keys = element_keys(entry["rule"], entry["vector"])
        pairs = [(key, one.whole(tensor, key), other.whole(tensor, key)) for key in keys]
        pairs += [(key, one.shared(f"{tensor}|{key}"), other.shared(f"{tensor}|{key}")) for key in ("v_row", "v_col", "step")]
        for key, a, b in pairs:
            assert (a is None) == (b is None), (tensor, key)
            if a is not None:
                assert (a - b).abs().max() <= 2e-4 * a.abs().max(), (tensor, key)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name, ranks", [("zero2", 4), ("ZeRO-3 on 2 state", 2), ("DDP on 2 state", 2)])
def test_no_rank_writes_more_than_its_share(continued, name, ranks):
    written = [0] * ranks
    for file, entry in StateReader(continued / name).files.items():
        for start, stop in entry["ranges"].values():
            written[int(file.split("_")[1])] += stop - start
    assert max(written) <= 1.2 * sum(written) / ranks, written  # partitions are padded: never exactly equal


@pytest.mark.slow
@pytest.mark.multiprocess
def test_states_of_low_precision_runs_go_on_at_another_stage(tmp_path):
    """bf16 with ZeRO and without, fp16 (where DeepSpeed 0.19 forgets to scale the loss without ZeRO): the float32
    masters travel, the model is rounded from them."""
    kinds = {
        "zero1": dict(kind="ds", stage=1, precision="bf16"),
        "zero3": dict(kind="ds", stage=3, precision="bf16"),
        "bf16 optimizer": dict(kind="ds", stage=1, precision="bf16-fp32acc"),
        "unfused": dict(kind="ds", stage=0, precision="bf16"),
        "fp16 zero2": dict(kind="ds", stage=2, precision="fp16"),
        "fp16 zero3": dict(kind="ds", stage=3, precision="fp16"),
    }
    pairs = (
        ("zero1", "bf16 optimizer"),
        ("bf16 optimizer", "zero3"),
        ("zero3", "unfused"),
        ("unfused", "zero1"),
        ("fp16 zero2", "fp16 zero3"),
        ("fp16 zero3", "fp16 zero2"),
    )
    jobs = []
    for name, job in kinds.items():
        jobs.append(
            {
                **job,
                "first": 0,
                "steps": 3,
                "save": str(tmp_path / f"{name} state"),
                "out": str(tmp_path / f"{name} at save.pt"),
            }
        )
        jobs.append({**job, "first": 0, "steps": 5, "out": str(tmp_path / f"{name}.pt")})
    for source, target in pairs:
        common = {**kinds[target], "seed": 5, "lr": 0.3, "scale_power": 4, "load": str(tmp_path / f"{source} state")}
        jobs.append({**common, "save": str(tmp_path / f"{source} loaded"), "out": str(tmp_path / f"{source} loaded.pt")})
        jobs.append({**common, "first": 3, "steps": 2, "out": str(tmp_path / f"{source} continued.pt")})
    launch(2, jobs)
    for source, target in pairs:
        # What the model holds right after loading is what the run that saved it held.
        assert difference(tmp_path / f"{source} at save.pt", tmp_path / f"{source} loaded.pt") == 0
        # Afterwards the gradients themselves are rounded (bf16: 2^-8), differently by each engine.
        assert difference(tmp_path / f"{source}.pt", tmp_path / f"{source} continued.pt") < 2e-2
        scales = [StateReader(tmp_path / f"{source} {kind}").loss_scale for kind in ("state", "loaded")]
        assert scales[0] == scales[1]
        assert (scales[0] is not None) == source.startswith("fp16")
        assert scales[0] is None or (scales[0]["cur_scale"], scales[0]["cur_iter"]) == (2.0**8, 3)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_deepspeeds_own_checkpoint_resumes_bit_for_bit(tmp_path):
    jobs = []
    for stage, precision, offload in (
        (0, "fp32", False),
        (1, "fp32", False),
        (2, "fp32", False),
        (3, "fp32", False),
        (0, "bf16", False),
        (1, "bf16-fp32acc", False),
        (2, "bf16", True),
        (3, "bf16", True),
    ):
        name = f"stage {stage} {precision} {offload}"
        jobs.append(
            dict(
                kind="ds",
                stage=stage,
                precision=precision,
                offload=offload,
                first=0,
                steps=2,
                more=2,
                ds_save=str(tmp_path / name),
                ds_load=str(tmp_path / name),
                out=str(tmp_path / f"{name}.pt"),
            )
        )
    launch(2, jobs)
    different = {job["out"]: d for job in jobs if (d := difference(job["out"] + ".uninterrupted", job["out"]))}
    assert not different
    # DeepSpeed's universal checkpoint knows AdamW's states only; it says no rather than dropping Celo2's.
    for name in ("stage 2 fp32 False", "stage 3 fp32 False"):
        converted = subprocess.run(
            [
                sys.executable,
                "-m",
                "deepspeed.checkpoint.ds_to_universal",
                "--num_extract_workers",
                "1",
                "--input_folder",
                str(tmp_path / name / "here"),
                "--output_folder",
                str(tmp_path / "universal"),
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
        )
        assert converted.returncode != 0 and "Error" in converted.stderr
        assert not (tmp_path / "universal").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_every_rank_gets_the_same_error_and_none_hangs(tmp_path):
    model = build()
    optimizer = celo2(model)
    train(model, lambda loss: _step(optimizer, loss), 0, 1)
    save_state(optimizer, tmp_path / "good")
    save_state(optimizer, tmp_path / "damaged")
    file = next((tmp_path / "damaged").glob("rank_*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # one bit
    file.write_bytes(data)
    jobs = [
        dict(kind="fsdp", load=str(tmp_path / "damaged"), error=str(tmp_path / "load")),
        dict(kind="fsdp", save=str(tmp_path / "good"), error=str(tmp_path / "save")),
    ]
    launch(2, jobs)
    for name, words in (("load", "is damaged"), ("save", "already exists")):
        texts = [(tmp_path / f"{name}.{rank}").read_text() for rank in (0, 1)]
        assert texts[0] == texts[1] and words in texts[0]


# ---- in one process ---------------------------------------------------------------------------------------------


def _step(optimizer, loss):
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(steps=2, seed=0, **options):
    model = build(seed)
    optimizer = celo2(model, **options)
    train(model, lambda loss: _step(optimizer, loss), 0, steps)
    return model, optimizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, optimizer = trained()
    return save_state(optimizer, tmp_path_factory.mktemp("state") / "here", extra=EXTRA)


def changed(saved, tmp_path, change):
    folder = shutil.copytree(saved, tmp_path / "changed")
    index = json.loads((folder / "index.json").read_text())
    change(folder, index)
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_one_process_resumes_bit_for_bit(saved):
    model, optimizer = trained(steps=4)
    other = build(seed=3)
    resumed = celo2(other, lr=0.7)
    assert load_state(resumed, saved) == EXTRA
    train(other, lambda loss: _step(resumed, loss), 2, 4)
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(a, b), name
    assert [group["lr"] for group in resumed.param_groups] == [group["lr"] for group in optimizer.param_groups]


def test_theta_and_group_options_are_restored(tmp_path):
    model, optimizer = trained()
    optimizer.param_groups[0]["weight_decay"] = 0.25
    optimizer.mlp.b2.add_(0.5)
    save_state(optimizer, tmp_path / "here")
    other = celo2(build())
    load_state(other, tmp_path / "here")
    assert [group["weight_decay"] for group in other.param_groups] == [0.25, 0.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(other.mlp, optimizer.mlp))


def test_any_range_is_read_across_files(tmp_path):
    """A tensor larger than a file is cut; ranges that span the cuts come back whole."""
    values = torch.randn(1000)
    state_files.begin(tmp_path / "state")
    files = state_files.write_ranges(
        tmp_path / "state.incomplete",
        "rank_0",
        [("w", 0, 600), ("w", 600, 1000)],
        lambda name, a, b: {"param": values[a:b].clone()},
        most=32 * 70,
    )
    assert len(files) > 5
    state_files.finish(
        tmp_path / "state",
        {
            "tensors": {"w": state_files.tensor_entry((40, 25), "celo2", MatrixView())},
            "groups": [],
            "files": files,
            "extra": None,
        },
    )
    reader = StateReader(tmp_path / "state")
    for start, stop in ((0, 1000), (69, 71), (70, 140), (555, 999), (3, 3)):
        assert torch.equal(reader.read("w", "param", start, stop), values[start:stop])


def test_transposed_storage_is_saved_in_its_logical_order(tmp_path):
    torch.manual_seed(0)
    params = [torch.randn(6, 4).T.requires_grad_(), torch.randn(4, 6).requires_grad_()]
    with torch.no_grad():
        params[1].copy_(params[0])
    save_state(Celo2([params[0]]), tmp_path / "a")
    other = torch.zeros(6, 4).T.requires_grad_()
    load_state(Celo2([other]), tmp_path / "a")
    assert torch.equal(other, params[1])
    assert torch.equal(StateReader(tmp_path / "a").whole("param 0", "param"), params[1])


def drop(index, name):
    for entry in index["files"].values():
        entry["ranges"].pop(name, None)


@pytest.mark.parametrize(
    "words, change",
    {
        "has no parameter 'square.weight'": lambda f, i: (i["tensors"].pop("square.weight"), drop(i, "square.weight")),
        "which the optimizer does not train": lambda f, i: i["tensors"].update(
            more={"shape": [0], "rule": "adamw", "vector": False, "view": {}}
        ),
        "with shape [7, 13]": lambda f, i: i["tensors"]["up.weight"].update(shape=[7, 13]),
        "v_row of 'up.weight' has shape": lambda f, i: i["tensors"]["up.weight"]["view"].update(split=[6, 7]),
        "with rule 'adamw', the optimizer with 'celo2'": lambda f, i: i["tensors"]["up.weight"].update(rule="adamw"),
        "format version 99": lambda f, i: i.update(version=99),
        "is not of the format": lambda f, i: i.update(format="other"),
        "lacks 'shared.safetensors'": lambda f, i: (f / "shared.safetensors").unlink(),
        "does not hold 'up.weight' exactly once": lambda f, i: drop(i, "up.weight"),
        "is damaged": lambda f, i: (f / "shared.safetensors").write_bytes(b"other"),
        "different options": lambda f, i: i["groups"].append({"options": {"lr": 7.0}, "names": ["up.weight"]}),
    }.items(),
)
def test_a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing(saved, tmp_path, words, change):
    model = build(seed=8)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(StateError) as caught:
        load_state(celo2(model), changed(saved, tmp_path, change))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_an_interrupted_save_never_looks_complete(saved, tmp_path, monkeypatch):
    _, optimizer = trained()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(state_files, "save_file", full)
        with pytest.raises(StateError, match="No space left"):
            save_state(optimizer, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    # A killed process can't tidy up: what it left is refused, and replaced by the next save.
    (tmp_path / "new.incomplete").mkdir()
    (tmp_path / "new.incomplete" / "rank_00007_000.safetensors").write_bytes(b"old")
    with pytest.raises(StateError, match="not finished"):
        load_state(optimizer, tmp_path / "new")
    save_state(optimizer, tmp_path / "new")
    assert not (tmp_path / "new" / "rank_00007_000.safetensors").exists()
    with pytest.raises(StateError, match="already exists"):
        save_state(optimizer, tmp_path / "new")
    with pytest.raises(StateError, match="no optimizer state at"):
        load_state(optimizer, tmp_path / "nowhere")


def test_batches_are_the_same_in_every_world():
    whole = batch(5, 0, 1)[0]
    assert torch.equal(torch.stack([batch(5, rank, 3)[0] for rank in range(3)], 1).flatten(), whole)
