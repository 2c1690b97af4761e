"""Norms of gradient, update and weights by rule, the same however the run is sharded.

They are taken around the optimizer's own step, from the float32 weights that it steps: DeepSpeed hands it one group (or
ZeRO-3 sub-group) after the other, and a copy of what this rank holds of that one lives until it has been stepped.
"""

import torch
from torch import Tensor

from celo2_pretrain.optimizer.sharding.layouts import local

RULES = ("celo2", "adamw")
KINDS = ("grad", "update", "weight")
SUMS = len(KINDS) * len(RULES) + 1
CHUNK = 1 << 20  # elements whose squares are summed in float32; the chunks' sums are added in float64


class Norms:
    """Sums of squares over what this rank holds, in the steps that it is asked for.

    Call `begin` before a step; afterwards `squares` is (SUMS,) float64: grad, update and weight by rule, and the number of
    elements, which tells copies from shards. It is None where no step was taken.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        """`optimizer`: the one that DeepSpeed wraps; a group's `rule` says which rule it counts to."""
        self.watching = False
        self.squares: Tensor | None = None
        self._before: list[Tensor] = []
        optimizer.register_step_pre_hook(self._about_to_step)
        optimizer.register_step_post_hook(self._stepped)

    def begin(self) -> None:
        self.watching, self.squares = True, None

    @staticmethod
    def _held(optimizer) -> list[tuple[int, Tensor]]:
        """(rule's number, tensor) of everything that this call steps."""
        return [
            (RULES.index(group.get("rule", "adamw")), param)
            for group in optimizer.param_groups
            for param in group["params"]
            if param.grad is not None
        ]

    @torch.no_grad()
    def _about_to_step(self, optimizer, *_) -> None:
        if not self.watching:
            return
        held = self._held(optimizer)
        if not held:
            return
        if self.squares is None:
            self.squares = torch.zeros(SUMS, dtype=torch.float64, device=local(held[0][1]).device)
        for rule, param in held:
            self.squares[rule] += sum_of_squares(local(param.grad))
        self._before = [local(param).detach().clone() for _, param in held]

    @torch.no_grad()
    def _stepped(self, optimizer, *_) -> None:
        if not self.watching or not self._before:
            return
        for (rule, param), before in zip(self._held(optimizer), self._before, strict=True):
            now = local(param).detach()
            self.squares[2 * len(RULES) + rule] += sum_of_squares(now)
            self.squares[len(RULES) + rule] += sum_of_squares(before.sub_(now))
            self.squares[-1] += now.numel()
        self._before = []


def sum_of_squares(x: Tensor) -> Tensor:
    """() float64."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=x.device)
    # sum adds in pairs; vector_norm on a CPU doesn't, and loses 4 in 1000 of a chunk.
    return torch.stack([chunk.float().square().sum().double() for chunk in x.reshape(-1).split(CHUNK)]).sum()


def by_rule(total: list[float], parameters: int, grad_norm: float | None) -> dict[str, float]:
    """What goes into the record, of `squares` summed over the ranks.

    Args:
        parameters: of the model; without ZeRO every rank holds them all, and the sums count them once for each rank.
        grad_norm: of the whole gradient before it was clipped; None where it wasn't. The optimizer sees clipped gradients,
            which all were scaled by one factor.
    """
    copies = max(1, round(total[-1] / parameters))  # padding is far less than one copy
    sums = {kind: [square / copies for square in total[k * len(RULES) : (k + 1) * len(RULES)]] for k, kind in enumerate(KINDS)}
    clipped = sum(sums["grad"]) ** 0.5
    unclip = grad_norm / clipped if grad_norm is not None and clipped > 0 else 1.0
    out = {}
    for kind, squares in sums.items():
        for rule, square, weight in zip(RULES, squares, sums["weight"]):
            if weight > 0:  # a run without this rule has no such line
                out[f"{kind}_norm/{rule}"] = square**0.5 * (unclip if kind == "grad" else 1.0)
    return out
