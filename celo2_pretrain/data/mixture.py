"""Several folders of prepared data trained on as one, by weights: which folder each sample of the run comes from.

Samples come in blocks of 10,000, in each of which every folder has its share, in an order drawn by (seed, block). So
the source of sample n, and how many samples that source gave before it, follow from n alone.
"""

import functools
import hashlib
import json
from dataclasses import dataclass

import numpy as np

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.data.permutation import permute
from celo2_pretrain.data.shards import read_index

BLOCK = 10_000


def shares(weights: list[float], total: int) -> list[int]:
    """`total` divided in proportion to `weights`, rounded so that the sum is kept (largest remainders first)."""
    exact = np.array(weights, float) / sum(weights) * total
    parts = np.floor(exact + 1e-9).astype(int)
    for k in np.argsort(parts - exact, kind="stable")[: total - parts.sum()]:
        parts[k] += 1
    return parts.tolist()


@dataclass
class Mixture:
    """Folders with their indexes and weights, all tokenized alike; a single folder is a mixture of one."""

    paths: list[str]
    indexes: list[dict]
    weights: list[float]  # sum to 1

    @property
    def index(self) -> dict:
        """What all folders have in common: tokenizer, vocab_size, eos_id."""
        return self.indexes[0]

    @property
    def val_tokens_per_byte(self) -> float:
        """Of validation text in which the folders have their weights in tokens."""
        parts = [index["splits"]["val"] for index in self.indexes]
        return 1 / sum(weight * part["bytes"] / part["tokens"] for weight, part in zip(self.weights, parts))

    @property
    def digest(self) -> str:
        """Of what the order of the data follows from, beside the seed: how much each folder holds, and the weights."""
        held = [(index["splits"], round(weight, 9)) for index, weight in zip(self.indexes, self.weights)]
        return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:12]

    def locate(self, samples: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """For samples of the run, int64 (n,): the folder of each, and how many of that folder's samples came before it;
        both int64 (n,)."""
        if len(self.paths) == 1:
            return np.zeros_like(samples), samples
        parts = tuple(shares(self.weights, BLOCK))
        folder, number = np.empty_like(samples), np.empty_like(samples)
        for block in np.unique(samples // BLOCK):
            here = samples // BLOCK == block
            order, before = block_order(parts, seed, int(block))
            folder[here], number[here] = order[samples[here] % BLOCK], before[samples[here] % BLOCK]
            number[here] += block * np.array(parts)[folder[here]]
        return folder, number

    def taken(self, samples: int, seed: int) -> list[int]:
        """How many of the run's first `samples` samples came from each folder."""
        if len(self.paths) == 1:
            return [samples]
        whole, rest = divmod(samples, BLOCK)
        parts = shares(self.weights, BLOCK)
        counts = np.bincount(block_order(tuple(parts), seed, whole)[0][:rest], minlength=len(parts))
        return [int(whole * share + count) for share, count in zip(parts, counts)]


@functools.lru_cache(maxsize=2)  # a global batch may lie across two blocks
def block_order(parts: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The folder of each sample of a block, and how many samples of that folder come before it in the block; both int64
    (BLOCK,)."""
    order = np.repeat(np.arange(len(parts)), parts)[permute(np.arange(BLOCK), BLOCK, f"{seed}/mixture", block)]
    before = np.empty_like(order)
    for folder, part in enumerate(parts):
        before[order == folder] = np.arange(part)
    return order, before


def open_mixture(path: str, mixture: list[dict] = ()) -> Mixture:
    """The folder `path`, or those of `mixture` (entries with path and weight) in its stead.

    Raises UserError for a folder that isn't prepared data, another tokenizer than the first's, or a share below 1 in
    10,000.
    """
    if not mixture:
        return Mixture([path], [read_index(path)], [1.0])
    paths, total = [entry["path"] for entry in mixture], sum(entry["weight"] for entry in mixture)
    indexes = [read_index(path) for path in paths]
    for path, index in zip(paths, indexes):
        ours, first = index["tokenizer"]["sha256"], indexes[0]["tokenizer"]["sha256"]
        if ours != first:
            raise UserError(
                f"data.mixture: {path} was prepared with another tokenizer ({ours[:12]}) than {paths[0]} "
                f"({first[:12]}): prepare it with that one, by --tokenizer {paths[0]}"
            )
    weights = [entry["weight"] / total for entry in mixture]
    for path, weight, share in zip(paths, weights, shares(weights, BLOCK)):
        if share == 0:
            raise UserError(
                f"data.mixture: the weight of {path} is {weight:.1e} of all: give it at least 1e-4, or leave it out"
            )
    return Mixture(paths, indexes, weights)
