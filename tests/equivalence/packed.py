"""The reference step with packed accumulators (`state_dtype="fp8"`) on whole tensors: the twin of the "fp8" cells.

One word that differs moves its element's momentum by some per cent, and so the update by more than the matrix allows:
the update's column compares the words, which DeepSpeed's own means of reading states would round to float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from celo2_pretrain.kernels.packed import draws, pack, step_offset_of, unpack
from celo2_pretrain.kernels.rounding import key_of
from celo2_pretrain.optimizer import reference
from celo2_pretrain.optimizer.backends.passes import scales
from celo2_pretrain.optimizer.matrices.views import Block
from celo2_pretrain.optimizer.reference import State
from celo2_pretrain.optimizer.sharding.shape import BlockShape
from celo2_pretrain.weights.mlp import MLP


def step(
    name: str,
    number: int,
    block: Block,
    shape: tuple[int, ...],
    p: Tensor,
    g: Tensor,
    state: State,
    mlp: MLP,
    orthogonalize: bool,
) -> tuple[Tensor, State]:
    """`reference.step` of a block of 2 or more dims, rounding its accumulators in step `number` (from 1) of its tensor.

    `p`, `g`: the block's; `shape`: the tensor's, in which elements count.
    """
    g = g.clamp(-reference.GRAD_CLAMP, reference.GRAD_CLAMP)
    updated = reference.accumulate(g, state, block.batch)
    rms = state.rms * reference.RMS_DECAY + g * g * (1 - reference.RMS_DECAY)  # rounded as by the passes
    d1, d0 = block.factored
    scale = scales(updated.v_row.unsqueeze(d0 + 1), updated.v_col.unsqueeze(d1 + 1), BlockShape(block))
    index = block.select(torch.arange(torch.Size(shape).numel()).view(shape))
    by_decay = [row * col for row, col in zip(scale.row, scale.col)]
    drawn = [draws(index, key_of(name, k), step_offset_of(number)) for k in range(4)]
    *momentum, rms = unpack(pack([*updated.momentum, rms], by_decay, drawn), by_decay)
    state = updated._replace(momentum=torch.stack(momentum), rms=rms)
    out = reference.direction(reference.normalize(reference.features(p, g, state, block.batch), (-2, -1)), mlp)
    return reference.normalize(reference.newton_schulz(out) if orthogonalize else out, (-2, -1)), state
