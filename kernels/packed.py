"""Four accumulators in one 32-bit word: small floats of 8, 8 and 10 bits for the momenta, 6 for the second moment.

    bits 0–5    v    4 exponent and 2 mantissa bits, no sign
    bits 6–13   m0   sign, 3 exponent and 4 mantissa bits
    bits 14–21  m1   sign, 3 and 4
    bits 22–31  m2   sign, 3 and 6

Why not a byte each: stochastic rounding of an average with decay β adds up over 1 / (1 − β²) steps, to an error of
some ulp · sqrt(1 / (6 (1 − β²))): 0.9 ulp for β = 0.9 but 9 for 0.999, which in a byte of 3 mantissa bits is 80 % of
the value. So the slow momentum has the most bits. The fast one matters most, as Newton–Schulz raises the small singular
values, and with them rounding noise, to 1: with 2 mantissa bits it cost 0.03 of a small GPT's loss. The range is narrow
for that: below the smallest normal number, some 1/16 of an element's usual size, precision is absolute.

What is stored is the value over a *scale* (for v: over its square), a power of two for each row times one for each
column, made of the factored second moments of the same decay: sqrt(v_row v_col / mean v_row), which bounds momenta and
is known whole to every rank. Being powers of two, scales that change only move the range; a value that is stored exactly is
stored exactly under the next scale, too. What lies above the range saturates; v > 0 is never stored as 0.

Rounding is stochastic, as in rounding.py, but a draw is that element's first one plus the step times the golden ratio
(modulo 1): evenly spread over the steps, which halves the variance of what adds up. Twin of `Packed` in cpu.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .rounding import random_bits

WORD = torch.int32  # its bits; torch has few operations on uint32
GOLDEN = 0x9E37  # 0.618 of 2^16
NEAREST = (1 << 15,) * 4  # draws for m0, m1, m2, v that round to the nearest
LIMIT = 60  # of the exponent of a row's and of a column's scale


class Format(NamedTuple):
    """A field of the word: a float without infinities, NaN or negative zero."""

    shift: int
    exponent_bits: int
    mantissa_bits: int
    top: int  # exponent of the largest binade
    signed: bool
    decay: int  # which of the factored second moments' decays scales it

    @property
    def magnitude_bits(self) -> int:
        return self.exponent_bits + self.mantissa_bits

    @property
    def least(self) -> int:
        """Exponent of the smallest normal number."""
        return self.top - (1 << self.exponent_bits) + 2

    @property
    def largest(self) -> float:
        return (2 - 2.0**-self.mantissa_bits) * 2.0**self.top


RMS = Format(0, 4, 2, 5, False, 1)  # by the slower decay 0.99: a v that fades falls under its scale, never above
MOMENTA = (Format(6, 3, 4, 2, True, 0), Format(14, 3, 4, 1, True, 1), Format(22, 3, 6, 1, True, 2))
FIELDS = (*MOMENTA, RMS)


def powers(v: Tensor) -> Tensor:
    """A power of two near sqrt(v), float32: 2^floor(floor(log2 v) / 2)."""
    exponent = (torch.frexp(v).exponent - 1) >> 1
    return ((exponent.clamp(-LIMIT, LIMIT).to(torch.int32) + 127) << 23).view(torch.float32)


def step_offset_of(step: int) -> int:
    """What a step adds to an element's first draw, of 16 bits."""
    return step * GOLDEN & 0xFFFF


def draws(index: Tensor, key: int, step_offset: int) -> Tensor:
    """16 bits by which each element is rounded in this step, int32."""
    return ((random_bits(index, key) + step_offset) & 0xFFFF).to(torch.int32)


def encode(x: Tensor, scale: Tensor, form: Format, draw: Tensor | int) -> Tensor:
    """`x` (float32) over `scale` (powers of two, broadcast; v: over its square) as a field's bits, at their place.

    `draw`: 16 bits an element, or 1 << 15 to round to the nearest.
    """
    kept = 23 - form.mantissa_bits
    low, offset = 2.0**form.least, (form.least + 127) << 23
    y = x.abs() / scale if form.signed else x / scale / scale  # the square of a scale may be too small for float32
    # A number that grows with y, linear within a binade and below the smallest normal number: the field's magnitude
    # followed by the mantissa's other bits.
    below = (y + low).view(torch.int32) - offset
    above = y.view(torch.int32) - (offset - (1 << 23))
    code = torch.where(y < low, below, above).clamp_max(((1 << form.magnitude_bits) - 1) << kept)
    code = (code + (draw << (kept - 16))) >> kept
    if form.signed:
        code = torch.where((x < 0) & (code > 0), code | (1 << form.magnitude_bits), code)
    else:
        code = torch.where(x > 0, code.clamp_min(1), code)
    return code << form.shift


def decode(words: Tensor, scale: Tensor, form: Format) -> Tensor:
    """A field of `words` (int32) times `scale` (v: times its square): float32."""
    kept = 23 - form.mantissa_bits
    low, offset = 2.0**form.least, (form.least + 127) << 23
    field = words >> form.shift
    code = (field & ((1 << form.magnitude_bits) - 1)) << kept
    below = (code + offset).view(torch.float32) - low
    above = (code + (offset - (1 << 23))).view(torch.float32)
    x = torch.where(code < (1 << 23), below, above) * scale
    return torch.where(field >> form.magnitude_bits & 1 > 0, -x, x) if form.signed else x * scale


def pack(values: Sequence[Tensor], scales: Sequence[Tensor], draws: Sequence[Tensor | int]) -> Tensor:
    """m0, m1, m2, v as words. `scales`: those of the three decays; `draws`: for m0, m1, m2, v."""
    m0, m1, m2, v = (encode(x, scales[form.decay], form, draw) for x, form, draw in zip(values, FIELDS, draws))
    return m0 | m1 | m2 | v


def unpack(words: Tensor, scales: Sequence[Tensor]) -> list[Tensor]:
    """m0, m1, m2, v, float32."""
    return [decode(words, scales[form.decay], form) for form in FIELDS]
