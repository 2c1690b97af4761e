"""Norms by rule are those of the whole tensors, whatever the ZeRO stage and the number of ranks."""
import pytest
from processes import drive

from celo2_pretrain.train.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

CONFIG = ["model.layers=1", "model.width=24", "model.heads=2", "model.context=16", "train.global_batch_size=4",
          "train.micro_batch_size=2", "train.max_steps=3", "train.log_every=1", "schedule.steps=20", "eval.sequences=2",
          "train.grad_clip=0.3", "optimizer.lr=3e-3", "optimizer.weight_decay=0.5", "checkpoint.any_world=false"]
NAMES = [f"{kind}_norm/{rule}" for kind in ("grad", "update", "weight") for rule in ("celo2", "adamw")]


def norms(data, run_dir, *arguments: str, ranks: int = 1) -> list[dict]:
    """Of each step, with the norm of the whole gradient."""
    result = drive(*CONFIG, f"data.path={data}", f"run_dir={run_dir}", *arguments, ranks=ranks)
    assert result.returncode == 0, result.stdout + result.stderr
    return [record for record in read_metrics(run_dir) if "loss" in record]


@pytest.fixture(scope="module")
def unsharded(data, tmp_path_factory) -> list[dict]:
    return norms(data, tmp_path_factory.mktemp("norms") / "run", "train.zero_stage=0")


@pytest.mark.parametrize("stage, ranks", [(0, 2), (2, 2), (3, 2), (2, 1)])
def test_norms_are_those_of_one_rank_without_zero(data, tmp_path, unsharded, stage, ranks):
    found = norms(data, tmp_path / "run", f"train.zero_stage={stage}", ranks=ranks)
    assert len(found) == len(unsharded) == 3
    for ours, theirs in zip(found, unsharded):
        assert {name: ours[name] for name in NAMES} == pytest.approx({name: theirs[name] for name in NAMES}, rel=1e-4)
        whole = (ours["grad_norm/celo2"] ** 2 + ours["grad_norm/adamw"] ** 2) ** 0.5
        assert whole == pytest.approx(ours["grad_norm"], rel=1e-4) and whole > 0.3  # before clipping


def test_update_of_a_celo2_step_has_the_size_that_its_rate_says(unsharded):
    """A direction has RMS 1 per matrix (and decay adds little to it in the first steps of small weights)."""
    hidden = 24 * 24 * 12  # QKV, projection, and the MLP's two of 4 × width
    for record in unsharded:
        assert record["update_norm/celo2"] == pytest.approx(record["lr"] * hidden ** 0.5, rel=0.01)
