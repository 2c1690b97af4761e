"""How long does an optimizer step take, beside fused AdamW and torch's Muon, all in one run?

    python benchmarks/optimizer_step.py                        GPT-2 124M's shapes on this machine
    python benchmarks/optimizer_step.py --model 350m 1.3b      larger ones (a GPU)
    python benchmarks/optimizer_step.py --profile              and where Celo2's time goes, pass by pass, with the bound

Every optimizer steps every tensor of the model (Celo2 and Muon: hidden matrices; embeddings and 1-D tensors by AdamW;
Celo2-base: the learned rule on every tensor; so the same work that a user's step would be). Celo2 orthogonalises in float32
and in bfloat16 (`newton_schulz_dtype`), torch's Muon in bfloat16. The optimizers take turns, round by round; shown are
the median and the quartiles of the ratio to fused AdamW in the same round. On a GPU also the device's own time (device_ms: a
step whose launches take longer waits for them), and the memory of the states and of what a step needs beside them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from celo2_pretrain import Celo2, param_groups, register
from celo2_pretrain.common.figures import new_figure, save_figure
from celo2_pretrain.optimizer.backends.choose import backend_for
from celo2_pretrain.optimizer.matrices.param_groups import tag_of
from celo2_pretrain.optimizer.step.learned import LearnedStep

from report import RESULTS, device_name, quartiles, write_csv

MODELS = {"124m": (12, 768, 12), "350m": (24, 1024, 16), "1.3b": (24, 2048, 16)}
# Bytes a parameter that a pass must move at least, float32: A reads g, m, v and writes m, v; B and C read p, g, m, v
# (C writes the direction); apply reads p and the direction and writes p.
BOUND = {"A accumulate": 40, "B norms": 24, "C direction": 28, "apply": 12}


def build(name: str, device: torch.device) -> nn.Module:
    layers, width, heads = MODELS[name]
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=layers, n_embd=width, n_head=heads))
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    return model


class Muon:
    """torch's Muon on the hidden matrices and fused AdamW on the rest, as one optimizer."""

    def __init__(self, model: nn.Module) -> None:
        tagged = list(model.parameters())
        hidden = [p for p in tagged if tag_of(p).rule == "celo2"]
        self.parts = [
            torch.optim.Muon(hidden, lr=1e-6),
            torch.optim.AdamW([p for p in tagged if tag_of(p).rule == "adamw"], lr=1e-6, fused=True),
        ]

    def step(self) -> None:
        for part in self.parts:
            part.step()


def optimizers(model: nn.Module) -> dict[str, Callable[[], None]]:
    register(model)
    celo2 = Celo2(param_groups(model), lr=1e-6)

    def step_in(dtype: str) -> Callable[[], None]:
        def step() -> None:
            for group in celo2.param_groups:
                group["newton_schulz_dtype"] = dtype
            celo2.step()

        return step

    return {
        "AdamW (fused)": torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True).step,
        "Celo2-base": Celo2(model.parameters(), lr=1e-6, orthogonalize=False).step,
        "Celo2": step_in("fp32"),
        "Celo2, bf16": step_in("bf16"),
        "Muon (torch)": Muon(model).step,
    }


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of one step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def on_device(run: Callable[[], None], device: torch.device) -> float:
    """Seconds that the device itself takes: on a GPU without the launches, which are under way before it begins."""
    if device.type != "cuda":
        return timed(run, device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # a tenth of a second
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def memory(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """GiB of the GPU that a step leaves allocated, and that it takes beside that while it runs."""
    if device.type != "cuda":
        step()
        return 0.0, 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    after = torch.cuda.memory_allocated()
    return (after - before) / 2**30, (torch.cuda.max_memory_allocated() - after) / 2**30


def compare(name: str, device: torch.device, rounds: int) -> list[dict]:
    model = build(name, device)
    steps = optimizers(model)
    times: dict[str, list[float]] = {key: [] for key in steps}
    kept = {key: memory(step, device)[0] for key, step in steps.items()}  # the first steps make states and plans
    beside = {key: memory(step, device)[1] for key, step in steps.items()} if device.type == "cuda" else {}
    for _ in range(rounds):
        for key, step in steps.items():
            times[key].append(timed(step, device))
    rows = []
    for key, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times["AdamW (fused)"])]
        low, middle, high = quartiles(ratios)
        rows.append(
            {
                "device": device_name(device),
                "threads": torch.get_num_threads(),
                "model": name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "optimizer": key,
                "ms": round(1e3 * statistics.median(seconds), 2),
                "ratio": round(middle, 2),
                "ratio_q1": round(low, 2),
                "ratio_q3": round(high, 2),
                "rounds": rounds,
            }
        )
        if device.type == "cuda":  # the states of both forms of Celo2 are the first one's
            rows[-1] |= {
                "device_ms": round(1e3 * statistics.median(on_device(steps[key], device) for _ in range(3)), 2),
                "states_gib": round(kept["Celo2" if key == "Celo2, bf16" else key], 2),
                "beside_gib": round(beside[key], 2),
            }
    return rows


def profile(name: str, device: torch.device, rounds: int) -> list[dict]:
    """Milliseconds of each pass over the hidden matrices, and what the bound's bytes take at a copy's bandwidth."""
    model = build(name, device)
    optimizer = Celo2(param_groups(model), lr=1e-6, newton_schulz_dtype="fp32")
    optimizer.step()
    group = optimizer.param_groups[0]
    (plan,) = optimizer.plans_of(group, group["params"])
    step = LearnedStep(plan, optimizer.state, optimizer._mlp_on(device), group)
    count = sum(p.numel() for p in group["params"])
    x, y = torch.empty(1 << 26, device=device), torch.empty(1 << 26, device=device)
    copies = [on_device(lambda: y.copy_(x), device) for _ in range(rounds + 1)][1:]
    bandwidth = 8 * x.numel() / statistics.median(copies)
    with torch.no_grad():
        step.run()
        directions: dict[int, torch.Tensor] = {}

        def c() -> None:
            for bucket in plan.buckets:
                directions.update(step._directions(bucket))

        passes = {
            "A accumulate": step._accumulate,
            "B norms": step._norms,
            "C direction": c,
            "apply": lambda: step._apply(directions),
        }
        rows = []
        for key, run in passes.items():
            ms = 1e3 * statistics.median([on_device(run, device) for _ in range(rounds + 1)][1:])
            bound = 1e3 * BOUND[key] * count / bandwidth
            rows.append(
                {"pass": key, "ms": round(ms, 2), "bytes bound ms": round(bound, 2), "bandwidth share": round(bound / ms, 3)}
            )
        passes_ms = sum(row["ms"] for row in rows)
        for dtype in ("fp32", "bf16"):
            group["newton_schulz_dtype"] = dtype
            whole = 1e3 * statistics.median([on_device(step.run, device) for _ in range(max(2, rounds // 2))])
            rows.append(
                {
                    "pass": f"Newton-Schulz in {dtype} and the rest",
                    "ms": round(whole - passes_ms, 2),
                    "bytes bound ms": "",
                    "bandwidth share": "",
                }
            )
    return [{"device": device_name(device), "model": name, "backend": backend_for(device).name, **row} for row in rows]


def plot(path: Path, rows: list[dict]) -> None:
    figure, axes = new_figure(path, figsize=(7, 1 + 0.5 * len(rows)))
    labels = [f"{row['optimizer']}, {row['model']}" for row in rows]
    axes.barh(
        labels,
        [row["ratio"] for row in rows],
        xerr=[[row["ratio"] - row["ratio_q1"] for row in rows], [row["ratio_q3"] - row["ratio"] for row in rows]],
    )
    for y, row in enumerate(rows):
        axes.text(row["ratio_q3"], y, f"  {row['ratio']:g} × ({row['ms']:g} ms)", va="center")
    axes.set_xlim(0, 1.6 * max(row["ratio_q3"] for row in rows))
    axes.invert_yaxis()
    axes.set_xlabel("time of a step, as a multiple of fused AdamW's in the same round (median, quartiles)")
    axes.set_title(f"{rows[0]['device']}, {rows[0]['threads']} threads", fontsize=10)
    save_figure(figure, path, dpi=120, bbox_inches="tight")
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", choices=MODELS, default=["124m"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV and PNG (default: benchmarks/results)")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    rows = [row for name in args.model for row in compare(name, device, args.rounds)]
    for row in rows:
        print(
            f"{row['model']:>5}  {row['optimizer']:14s} {row['ms']:10.2f} ms   {row['ratio']:7.2f} x AdamW "
            f"(quartiles {row['ratio_q1']:.2f} to {row['ratio_q3']:.2f})"
            + (
                f"; device {row['device_ms']:.2f} ms, states {row['states_gib']:.2f} GiB, beside {row['beside_gib']:.2f} GiB"
                if "device_ms" in row
                else ""
            )
        )
    write_csv(args.out / f"optimizer_step_{device.type}.csv", rows)
    plot(args.out / f"optimizer_step_{device.type}.png", rows)
    if args.profile:
        rows = [row for name in args.model for row in profile(name, device, args.rounds)]
        for row in rows:
            print(f"{row['model']:>5}  {row['pass']:28s} {row['ms']:10.2f} ms   bound {row['bytes bound ms'] or '-':>8} ms")
        write_csv(args.out / f"optimizer_profile_{device.type}.csv", rows)


if __name__ == "__main__":
    main()
