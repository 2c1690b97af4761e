"""One rank of test_deepspeed_swap: an ordinary DeepSpeed run whose config names Celo2. Arguments: a JSON file."""

import json
import logging
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from celo2_pretrain import Celo2, param_groups, register

STEPS, BATCH, LR = 4, 6, 1e-2


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=37, n_positions=8, n_embd=12, n_layer=2, n_head=3, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    )


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 37, (BATCH, 8), generator=torch.Generator().manual_seed(step))


def unsharded() -> dict[str, torch.Tensor]:
    """The same training in one plain process, without DeepSpeed."""
    model = build()
    optimizer = Celo2(param_groups(model), lr=LR, weight_decay=0.1, adamw_lr_multiplier=1.0)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step), labels=batch(step)).loss.backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train(stage: int, client: bool, rank: int, world: int) -> dict[str, torch.Tensor]:
    import deepspeed

    model = build()
    options = {"lr": LR, "weight_decay": 0.1, "adamw_lr_multiplier": 1.0}
    config = {
        "train_micro_batch_size_per_gpu": BATCH // world,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
    }
    if client:
        extra = {"optimizer": Celo2(param_groups(model), **options)}  # without "zero_allow_untested_optimizer"
    else:
        register(model)
        extra, config["optimizer"] = {}, {"type": "Celo2", "params": options}
    engine, *_ = deepspeed.initialize(model=model, config=config, **extra)
    for step in range(STEPS):
        x = batch(step)[rank::world]
        loss = engine(x, labels=x).loss
        engine.backward(loss)
        engine.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def main() -> None:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    for name, stage, client in job["runs"]:
        torch.save(train(stage, client, rank, world), f"{job['out']}/{name}-rank{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then abort the interpreter's exit


if __name__ == "__main__":
    main()
