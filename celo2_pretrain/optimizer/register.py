"""Make Celo2 known to DeepSpeed by its name in a config."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .celo2 import Celo2
from .enroll import enroll
from .matrices.param_groups import tag_model


def register(model: nn.Module | None = None, **options: Any) -> None:
    """Make `"optimizer": {"type": "Celo2", "params": {…}}` valid in any DeepSpeed config.

    Call it before `deepspeed.initialize`. Given the model, its embeddings, heads, 1-D tensors and matrix views are
    tagged as by `param_groups(model, **options)`; without it, every tensor of 2 or more dims gets the learned rule as
    it lies, embeddings included.

    Raises ValueError as `param_groups` does.
    """
    torch.optim.Celo2 = Celo2  # where DeepSpeed looks a type up that it doesn't know
    enroll(Celo2)
    if model is not None:
        tag_model(model, **options)
