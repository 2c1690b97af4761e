"""One rank of test_plan: what an engine of a tiny model really holds, in bytes. Arguments: a JSON file of cases.

A census goes through the tensors that the engine, its optimizer and the model keep, storage by storage, at two moments:
after a backward pass ("backward"), and inside the optimizer's step ("step").
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import deepspeed
import torch

from celo2_pretrain.config import load_config
from celo2_pretrain.deepspeed_config import deepspeed_config
from celo2_pretrain.model.build import build_model
from celo2_pretrain.model.build_optimizer import build_optimizer
from celo2_pretrain.model.loss import training_loss
from celo2_pretrain.train.start.ranks import join_ranks


def leaves(x):
    """All tensors in nested lists and mappings."""
    if isinstance(x, torch.Tensor):
        return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else []
    return [tensor for part in parts for tensor in leaves(part)]


def census(engine, optimizer) -> dict[str, int]:
    """Bytes by part; a storage counts once, for the first part that it belongs to."""
    wrapper = engine.optimizer
    model = list(engine.module.parameters())
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    masters += (
        leaves(getattr(wrapper, "fp32_partitioned_groups_flat", []))
        + leaves(getattr(wrapper, "single_partition_of_fp32_groups", []))
        + leaves(getattr(wrapper, "fp32_groups_flat_partition", []))
    )
    buckets = [bucket.buffer for bucket in getattr(wrapper, "ipg_buckets", {}).values()]
    parts = {
        "weights": [p.data for p in model]
        + [p.ds_tensor for p in model if hasattr(p, "ds_tensor")]
        + leaves(getattr(wrapper, "lp_param_buffer", None)),
        "states": [x for state in optimizer.state.values() for x in leaves(state)],
        "master": masters,
        "buckets": leaves(buckets),
        "gradients": [p.grad for p in [*model, *masters] if p.grad is not None]
        + leaves(getattr(wrapper, "averaged_gradients", {}))
        + leaves(getattr(wrapper, "grad_partitions_flat_buffer", None))
        + leaves(getattr(wrapper, "fp32_groups_gradients_flat", [])),
    }
    seen, out = set(), Counter()
    for part, tensors in parts.items():
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                out[part] += storage.nbytes()
    return dict(out)


def measure(overrides: list[str], rank: int, world: int) -> dict:
    config = load_config(None, overrides)
    torch.manual_seed(0)
    model = build_model(config.model, config.model.vocab_size, 0)
    inner = build_optimizer(model, config.optimizer)
    engine, *_ = deepspeed.initialize(model=model, optimizer=inner, config=deepspeed_config(config, world))
    found = {"backward": Counter(), "step": Counter()}
    step = type(inner).step

    def watched(self, *args, **kwargs):
        if any(self.state.values()):  # not in the first step, which makes the states
            for part, size in census(engine, inner).items():
                found["step"][part] = max(found["step"][part], size)
        return step(self, *args, **kwargs)

    inner.step = watched.__get__(inner)
    for _ in range(2):
        for _ in range(engine.gradient_accumulation_steps()):
            windows = torch.randint(0, config.model.vocab_size, (config.train.micro_batch_size, config.model.context + 1))
            engine.backward(training_loss(engine, windows)[0])
            found["backward"] = census(engine, inner)
            engine.step()
    return found


def main() -> None:
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    join_ranks()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = {name: measure(overrides, rank, world) for name, overrides in job["cases"].items()}
    Path(f"{job['out']}/rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then abort the interpreter's exit


if __name__ == "__main__":
    main()
