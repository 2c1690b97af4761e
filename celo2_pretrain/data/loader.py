"""The training and validation batches: each a pure function of seed and position, so a run can resume anywhere.

The tokens of each folder are cut into windows of context + 1 tokens (inputs and targets overlap by one). The k-th
sample of a folder is window `permutation(seed, epoch)(k mod windows)`: a global shuffle, another one each epoch, that
needs no list of windows in memory. Samples don't depend on how many ranks share them: rank r of W takes its part of
the same global batch.
"""

import numpy as np
import torch

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.data.mixture import Mixture, open_mixture, shares
from celo2_pretrain.data.permutation import permute
from celo2_pretrain.data.shards import TokenArray


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


def read_rows(sources: list[Windows], folders: np.ndarray, windows: np.ndarray) -> torch.Tensor:
    """Row k is window windows[k] of folder folders[k]: int64 (len(windows), context + 1)."""
    return torch.cat([sources[folder].batch(windows[k : k + 1]) for k, folder in enumerate(folders)])


class TrainLoader:
    """Training micro-batches by position.

    Args:
        data: a folder of prepared data, or a mixture of several.

    Raises UserError when one global batch needs more windows than there are.
    """

    def __init__(
        self,
        data: str | Mixture,
        context: int,
        micro_batch_size: int,
        global_batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
    ):
        self.mixture = open_mixture(data) if isinstance(data, str) else data
        self.sources = [Windows(path, "train", context) for path in self.mixture.paths]
        self.micro_batch_size, self.seed, self.rank, self.world_size = micro_batch_size, seed, rank, world_size
        self.count = sum(source.count for source in self.sources)
        for path, source in zip(self.mixture.paths, self.sources):
            if source.count == 0:
                raise UserError(
                    f"not enough data: {path} has no training window of {context} tokens: prepare more text, "
                    f"or lower model.context"
                )
        if self.count < global_batch_size:
            raise UserError(
                f"not enough data: {' + '.join(self.mixture.paths)} has {self.count} training windows of {context} "
                f"tokens, one step of {world_size} ranks needs {global_batch_size}: prepare more text, or lower "
                f"train.global_batch_size, model.context or the number of ranks"
            )

    def batch(self, samples: int, micro: int) -> torch.Tensor:
        """Micro-batch `micro` of this rank in the step that begins after `samples` samples of the run.

        int64 (micro_batch_size, context + 1).
        """
        first = samples + (micro * self.world_size + self.rank) * self.micro_batch_size
        folders, number = self.mixture.locate(np.arange(first, first + self.micro_batch_size), self.seed)
        windows = np.empty_like(number)
        for k, source in enumerate(self.sources):
            epoch, position = number // source.count, number % source.count
            seed = self.seed if k == 0 else f"{self.seed}/{k}"
            for e in np.unique(epoch[folders == k]):
                chosen = (folders == k) & (epoch == e)
                windows[chosen] = permute(position[chosen], source.count, seed, int(e))
        return read_rows(self.sources, folders, windows)

    def epochs(self, samples: int) -> dict[str, float]:
        """How often the first `samples` samples of the run have gone through each folder."""
        taken = self.mixture.taken(samples, self.seed)
        return {path: round(n / source.count, 4) for path, n, source in zip(self.mixture.paths, taken, self.sources)}


class ValLoader:
    """The first `sequences` validation windows, each folder of a mixture with its share of them, shared out evenly:
    every rank gets equally many batches (a sharded model's forward pass is a collective), and the rows beyond the last
    window weigh 0. A folder with fewer windows than its share has each weigh more."""

    def __init__(self, data: str | Mixture, context: int, batch_size: int, sequences: int, rank: int, world_size: int):
        mixture = open_mixture(data) if isinstance(data, str) else data
        self.sources = [Windows(path, "val", context) for path in mixture.paths]
        for path, source in zip(mixture.paths, self.sources):
            if source.count == 0:
                raise UserError(
                    f"not enough data: validation in {path} has {len(source.tokens)} tokens, one window needs "
                    f"{context + 1}: prepare more text, raise --val-fraction, or lower model.context"
                )
        wanted = shares(mixture.weights, min(sequences, sum(source.count for source in self.sources)))
        counts = np.array([min(max(1, n), source.count) for n, source in zip(wanted, self.sources)])
        self.sequences = int(counts.sum())
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.folders = np.repeat(np.arange(len(counts)), counts)
        self.windows = np.concatenate([np.arange(count) for count in counts])
        self.weights = (np.array(mixture.weights) * self.sequences / counts)[self.folders]

    def __len__(self) -> int:
        """Batches of this rank, as many as of every other."""
        return -(-self.sequences // (self.batch_size * self.world_size))  # noqa: PLE0303 (it is not negative)

    def __iter__(self):
        """Pairs of int64 (batch_size, context + 1) and float32 weights (batch_size,): 1, or 0 for rows that don't
        count, in a single folder."""
        per_round = self.batch_size * self.world_size
        for start in range(0, self.sequences, per_round):
            n = start + self.rank * self.batch_size + np.arange(self.batch_size)
            row = np.minimum(n, self.sequences - 1)
            weights = torch.from_numpy((self.weights[row] * (n < self.sequences)).astype(np.float32))
            yield read_rows(self.sources, self.folders[row], self.windows[row]), weights
