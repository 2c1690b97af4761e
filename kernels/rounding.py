"""Stochastic rounding of float32 to bfloat16 that depends on nothing but the value, the element and a key.

A momentum with decay 0.999 changes by a thousandth of itself in a step, less than half a bfloat16 ulp: rounded to the
nearest it would stand still. Rounded up with the probability of the part cut off, it is right on average. The
random bits are a hash of the element's index in the whole tensor and a key (seed, step, tensor, accumulator), so the
result is the same however the tensor is sharded, and however the work is cut into calls. Twin of `rounded` in cpu.cpp.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def key_of(*parts: int | str) -> int:
    """A 32-bit key from what distinguishes two draws: seed, step, tensor name, accumulator."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2s(text, digest_size=4).digest(), "little")


def random_bits(index: Tensor, key: int) -> Tensor:
    """16 random bits for each element: int64 in [0, 65536), from its index (int64, of any size)."""
    x = ((index & MASK) ^ ((index >> 32) * 0x9E3779B1) ^ key) & MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK
    return (x ^ (x >> 16)) >> 16


def stochastic_round(x: Tensor, index: Tensor, key: int) -> Tensor:
    """`x` (float32) as bfloat16; `index` (int64, same shape): the elements' places in the whole tensor.

    Infinities and NaN stay what they are.
    """
    bits = x.contiguous().view(torch.int32).to(torch.int64) & MASK
    rounded = (bits + random_bits(index, key)) & 0xFFFF0000
    rounded = torch.where(torch.isfinite(x), rounded, bits)
    return rounded.to(torch.int32).view(torch.float32).to(torch.bfloat16)  # exact: the lower half is zero
