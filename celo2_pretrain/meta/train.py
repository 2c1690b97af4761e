"""Meta-training: the outer loop over theta, its checkpoints, log and picture."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..common.durable import replacing, write_atomically
from ..common.errors import UserError
from ..common.figures import new_figure, save_figure
from ..common.settings import as_tree
from ..common.yaml_text import dump_yaml
from ..weights import save_weights
from ..weights.mlp import MLP
from .config import MetaConfig
from .evolution import Evolution
from .family import Family
from .initial import initial_theta
from .rule import unflatten

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"


class MetaTraining:
    """theta, its AdamW, its average and the inner problems of every family: all that a checkpoint holds."""

    def __init__(self, config: MetaConfig) -> None:
        self.config, self.step, self.seconds, self.inner_steps = config, 0, 0.0, 0
        self.theta = initial_theta(config).to(config.device).requires_grad_()
        self.average = self.theta.detach().clone()
        self.outer = torch.optim.AdamW([self.theta], config.outer_lr, weight_decay=config.outer_weight_decay)
        self.families = [Family(name, config, config.seed * 1000 + k) for k, name in enumerate(config.family_names)]

    def advance(self) -> dict[str, Any]:
        """One outer step: a truncation of every family, the mean of their gradients, clipped, into AdamW."""
        began, config = time.perf_counter(), self.config
        estimates = [family.truncate(self.theta.detach()) for family in self.families]
        gradient = torch.stack([estimate.gradient for estimate in estimates]).mean(0)
        norm = gradient.norm()
        self.theta.grad = gradient * (config.outer_clip / norm.clamp_min(config.outer_clip)) if config.outer_clip else gradient
        self.outer.step()
        self.average.lerp_(self.theta.detach(), 1 - config.average)
        self.step += 1
        self.inner_steps += sum(len(family.inner.step) for family in self.families) * config.truncation
        self.seconds += time.perf_counter() - began
        return {
            "step": self.step,
            "loss": float(sum(estimate.loss for estimate in estimates)) / len(estimates),
            **{f"loss/{family.task.name}": float(estimate.loss) for family, estimate in zip(self.families, estimates)},
            "gradient_norm": float(norm),
            "theta_norm": float(self.theta.detach().norm()),
            "broken": int(sum(estimate.broken.sum() for estimate in estimates)),
            "inner_steps": self.inner_steps,
            "seconds": round(self.seconds, 3),
        }

    def mlp(self) -> MLP:
        """The weights so far (their average, if the configuration says so)."""
        return unflatten(self.average if self.config.average else self.theta.detach())

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "inner_steps": self.inner_steps,
            "theta": self.theta.detach(),
            "average": self.average,
            "outer": self.outer.state_dict(),
            "families": [family.state_dict() for family in self.families],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seconds, self.inner_steps = state["step"], state["seconds"], state["inner_steps"]
        self.theta.data.copy_(state["theta"])
        self.average.copy_(state["average"])
        self.outer.load_state_dict(state["outer"])
        for family, kept in zip(self.families, state["families"]):
            family.load_state_dict(kept)


def run(config: MetaConfig, resume: bool = False, overwrite: bool = False) -> Path:
    """Meta-train as configured; the path of the weights made. Raises UserError for a folder already in use."""
    out = Path(config.out)
    if (out / METRICS).exists() and not (resume or overwrite):
        raise UserError(
            f"{out} holds a meta-training already: --resume goes on with it, --overwrite replaces it, or "
            "give another folder with out=…"
        )
    if resume and not (out / CHECKPOINT).is_file():
        raise UserError(f"{out} has no {CHECKPOINT} to resume from")
    # Before anything is written: it says what is missing.
    training = (Evolution if config.estimator == "evolution" else MetaTraining)(config)
    if resume:
        training.load_state_dict(torch.load(out / CHECKPOINT, weights_only=True, map_location="cpu"))
        _drop_after(out / METRICS, training.step)
    else:
        if (out / METRICS).exists():  # never a folder that isn't a meta-training's
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(dump_yaml(as_tree(config)), encoding="utf-8")
    with (
        open(out / METRICS, "a", encoding="utf-8") as log,
        tqdm(
            total=config.outer_steps,
            initial=training.step,
            unit="outer step",
            smoothing=0.05,
            mininterval=1,
            dynamic_ncols=True,
        ) as bar,
    ):
        while training.step < config.outer_steps:
            record = training.advance()
            print(json.dumps(record), file=log, flush=True)
            bar.set_postfix(loss=f"{record['loss']:.4f}", broken=record["broken"], refresh=False)
            bar.update()
            if training.step % config.save_every == 0 or training.step == config.outer_steps:
                save(training, out / CHECKPOINT)
                save_weights(
                    training.mlp(),
                    out / f"theta_{training.step:06d}.safetensors",
                    {"meta_trained": True, "outer_step": training.step, "seconds": round(training.seconds)},
                )
                plot(out)
    path = out / f"theta_{training.step:06d}.safetensors"
    print(
        f"{training.step} outer steps, {training.inner_steps:,} inner steps, {training.seconds:.0f} s\n"
        f"weights     {path}\nmeta-loss   {out / 'meta_loss.png'}\n"
        f"try them    celo2-pretrain meta-eval --quick --theta mine={path}"
    )
    return path


def save(training: MetaTraining | Evolution, path: Path) -> None:
    with replacing(path) as temporary:
        torch.save(training.state_dict(), temporary)


def _drop_after(metrics: Path, step: int) -> None:
    """Forget the lines that a resumed run will write again."""
    lines = [
        line
        for line in metrics.read_text(encoding="utf-8").splitlines()
        if line.endswith("}") and json.loads(line)["step"] <= step
    ]
    write_atomically(metrics, "".join(line + "\n" for line in lines))


def plot(out: Path) -> None:
    """meta_loss.png: the mean inner loss of each family over outer steps, smoothed over a fiftieth of the run."""
    records = [json.loads(line) for line in (out / METRICS).read_text(encoding="utf-8").splitlines()]
    figure, axes = new_figure(out / "meta_loss.png", figsize=(7, 4.5))
    width = max(1, len(records) // 50)
    for name in [name for name in records[0] if name.startswith("loss")]:
        y = torch.tensor([record[name] for record in records]).unfold(0, width, 1).mean(-1)
        axes.plot(
            [record["step"] for record in records][width - 1 :],
            y,
            label=name.removeprefix("loss/"),
            linewidth=2.5 if name == "loss" else 1.2,
            color="black" if name == "loss" else None,
        )
    axes.set(xlabel="outer step", ylabel=f"inner loss, mean over a truncation\n(smoothed over {width} steps)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    save_figure(figure, out / "meta_loss.png")
