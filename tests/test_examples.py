"""The examples run as they are with AdamW, and with Celo2 after a diff of at most five lines, which then trains better."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from celo2_pretrain.train.start.ranks import free_port

from support.paths import ROOT, SUPPORT
from support.processes import environment

WORKER = SUPPORT / "example_worker.py"
DEEPSPEED = ["-m", "deepspeed.launcher.runner", "--log_level", "critical", "--num_gpus"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node"]
# Accelerate, and Trainer with it, knows one process on a CPU under DeepSpeed.
LAUNCHERS = {
    "deepspeed_loop": (*DEEPSPEED, "2"),
    "hf_trainer": (*DEEPSPEED, "1"),
    "accelerate_loop": (*DEEPSPEED, "1"),
    "fsdp2": (*TORCHRUN, "2"),
}


def run(script: Path, launcher: tuple[str, ...]) -> tuple[list[float], dict]:
    """(training losses as printed, what the worker noted)."""
    notes = script.with_suffix(".json")
    result = subprocess.run(
        [sys.executable, *launcher, "--master_port", str(free_port()), WORKER, script, notes],
        cwd=script.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    losses = [float(loss) for loss in re.findall(r"\bloss(?:': '| )([\d.]+)", result.stdout)]
    assert len(losses) == 8, result.stdout
    return losses, json.loads(notes.read_text())


def test_every_example_has_its_diff_and_its_test():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(LAUNCHERS)
    assert {path.stem for path in (ROOT / "examples").glob("*.diff")} == set(LAUNCHERS)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_swap_is_a_diff_of_at_most_five_lines(name):
    lines = (ROOT / "examples" / f"{name}.diff").read_text().splitlines()
    for sign in "+-":
        assert 1 <= sum(line.startswith(sign) and not line.startswith(sign * 3) for line in lines) <= 5


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_swapped_example_trains_with_celo2_and_ends_below_adamw(name, tmp_path):
    (tmp_path / "examples").mkdir()
    script = tmp_path / "examples" / f"{name}.py"
    script.write_bytes((ROOT / "examples" / script.name).read_bytes())
    adamw, notes = run(script, LAUNCHERS[name])
    assert "AdamW" in notes["optimizers"] and "Celo2" not in notes["optimizers"]
    assert adamw[-1] < adamw[0]

    subprocess.run(["git", "apply", ROOT / "examples" / f"{name}.diff"], cwd=tmp_path, check=True, capture_output=True)
    celo2, notes = run(script, LAUNCHERS[name])
    assert "Celo2" in notes["optimizers"] and "AdamW" not in notes["optimizers"]
    assert notes["steps"] >= 80 and notes["flat"] == (name != "fsdp2")  # flat: ZeRO's partitions, not the tensors
    # Untied from what the model is: which kinds of tensor GPT-2 has.
    for tensor, rule in notes["rules"].items():
        hidden = re.search(r"\.(attn|mlp)\..*\.weight$", tensor)
        assert rule == ("celo2" if hidden else "adamw"), tensor
    assert sum(rule == "celo2" for rule in notes["rules"].values()) == 8  # 4 matrices in each of 2 layers
    assert len(notes["rules"]) == 28
    mean = [sum(losses[-4:]) / 4 for losses in (adamw, celo2)]  # of the same batches
    assert mean[1] < mean[0] < adamw[0]
