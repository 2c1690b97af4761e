"""Whatever lies in a folder of prepared data: it is trained on, or refused in a line that says which file is wrong."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.config import Model
from celo2_pretrain.data.loader import TrainLoader, ValLoader
from celo2_pretrain.data.mixture import open_mixture
from celo2_pretrain.data.shards import SPLITS, ShardWriter, TokenArray, read_index
from celo2_pretrain.data.tokenizer import load_tokenizer
from celo2_pretrain.model.build import vocab_rows

from support.fuzz import cases, snapshot, spoiled_trees, spoilers, works_or_refuses

CONTEXT = 16


@pytest.fixture(scope="module")
def tokens(data, tmp_path_factory) -> Path:
    """A few hundred tokens in several shards, in a folder with something beside it."""
    folder = tmp_path_factory.mktemp("around") / "tokens"
    folder.mkdir()
    index = read_index(data)
    for split in SPLITS:
        writer = ShardWriter(folder, split, index["dtype"], 200)
        writer.write(TokenArray(data, split).read(0, 500), 3, 900)
        writer.close()
        index["splits"][split] = writer.summary()
    (folder / "index.json").write_text(json.dumps(index))
    shutil.copy(f"{data}/tokenizer.model", folder)
    (folder.parent / "train-00000.bin").write_bytes(bytes(400))  # what a path out of the folder could find
    return folder


def use(folder: Path) -> None:
    """All that a training run and `generate` take from the folder."""
    mixture = open_mixture(str(folder))
    index = mixture.index
    rows = vocab_rows(Model(), index["vocab_size"])
    batches = [TrainLoader(mixture, CONTEXT, 4, 8, 0, rank, 2).batch(8 * step, 0) for rank in (0, 1) for step in range(4)]
    batches += [batch for batch, _ in ValLoader(mixture, CONTEXT, 4, 40, 0, 1)]
    assert all(batch.shape == (4, CONTEXT + 1) and 0 <= batch.min() and batch.max() < rows for batch in batches)
    assert np.isfinite(mixture.val_tokens_per_byte) and 0 <= index["eos_id"] < rows
    assert isinstance(index["tokenizer"]["sha256"][:12], str)


def spoil(folder: Path, name: str, data: bytes) -> None:
    """Put `data` in the place of a file, also of one that was made something else."""
    path = folder / name
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():
        path.unlink()
    path.write_bytes(data)


@pytest.fixture
def restored(tokens):
    """The folder as it was, after the test; and that nothing around it was touched, whatever stood in it."""
    files = {path.name: path.read_bytes() for path in tokens.iterdir()}
    around = snapshot(tokens.parent, leave_out=("tokens",))
    yield tokens, files
    for name, data in files.items():
        spoil(tokens, name, data)
    assert snapshot(tokens.parent, leave_out=("tokens",)) == around


def test_the_folder_itself_works(restored):
    use(restored[0])


def test_any_index_is_used_or_refused(restored):
    folder, files = restored
    index = json.loads(files["index.json"])
    del index["statistics"]

    @cases(2000)
    @given(spoiled_trees(index))
    def check(tree):
        (folder / "index.json").write_text(json.dumps(tree))
        works_or_refuses(lambda: use(folder))

    check()


@pytest.mark.parametrize("name, count", [("index.json", 700), ("train-00001.bin", 300), ("val-00000.bin", 200)])
def test_a_spoiled_file_is_used_or_refused(restored, name, count):
    folder, files = restored

    @cases(count)
    @given(st.lists(spoilers(), min_size=1, max_size=2))
    def check(spoils):
        data = files[name]
        for change in spoils:
            data = change(data)
        spoil(folder, name, data)
        works_or_refuses(lambda: use(folder))

    check()


@pytest.mark.parametrize("name", ["index.json", "train-00000.bin", "val-00002.bin"])
@pytest.mark.parametrize("what", ["missing", "empty", "folder", "fifo", "dangling link", "link to itself", "device"])
def test_something_else_in_a_files_place_is_refused(restored, name, what):
    folder, _ = restored
    path = folder / name
    path.unlink()
    if what == "empty":
        path.write_bytes(b"")
    elif what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what != "missing":
        path.symlink_to({"dangling link": "nowhere", "link to itself": name, "device": "/dev/zero"}[what])
    with pytest.raises(UserError, match=name):
        use(folder)
    assert works_or_refuses(lambda: use(folder)) is None


def test_an_id_outside_the_vocabulary_is_refused_by_file_and_position(restored):
    folder, files = restored
    ids = np.frombuffer(files["train-00001.bin"], "<u2").copy()
    ids[7] = 60_000
    spoil(folder, "train-00001.bin", ids.tobytes())
    with pytest.raises(UserError, match="train-00001.bin: token 60000 at position 7 is outside the vocabulary of 512"):
        TokenArray(folder, "train").read(0, 500)


@pytest.mark.parametrize("name", ["../train-00000.bin", "/etc/passwd", "tokens/../../train-00000.bin", "val-00000.bin", ""])
def test_a_shard_that_leads_out_of_the_folder_is_refused(restored, name):
    folder, files = restored
    index = json.loads(files["index.json"])
    index["splits"]["train"]["shards"][0]["file"] = name
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="a shard of train has the name"):
        use(folder)


def test_a_spoiled_tokenizer_is_used_or_refused(restored):
    folder, files = restored
    text = "def main(argv):\n    return 0  # é"

    @cases(600)
    @given(st.lists(spoilers(), min_size=1, max_size=2), st.booleans())
    def check(spoils, of_data):
        data = files["tokenizer.model"]
        for change in spoils:
            data = change(data)
        spoil(folder, "tokenizer.model", data)

        def call():
            tokenizer = load_tokenizer(folder if of_data else folder / "tokenizer.model")
            ids = tokenizer.encode([text])[0]
            assert all(0 <= id < tokenizer.vocab_size for id in ids)
            tokenizer.decode(ids)

        works_or_refuses(call)

    check()
