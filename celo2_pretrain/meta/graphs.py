"""An inner step on a GPU as one CUDA graph: launching its thousands of small kernels costs more than running them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .inner import Inner
from .problems.tasks import Batch

WARM_UP = 3  # steps before the recording: libraries choose their algorithms and take their memory


class Graphed:
    """`inner.make_advance`'s function without gradients, recorded at its first call and replayed since.

    The inner problems live in the graph's own tensors, which every call overwrites: what it returns holds until the next.
    """

    def __init__(self, advance: Callable[[Tensor, Inner, Batch], tuple[Inner, Tensor]]) -> None:
        self.advance, self.graph = advance, None

    def __call__(self, theta: Tensor, inner: Inner, batch: Batch) -> tuple[Inner, Tensor]:
        if self.graph is None:
            self._record(theta, inner, batch)
        for held, given in zip(pytree.tree_leaves(self.held), pytree.tree_leaves((theta, inner, batch))):
            if held is not given:
                held.copy_(given)
        self.graph.replay()
        return self.held[1], self.loss

    def _record(self, theta: Tensor, inner: Inner, batch: Batch) -> None:
        self.held = pytree.tree_map(torch.clone, (theta, inner, batch))
        aside = torch.cuda.Stream(theta.device)
        aside.wait_stream(torch.cuda.current_stream(theta.device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self.advance(*self.held)
        torch.cuda.current_stream(theta.device).wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            after, self.loss = self.advance(*self.held)
            for held, new in zip(pytree.tree_leaves(self.held[1]), pytree.tree_leaves(after)):
                held.copy_(new)
