"""Which theta of a meta-training is taken? The best on a small language model that is in neither meta-training nor the suite.

As the paper did (arXiv 2602.19142, section 4), with other text: the descriptions of the installed packages (English
prose about software), where the suite has Python's sources. Each theta trains a byte-level GPT over a few rates and seeds.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

import torch

from ..common.errors import UserError
from .evaluation import job, optimizers
from .evaluation.suite.models import GPT
from .evaluation.suite.problem import Problem, Task
from .evaluation.suite.text import CONTEXT, language_model

LRS, SEEDS, STEPS, BATCH = (2e-3, 4e-3), 2, 400, 16
FIRST_SEED = 100  # the suite's seeds begin at 0
PACKAGES = (
    "torch",
    "numpy",
    "transformers",
    "datasets",
    "deepspeed",
    "matplotlib",
    "safetensors",
    "huggingface-hub",
    "sentencepiece",
    "tqdm",
    "scikit-learn",
    "scikit-image",
    "scipy",
    "pandas",
    "pillow",
    "packaging",
    "setuptools",
    "fsspec",
    "requests",
    "urllib3",
    "networkx",
    "sympy",
    "pyyaml",
    "tokenizers",
    "gymnasium",
    "ale-py",
    "pytorch_optimizer",
    "pydantic",
    "pyarrow",
    "jinja2",
    "accelerate",
    "pytest",
    "hypothesis",
)


@cache
def text() -> torch.Tensor:
    """Bytes of the descriptions of those PACKAGES that are installed, in this order, int64."""
    parts = []
    for name in PACKAGES:
        try:
            parts.append(str(metadata.metadata(name).get_payload()))
        except metadata.PackageNotFoundError:
            continue
    return torch.frombuffer(bytearray("\n".join(parts).encode()), dtype=torch.uint8).long()


def problem(seed: int) -> Problem:
    """A GPT of 2 layers of 64; every tenth kilobyte is held out."""
    torch.manual_seed(seed)
    model, data = GPT(256, 64, 2, CONTEXT), text()
    chunks = data[: len(data) // 1000 * 1000].view(-1, 1000)
    held = torch.arange(len(chunks)) % 10 == 9
    train, val = chunks[~held].flatten(), chunks[held].flatten()
    return language_model(model, (train, val), BATCH, seed, validation=128)


TASK = Task("selection-lm", "byte-level GPT, 2 layers of 64, on package descriptions", problem, STEPS, "nats a byte")


def _score(case: tuple[str, str, float, int, int]) -> float:
    torch.set_num_threads(1)
    weights, kind, lr, seed, steps = case
    spec = optimizers.with_weights(optimizers.SPECS[kind], weights, "candidate")
    row = job.run(job.Job(TASK.name, spec, lr, seed, steps), TASK)
    if row["status"] == "failed":
        raise UserError(f"{weights}: {row['error']}")
    return float("inf") if row["loss"] is None else row["loss"]


def select(
    candidates: list[str],
    kind: str,
    out: Path,
    processes: int,
    steps: int = STEPS,
    lrs: tuple[float, ...] = LRS,
    seeds: int = SEEDS,
    say: Callable[[str], None] = print,
) -> str:
    """The candidate whose best rate has the lowest mean loss over seeds; all scores go to the CSV file `out`.

    Args: `candidates` as `load_weights` takes them; `kind` "celo2" or "celo2-base".
    """
    cases = [
        (weights, kind, lr, seed, steps)
        for weights in candidates
        for lr in lrs
        for seed in range(FIRST_SEED, FIRST_SEED + seeds)
    ]
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        losses = []
        for case, loss in zip(cases, pool.map(_score, cases)):
            losses.append(loss)
            say(f"[{len(losses)}/{len(cases)}] {case[0]} lr {case[2]:g} seed {case[3]}: {loss:.4f}")
    rows = [
        {"weights": weights, "optimizer": kind, "lr": lr, "seed": seed, "steps": steps, "loss": loss}
        for (weights, _, lr, seed, _), loss in zip(cases, losses)
    ]
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    means = {
        weights: min(sum(row["loss"] for row in rows if row["weights"] == weights and row["lr"] == lr) / seeds for lr in lrs)
        for weights in candidates
    }
    for weights, mean in sorted(means.items(), key=lambda item: item[1]):
        say(f"{mean:.4f}  {weights}")
    return min(means, key=means.get)
