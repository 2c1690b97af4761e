"""Meta-training by evolution: CMA-ES over few numbers from which theta is constructed, judged by whole inner trainings.

No gradient, so nothing is looked at but how inner trainings end: none of the bias of short truncations. In all 347 dimensions
that would want far more trainings than two cores make. So theta is sought among the rules that `weights.construct` makes: a
linear combination of the features that change sign with the gradient, of which what is above 1 counts by another slope. A
momentum that remembers more steps than the trainings have is left out (unless long_momenta): it is something else in them
than in longer ones. Each generation's candidates train the same fresh problems, and every problem ranks them: it has one
vote, however large its loss is. CMA-ES is that of the `cma` package (Hansen et al.).
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.errors import UserError
from ..optimizer.reference import MOMENTUM_DECAYS
from ..weights.construct import ODD, RECIPES, construct
from ..weights.mlp import MLP
from .config import MetaConfig
from .family import Family
from .initial import initial_theta
from .rule import flatten, unflatten

# The decays of the features that are momenta: plain, over the second moment's root, and over the factored moments.
MOMENTA = {first + k: decay for first in (3, 7, 27) for k, decay in enumerate(MOMENTUM_DECAYS)}
BEGIN = 0.5  # the length of the first combination: features have a root mean square of 1, so few elements are above 1


class Evolution:
    """CMA-ES and the families. It has the interface of `train.MetaTraining`; an outer step is a generation."""

    def __init__(self, config: MetaConfig) -> None:
        if not config.length_min == config.length_max == config.truncation:
            raise UserError(
                f"length_min={config.length_min}, length_max={config.length_max}, truncation={config.truncation}: "
                "evolution judges whole trainings; give all three the same number of steps"
            )
        if find_spec("cma") is None:
            raise UserError(
                "estimator=evolution needs the cma package, which isn't installed: pip install 'celo2-pretrain[meta]'"
            )
        self.config, self.step, self.seconds, self.inner_steps = config, 0, 0.0, 0
        self.families = [Family(name, config, config.seed * 1000 + k) for k, name in enumerate(config.family_names)]
        self.features = ODD if config.long_momenta else searched(config.truncation)
        self.search = _search(config, self.features)
        self.asked: list[
            np.ndarray
        ] = []  # each generation's candidates (population, dims): a resumed search is told them again
        self.ranks: list[np.ndarray] = []  # and their values (population,)

    def advance(self) -> dict[str, Any]:
        """One generation: every candidate through the same inner trainings, and the ranks into CMA-ES."""
        began = time.perf_counter()
        candidates = np.stack(self.search.ask())
        thetas = torch.stack([flatten(constructed(x, self.features)) for x in candidates]).to(self.config.device)
        losses = self._evaluate(thetas)
        value = mean_rank(torch.cat(losses, 1)).cpu().numpy()
        self._tell(candidates, value)
        self.inner_steps += sum(x.numel() for x in losses) * self.config.truncation
        self.seconds += time.perf_counter() - began
        means = {f"loss/{family.task.name}": float(x[x.isfinite()].mean()) for family, x in zip(self.families, losses)}
        return {
            "step": self.step,
            "loss": sum(means.values()) / len(means),
            **means,
            "spread": float(self.search.sigma),
            "broken": int(sum((~x.isfinite()).sum() for x in losses)),
            "inner_steps": self.inner_steps,
            "seconds": round(self.seconds, 3),
        }

    def _evaluate(self, thetas: Tensor) -> list[Tensor]:
        """Each family's losses (population, problems). On a GPU the families train side by side: each step is a long chain of
        small kernels, which leaves most of the device idle."""
        if thetas.device.type != "cuda" or not all(family.advance.graph for family in self.families):
            return [family.evaluate(thetas) for family in self.families]  # graphs are recorded one at a time
        before = torch.cuda.current_stream(thetas.device)

        def aside(family: Family, stream: torch.cuda.Stream) -> Tensor:
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                losses = family.evaluate(thetas)
            stream.synchronize()
            return losses

        streams = [torch.cuda.Stream(thetas.device) for _ in self.families]
        with ThreadPoolExecutor(len(streams)) as threads:
            return list(threads.map(aside, self.families, streams))

    def _tell(self, candidates: np.ndarray, value: np.ndarray) -> None:
        self.search.tell(list(candidates), list(value))
        self.asked.append(candidates)
        self.ranks.append(value)
        self.step += 1

    def mlp(self) -> MLP:
        """The middle of the candidates' distribution: it has seen every generation."""
        return constructed(self.search.mean, self.features)

    def state_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "inner_steps": self.inner_steps,
            "asked": torch.from_numpy(np.stack(self.asked)),
            "ranks": torch.from_numpy(np.stack(self.ranks)),
            "families": [family.state_dict() for family in self.families],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Tell the search its generations again, which brings it to where it was."""
        for candidates, value in zip(state["asked"].numpy(), state["ranks"].numpy()):
            if not np.array_equal(np.stack(self.search.ask()), candidates):
                raise UserError(
                    f"{self.config.out}: another release of cma asks for other candidates; go on with the one that "
                    "the search was begun with"
                )
            self._tell(candidates, value)
        self.seconds, self.inner_steps = state["seconds"], state["inner_steps"]
        for family, kept in zip(self.families, state["families"]):
            family.load_state_dict(kept)


def searched(steps: int) -> tuple[int, ...]:
    """The features of which trainings of so many steps can judge the coefficients."""
    return tuple(feature for feature in ODD if steps >= round(1 / (1 - MOMENTA.get(feature, 0))))


def _search(config: MetaConfig, features: tuple[int, ...]):
    import cma

    x = numbers_of(unflatten(initial_theta(config)), features)
    if x is None:
        raise UserError(
            f"init={config.init}: evolution begins with a constructed rule ({', '.join(RECIPES)}, or what an evolution "
            f"has made) without a momentum that remembers more than the {config.truncation} steps of its "
            "trainings, unless long_momenta=true"
        )
    if x[-1] == 1:  # then the length means nothing
        x[:-1] *= BEGIN / np.linalg.norm(x[:-1])
    random = np.random.default_rng(config.seed)  # its own: numpy's is anybody's
    return cma.CMAEvolutionStrategy(
        x,
        config.sigma,
        {
            "popsize": config.population,
            "seed": float("nan"),
            "randn": lambda *shape: random.standard_normal(shape),
            "verbose": -9,
            "verb_log": 0,
        },
    )


def constructed(x: np.ndarray, features: tuple[int, ...]) -> MLP:
    """The rule of coefficients of these features and, last, the slope above 1."""
    return construct(dict(zip(features, map(float, x[:-1]))), slope=float(x[-1]))


def numbers_of(mlp: MLP, features: tuple[int, ...]) -> np.ndarray | None:
    """The x that `constructed(x, features)` makes these weights from; None where there is none."""
    x = np.array([*mlp.w0[list(features), 0].tolist(), 1 + float(mlp.w2[2, 0])])
    return x if all(map(torch.equal, constructed(x, features), mlp)) else None


def mean_rank(losses: Tensor) -> Tensor:
    """(population,) from (population, problems): each problem ranks the candidates, equal losses share their ranks."""
    losses = torch.where(losses.isnan(), torch.inf, losses)
    below = (losses[:, None] > losses[None]).sum(1)
    equal = (losses[:, None] == losses[None]).sum(1)
    return (below + (equal - 1) / 2).double().mean(1)
