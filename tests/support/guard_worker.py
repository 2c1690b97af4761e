"""One rank: a gradient with one bad number, at each ZeRO stage and in each precision, must change nothing.

guard_worker.py RESULT   writes {case: {what: value}} as RESULT.rank, for test_guard.py to look at
"""

import hashlib
import json
import os
import sys

import deepspeed
import deepspeed.comm as dist
import torch

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import load_config
from celo2_pretrain.deepspeed_config import deepspeed_config
from celo2_pretrain.model.build import build_model
from celo2_pretrain.model.build_optimizer import build_optimizer
from celo2_pretrain.model.loss import training_loss
from celo2_pretrain.train.guard import Guard, guarded
from celo2_pretrain.train.start.ranks import join_ranks

TINY = [
    "model.layers=1",
    "model.width=16",
    "model.heads=2",
    "model.context=8",
    "model.vocab_size=32",
    "optimizer.lr=1e-3",
    "train.micro_batch_size=1",
    "train.global_batch_size=2",
]
BAD = {"1e30": 1e30, "inf": float("inf"), "nan": float("nan")}
STEPS, BAD_STEP = 4, 3


def digest(engine, optimizer) -> str:
    """Of everything that a step changes on this rank, but for step counts that DeepSpeed keeps."""
    found = hashlib.sha256()
    for group in optimizer.param_groups:
        for p in group["params"]:
            for x in (p, *(value for _, value in sorted(optimizer.state.get(p, {}).items()) if torch.is_tensor(value))):
                found.update(x.detach().float().cpu().numpy().tobytes())
    for p in engine.module.parameters():
        found.update(getattr(p, "ds_tensor", p).detach().float().cpu().numpy().tobytes())
    return found.hexdigest()


def run(optimizer_name: str, stage: int, precision: str, bad: str, on_nonfinite: str, clip: float) -> dict:
    world, rank = dist.get_world_size(), dist.get_rank()
    config = load_config(
        None,
        [
            *TINY,
            f"optimizer.name={optimizer_name}",
            f"train.zero_stage={stage}",
            f"train.precision={precision}",
            f"train.on_nonfinite={on_nonfinite}",
            f"train.grad_clip={clip}",
        ],
    )
    torch.manual_seed(0)
    model = build_model(config.model, 32, 0)
    optimizer = build_optimizer(model, config.optimizer)
    scale = {"initial_scale_power": 4} if precision == "fp16" else {}
    ds_config = deepspeed_config(config, world)
    ds_config["fp16"] |= scale
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    guarded(engine)
    guard, out = Guard(engine, optimizer, config), {"what": [], "digest": [], "loss": [], "stopped": ""}
    for step in range(1, STEPS + 1):
        for micro in range(engine.gradient_accumulation_steps()):
            windows = torch.randint(32, (1, 9), generator=torch.Generator().manual_seed(100 * step + 10 * micro + rank))
            loss, _ = training_loss(engine, windows)
            if step == BAD_STEP and rank == world - 1 and micro == 0:  # on one rank, in one place of the gradient
                loss = Poison.apply(loss, engine.module.get_input_embeddings().weight.new_tensor(BAD[bad]))
            engine.backward(loss)
            engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        mean = float(total) / world
        try:
            found = guard.look(step, mean)
        except UserError as error:
            out["stopped"] = str(error)
            break
        out["what"].append(found.what)
        out["loss"].append(mean)
        out["digest"].append(digest(engine, optimizer))
    if out["stopped"]:
        out["digest"].append(digest(engine, optimizer))
    out["finite"] = all(bool(torch.isfinite(getattr(p, "ds_tensor", p)).all()) for p in engine.module.parameters())
    engine.destroy()
    return out


class Poison(torch.autograd.Function):
    """The loss as it is, its gradient times something bad."""

    @staticmethod
    def forward(context, loss, bad):
        context.save_for_backward(bad)
        return loss.clone()

    @staticmethod
    def backward(context, grad):
        return grad * context.saved_tensors[0].float(), None


def main() -> None:
    join_ranks()
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True  # its CPU kernels are just slow
    results = {}
    for name in json.loads(os.environ["CASES"]):
        optimizer, stage, precision, bad, policy, clip = name.split(",")
        results[name] = run(optimizer, int(stage), precision, bad, policy, float(clip))
    with open(f"{sys.argv[1]}.{dist.get_rank()}", "w") as file:
        json.dump(results, file)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch's threads may abort at the interpreter's exit


if __name__ == "__main__":
    main()
