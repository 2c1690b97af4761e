"""Norms by rule are those of the whole tensors, whatever the ZeRO stage and the number of ranks."""

import json

import pytest

from support.paths import SUPPORT
from support.processes import on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

WORKER = SUPPORT / "norms_worker.py"
NAMES = [f"{kind}_norm/{rule}" for kind in ("grad", "update", "weight") for rule in ("celo2", "adamw")]


@pytest.fixture(scope="module")
def found() -> dict[int, dict[str, list[dict]]]:
    """By number of ranks."""
    return {ranks: json.loads(on_ranks(ranks, WORKER, timeout=1500)[0].splitlines()[-1]) for ranks in (1, 2)}


@pytest.mark.parametrize("optimizer", ["celo2", "adamw"])
def test_norms_are_those_of_the_whole_tensors(found, optimizer):
    for record in found[1][f"{optimizer} 0"]:
        assert {name: record[name] for name in NAMES} == pytest.approx(record["direct"], rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("optimizer", ["celo2", "adamw"])
def test_norms_are_the_same_however_the_run_is_sharded(found, optimizer, stage, ranks):
    one, here = found[1][f"{optimizer} 0"], found[ranks][f"{optimizer} {stage}"]
    assert len(one) == len(here) == 2
    for ours, theirs in zip(here, one):
        assert {name: ours[name] for name in NAMES} == pytest.approx({name: theirs[name] for name in NAMES}, rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4) and ours["grad_norm"] > 0.3  # clipped there
        whole = (ours["grad_norm/celo2"] ** 2 + ours["grad_norm/adamw"] ** 2) ** 0.5
        assert whole == pytest.approx(ours["grad_norm"], rel=1e-4)


def test_update_of_a_celo2_step_has_the_size_that_its_rate_says(found):
    """A direction has RMS 1 per matrix, and decay adds little to it while the weights are small."""
    hidden = 24 * 24 * 12  # QKV, projection, and the MLP's two of 4 × width
    for record in found[2]["celo2 2"]:
        assert record["update_norm/celo2"] == pytest.approx(3e-3 * hidden**0.5, rel=0.01)
