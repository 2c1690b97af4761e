"""A shuffle without a list: where a pseudo-random permutation sends an index, computed on its own."""

import hashlib

import numpy as np

ROUNDS = 4


def permute(index: np.ndarray, size: int, seed: int | str, epoch: int) -> np.ndarray:
    """Where a pseudo-random permutation of range(size), drawn by (seed, epoch), sends each `index`.

    A Feistel network on the next even number of bits is a bijection whatever its round function; values that land
    outside range(size) are sent through it again ("cycle walking"), which keeps it one. int64 in and out.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * ROUNDS).digest()
    keys = np.frombuffer(digest, "<u8")

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(32)
            mixed *= np.uint64(0xD6E8FEB86659FD93)
            mixed ^= mixed >> np.uint64(32)
            left, right = right, left ^ (mixed & mask)
        return (left << np.uint64(half)) | right

    out = network(np.asarray(index, np.uint64))
    while (outside := out >= size).any():
        out[outside] = network(out[outside])
    return out.astype(np.int64)
