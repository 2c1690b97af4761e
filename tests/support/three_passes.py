"""All that a backend computes of a block, to compare one backend with another."""

import torch

from celo2_pretrain.optimizer.backends.passes import Tensors
from celo2_pretrain.optimizer.backends.plain import TorchBackend
from celo2_pretrain.optimizer.sharding.plan import Part
from celo2_pretrain.optimizer.sharding.shape import BlockShape
from celo2_pretrain.weights.mlp import MLP


def step(backend: TorchBackend, t: Tensors, shape: BlockShape, cut: list, mlp: MLP) -> list[torch.Tensor]:
    """All three passes over the pieces of a slice; returns everything they make."""
    parts = [Part(0, shape, cut, 0, 0)]
    row, col = torch.zeros(shape.row), torch.zeros(shape.col)
    backend.accumulate(parts, [t], [(row, col)])
    generator = torch.Generator().manual_seed(1)
    v_row, v_col = (torch.rand(3, *size, generator=generator) for size in (shape.row, shape.col))
    factor = backend.factor(shape, v_row, v_col)
    squares = torch.zeros(len(shape.elementwise), *shape.lead)
    backend.norms(parts, [t], [factor], [squares])
    layer = backend.first_layer(squares + 1e-3, v_row, v_col, shape, mlp)
    out = torch.zeros(t.rms.shape)
    backend.direction(parts, [t], [factor], [layer], mlp, [out])
    return [row, col, squares, out, *t.momentum, t.rms, *t.v_full]
