"""How much longer does a whole training step take with Celo2 than with AdamW? Both in one run, under DeepSpeed.

    python benchmarks/training_step.py --model 1.3b --tokens 524288     one GPU, ZeRO-2, bf16
    DS_ACCELERATOR=cpu python benchmarks/training_step.py               GPT-2 124M's shapes and a small batch on a CPU

A step is all forward and backward passes of its micro-batches and the optimizer's part, on random tokens. The two engines
take turns, round by round; shown are the median times, and the median and the quartiles of the ratio within a round.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from optimizer_step import MODELS
from transformers import AutoModelForCausalLM, GPT2Config

from celo2_pretrain import Celo2, param_groups, register
from celo2_pretrain.train.start.ranks import free_port

from report import RESULTS, device_name, quartiles, write_csv

CONTEXT = {"124m": 1024, "350m": 2048, "1.3b": 2048}
VOCABULARY = 50304


def engine(name: str, optimizer: str, micro_batch: int, accumulation: int):
    (layers, width, heads), context = MODELS[name], CONTEXT[name]
    torch.manual_seed(0)
    gpu = get_accelerator().device_name() != "cpu"
    with torch.device(get_accelerator().current_device_name()):
        model = AutoModelForCausalLM.from_config(
            GPT2Config(n_layer=layers, n_embd=width, n_head=heads, n_positions=context, vocab_size=VOCABULARY, use_cache=False)
        )
    register(model)
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 1.0,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": gpu},
    }
    made = (
        torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if optimizer == "AdamW (fused)"
        else Celo2(param_groups(model), lr=1e-4)
    )
    return deepspeed.initialize(model=model, optimizer=made, config=config)[0]


def timed(made, tokens: torch.Tensor, accumulation: int) -> float:
    """Seconds of one whole step."""
    get_accelerator().synchronize()
    begin = time.perf_counter()
    for _ in range(accumulation):
        made.backward(made(input_ids=tokens, labels=tokens).loss)
        made.step()
    get_accelerator().synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="124m")
    parser.add_argument("--tokens", type=int, default=0, help="of a step (default: 524288 on a GPU, one micro-batch on a CPU)")
    parser.add_argument("--micro-batch", type=int, default=0, help="sequences (default: 8 on a GPU, 1 on a CPU)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV (default: benchmarks/results)")
    args = parser.parse_args()
    gpu = get_accelerator().device_name() != "cpu"
    micro_batch, context = args.micro_batch or (8 if gpu else 1), CONTEXT[args.model]
    accumulation = max(1, (args.tokens or (524288 if gpu else 0)) // (micro_batch * context))
    for name, value in (
        ("RANK", 0),
        ("LOCAL_RANK", 0),
        ("WORLD_SIZE", 1),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", free_port()),
    ):
        os.environ.setdefault(name, str(value))
    deepspeed.init_distributed(verbose=False)
    device = torch.device(get_accelerator().current_device_name())
    tokens = torch.randint(VOCABULARY, (micro_batch, context), device=device)
    engines = {key: engine(args.model, key, micro_batch, accumulation) for key in ("AdamW (fused)", "Celo2")}
    times: dict[str, list[float]] = {key: [] for key in engines}
    for number in range(args.rounds + 1):
        for key, made in engines.items():
            seconds = timed(made, tokens, accumulation)
            print(f"round {number}{' (not counted)' if number == 0 else ''}: {key} {seconds:.3f} s", flush=True)
            if number:
                times[key].append(seconds)
        gc.collect()
    ratios = [a / b for a, b in zip(times["Celo2"], times["AdamW (fused)"])]
    low, middle, high = quartiles(ratios)
    print(
        f"{args.model}, {accumulation * micro_batch * context:,} tokens a step on {device_name(device)}: "
        f"with Celo2 {middle:.4f} x AdamW's step (quartiles {low:.4f} to {high:.4f})"
    )
    write_csv(
        args.out / f"training_step_{device.type}.csv",
        [
            {
                "device": device_name(device),
                "model": args.model,
                "tokens": accumulation * micro_batch * context,
                "micro_batch": micro_batch,
                "optimizer": key,
                "seconds": round(statistics.median(times[key]), 4),
                "ratio": round(middle, 4) if key == "Celo2" else 1,
                "ratio_q1": round(low, 4) if key == "Celo2" else 1,
                "ratio_q3": round(high, 4) if key == "Celo2" else 1,
                "rounds": args.rounds,
            }
            for key in engines
        ],
    )
    os._exit(0)  # what DeepSpeed and gloo have running may abort the interpreter's exit


if __name__ == "__main__":
    main()
