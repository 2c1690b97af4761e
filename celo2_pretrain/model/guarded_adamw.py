"""AdamW for comparisons with Celo2: it leaves the same steps out."""

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator

from celo2_pretrain.optimizer.step.finite import nonfinite


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that leaves a step out, on all ranks, when a gradient is not finite or too large to be squared; it counts them."""

    skipped_steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        bad = nonfinite(grads).any() if grads else False
        if not on_every_rank(not bool(bad)):
            self.skipped_steps += 1
            return None
        return super().step(closure)


def on_every_rank(fine: bool) -> bool:
    """Whether it is so on all ranks: under ZeRO each looks at its own part of the gradient only."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return fine
    flag = torch.tensor(int(fine), device=get_accelerator().current_device_name())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)
