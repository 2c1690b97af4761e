"""One rank of tests/optimizer/test_state.py and test_takeover.py: runs the jobs of a JSON list, one after the other.

A job builds a small model in some sharding, restores and trains it, saves it, and writes the model's full parameters.
"""

import json
import os
import sys
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

FEATURES = 7


class Net(nn.Module):
    """Odd shapes: a tie in the factored axes, a fused QKV, a stack of matrices, one-element and frozen parameters."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = nn.Embedding(11, FEATURES)
        self.c_attn = Conv1D(3 * FEATURES, FEATURES)
        self.up = nn.Linear(FEATURES, 13)
        self.square = nn.Linear(13, 13, bias=False)
        self.down = nn.Linear(13, FEATURES)
        self.stack = nn.Parameter(torch.randn(2, 5, FEATURES) / 3)
        self.frozen = nn.Linear(5, FEATURES, bias=False)
        self.frozen.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))
        self.lm_head = nn.Linear(FEATURES, 11, bias=False)

    def forward(self, ids):
        q, k, v = self.c_attn(self.embed(ids)).chunk(3, -1)
        x = self.down(torch.tanh(self.square(torch.tanh(self.up(q * torch.sigmoid(k) + v)))))
        x = self.frozen((x @ self.stack[0].T) * torch.sigmoid(x @ self.stack[1].T)) * self.scale
        return self.lm_head(x)


def build(seed=0):
    torch.manual_seed(seed)
    model = Net()
    torch.manual_seed(99)  # what is frozen comes with the model, not with the optimizer's state
    nn.init.normal_(model.frozen.weight)
    return model


def batch(step, rank, world):
    """This rank's share of the global batch of 12 samples, the same batch whatever the world."""
    generator = torch.Generator().manual_seed(1000 + step)
    return tuple(torch.randint(0, 11, (12,), generator=generator)[rank::world] for _ in range(2))


def celo2(model, lr=2e-3, reread=False):
    """`reread`: make it read two tensors as other matrices than it would by itself."""
    from celo2_pretrain import Celo2, param_groups
    from celo2_pretrain.optimizer.matrices.param_groups import TAG, tag_of
    from celo2_pretrain.optimizer.matrices.views import MatrixView

    # Random weights look at every feature, so that a state which isn't restored shows; good ones ignore some.
    generator = torch.Generator().manual_seed(7)
    shapes = {"w0": (30, 8), "b0": (8,), "w1": (8, 8), "b1": (8,), "w2": (8, 3), "b2": (3,)}
    theta = {name: torch.randn(shape, generator=generator) / shape[0] ** 0.5 for name, shape in shapes.items()}
    groups = param_groups(model, lr=lr, weight_decay=0.1)
    for param, view in (
        ((model.up.weight, MatrixView(transpose=True, split=(6, 7))), (model.c_attn.weight, MatrixView())) if reread else ()
    ):
        setattr(param, TAG, replace(tag_of(param), view=view))
    return Celo2(groups, weights=theta)


def adamw(model, lr=2e-3, reread=False, **options):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1, **options)


def start(job):
    """(model to call, what save_state takes, step function, model whose parameters are read)."""
    make = partial(adamw if job.get("optimizer") == "adamw" else celo2, reread=job.get("reread", False))
    model, lr = build(job.get("seed", 0)), job.get("lr", 2e-3)
    if job["kind"] in ("plain", "fsdp"):
        if job["kind"] == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for part in (model.up, model.down):
                fully_shard(part)
            fully_shard(model)
        optimizer = make(model, lr)

        def step(loss):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return model, optimizer, step
    import deepspeed

    zero = {"stage": job["stage"], "stage3_param_persistence_threshold": job.get("persist", 0), "sub_group_size": 300}
    if job.get("round_robin"):
        zero["round_robin_gradients"] = True
    if job.get("offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
    precision = job.get("precision", "fp32")
    config = {
        "train_batch_size": 12,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision.startswith("bf16")},
        "fp16": {"enabled": precision == "fp16", "initial_scale_power": job.get("scale_power", 8)},
    }
    if precision == "bf16-fp32acc":  # DeepSpeed's BF16_Optimizer
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, *_ = deepspeed.initialize(model=model, optimizer=make(model, lr), config=config)

    def step(loss):
        engine.backward(loss)
        engine.step()

    return engine, engine, step


def train(model, step, first, last):
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for number in range(first, last):
        ids, targets = batch(number, rank, world)
        step(nn.functional.cross_entropy(model(ids).float(), targets))


def parameters(model):
    """Every parameter of the model itself, whole."""
    model = getattr(model, "module", model)
    found = {}
    for name, param in model.named_parameters():
        if hasattr(param, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([param]):
                found[name] = param.detach().clone()
        else:
            found[name] = (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().clone()
    return found


def dump(model, path):
    found = parameters(model)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(found, path)


def run(job):
    """Train `steps` steps from step `first`, after `load`; then `save`, train `more` steps, and write `out`."""
    from celo2_pretrain.optimizer.state.save_load import StateError, load_state, save_state

    model, optimizer, step = start(job)
    if "error" in job:  # both ranks must get it, and none may hang
        try:
            save_state(optimizer, job["save"]) if "save" in job else load_state(optimizer, job["load"])
            text = "no error"
        except StateError as error:
            text = str(error)
        with open(f"{job['error']}.{dist.get_rank() if dist.is_initialized() else 0}", "w") as file:
            file.write(text)
        return
    if "load" in job:
        extra = load_state(optimizer, job["load"])
        assert extra == job.get("extra", extra), extra
    if "first" in job:
        train(model, step, job["first"], job["first"] + job["steps"])
    if "save" in job:
        save_state(optimizer, job["save"], extra=job.get("extra"))
    if "ds_save" in job:
        model.save_checkpoint(job["ds_save"], tag="here")
    if "more" in job:
        train(model, step, job["first"] + job["steps"], job["first"] + job["steps"] + job["more"])
    if "ds_load" in job:  # the same steps again, from DeepSpeed's own checkpoint, in a new engine
        dump(model, job["out"] + ".uninterrupted")
        model, optimizer, step = start({**job, "seed": 1, "lr": 0.5})
        model.load_checkpoint(job["ds_load"], tag="here")
        train(model, step, job["first"] + job["steps"], job["first"] + job["steps"] + job["more"])
    dump(model, job["out"])


def main():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    jobs = json.loads(sys.argv[1])
    if any(job["kind"] == "fsdp" for job in jobs) and not any(job["kind"] == "ds" for job in jobs):
        dist.init_process_group("gloo")
    elif any(job["kind"] == "ds" for job in jobs):
        import deepspeed

        deepspeed.logger.setLevel("ERROR")
        # A CPU without fp16 arithmetic computes it all the same, slower; DeepSpeed would refuse.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
        deepspeed.init_distributed("gloo", verbose=False)
    for job in jobs:
        run(job)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch's own threads (FSDP2 over gloo) now and then abort the interpreter's exit


if __name__ == "__main__":
    main()
