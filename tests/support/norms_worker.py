"""Prints the norms of a few steps for every ZeRO stage and both optimizers, as JSON; started once on each rank.

    {"celo2 0": [{"grad_norm": …, "grad_norm/celo2": …, …, one entry a step], "adamw 3": …}

Without ZeRO on one rank each entry also has what the whole tensors say ("direct").
"""

import json
import os
import sys

import deepspeed
import torch

from celo2_pretrain.config import Config, Model
from celo2_pretrain.deepspeed_config import deepspeed_config
from celo2_pretrain.model.build import build_model
from celo2_pretrain.model.build_optimizer import build_optimizer
from celo2_pretrain.model.loss import training_loss
from celo2_pretrain.train.record.insight import Insight
from celo2_pretrain.train.record.peak_flops import Peak
from celo2_pretrain.train.start.ranks import join_ranks

STEPS, VOCABULARY = 2, 40


def direct(
    model, rules: dict[str, str], before: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Norms by rule from whole tensors."""
    now = {name: p.detach().clone() for name, p in model.named_parameters()}
    sums = {"grad": gradients, "weight": now, "update": {name: now[name] - before[name] for name in now}}
    return {
        f"{kind}_norm/{rule}": float(
            torch.stack([x.double().norm() for name, x in tensors.items() if rules[name] == rule]).norm()
        )
        for kind, tensors in sums.items()
        for rule in ("celo2", "adamw")
    }


def run(name: str, stage: int) -> list[dict]:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    config = Config()
    config.model = Model(layers=1, width=24, heads=2, context=16)
    config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay = name, 3e-3, 0.5
    config.train.micro_batch_size, config.train.global_batch_size, config.train.log_every = 1, 4, 1
    config.train.zero_stage, config.train.grad_clip = stage, 0.3
    torch.manual_seed(0)
    model = build_model(config.model, VOCABULARY, 0)
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = build_optimizer(model, config.optimizer)
    rules = {
        name: group["rule"]
        for group in optimizer.param_groups
        for p in group["params"]
        for name, q in model.named_parameters()
        if q is p
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config, world))
    insight = Insight(engine, optimizer, config, parameters, 1.0, Peak(None, ""))
    windows = torch.randint(VOCABULARY, (STEPS, 4, 17), generator=torch.Generator().manual_seed(1))
    whole, out = stage == 0 and world == 1, []
    for step in range(STEPS):
        before = {name: p.detach().clone() for name, p in model.named_parameters()} if whole else {}
        insight.begin(step + 1)
        for micro in range(4 // world):
            insight.mark("forward")
            loss, _ = training_loss(engine, windows[step, micro * world + rank][None])
            insight.mark("backward")
            engine.backward(loss)
            insight.mark("optimizer")
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()} if whole else {}
            engine.step()
        insight.end()
        record = {key: value for key, value in insight.record(1.0, 1.0).items() if "norm" in key}
        out.append(record | ({"direct": direct(model, rules, before, gradients)} if whole else {}))
    engine.destroy()
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    join_ranks()
    found = {f"{name} {stage}": run(name, stage) for name in ("celo2", "adamw") for stage in (0, 1, 2, 3)}
    sys.stdout.write("\n" + json.dumps(found) + "\n")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort the interpreter's exit
