"""With which theta does a meta-training begin?"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.errors import UserError
from ..weights import load_weights
from .config import MetaConfig
from .rule import flatten, random_theta


def initial_theta(config: MetaConfig) -> Tensor:
    """(347,): random, or given weights whose dead hidden units are made ready to learn. Raises UserError without them.

    A dead unit (no weights in or out) has no gradient. It gets noise in its first layer and the unit matrix's weight in
    the second; its way out stays zero, so that the rule is at first what it was.
    """
    generator = torch.Generator().manual_seed(config.seed)
    if config.init == "random":
        return random_theta(generator)
    try:
        mlp = load_weights(config.init)
    except (ValueError, OSError) as error:
        raise UserError(f"init={config.init}: {error}") from None
    if config.live_units:
        dead = (mlp.w0.abs().sum(0) + mlp.b0.abs() == 0) & (mlp.w2.abs().sum(1) == 0)
        noise = torch.randn(mlp.w0.shape, generator=generator) * config.live_units
        mlp = mlp._replace(
            w0=torch.where(dead, noise, mlp.w0), w1=torch.where(dead[:, None] & dead, torch.eye(len(dead)), mlp.w1)
        )
    return flatten(mlp)
