"""A mixture draws from its folders by weight, each without gaps or repeats, as a function of the sample's number."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.data.loader import TrainLoader, ValLoader
from celo2_pretrain.data.mixture import BLOCK, open_mixture, shares
from celo2_pretrain.data.prepare import prepare
from celo2_pretrain.data.shards import read_index
from celo2_pretrain.data.sources import Files, PythonSources

WEIGHTS = (0.5, 0.3, 0.2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """Three folders of one tokenizer with texts of different kinds and sizes."""
    root = tmp_path_factory.mktemp("mixture")
    out = [str(root / name) for name in ("code", "numbers", "letters")]
    prepare(PythonSources(200_000, 0.2), out[0], vocab_size=400)
    (root / "numbers.txt").write_text("".join(f"{k}\n" for k in range(9_000)))
    (root / "letters.txt").write_text("".join("abcdefghij"[k % 10] * (k % 7) + "\n" for k in range(4_000)))
    for name, folder in zip(("numbers", "letters"), out[1:]):
        prepare(Files([str(root / f"{name}.txt")], 0.2), folder, tokenizer=out[0])
    return out


def entries(folders: list[str], weights=WEIGHTS) -> list[dict]:
    return [{"path": path, "weight": weight} for path, weight in zip(folders, weights)]


@pytest.fixture
def mixture(folders):
    return open_mixture("unused", entries(folders))


def test_shares_keep_their_sum():
    assert shares([0.5, 0.3, 0.2], 10) == [5, 3, 2] and shares([1, 1, 1], 10) == [4, 3, 3]
    assert shares([7], 10**12) == [10**12] and sum(shares([0.1, 0.2, 0.7, 1e-3], 997)) == 997


def test_every_block_has_the_weights_exactly_and_is_mixed(mixture):
    for start in (0, 5 * BLOCK):
        folder, _ = mixture.locate(start + np.arange(BLOCK), seed=1)
        assert np.bincount(folder).tolist() == [5000, 3000, 2000]
        for part in np.split(folder, 10):
            assert np.allclose(np.bincount(part, minlength=3) / len(part), WEIGHTS, atol=0.06)
    again, _ = mixture.locate(np.arange(BLOCK), seed=2)
    assert (again != mixture.locate(np.arange(BLOCK), seed=1)[0]).mean() > 0.3


def test_each_folder_is_gone_through_without_gaps_or_repeats(mixture):
    samples = np.arange(2 * BLOCK + 1234)
    folder, number = mixture.locate(samples, seed=1)
    for k in range(3):
        whole = 2 * round(WEIGHTS[k] * BLOCK)
        assert sorted(number[(folder == k) & (samples < 2 * BLOCK)]) == list(range(whole))
        assert len(set(number[folder == k])) == (folder == k).sum() == mixture.taken(len(samples), 1)[k]
        assert number[folder == k].max() < whole + round(WEIGHTS[k] * BLOCK)


def test_a_sample_does_not_depend_on_how_it_is_asked_for(mixture):
    samples = np.arange(BLOCK - 50, BLOCK + 50)
    together = mixture.locate(samples, seed=3)
    alone = [mixture.locate(samples[k : k + 1], seed=3) for k in range(100)]
    for j in (0, 1):
        assert together[j].tolist() == [int(found[j][0]) for found in alone]


@pytest.mark.parametrize("world_size, micro", [(1, 12), (2, 3), (4, 1), (3, 2), (12, 1)])
def test_global_batches_of_a_mixture_do_not_depend_on_ranks(mixture, world_size, micro):
    for samples in (0, 600, BLOCK - 6):
        expected = TrainLoader(mixture, 16, 12, 12, 0, 0, 1).batch(samples, 0)
        parts = [
            TrainLoader(mixture, 16, micro, 12, 0, rank, world_size).batch(samples, k)
            for k in range(12 // world_size // micro)
            for rank in range(world_size)
        ]
        assert torch.equal(torch.cat(parts), expected)


def test_epochs_of_each_folder_are_told(mixture, folders):
    loader = TrainLoader(mixture, 16, 1, 1, 0, 0, 1)
    counts = [source.count for source in loader.sources]
    assert loader.epochs(2 * BLOCK) == {
        path: pytest.approx(2 * BLOCK * weight / count, abs=1e-3) for path, weight, count in zip(folders, WEIGHTS, counts)
    }
    samples = next(n for n in range(2 * BLOCK) if mixture.taken(n, 0)[1] == counts[1])
    assert loader.epochs(samples)[folders[1]] == 1 and counts[1] > 500
    seen = {tuple(loader.batch(k, 0)[0].tolist()) for k in range(samples)}
    assert {tuple(row.tolist()) for row in loader.sources[1].batch(np.arange(counts[1]))} <= seen, "a whole epoch"


def test_the_digest_changes_with_what_changes_the_order(folders, tmp_path):
    moved = [str(shutil.copytree(path, tmp_path / Path(path).name)) for path in folders]
    digest = open_mixture("unused", entries(folders)).digest
    assert open_mixture("unused", entries(moved, (5, 3, 2))).digest == digest
    others = [entries(folders, (0.5, 0.31, 0.19)), entries(folders[::-1]), entries(folders[:2], WEIGHTS[:2])]
    (tmp_path / "numbers.txt").write_text("".join(f"{k}\n" for k in range(9_001)))
    prepare(Files([str(tmp_path / "numbers.txt")], 0.2), moved[1], tokenizer=folders[0], overwrite=True)
    found = {open_mixture("unused", mixture).digest for mixture in (*others, entries(moved))}
    assert len(found) == 4 and digest not in found


def test_one_folder_is_a_mixture_of_one(folders):
    one = TrainLoader(open_mixture("unused", entries(folders[:1])), 16, 4, 4, 0, 0, 1)
    assert torch.equal(one.batch(100, 0), TrainLoader(folders[0], 16, 4, 4, 0, 0, 1).batch(100, 0))


def test_validation_has_the_weights_of_the_mixture(mixture, folders):
    loader = ValLoader(mixture, 16, 4, 50, 0, 1)
    counts = np.bincount(loader.folders)
    total = np.bincount(loader.folders, weights=loader.weights)
    assert loader.sequences == 50 and counts.tolist() == [25, 15, 10] and np.allclose(total, [25, 15, 10])
    everything = ValLoader(mixture, 16, 4, 10**9, 0, 1)  # the small folder has fewer windows than its share
    total = np.bincount(everything.folders, weights=everything.weights)
    assert np.allclose(total / total.sum(), WEIGHTS)
    rows = sum(float(weights.sum()) for rank in (0, 1) for _, weights in ValLoader(mixture, 16, 4, 50, rank, 2))
    assert rows == pytest.approx(50)
    parts = [read_index(path)["splits"]["val"] for path in folders]
    nats = [part["bytes"] / part["tokens"] for part in parts]
    assert mixture.val_tokens_per_byte == pytest.approx(1 / np.dot(WEIGHTS, nats))


def test_other_tokenizers_and_tiny_weights_are_refused(folders, tmp_path):
    other = str(tmp_path / "other")
    prepare(PythonSources(200_000, 0.2), other, vocab_size=401)
    with pytest.raises(UserError, match="other was prepared with another tokenizer .* by --tokenizer .*code"):
        open_mixture("unused", entries([folders[0], other]))
    with pytest.raises(UserError, match="the weight of .*numbers is 1.0e-06 of all: give it at least 1e-4"):
        open_mixture("unused", entries(folders[:2], (1, 1e-6)))
    with pytest.raises(UserError, match="'/no/such' does not exist"):
        open_mixture("unused", entries(["/no/such"]))
    with pytest.raises(UserError, match="letters has no training window of 100000 tokens"):
        TrainLoader(open_mixture("unused", entries(folders[::-1])), 100_000, 1, 1, 0, 0, 1)


def test_the_given_folder_counts_only_without_a_mixture(folders):
    assert open_mixture(folders[1], []).paths == [folders[1]]
    assert Path(open_mixture(folders[1], entries(folders[:1])).paths[0]).name == "code"
