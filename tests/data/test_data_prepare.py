"""`prepare` gives the same bytes with any number of workers and after any interruption, and counts what it wrote."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.data import encode, progress
from celo2_pretrain.data import prepare as module
from celo2_pretrain.data.prepare import prepare
from celo2_pretrain.data.shards import TokenArray, read_index
from celo2_pretrain.data.sources import Files, Interrupted, PythonSources
from celo2_pretrain.data.statistics import EDGES, Statistics, describe
from celo2_pretrain.data.tokenizer import load_tokenizer

from support.paths import ROOT


def source() -> PythonSources:
    return PythonSources(300_000, 0.2)


def contents(folder: str | Path) -> dict[str, bytes]:
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """A small corpus in many chunks, and progress saved after each."""
    monkeypatch.setattr(encode, "CHUNK_CHARS", 20_000)
    monkeypatch.setattr(module, "SAVE_SECONDS", 0)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "tokens"
    prepare(source(), str(out), vocab_size=512, shard_tokens=9_001)
    return contents(out)


def test_the_folder_holds_shards_tokenizer_and_index_only(expected):
    names = {name.split("-")[0] for name in expected}
    assert names == {"train", "val", "tokenizer.model", "index.json"} and len(expected) > 10


@pytest.mark.parametrize("workers", [2, 3, None])
def test_any_number_of_workers_gives_the_same_bytes(expected, tmp_path, workers):
    prepare(source(), str(tmp_path / "tokens"), vocab_size=512, shard_tokens=9_001, workers=workers)
    assert contents(tmp_path / "tokens") == expected


class Breaking:
    """A source that stops with an error after so many documents."""

    def __init__(self, inner, after: int, error: BaseException):
        self.inner, self.after, self.error, self.identity = inner, after, error, inner.identity
        self.cursor, self.fraction = inner.cursor, inner.fraction

    def read(self, cursor=None):
        yield from itertools.islice(self.inner.read(cursor), self.after)
        raise self.error


@pytest.mark.parametrize("after, workers", [(1, 1), (5, 1), (9, 1), (9, 2), (3, 1)])
def test_interrupted_call_goes_on_to_the_same_bytes(expected, tmp_path, after, workers):
    out = tmp_path / "tokens"
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(expected["tokenizer.model"])
    arguments = dict(tokenizer=str(tokenizer), shard_tokens=9_001, workers=workers)
    for number in range(100):  # again and again, `after` documents further each time
        try:
            prepare(Breaking(source(), after, Interrupted("gone")), str(out), **arguments)
        except Interrupted:
            assert not out.exists() and (tmp_path / ".tokens.unfinished/progress.json").is_file()
            for path in (tmp_path / ".tokens.unfinished").glob("*.bin"):  # written, but not yet recorded
                with open(path, "ab") as file:
                    file.write(b"torn")
            (tmp_path / ".tokens.unfinished/.progress.json.1").write_text("{")  # half written
        if number == 2:
            break
    prepare(source(), str(out), **arguments)
    assert contents(out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.model", "tokens"]


def test_progress_is_kept_between_calls(tmp_path, expected, capsys):
    out = tmp_path / "tokens"
    with pytest.raises(KeyboardInterrupt):
        prepare(Breaking(source(), 15, KeyboardInterrupt()), str(out), vocab_size=512)  # in the tokenizer's training
    read = []

    class Watched(PythonSources):
        def read(self, cursor=None):
            read.append(cursor)
            return super().read(cursor)

    with pytest.raises(Interrupted):
        calls = itertools.count()

        class SecondRead(Breaking):
            def read(self, cursor=None):
                return super().read(cursor) if next(calls) else self.inner.read(cursor)

        prepare(SecondRead(source(), 15, Interrupted("gone")), str(out), vocab_size=512, shard_tokens=9_001)
    prepare(Watched(300_000, 0.2), str(out), vocab_size=512, shard_tokens=9_001)
    assert len(read) == 1 and read[0]["documents"] > 5, "neither the tokenizer nor the documents are done again"
    assert "going on after" in capsys.readouterr().out and contents(out) == expected


def test_other_arguments_than_the_interrupted_ones_are_refused(tmp_path):
    out, corpus = tmp_path / "tokens", tmp_path / "corpus.txt"
    corpus.write_text("".join(text for _, text in source().read()))

    def call(after=None, fraction=0.2, **arguments):
        inner = Files([str(corpus)], fraction)
        calls = itertools.count()

        class SecondRead(Breaking):
            def read(self, cursor=None):
                return super().read(cursor) if next(calls) else self.inner.read(cursor)

        prepare(
            SecondRead(inner, after, Interrupted("gone")) if after else inner,
            str(out),
            **{"vocab_size": 400, "shard_tokens": 999} | arguments,
        )

    with pytest.raises(Interrupted):
        call(after=4)
    before = contents(tmp_path / ".tokens.unfinished")
    for changed, message in (
        ({"vocab_size": 401}, "--vocab-size = 400, not 401"),
        ({"shard_tokens": 1000}, "--shard-tokens = 999, not 1000"),
        ({"fraction": 0.1}, "--val-fraction = 0.2, not 0.1"),
    ):
        with pytest.raises(UserError, match=f"made with {message}: give the same"):
            call(**changed)
    corpus.write_text(corpus.read_text() + "another line\n")
    with pytest.raises(UserError, match="made with the corpus's files = "):
        call()
    assert contents(tmp_path / ".tokens.unfinished") == before
    call(overwrite=True)
    assert read_index(out)["splits"]["train"]["shards"][0]["tokens"] == 999


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_process_is_gone_with_its_workers_and_goes_on(tmp_path, expected):
    script = tmp_path / "call.py"
    script.write_text(
        "import itertools, sys, time\nfrom celo2_pretrain.data import encode, prepare as module\n"
        "from celo2_pretrain.data.sources import PythonSources\n"
        "if __name__ == '__main__':\n"
        "    encode.CHUNK_CHARS, module.SAVE_SECONDS, slow, add = 20_000, 0, float(sys.argv[1]), module.add\n"
        "    chunks = itertools.count()\n"
        "    module.add = lambda *a: (time.sleep(slow * (next(chunks) > 6)), add(*a))\n"
        f"    module.prepare(PythonSources(300_000, 0.2), {str(tmp_path / 'tokens')!r}, vocab_size=512,\n"
        "                   shard_tokens=9_001, workers=2)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = subprocess.Popen([sys.executable, str(script), "600"], env=environment, start_new_session=True)
    unfinished = tmp_path / ".tokens.unfinished" / "progress.json"
    deadline = time.time() + 120
    while not unfinished.exists() or json.loads(unfinished.read_text())["statistics"]["bytes"] < 100_000:
        assert time.time() < deadline and running.poll() is None
        time.sleep(0.1)
    refused = subprocess.run([sys.executable, str(script), "0"], env=environment, capture_output=True, text=True)
    assert "another `prepare` is writing" in refused.stderr
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    subprocess.run([sys.executable, str(script), "0"], env=environment, check=True)
    assert contents(tmp_path / "tokens") == expected
    for _ in range(100):
        if not group_alive(running.pid):
            return
        time.sleep(0.1)
    raise AssertionError("worker processes outlive the killed one")


def group_alive(group: int) -> bool:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


def test_statistics_are_those_of_the_tokens(tmp_path):
    out = tmp_path / "tokens"
    index = prepare(source(), str(out), vocab_size=512)
    found, ids = (
        index["statistics"],
        np.concatenate([(array := TokenArray(out, split)).read(0, len(array)) for split in ("train", "val")]),
    )
    lengths = np.sort(np.diff(np.concatenate([[-1], np.flatnonzero(ids == index["eos_id"])])))
    tokenizer = load_tokenizer(out)
    texts = [text for _, text in source().read()]
    assert found["documents"] == len(lengths) == len(texts) and found["tokens"] == len(ids)
    assert found["bytes"] == sum(len(text.encode()) for text in texts)
    assert found["bytes_per_token"] == pytest.approx(found["bytes"] / len(ids), abs=1e-4)
    assert found["vocabulary_coverage"] == pytest.approx(len(set(ids.tolist())) / 512, abs=1e-6)
    counts = Counter(ids.tolist())
    assert found["unknown_rate"] == counts[tokenizer.unk_id] / len(ids)
    assert found["byte_fallback_rate"] == sum(counts[i] for i in tokenizer.byte_ids()) / len(ids) > 0
    quantiles = found["tokens_per_document"]
    assert (quantiles["least"], quantiles["most"]) == (lengths[0], lengths[-1])
    for name, q in (("25%", 0.25), ("50%", 0.5), ("95%", 0.95)):
        exact = lengths[int(np.ceil(q * len(lengths))) - 1]
        assert abs(quantiles[name] - exact) <= max(1, 0.011 * exact), name
    assert json.loads((out / "index.json").read_text()) == index
    assert f"{found['vocabulary_coverage']:.1%} of the vocabulary occurs" in describe(index, "tokens")


def test_unknown_tokens_are_counted():
    counts = Statistics(4)
    counts.add(np.array([0, 1, 2, 0]), np.array([1, 3]), 7)
    assert counts.summary(unk_id=0, byte_ids=[2])["unknown_rate"] == 0.5
    assert counts.summary(unk_id=None, byte_ids=[2])["byte_fallback_rate"] == 0.25
    assert np.all(np.diff(EDGES) > 0) and EDGES[0] == 0


def test_transformers_tokenizer_is_taken(tmp_path):
    from celo2_pretrain.data.tokenizer import train_tokenizer

    texts = (text for _, text in source().read())
    train_tokenizer(texts, 400, 100_000).save_for_transformers(tmp_path / "hf", 128)
    index = prepare(source(), str(tmp_path / "tokens"), tokenizer=str(tmp_path / "hf"), workers=2)
    assert index["tokenizer"]["kind"] == "transformers" and index["vocab_size"] == 400
    assert load_tokenizer(tmp_path / "tokens").fingerprint == index["tokenizer"]["sha256"]


def test_the_corpus_is_never_in_memory(tmp_path):
    """The documents that were read but not yet written are bounded by the chunks under way."""
    written, most, ahead = [0], [0], itertools.count(1)

    class Counted(PythonSources):
        def read(self, cursor=None):
            for document in super().read(cursor):
                most[0] = max(most[0], next(ahead) - written[0])
                yield document

    counted = Counted(1_500_000, 0.1)
    total = len(list(PythonSources(1_500_000, 0.1).read()))
    for chunk, encoded in encode.encode_in_order(encode.chunks(counted, None), make_tokenizer(tmp_path), "uint16", workers=2):
        written[0] += len(chunk.documents)
    assert written[0] == total and most[0] < total / 2


def make_tokenizer(folder: Path) -> Path:
    from celo2_pretrain.data.tokenizer import train_tokenizer

    train_tokenizer((text for _, text in source().read()), 400, 100_000).save(folder)
    return folder


def test_plain_lines_tell_of_the_progress_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    shown = progress.Progress(0.2, 10, 100, 1000)
    shown.add(0.6, 5, 50, 1_000_000)
    line = capsys.readouterr().out
    assert "1.0 MB, 15 documents, 0.00 M tokens" in line and "60%" in line and "left" in line
    shown.add(None, 5, 50, 1_000_000)
    assert "left" not in capsys.readouterr().out
