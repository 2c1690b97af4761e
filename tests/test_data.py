"""Corpus to tokens to batches: nothing is lost, the split is fixed, every batch is a function of its position."""
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from celo2_pretrain.data import sources
from celo2_pretrain.data.loader import TrainLoader, ValLoader, permute
from celo2_pretrain.data.prepare import prepare
from celo2_pretrain.data.shards import SPLITS, ShardWriter, TokenArray, read_index
from celo2_pretrain.data.tokenizer import SentencePieceTokenizer, load_tokenizer, train_tokenizer
from celo2_pretrain.train.errors import UserError


@pytest.fixture(scope="module")
def documents() -> list[sources.Document]:
    return list(sources.from_python(300_000, 0.1))


@pytest.fixture(scope="module")
def folder(documents, tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("data") / "tokens")
    prepare(lambda: iter(documents), out, source="test", vocab_size=512, shard_tokens=10_007)
    return out


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
    writer.write([70_000, 1, 2, 3, 100_000], 5)
    writer.close()
    empty = ShardWriter(tmp_path, "val", "uint32", 3).summary()
    index = {"format": "celo2-tokens-1", "dtype": "uint32", "splits": {"train": writer.summary(), "val": empty}}
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert TokenArray(tmp_path, "train").read(0, 5).tolist() == [70_000, 1, 2, 3, 100_000]
    assert TokenArray(tmp_path, "train").read(2, 2).tolist() == [2, 3]


def test_preparing_twice_gives_the_same_bytes(folder, documents, tmp_path):
    prepare(lambda: iter(documents), str(tmp_path / "again"), source="test", vocab_size=512, shard_tokens=10_007)
    for path in Path(folder).iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_truncated_shard_is_refused(documents, tmp_path):
    out = tmp_path / "tokens"
    prepare(lambda: iter(documents), str(out), source="test", vocab_size=512)
    shard = out / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match="train-00000.bin is missing or has another length"):
        read_index(out)


def test_every_window_is_seen_once_an_epoch(folder):
    loader = TrainLoader(folder, 64, 1, 1, seed=3, rank=0, world_size=1)
    for epoch in (0, 1):
        n = loader.windows.count
        seen = {tuple(loader.batch(epoch * n + k, 0)[0].tolist()) for k in range(n)}
        assert seen == {tuple(row.tolist()) for row in loader.windows.batch(np.arange(n))}


def test_samples_do_not_depend_on_the_number_of_ranks(folder):
    def global_batch(world_size, micro_batch_size, samples):
        accumulation = 8 // (world_size * micro_batch_size)
        parts = [TrainLoader(folder, 32, micro_batch_size, 8, 0, rank, world_size).batch(samples, micro)
                 for micro in range(accumulation) for rank in range(world_size)]
        return np.concatenate(parts)

    expected = global_batch(1, 8, 24)
    for world_size, micro in ((1, 2), (2, 2), (4, 1), (8, 1)):
        assert np.array_equal(global_batch(world_size, micro, 24), expected)
    assert not np.array_equal(global_batch(1, 8, 32), expected)


def test_targets_are_the_next_tokens(folder):
    array = TokenArray(folder, "train")
    windows = TrainLoader(folder, 32, 1, 1, 0, 0, 1).windows.batch(np.array([0, 1]))
    assert windows[0].tolist() == array.read(0, 33).tolist() and windows[1, 0] == windows[0, -1]


@pytest.mark.parametrize("world_size, batch_size, sequences", [(1, 4, 10), (2, 4, 10), (3, 2, 7), (2, 8, 10**9)])
def test_validation_windows_count_once_over_all_ranks(folder, world_size, batch_size, sequences):
    seen, lengths = [], set()
    for rank in range(world_size):
        loader = ValLoader(folder, 32, batch_size, sequences, rank, world_size)
        batches = list(loader)
        lengths.add(len(batches))
        seen += [tuple(row.tolist()) for windows, weights in batches for row, w in zip(windows, weights) if w]
    expected = [tuple(row.tolist()) for row in loader.windows.batch(np.arange(loader.sequences))]
    assert sorted(seen) == sorted(expected)
    assert len(lengths) == 1, "a sharded model's forward pass is a collective: all ranks need equally many"


def test_more_ranks_than_data_is_refused(folder):
    with pytest.raises(UserError, match="one step of 512 ranks needs 512"):
        TrainLoader(folder, 1024, 1, 512, 0, 0, 512)


def test_split_is_by_file_and_never_without_validation(tmp_path):
    for k in range(30):
        (tmp_path / f"{k}.txt").write_text(f"file {k}\n" * 20_000)
    found = {}
    for split, text in sources.from_files([str(tmp_path)], 0.2):
        found.setdefault(text.splitlines()[0], set()).add(split)
    assert len(found) == 30 and all(len(splits) == 1 for splits in found.values())
    assert 1 <= sum("val" in splits for splits in found.values()) <= 15
    tiny = list(sources.from_files([str(tmp_path)], 1e-9))
    assert {split for split, _ in tiny} == {"train", "val"}


def test_text_files_are_read_in_pieces_that_join_to_the_whole(tmp_path):
    text = "".join(f"line {k} ä\n" for k in range(30_000))
    (tmp_path / "big.txt").write_text(text)
    pieces = [piece for _, piece in sources.from_files([str(tmp_path / "big.txt")], 0.1)]
    assert "".join(pieces) == text and len(pieces) > 3 and all(piece.endswith("\n") for piece in pieces)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_json_lines_are_one_document_each(tmp_path, suffix):
    lines = "\n".join(json.dumps({"body": f"document {k}"}) for k in range(50)).encode()
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(lines) if suffix.endswith("gz") else lines)
    found = [text for _, text in sources.from_files([str(tmp_path)], 0.1, "body")]
    assert found == [f"document {k}" for k in range(50)]


def test_datasets_on_disk_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["one", "two", "three"]}).save_to_disk(tmp_path / "set")
    assert [text for _, text in sources.from_dataset(str(tmp_path / "set"), 0.1)] == ["one", "two", "three"]
    with pytest.raises(UserError, match="no text column 'body', it has text: name it"):
        list(sources.from_dataset(str(tmp_path / "set"), 0.1, "body"))


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
