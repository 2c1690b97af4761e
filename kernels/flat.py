"""Flat slices of many tensors for one elementwise launch: which program does which elements of which slice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements of a program


def make_chunks(sizes: list[int], device: torch.device) -> Tensor:
    """(programs, 2) int32: slice, and number of the block in the slice, for slices of these numbers of elements."""
    blocks = torch.tensor([-(-size // BLOCK) for size in sizes], dtype=torch.int64)
    which = torch.repeat_interleave(torch.arange(len(sizes)), blocks)
    number = torch.arange(len(which)) - (blocks.cumsum(0) - blocks)[which]
    return torch.stack([which, number], 1).to(torch.int32).to(device)


@triton.jit
def find_chunk(chunks, BLOCK: tl.constexpr):
    """This program's slice, and its elements (BLOCK,)."""
    chunk = chunks + tl.program_id(0).to(tl.int64) * 2
    return tl.load(chunk).to(tl.int64), tl.load(chunk + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def address(at, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer from an entry of an address table; `ALIGNED` says that it is a multiple of 16 bytes."""
    found = tl.load(at).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def size_of(at, ALIGNED: tl.constexpr):
    """A number of elements from a table; `ALIGNED` says that it is a multiple of 4."""
    size = tl.load(at)
    if ALIGNED:
        size = tl.multiple_of(size, 4)
    return size
