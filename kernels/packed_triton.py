"""Packed accumulators in Triton: the fields of a word, and the powers of two that scale them.

Plain twin: kernels/packed.py, which says what a field is. Scales of a row and of a column are float32; where a mask is
off they are 0, and what is made of that isn't stored.
"""

import triton
import triton.language as tl

from .packed import LIMIT, MOMENTA, RMS

POWER_LIMIT = tl.constexpr(LIMIT)
# Shift, exponent bits, mantissa bits, exponent of the smallest normal number.
V, M0, M1, M2 = (tl.constexpr((form.shift, form.exponent_bits, form.mantissa_bits, form.least)) for form in (RMS, *MOMENTA))


@triton.jit
def power_near_root(v):
    """A power of two near sqrt(v): 2^floor(floor(log2 v) / 2)."""
    exponent = ((v.to(tl.int32, bitcast=True) >> 23) - 127) >> 1
    exponent = tl.minimum(tl.maximum(exponent, -POWER_LIMIT), POWER_LIMIT)
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def decode(words, scale, FORM: tl.constexpr, SIGNED: tl.constexpr):
    """A field of `words` (uint32) times `scale` (v: times its square)."""
    MAGNITUDE: tl.constexpr = FORM[1] + FORM[2]
    OFFSET: tl.constexpr = (FORM[3] + 127) << 23
    code = ((words >> FORM[0]) & ((1 << MAGNITUDE) - 1)) << (23 - FORM[2])
    below = (code + OFFSET).to(tl.float32, bitcast=True) - 2.0 ** FORM[3]
    above = (code + (OFFSET - (1 << 23))).to(tl.float32, bitcast=True)
    x = tl.where(code < (1 << 23), below, above) * scale
    if SIGNED:
        sign = ((words >> (FORM[0] + MAGNITUDE)) & 1) << 31
        return (x.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    else:
        return x * scale


@triton.jit
def encode(x, scale, index, key, step_offset, FORM: tl.constexpr, SIGNED: tl.constexpr):
    """`x` over `scale` (v: over its square) as a field at its place, rounded by the element's index, key and step_offset."""
    MAGNITUDE: tl.constexpr = FORM[1] + FORM[2]
    KEPT: tl.constexpr = 23 - FORM[2]
    OFFSET: tl.constexpr = (FORM[3] + 127) << 23
    MOST: tl.constexpr = ((1 << MAGNITUDE) - 1) << KEPT
    LOW: tl.constexpr = 2.0 ** FORM[3]
    inverse = (0x7F000000 - scale.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)  # exact, unlike a division
    y = tl.abs(x) * inverse if SIGNED else x * inverse * inverse
    below = (y + LOW).to(tl.uint32, bitcast=True) - OFFSET
    above = y.to(tl.uint32, bitcast=True) - (OFFSET - (1 << 23))
    code = tl.where(y < LOW, below, above)
    code = tl.where(code > MOST, MOST, code)
    draw = (random_bits(index, key) + step_offset) & 0xFFFF
    code = (code + (draw << (KEPT - 16))) >> KEPT
    if SIGNED:
        code = tl.where((x < 0) & (code > 0), code | (1 << MAGNITUDE), code)
    else:
        code = tl.where((x > 0) & (code == 0), 1, code)
    return code << FORM[0]


@triton.jit
def random_bits(index, key):
    """16 bits for each element, as in kernels/rounding.py."""
    r = index.to(tl.uint32) ^ ((index >> 32).to(tl.uint32) * 0x9E3779B1) ^ key
    r = (r ^ (r >> 16)) * 0x85EBCA6B
    r = (r ^ (r >> 13)) * 0xC2B2AE35
    return (r ^ (r >> 16)) >> 16


@triton.jit
def scale_of(row, col, k: tl.constexpr):
    """(STEP, COLS) of three row scales (STEP,) and three column scales (COLS,)."""
    return row[k][:, None] * col[k][None, :]


@triton.jit
def unpack(words, row, col):
    """m0, m1, m2, v of words (int32); `row`, `col` as of `scale_of`."""
    words = words.to(tl.uint32, bitcast=True)
    middle = scale_of(row, col, 1)
    return (
        decode(words, scale_of(row, col, 0), M0, True),
        decode(words, middle, M1, True),
        decode(words, scale_of(row, col, 2), M2, True),
        decode(words, middle, V, False),
    )
