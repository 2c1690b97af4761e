"""The figures that the README and the weights' card show are those of the committed results."""

import re
import shutil

import pytest

from celo2_pretrain.meta.evaluation import analysis
from celo2_pretrain.meta.evaluation.report import write_report
from celo2_pretrain.meta.evaluation.runner import read_results

from support.paths import ROOT

FOLDER = ROOT / "benchmarks/results/evaluation"
OPTIMIZERS = ("celo2", "celo2[published]", "adamw", "muon", "soap")  # the tables' columns
TASKS = {
    "byte LM": "lm-byte-small",
    "byte LM, larger": "lm-byte-large",
    "sentencepiece LM": "lm-piece-small",
    "sentencepiece LM, larger": "lm-piece-large",
    "GRU, bytes": "gru-byte",
    "ViT": "vit-photos",
    "conv net": "conv-photos",
    "auto-encoder": "autoencoder-photos",
    "PPO, CartPole (− return)": "ppo-cartpole",
    "PPO, Acrobot (− return)": "ppo-acrobot",
    "PPO, Atari Krull (− score)": "ppo-atari",
}


@pytest.fixture(scope="module")
def rows():
    return read_results(FOLDER)


def test_the_committed_report_is_that_of_the_committed_results(tmp_path):
    shutil.copy(FOLDER / "results.jsonl.gz", tmp_path)
    write_report(tmp_path)
    for name in ("report.md", "results.csv"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (FOLDER / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", ["README.md", "docs/results.md", "celo2_pretrain/weights/celo2.md"])
def test_a_table_shows_tasks_as_they_were_measured(path, rows):
    found, shown = analysis.entries(rows), []
    table = (ROOT / path).read_text(encoding="utf-8").partition("| task (lower is better")[2].partition("\n\n")[0]
    for line in table.splitlines()[2:]:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        shown.append(TASKS[name])
        least = min(found[TASKS[name], optimizer].best for optimizer in OPTIMIZERS)
        for optimizer, cell in zip(OPTIMIZERS, cells, strict=True):
            entry, text = found[TASKS[name], optimizer], cell.strip("*").replace("−", "-")
            for value, figure in zip((entry.best, entry.deviation), text.split(" ± "), strict=True):
                digits = len(re.sub(r"^[^.]*\.?", "", figure))
                assert abs(float(figure) - value) <= 0.5001 * 10**-digits, (name, optimizer, value)
            assert cell.startswith("**") == (entry.best == least), (name, optimizer)
    assert len(shown) == len(set(shown)) and (set(shown) == set(TASKS.values()) or (path == "README.md" and shown))
