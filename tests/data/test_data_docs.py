"""The commands in docs/data.md and docs/schedules.md run as they are printed."""

import json
import os
import re
import subprocess
import sys

import pytest

from celo2_pretrain.train.record.metrics import read_metrics

from support.paths import ROOT


def commands(name: str) -> str:
    return "\n".join(re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / name).read_text(encoding="utf-8"), re.S))


@pytest.mark.slow
def test_commands_in_the_documents_run(tmp_path):
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "celo2-pretrain"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m celo2_pretrain.cli "$@"\n')
    command.chmod(0o755)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "notes").mkdir()
    for k in range(20):
        (tmp_path / "notes" / f"{k}.md").write_text("".join(f"{k}: note number {n}, about nothing\n" for n in range(400)))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    for name, count in (("data.md", 4), ("schedules.md", 3)):
        script = commands(name)
        assert script.count("celo2-pretrain ") == count
        result = subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    epochs = read_metrics(tmp_path / "runs/mixture")[-2]["epochs"]
    assert set(epochs) == {"data/python", "data/notes"} and epochs["data/notes"] > epochs["data/python"]
    steps = [record["global_batch_size"] for record in read_metrics(tmp_path / "runs/schedules") if "loss" in record]
    assert steps[-1] == 32
    assert json.loads((tmp_path / "data/notes/index.json").read_text())["statistics"]["documents"] == 20
    assert (tmp_path / "runs/sweep/sweep.png").exists()
