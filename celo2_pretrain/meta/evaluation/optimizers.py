"""Which optimizers are compared, and with which learning rates? All through one harness.

Each steps the hidden matrices at `lr`; embeddings, heads and vectors get AdamW(0.9, 0.95) at `ratio` × lr, under
every optimizer alike (only Celo2-base and VeLO, which are made for every tensor, step them too). Rates mean different
things: a Celo2 step has a root mean square of 1 per matrix, Muon's `match_rms_adamw` one of 0.2. So each optimizer has
a grid of its own around its own middle, and `ratio` is what makes AdamW's part the same: the i-th rate of every grid
comes with the i-th of the same AdamW rates, EMBEDDING in the middle. Weight decay is 0 throughout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from celo2_pretrain import Celo2, param_groups
from celo2_pretrain.common.errors import UserError
from celo2_pretrain.weights import load_weights

EMBEDDING = 6e-3  # AdamW's rate of embeddings, heads and vectors, at the middle of every grid
FACTORS = tuple(10.0 ** (k / 2) for k in (-2, -1, 0, 1, 2))  # a grid: two decades around the middle
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Spec:
    """An optimizer of the comparison. It is sent to the worker processes, so it holds plain data.

    Args:
        name: its name in results.
        kind: a key of BUILDERS.
        middle: the middle of its grid of learning rates.
        needs: (module, how to get it) without which it is skipped.
        weights: theta of a learned optimizer, as arrays; None for the others.
        fingerprint: of theta, so that results of other weights are not taken for these.
    """

    name: str
    kind: str
    middle: float
    needs: tuple[str, str] | None = None
    weights: dict[str, np.ndarray] | None = None
    fingerprint: str = ""

    @property
    def ratio(self) -> float:
        return EMBEDDING / self.middle

    def grid(self) -> list[float]:
        return [float(f"{self.middle * factor:.3g}") for factor in FACTORS]

    def missing(self) -> str | None:
        """Why it can't run here; None where it can."""
        if self.needs is None or _found(self.needs[0]):
            return None
        return f"needs {self.needs[1]}"


_EXTRA = "pytorch_optimizer (pip install 'celo2-pretrain[meta]')"
_PYLO = 'PyLO, from its source repository Belilovsky-Lab/pylo (the index\'s "pylo" is another program)'
SPECS = {
    spec.name: spec
    for spec in (
        Spec("celo2", "celo2", 2e-3),
        Spec("celo2-base", "celo2-base", 2e-3),
        Spec("adamw", "adamw", 3e-3),
        Spec("muon", "muon", 1e-2),  # 5 × Celo2's, see above
        Spec("soap", "soap", 3e-3, ("pytorch_optimizer", _EXTRA)),
        Spec("lion", "lion", 6e-4, ("pytorch_optimizer", _EXTRA)),
        Spec("ademamix", "ademamix", 3e-3, ("pytorch_optimizer", _EXTRA)),
        Spec("velo", "velo", 1.0, ("pylo.optim.Velo_naive", _PYLO)),
    )
}
DEFAULT = ("celo2", "celo2-base", "adamw", "muon", "soap")


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a package of that name without the module
        return False


# ---- learned weights ----------------------------------------------------------------------------------------------


def with_weights(spec: Spec, weights: Any = None, name: str | None = None) -> Spec:
    """A learned optimizer with its theta loaded (default: the bundled one); other optimizers as they are."""
    if spec.kind not in ("celo2", "celo2-base"):
        return spec
    default = "default" if spec.kind == "celo2" else "default-base"
    arrays = {key: x.numpy() for key, x in load_weights(default if weights is None else weights)._asdict().items()}
    digest = hashlib.sha256(b"".join(arrays[key].tobytes() for key in sorted(arrays))).hexdigest()[:12]
    return replace(spec, name=name or spec.name, weights=arrays, fingerprint=digest)


def named_theta(kind: str, argument: str) -> Spec:
    """The optimizer of `--theta NAME=PATH`: called celo2[NAME], or celo2-base[NAME].

    PATH is whatever `load_weights` takes, or an .npz with arrays w0 … b2, or `FILE.npz:CASE` with CASE/theta/w0 ….
    Raises UserError where it has another form or can't be read.
    """
    name, equals, path = argument.partition("=")
    if not (name and equals and path):
        raise UserError(f"--theta {argument!r}: give NAME=PATH, as in --theta mine=theta.safetensors")
    try:
        weights = _npz(path) if ".npz" in path else path
        return with_weights(SPECS[kind], weights, f"{kind}[{name}]")
    except (ValueError, OSError) as error:
        raise UserError(f"--theta {argument!r}: {error}") from None


def _npz(path: str) -> dict[str, np.ndarray]:
    file, _, case = path.partition(".npz:")
    with np.load(file if file.endswith(".npz") else file + ".npz") as arrays:
        prefix = f"{case}/theta/" if case else ""
        found = {
            key.removeprefix(prefix): arrays[key]
            for key in arrays
            if key.startswith(prefix) and "/" not in key.removeprefix(prefix)
        }
        if not found:
            cases = sorted({key.partition("/theta/")[0] for key in arrays if "/theta/" in key})
            raise ValueError(
                f"no arrays w0 … b2{' of case ' + case if case else ''} in it"
                + (
                    f"; append one of its cases, as in {file.removesuffix('.npz')}.npz:{cases[0]} (there are "
                    f"{', '.join(cases)})"
                    if cases
                    else ""
                )
            )
    return found


# ---- building -----------------------------------------------------------------------------------------------------


class Several:
    """Optimizers that step together, as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def build(spec: Spec, model: nn.Module, lr: float, steps: int) -> tuple[Any, Callable[[Tensor], None]]:
    """The optimizer (with `param_groups` of peak rates) and what steps it, given the loss.

    Args: lr of the hidden matrices; `steps` of the whole run, which VeLO wants to know.
    """
    if spec.kind in ("celo2", "celo2-base"):
        base = spec.kind == "celo2-base"
        groups = param_groups(model)  # records the matrix views on the parameters
        optimizer = Celo2(
            model.parameters() if base else groups,
            lr=lr,
            weights=spec.weights,
            orthogonalize=not base,
            adamw_lr_multiplier=spec.ratio,
            adamw_betas=BETAS,
        )
        return optimizer, lambda loss: optimizer.step()
    if spec.kind == "velo":
        from pylo.optim.Velo_naive import VeLO

        velo = VeLO(model.parameters(), lr=lr, num_steps=steps)
        return velo, lambda loss: velo.step(loss.detach())
    hidden = [p for group in param_groups(model) if group["rule"] == "celo2" for p in group["params"]]
    rest = [p for group in param_groups(model) if group["rule"] == "adamw" for p in group["params"]]
    both = Several(_hidden(spec.kind, hidden, lr), torch.optim.AdamW(rest, lr=lr * spec.ratio, betas=BETAS, weight_decay=0.0))
    return both, lambda loss: both.step()


def _hidden(kind: str, params: list[Tensor], lr: float) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(params, lr=lr, betas=BETAS, weight_decay=0.0)
    if kind == "muon":
        return torch.optim.Muon(params, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    import pytorch_optimizer

    if kind == "soap":
        return pytorch_optimizer.SOAP(params, lr=lr, weight_decay=0.0)
    if kind == "lion":
        return pytorch_optimizer.Lion(params, lr=lr, weight_decay=0.0)
    if kind == "ademamix":
        return pytorch_optimizer.AdEMAMix(params, lr=lr, weight_decay=0.0)
    raise ValueError(f"no optimizer of kind {kind!r}")
