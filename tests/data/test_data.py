"""Corpus to tokens to batches: nothing is lost, the split is fixed, every batch is a function of its position."""

import json

import numpy as np
import pytest
import torch

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.data import sources
from celo2_pretrain.data.loader import TrainLoader, ValLoader
from celo2_pretrain.data.permutation import permute
from celo2_pretrain.data.prepare import prepare
from celo2_pretrain.data.shards import SPLITS, ShardWriter, TokenArray, read_index
from celo2_pretrain.data.tokenizer import SentencePieceTokenizer, load_tokenizer, train_tokenizer


def source() -> sources.PythonSources:
    return sources.PythonSources(300_000, 0.1)


@pytest.fixture(scope="module")
def documents() -> list[sources.Document]:
    return list(source().read())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("data") / "tokens")
    prepare(source(), out, vocab_size=512, shard_tokens=10_007)
    return out


def read(paths: list, val_fraction: float, field: str = "text") -> list[sources.Document]:
    return list(sources.Files(list(map(str, paths)), val_fraction, field).read())


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 97, 1000, 4096, 10_007])
def test_shuffle_is_a_permutation(size):
    for seed, epoch in ((0, 0), (0, 1), (7, 0)):
        assert sorted(permute(np.arange(size), size, seed, epoch)) == list(range(size))


def test_shuffle_depends_on_seed_and_epoch_and_mixes():
    base = permute(np.arange(1000), 1000, 0, 0)
    assert (base != permute(np.arange(1000), 1000, 1, 0)).mean() > 0.9
    assert (base != permute(np.arange(1000), 1000, 0, 1)).mean() > 0.9
    assert abs(np.corrcoef(base, np.arange(1000))[0, 1]) < 0.1
    assert abs(np.corrcoef(base[1:], base[:-1])[0, 1]) < 0.1


def test_prepared_tokens_decode_to_the_corpus(folder, documents):
    index, tokenizer = read_index(folder), load_tokenizer(folder)
    assert len(index["splits"]["train"]["shards"]) > 1, "the test wants documents that cross a shard's end"
    for split in SPLITS:
        array = TokenArray(folder, split)
        ids = array.read(0, len(array))
        ends = np.flatnonzero(ids == index["eos_id"])
        texts = [tokenizer.decode(part.tolist()) for part in np.split(ids, ends + 1)[:-1]]
        texts = [text.removesuffix("<|endoftext|>") for text in texts]
        assert texts == [text for where, text in documents if where == split]


def test_wide_vocabularies_get_wide_tokens(tmp_path):
    writer = ShardWriter(tmp_path, "train", "uint32", 3)
    writer.write(np.array([70_000, 1, 2, 3, 100_000]), 1, 5)
    writer.close()
    empty = ShardWriter(tmp_path, "val", "uint32", 3).summary()
    index = {
        "format": "celo2-tokens-1",
        "dtype": "uint32",
        "vocab_size": 100_001,
        "eos_id": 1,
        "tokenizer": {"kind": "sentencepiece", "sha256": ""},
        "splits": {"train": writer.summary(), "val": empty},
    }
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert TokenArray(tmp_path, "train").read(0, 5).tolist() == [70_000, 1, 2, 3, 100_000]
    assert TokenArray(tmp_path, "train").read(2, 2).tolist() == [2, 3]


def test_truncated_shard_is_refused(tmp_path):
    out = tmp_path / "tokens"
    prepare(source(), str(out), vocab_size=512)
    shard = out / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match="train-00000.bin is missing or has another length"):
        read_index(out)


def test_every_window_is_seen_once_an_epoch(folder):
    loader = TrainLoader(folder, 64, 1, 1, seed=3, rank=0, world_size=1)
    for epoch in (0, 1):
        n = loader.count
        seen = {tuple(loader.batch(epoch * n + k, 0)[0].tolist()) for k in range(n)}
        assert seen == {tuple(row.tolist()) for row in loader.sources[0].batch(np.arange(n))}


GLOBAL = 24


@pytest.mark.parametrize(
    "world_size, micro, accumulation",
    [
        (world, micro, GLOBAL // (world * micro))
        for world in (1, 2, 3, 4, 8, 24)
        for micro in (1, 2, 3, 4, 6, 12, 24)
        if GLOBAL % (world * micro) == 0
    ],
)
def test_global_batches_do_not_depend_on_ranks_micro_batch_and_accumulation(folder, world_size, micro, accumulation):
    """Each global batch has the same windows in the same order, also in the middle of a run and over an epoch's end."""
    count = TrainLoader(folder, 32, 1, 1, 5, 0, 1).count
    for samples in (0, 7 * GLOBAL, count - GLOBAL // 2, 3 * count - 1):
        expected = TrainLoader(folder, 32, GLOBAL, GLOBAL, 5, 0, 1).batch(samples, 0)
        parts = [
            TrainLoader(folder, 32, micro, GLOBAL, 5, rank, world_size).batch(samples, k)
            for k in range(accumulation)
            for rank in range(world_size)
        ]
        assert torch.equal(torch.cat(parts), expected)


def test_each_epoch_has_another_order(folder):
    loader = TrainLoader(folder, 64, 1, 1, seed=3, rank=0, world_size=1)
    n = loader.count
    first, second = ([tuple(loader.batch(e * n + k, 0)[0].tolist()) for k in range(n)] for e in (0, 1))
    assert sum(a == b for a, b in zip(first, second)) < loader.count / 10
    assert loader.epochs(loader.count + loader.count // 2) == {folder: pytest.approx(1.5, abs=0.01)}


def test_targets_are_the_next_tokens(folder):
    array = TokenArray(folder, "train")
    windows = TrainLoader(folder, 32, 1, 1, 0, 0, 1).sources[0].batch(np.array([0, 1]))
    assert windows[0].tolist() == array.read(0, 33).tolist() and windows[1, 0] == windows[0, -1]


@pytest.mark.parametrize("world_size, batch_size, sequences", [(1, 4, 10), (2, 4, 10), (3, 2, 7), (2, 8, 10**9)])
def test_validation_windows_count_once_over_all_ranks(folder, world_size, batch_size, sequences):
    seen, lengths = [], set()
    for rank in range(world_size):
        loader = ValLoader(folder, 32, batch_size, sequences, rank, world_size)
        batches = list(loader)
        lengths.add(len(batches))
        seen += [tuple(row.tolist()) for windows, weights in batches for row, w in zip(windows, weights) if w]
    expected = [tuple(row.tolist()) for row in loader.sources[0].batch(np.arange(loader.sequences))]
    assert sorted(seen) == sorted(expected)
    assert len(lengths) == 1, "a sharded model's forward pass is a collective: all ranks need equally many"


def test_more_ranks_than_data_is_refused(folder):
    with pytest.raises(UserError, match="one step of 512 ranks needs 512"):
        TrainLoader(folder, 1024, 1, 512, 0, 0, 512)


def test_tokenizer_is_lossless_on_any_text(folder):
    tokenizer = load_tokenizer(folder)
    texts = ["", " ", "  two  spaces\n\n\ttab\r\n", "naïve 漢字 🙂 \u200b", "x" * 5000, "▁ the mark itself"]
    for text, ids in zip(texts, tokenizer.encode(texts)):
        # sentencepiece writes a space as "▁", so that the mark itself comes back as a space
        assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_transformers_gets_the_same_tokenizer(folder, documents, tmp_path):
    ours = load_tokenizer(folder)
    ours.save_for_transformers(tmp_path, 128)
    theirs = load_tokenizer(tmp_path)
    texts = [text for _, text in documents][:40]
    a, b = ours.encode(texts), theirs.encode(texts)
    assert (theirs.vocab_size, theirs.eos_id) == (ours.vocab_size, ours.eos_id)
    # Two segmentations of the same score may be told apart by round-off; the text is the same in any case.
    assert [theirs.decode(ids) for ids in a] == texts == [theirs.decode(ids) for ids in b]
    assert abs(sum(map(len, a)) - sum(map(len, b))) <= 1e-3 * sum(map(len, a))


def test_vocabulary_that_the_text_cannot_support_is_refused():
    with pytest.raises(UserError, match=r"cannot train a vocabulary of 5000 pieces: the text supports at most \d+"):
        train_tokenizer(["a small text\n"] * 10, 5000)


def test_same_text_gives_the_same_tokenizer(documents):
    first, second = (train_tokenizer((t for _, t in documents), 400, 100_000) for _ in range(2))
    assert isinstance(first, SentencePieceTokenizer) and first.model == second.model
