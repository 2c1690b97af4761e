"""Does the loss jump when Celo2 takes over a running AdamW run, or AdamW takes it back?

    python benchmarks/takeover.py            # about ten minutes on one core; --seeds 1 for a third of it

A small GPT-2 (transformers) on the bytes of Python's standard library, under a DeepSpeed engine (ZeRO-2, one rank,
CPU). AdamW trains to the switch and DeepSpeed saves its checkpoint. From there every run sees the same batches: AdamW
goes on; Celo2 takes over with `from_adamw` at the rates it prints; the same with accumulators of zero; the same at AdamW's
own rate and the default multiplier; and Celo2 for a while, then AdamW again by `to_adamw`. Writes results/takeover.csv
(validation loss of a fixed set) and results/takeover.png.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}

import deepspeed
import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from celo2_pretrain import Celo2, param_groups
from celo2_pretrain.common.figures import new_figure, save_figure
from celo2_pretrain.optimizer.state.save_load import load_state, save_state
from celo2_pretrain.optimizer.state.takeover import from_adamw, to_adamw
from celo2_pretrain.train.start.ranks import free_port

RESULTS = Path(__file__).parent / "results"
CONTEXT, BATCH, WARMUP = 64, 16, 30
ADAMW_LR, EMBED_LR = 1e-3, 2e-3
BETAS = (0.9, 0.95)
RUNS = {  # label and colour; in the order of the legend
    "AdamW": ("AdamW, uninterrupted", "black"),
    "celo2": ("Celo2 takes over (seeded, printed rates)", "tab:blue"),
    "cold": ("Celo2 with accumulators of zero, same rates", "tab:cyan"),
    "naive": ("Celo2 seeded, but AdamW's lr and multiplier 20", "tab:red"),
    "back": ("Celo2, then AdamW takes back", "tab:orange"),
}


def corpus(megabytes: float) -> torch.Tensor:
    """Bytes of the standard library's sources, as int64."""
    parts, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        parts.append(path.read_bytes())
        size += len(parts[-1])
        if size > megabytes * 1e6:
            break
    return torch.from_numpy(np.frombuffer(b"".join(parts), dtype=np.uint8).astype(np.int64))


class Data:
    def __init__(self, megabytes: float = 4.0) -> None:
        data = corpus(megabytes)
        self.train, self.held_out = data[: -len(data) // 10], data[-len(data) // 10 :]

    def batch(self, seed: int, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 100_003 + step)
        starts = torch.randint(0, len(self.train) - CONTEXT - 1, (BATCH,), generator=generator)
        return torch.stack([self.train[s : s + CONTEXT + 1] for s in starts])

    def validation(self, count: int = 64) -> torch.Tensor:
        starts = torch.linspace(0, len(self.held_out) - CONTEXT - 2, count).long()
        return torch.stack([self.held_out[s : s + CONTEXT + 1] for s in starts])


def loss_of(model, windows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=windows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def new_model(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=CONTEXT,
            n_embd=96,
            n_layer=2,
            n_head=4,
            bos_token_id=None,
            eos_token_id=None,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def adamw(model) -> torch.optim.AdamW:
    """Embeddings and 1-D tensors at their own rate, as Celo2 has them."""
    groups = [
        {"params": group["params"], "lr": ADAMW_LR if group["rule"] == "celo2" else EMBED_LR} for group in param_groups(model)
    ]
    return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)


def engine_of(model, optimizer):
    config = {"train_batch_size": BATCH, "gradient_clipping": 1.0, "steps_per_print": 10**9, "zero_optimization": {"stage": 2}}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine, data: Data, seed: int, first: int, last: int, note, every: int, warmup: bool = False) -> None:
    peaks = [group["lr"] for group in engine.optimizer.param_groups]
    for step in range(first, last):
        if step % every == 0:
            with torch.no_grad():
                note(step, float(loss_of(engine.module, data.validation())))
        if warmup:
            for group, peak in zip(engine.optimizer.param_groups, peaks):
                group["lr"] = peak * min(1.0, (step + 1) / WARMUP)
        engine.backward(loss_of(engine, data.batch(seed, step)))
        engine.step()
    with torch.no_grad():
        note(last, float(loss_of(engine.module, data.validation())))


def one_seed(seed: int, data: Data, switch: int, last: int, every: int, rows: dict, folder: Path) -> None:
    def noting(run: str):
        return lambda step, loss: rows.update({(seed, run, step): loss})

    back_at = switch + (last - switch) // 2
    engine = engine_of(model := new_model(seed), adamw(model))
    train(engine, data, seed, 0, switch, noting("AdamW"), every, warmup=True)
    engine.save_checkpoint(str(folder / "adamw"), tag="switch")
    train(engine, data, seed, switch, last, noting("AdamW"), every)

    # Another start, which the checkpoint must replace altogether.
    rates = from_adamw(folder / "adamw", folder / "celo2", Celo2(param_groups(new_model(seed + 100))))

    def celo2(seeded: bool = True, naive: bool = False):
        model = new_model(seed + 100)
        engine = engine_of(
            model,
            Celo2(
                param_groups(model),
                lr=ADAMW_LR if naive else rates["lr"],
                adamw_lr_multiplier=20.0 if naive else rates["adamw_lr_multiplier"],
            ),
        )
        load_state(engine, folder / "celo2")
        for state in () if seeded else engine.basic_optimizer.state.values():
            for value in state.values():
                value.zero_()
        return engine

    train(celo2(naive=True), data, seed, switch, last, noting("naive"), every)
    train(celo2(seeded=False), data, seed, switch, last, noting("cold"), every)
    engine = celo2()
    train(engine, data, seed, switch, back_at, noting("celo2"), every)
    save_state(engine, folder / "at_back")
    train(engine, data, seed, back_at, last, noting("celo2"), every)

    to_adamw(folder / "at_back", folder / "back", betas=BETAS)
    engine = engine_of(model := new_model(seed + 200), adamw(model))
    load_state(engine, folder / "back")
    train(engine, data, seed, back_at, last, noting("back"), every)


def plot(rows: list[dict], switch: int, back_at: int, path: Path) -> None:
    figure, axis = new_figure(path, figsize=(8.5, 5))
    for run, (label, colour) in RUNS.items():
        shown = [row for row in rows if row["run"] == run and row["step"] >= switch - (back_at - switch)]
        steps = sorted({row["step"] for row in shown})
        losses = np.array([[row["val_loss"] for row in shown if row["step"] == step] for step in steps])
        axis.plot(steps, losses.mean(1), color=colour, label=label, zorder=3 if run != "naive" else 2)
        axis.fill_between(steps, losses.min(1), losses.max(1), color=colour, alpha=0.15, linewidth=0)
    for step, text in ((switch, "Celo2 takes over"), (back_at, "AdamW takes back")):
        axis.axvline(step, color="grey", linewidth=0.8, linestyle=":")
        axis.text(step, 0.98, " " + text, transform=axis.get_xaxis_transform(), va="top", fontsize=8, color="grey")
    seeds = len({row["seed"] for row in rows})
    usual = [row["val_loss"] for row in rows if row["run"] != "naive" and row["step"] >= switch - (back_at - switch)]
    axis.set_ylim(min(usual) - 0.05, max(usual) + 0.15)
    axis.set(
        xlabel="step",
        ylabel="validation loss (nats per byte)",
        title=f"Switching optimizers in a running run: mean of {seeds} seeds, band from least to largest",
    )
    axis.legend(fontsize=8, loc="lower left")
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--switch", type=int, default=300, help="step of the switch")
    parser.add_argument("--after", type=int, default=200, help="steps after it")
    parser.add_argument("--every", type=int, default=5, help="steps between validations")
    arguments = parser.parse_args()
    os.environ["MASTER_PORT"] = str(free_port())
    torch.set_num_threads(1)
    deepspeed.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo", verbose=False)
    data, losses, last = Data(), {}, arguments.switch + arguments.after
    for seed in range(arguments.seeds):
        folder = Path(tempfile.mkdtemp())
        try:
            one_seed(seed, data, arguments.switch, last, arguments.every, losses, folder)
        finally:
            shutil.rmtree(folder)
    rows = [{"seed": seed, "run": run, "step": step, "val_loss": round(loss, 5)} for (seed, run, step), loss in losses.items()]
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "takeover.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, arguments.switch, arguments.switch + arguments.after // 2, RESULTS / "takeover.png")
    for run in RUNS:
        losses = [row["val_loss"] for row in rows if row["run"] == run and row["step"] == last]
        print(f"{run:8s} validation loss at step {last}: {np.mean(losses):.3f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
