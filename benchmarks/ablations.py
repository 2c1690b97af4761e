"""What does each part of the recipe do? The paper's ablations, in small: `python benchmarks/ablations.py`.

Each variant is meta-trained alike (random theta, two MLP families on images, the same number of outer steps and seeds), then
trains problems that it never saw: a transformer on Markov chains, one on text and a conv net, over five learning rates and
three seeds. Thetas that hardly use the second moment can't show what its decay does, so the constructed rule of Celo2-base,
which divides by its root, is put beside them with both decays. Everything runs in meta-training's own vectorised inner
loop, because the variants are no deployable optimizers. Writes results/ablations.csv and .png.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

import torch

from celo2_pretrain.common.figures import new_figure, save_figure
from celo2_pretrain.meta import inner
from celo2_pretrain.meta.config import MetaConfig
from celo2_pretrain.meta.family import harness_of
from celo2_pretrain.meta.problems import tasks
from celo2_pretrain.meta.rule import flatten
from celo2_pretrain.meta.train import MetaTraining
from celo2_pretrain.weights.load import load_weights

from report import RESULTS, write_csv

# The rate is the paper's, 1e-3 throughout, so that the scale is all that varies how far a step leads.
META = MetaConfig(
    families="mlp/digits_on_photos mlp/photos",
    problems=4,
    estimator="analytic",
    truncation=20,
    length_min=100,
    length_max=1000,
    scale_min=0.1,
    scale_max=10,
    schedule="cosine",
    inner_clip=1.0,
    outer_lr=3e-3,
    average=0.95,
)
VARIANTS = {
    "full": {},
    "no input normalisation": {"normalize_inputs": False},
    "no augmentation": {"scale_min": 1.0, "scale_max": 1.0},
    "no orthogonalisation": {"orthogonalize": False},
    "RMS decay 0.999": {"rms_decay": 0.999},
}
RULES = {  # the constructed weights of Celo2-base, not meta-trained, with either decay
    "constructed-base": {"orthogonalize": False},
    "constructed-base, 0.999": {"orthogonalize": False, "rms_decay": 0.999},
}
HELD_OUT = {"transformer": 1, "text": 2, "conv/orientation": 1}  # and how many times --steps it is trained
LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


@torch.no_grad()
def evaluate(theta: torch.Tensor, config: MetaConfig, name: str, seeds: int, steps: int) -> torch.Tensor:
    """Final loss (mean of the last twentieth of the steps), (rates, seeds); a diverged one is infinite."""
    task, n = tasks.make(name), len(LRS) * seeds
    harness = replace(harness_of(config), adamw=True)
    generator = torch.Generator().manual_seed(1234)
    fixed = inner.Fixed(torch.tensor(LRS).repeat_interleave(seeds), torch.full((n,), float(steps)), torch.ones(n))
    problems, advance = inner.start(task, harness, fixed, generator), inner.make_advance(task, harness, shared_theta=True)
    last, total = max(1, steps // 20), torch.zeros(n)
    for step in range(steps):
        problems, loss = advance(theta, problems, task.draw(generator, n))
        if step >= steps - last:
            total += loss
    return torch.where(total.isfinite(), total / last, torch.inf).view(len(LRS), seeds)


def meta_trained(config: MetaConfig, outer_steps: int) -> torch.Tensor:
    training = MetaTraining(config)
    for _ in range(outer_steps):
        training.advance()
    return training.average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outer-steps", type=int, default=400)
    parser.add_argument("--meta-seeds", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="inner steps of the evaluation")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for variant, changes in (VARIANTS | RULES).items():
        for meta_seed in range(1 if variant in RULES else args.meta_seeds):
            began = time.perf_counter()
            config = replace(META, seed=meta_seed, **changes)
            theta = flatten(load_weights("constructed-base")) if variant in RULES else meta_trained(config, args.outer_steps)
            for name, times in HELD_OUT.items():
                losses = evaluate(theta, config, name, args.seeds, args.steps * times)
                rows += [
                    {
                        "variant": variant,
                        "meta_seed": meta_seed,
                        "task": name,
                        "lr": lr,
                        "seed": seed,
                        "loss": losses[k, seed].item(),
                    }
                    for k, lr in enumerate(LRS)
                    for seed in range(args.seeds)
                ]
                best = losses.mean(1).min().item()
                print(f"{variant:<24} meta-seed {meta_seed}  {name:<18} best over rates {best:.4f}", flush=True)
            print(f"    {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    write_csv(RESULTS / "ablations.csv", rows)
    table(rows)


def table(rows: list[dict]) -> None:
    """Print the best loss over rates of each variant, and draw the losses over rates."""
    figure, axes = new_figure(RESULTS / "ablations.png", ncols=len(HELD_OUT), figsize=(14, 4))
    print(f"\n{'best loss over rates, mean ± deviation over meta-seeds':<28}")
    for variant in VARIANTS | RULES:
        cells = []
        for axis, name in zip(axes, HELD_OUT):
            mine = [row for row in rows if row["variant"] == variant and row["task"] == name]
            metas = sorted({row["meta_seed"] for row in mine})
            loss = torch.tensor(
                [
                    [[row["loss"] for row in mine if row["lr"] == lr and row["meta_seed"] == meta] for lr in LRS]
                    for meta in metas
                ]
            )  # (meta-seeds, rates, seeds)
            over_seeds = loss.mean(-1)
            best = over_seeds.min(1).values
            cells.append(f"{best.mean():.4f}" + (f" ± {best.std(correction=0):.4f}" if len(metas) > 1 else ""))
            axis.plot(LRS, over_seeds.mean(0), marker="o", label=variant)
            if variant == "full":  # without normalisation large rates end far above everything else
                axis.set_ylim(0.95 * best.min(), 1.25 * over_seeds.mean(0)[0])
            axis.set(xscale="log", xlabel="learning rate", ylabel="final loss", title=name)
            axis.grid(alpha=0.3)
        print(f"| {variant:<24} | {' | '.join(cells)} |")
    axes[0].legend(fontsize=8, loc="upper left")
    save_figure(figure, RESULTS / "ablations.png")


if __name__ == "__main__":
    main()
