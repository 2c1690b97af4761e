"""The MLP of the learned rule: its sizes and its weights."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

FEATURES_ND, FEATURES_1D = 30, 15  # inputs for a tensor of 2 or more dims; a 1-D one has the first of them only
DIMS = (FEATURES_ND, 8, 8, 3)  # the MLP, 347 weights


class MLP(NamedTuple):
    """Weights of the learned rule, input-major: `h = relu(x @ w0 + b0)` …  (30,8) (8,) (8,8) (8,) (8,3) (3,)."""

    w0: Tensor
    b0: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
