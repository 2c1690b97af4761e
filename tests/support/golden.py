"""The authors' trajectories (tests/golden/README.md), and the optimizer's steps compared with them."""

import numpy as np
import torch

from celo2_pretrain import Celo2
from celo2_pretrain.optimizer import reference

CASES = ["celo2_official", "celo2_base_random", "celo2_random", "celo2_base_extreme"]
# Largest error of a step (which has RMS 1), i.e. of (p_after - expected) / lr. Parameters of size 1 are stored with
# a round-off of 6e-8, which at lr 1e-3 is 6e-5 of a step; two roundings fit below.
TOLERANCE = {"celo2_official": 2e-4, "celo2_base_random": 1e-4, "celo2_random": 1e-4, "celo2_base_extreme": 2e-4}


class Case:
    def __init__(self, golden: dict[str, np.ndarray], name: str) -> None:
        self.golden, self.name = golden, name
        orthogonalize, steps, self.lr, self.weight_decay = (float(x) for x in golden[f"{name}/meta"])
        self.orthogonalize, self.steps = bool(orthogonalize), int(steps)
        self.theta = {key: self.tensor(f"theta/{key}") for key in reference.MLP._fields}
        self.tensors = sum(key.startswith(f"{name}/t") and key.endswith("/p0") for key in golden)

    def tensor(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.golden[f"{self.name}/{key}"]).clone()


def close(ours: torch.Tensor, theirs: torch.Tensor, relative: float = 2e-6) -> None:
    """Accumulators: relative to each element, or (sums that cancel) to a few float32 ulps of the largest."""
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=relative, atol=3e-7 * max(theirs.abs().max().item(), 1e-30))


def repeat(case: Case, device: torch.device, relative: float = 2e-6) -> None:
    """Every parameter after each of the optimizer's steps there, and the accumulators at the end, are the trajectory's."""
    params = [torch.nn.Parameter(case.tensor(f"t{i}/p0").to(device)) for i in range(case.tensors)]
    optimizer = Celo2(
        [{"params": params, "rule": "celo2"}],
        lr=case.lr,
        weights=case.theta,
        newton_schulz_dtype="fp32",
        weight_decay=case.weight_decay,
        adamw_weight_decay=None,
        orthogonalize=case.orthogonalize,
    )
    for k in range(1, case.steps + 1):
        for i, p in enumerate(params):
            p.grad = case.tensor(f"t{i}/g{k}").to(device)
        optimizer.step()
        for i, p in enumerate(params):
            error = (p.detach().cpu() - case.tensor(f"t{i}/p{k}")).abs().max().item() / case.lr
            assert error < TOLERANCE[case.name], f"tensor {i} of shape {tuple(p.shape)} at step {k}: {error}"
    for i, p in enumerate(params):
        state = {key: x.cpu() for key, x in optimizer.state[p].items()}
        close(torch.stack([state[f"momentum_{k}"] for k in range(3)], -1), case.tensor(f"t{i}/momentum"), relative)
        close(state["rms"][..., None], case.tensor(f"t{i}/rms"), relative)
        for key in ("v_row", "v_col") if p.ndim >= 2 else ():
            theirs = case.tensor(f"t{i}/{key}")
            close(state[key].view(3, *theirs.shape[:-1]).movedim(0, -1), theirs, relative)
        if p.ndim < 2:
            close(torch.stack([state[f"v_full_{k}"] for k in range(3)], -1), case.tensor(f"t{i}/v_full"), relative)
