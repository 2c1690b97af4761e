"""Tensors with matrix views, and the matrices that they consist of, cut out with plain torch and without the view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from celo2_pretrain.optimizer.matrices.views import MatrixView


@dataclass
class Case:
    name: str
    shape: tuple[int, ...]
    view: MatrixView
    cut: Callable[[Tensor], list[Tensor]]  # a tensor of `shape` → its matrices (in, out)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def places(self) -> list[Tensor]:
        """For each matrix the flat places of its elements in the stored tensor."""
        return self.cut(torch.arange(self.numel).view(self.shape))


def halves(w: Tensor) -> list[Tensor]:
    return [w[: len(w) // 2].T, w[len(w) // 2 :].T]


SIMPLE = [
    Case("linear", (5, 7), MatrixView(transpose=True), lambda w: [w.T]),
    Case("square linear", (5, 5), MatrixView(transpose=True), lambda w: [w.T]),
    Case("conv1d qkv", (3, 12), MatrixView(split=(4, 4, 4)), lambda w: [w[:, :4], w[:, 4:8], w[:, 8:]]),
    Case("grouped qkv", (11, 4), MatrixView(transpose=True, split=(6, 3, 2)), lambda w: [w[:6].T, w[6:9].T, w[9:].T]),
    Case("heads", (12, 4), MatrixView(transpose=True, head_dim=3), lambda w: [x.T for x in w.split(3)]),
    Case("experts", (3, 4, 5), MatrixView(batch=1), list),
    Case(
        "experts gate_up",
        (2, 6, 5),
        MatrixView(transpose=True, split=(3, 3), batch=1),
        lambda w: [x for expert in w for x in halves(expert)],
    ),
]

INTERLEAVED = [
    Case(
        "neox qkv",
        (18, 4),
        MatrixView(transpose=True, split=(2, 2, 2), repeats=3),
        lambda w: [w.view(3, 3, 2, 4)[:, i].reshape(6, 4).T for i in range(3)],
    ),
    Case(
        "neox qkv, square",
        (12, 4),
        MatrixView(transpose=True, split=(2, 2, 2), repeats=2),
        lambda w: [w.view(2, 3, 2, 4)[:, i].reshape(4, 4).T for i in range(3)],
    ),
    Case(
        "neox qkv, heads of 1",
        (12, 3),
        MatrixView(transpose=True, split=(1, 1, 1), repeats=4),
        lambda w: [w[i::3].T for i in range(3)],
    ),
    Case(
        "neox qkv, per head",
        (12, 4),
        MatrixView(transpose=True, split=(2, 2, 2), repeats=2, head_dim=2),
        lambda w: [x.T for x in w.split(2)],
    ),
    Case(
        "grouped qkv, interleaved",
        (20, 3),
        MatrixView(transpose=True, split=(6, 2, 2), repeats=2),
        lambda w: [torch.cat([w[a:b], w[10 + a : 10 + b]]).T for a, b in ((0, 6), (6, 8), (8, 10))],
    ),
    Case(
        "grouped qkv, interleaved, (in, out)",
        (3, 20),
        MatrixView(split=(6, 2, 2), repeats=2),
        lambda w: [torch.cat([w[:, a:b], w[:, 10 + a : 10 + b]], 1) for a, b in ((0, 6), (6, 8), (8, 10))],
    ),
    Case(
        "query and gate",
        (12, 5),
        MatrixView(transpose=True, split=(3, 3), repeats=2),
        lambda w: [torch.cat([w[:3], w[6:9]]).T, torch.cat([w[3:6], w[9:]]).T],
    ),
    Case(
        "qkvz",
        (26, 3),
        MatrixView(transpose=True, split=(2, 2, 5, 4), repeats=2),
        lambda w: [torch.cat([w[a:b], w[13 + a : 13 + b]]).T for a, b in ((0, 2), (2, 4), (4, 9), (9, 13))],
    ),
    Case("alternating columns", (5, 12), MatrixView(split=(1, 1), repeats=6), lambda w: [w[:, ::2], w[:, 1::2]]),
    Case(
        "experts, alternating columns",
        (2, 3, 10),
        MatrixView(split=(1, 1), repeats=5, batch=1),
        lambda w: [x for expert in w for x in (expert[:, ::2], expert[:, 1::2])],
    ),
    Case(
        "experts, alternating rows",
        (2, 10, 3),
        MatrixView(transpose=True, split=(1, 1), repeats=5, batch=1),
        lambda w: [x.T for expert in w for x in (expert[::2], expert[1::2])],
    ),
    Case(
        "one column of three",
        (5, 12),
        MatrixView(split=(1, 2), repeats=4),
        lambda w: [w[:, ::3], w.view(5, 4, 3)[:, :, 1:].reshape(5, 8)],
    ),
    Case(
        "pairs of columns",
        (3, 12),
        MatrixView(split=(2, 2), repeats=3),
        lambda w: [w.view(3, 3, 2, 2)[:, :, i].reshape(3, 6) for i in range(2)],
    ),
    Case(
        "one row in, alternating",
        (6, 1),
        MatrixView(transpose=True, split=(1, 2), repeats=2),
        lambda w: [w[::3].T, w.view(2, 3)[:, 1:].reshape(4, 1).T],
    ),
]

FLATTENED = [
    Case("conv2d", (6, 3, 2, 2), MatrixView(transpose=True, flatten=True), lambda w: [w.flatten(1).T]),
    Case("conv2d, square", (8, 2, 2, 2), MatrixView(transpose=True, flatten=True), lambda w: [w.flatten(1).T]),
    Case("conv2d, 1 × 1", (5, 7, 1, 1), MatrixView(transpose=True, flatten=True), lambda w: [w[:, :, 0, 0].T]),
    Case(
        "conv1d of two halves",
        (6, 2, 3),
        MatrixView(transpose=True, flatten=True, split=(3, 3)),
        lambda w: halves(w.flatten(1)),
    ),
    Case(
        "stacked conv1d",
        (2, 4, 3, 2),
        MatrixView(transpose=True, flatten=True, batch=1),
        lambda w: [x.flatten(1).T for x in w],
    ),
    Case("transposed conv2d", (3, 4, 2, 3), MatrixView(flatten=True), lambda w: [w.movedim(1, -1).reshape(18, 4)]),
    Case("transposed conv2d, 1 × 1", (5, 7, 1, 1), MatrixView(flatten=True), lambda w: [w[:, :, 0, 0]]),
    Case(
        "transposed conv1d, alternating",
        (3, 8, 2),
        MatrixView(flatten=True, split=(1, 1), repeats=4),
        lambda w: [w[:, i::2].movedim(1, -1).reshape(6, 4) for i in range(2)],
    ),
]

CASES = SIMPLE + INTERLEAVED + FLATTENED
