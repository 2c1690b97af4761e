"""The training and validation batches: each a pure function of seed and position, so a run can resume anywhere.

The tokens are cut into windows of context + 1 tokens (inputs and targets overlap by one). Sample n of a run is
window `permutation(seed, epoch)(n mod windows)`: a global shuffle that needs no list of windows in memory.
Samples don't depend on how many ranks share them: rank r of W takes its part of the same global batch.
"""
import hashlib

import numpy as np
import torch

from celo2_pretrain.data.shards import TokenArray
from celo2_pretrain.train.errors import UserError

ROUNDS = 4


def permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
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


class Windows:
    """The windows of context + 1 tokens of one split."""

    def __init__(self, folder: str, split: str, context: int):
        self.tokens = TokenArray(folder, split)
        self.context = context
        self.count = max(0, (len(self.tokens) - 1) // context)

    def batch(self, windows: np.ndarray) -> torch.Tensor:
        """int64 (len(windows), context + 1)."""
        rows = [self.tokens.read(int(w) * self.context, self.context + 1) for w in windows]
        return torch.from_numpy(np.stack(rows))


class TrainLoader:
    """Training micro-batches by position. Raises UserError when one global batch needs more windows than there are."""

    def __init__(self, folder: str, context: int, micro_batch_size: int, global_batch_size: int, seed: int,
                 rank: int, world_size: int):
        self.windows = Windows(folder, "train", context)
        self.micro_batch_size, self.seed, self.rank, self.world_size = micro_batch_size, seed, rank, world_size
        if self.windows.count < global_batch_size:
            raise UserError(
                f"not enough data: {folder} has {self.windows.count} training windows of {context} tokens, one step of "
                f"{world_size} ranks needs {global_batch_size}: prepare more text, or lower train.global_batch_size, "
                f"model.context or the number of ranks"
            )

    def batch(self, samples: int, micro: int) -> torch.Tensor:
        """Micro-batch `micro` of this rank in the step that begins after `samples` samples of the run.

        int64 (micro_batch_size, context + 1).
        """
        first = samples + (micro * self.world_size + self.rank) * self.micro_batch_size
        n = np.arange(first, first + self.micro_batch_size)
        epoch, position = n // self.windows.count, n % self.windows.count
        chosen = np.empty_like(n)
        for e in np.unique(epoch):
            chosen[epoch == e] = permute(position[epoch == e], self.windows.count, self.seed, int(e))
        return self.windows.batch(chosen)


class ValLoader:
    """The first `sequences` validation windows, shared out evenly: every rank gets equally many batches (a sharded
    model's forward pass is a collective), and the rows beyond the last window weigh 0."""

    def __init__(self, folder: str, context: int, batch_size: int, sequences: int, rank: int, world_size: int):
        self.windows = Windows(folder, "val", context)
        self.sequences = min(sequences, self.windows.count)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        if self.sequences == 0:
            raise UserError(
                f"not enough data: validation in {folder} has {len(self.windows.tokens)} tokens, one window needs "
                f"{context + 1}: prepare more text, raise --val-fraction, or lower model.context"
            )

    def __iter__(self):
        """Pairs of int64 (batch_size, context + 1) and float32 weights (batch_size,), 0 or 1."""
        per_round = self.batch_size * self.world_size
        for start in range(0, self.sequences, per_round):
            n = start + self.rank * self.batch_size + np.arange(self.batch_size)
            weights = torch.from_numpy((n < self.sequences).astype(np.float32))
            yield self.windows.batch(np.minimum(n, self.sequences - 1)), weights
