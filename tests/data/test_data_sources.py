"""Every kind of source gives its documents whole, in a fixed order, split for good, and goes on from any cursor."""

import gzip
import json
from pathlib import Path

import pytest

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.data.files import PIECE_CHARS
from celo2_pretrain.data.sources import Dataset, Files, Interrupted, PythonSources

TEXTS = [f"document {k} ä\nand its second line\n" for k in range(700)]


def read(paths: list, val_fraction: float = 0.1, field: str = "text") -> list[tuple[str, str]]:
    return list(Files(list(map(str, paths)), val_fraction, field).read())


def compress(path: Path, content: bytes) -> Path:
    import zstandard

    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(pack(content))
    return path


def write_parquet(path: Path, texts: list, field: str = "text") -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), field: texts}), path, row_group_size=100)


def test_split_is_by_file_and_never_without_validation(tmp_path):
    for k in range(30):
        (tmp_path / f"{k}.txt").write_text(f"file {k}\n" * 20_000)
    found = {}
    for split, text in read([tmp_path], 0.2):
        found.setdefault(text.splitlines()[0], set()).add(split)
    assert len(found) == 30 and all(len(splits) == 1 for splits in found.values())
    assert 1 <= sum("val" in splits for splits in found.values()) <= 15
    assert {split for split, _ in read([tmp_path], 1e-9)} == {"train", "val"}


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
def test_text_files_are_read_in_pieces_that_join_to_the_whole(tmp_path, suffix):
    text = "".join(f"line {k} ä\n" for k in range(30_000))
    path = compress(tmp_path / f"big{suffix}", text.encode())
    pieces = [piece for _, piece in read([path])]
    assert "".join(pieces) == text and len(pieces) > 3 and all(piece.endswith("\n") for piece in pieces)
    assert all(len(piece) < 2 * PIECE_CHARS for piece in pieces)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson"])
def test_json_lines_are_one_document_each(tmp_path, suffix):
    compress(tmp_path / f"a{suffix}", "\n".join(json.dumps({"body": text}) for text in TEXTS).encode())
    assert [text for _, text in read([tmp_path], field="body")] == TEXTS


def test_half_a_surrogate_pair_in_json_does_not_stop_the_pass(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d b"}\n{"text": "\\ud83d\\ude42"}\n')
    assert [text for _, text in read([tmp_path])] == ["a ? b", "🙂"]


def test_parquet_rows_are_one_document_each(tmp_path):
    write_parquet(tmp_path / "a.parquet", [*TEXTS, None])
    assert [text for _, text in read([tmp_path])] == [*TEXTS, ""]
    with pytest.raises(UserError, match="a.parquet has no text column 'body', it has id, text: name it with --field"):
        read([tmp_path], field="body")
    with pytest.raises(UserError, match="no text column 'id'"):
        read([tmp_path], field="id")


@pytest.mark.parametrize(
    "name, message",
    [
        ("a.jsonl.gz", "is not a whole gzip file"),
        ("a.txt.zst", "is not a zstandard file"),
        ("a.parquet", "is not a parquet"),
        ("a.txt", "is not UTF-8"),
    ],
)
def test_file_that_is_not_what_its_name_says_is_refused(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"\xff\xfe\x00 something else" * 100)
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        read([tmp_path])


def test_datasets_on_disk_are_read(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["one", None, "three"]}).save_to_disk(tmp_path / "set")
    assert [text for _, text in Dataset(str(tmp_path / "set"), 0.1).read()] == ["one", "", "three"]
    with pytest.raises(UserError, match="no text column 'body', it has text: name it"):
        list(Dataset(str(tmp_path / "set"), 0.1, "body").read())


def test_unknown_dataset_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="cannot load dataset .*nothing"):
        Dataset(str(tmp_path / "nothing"), 0.1)


def test_a_failing_stream_can_go_on_later(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS)
    source = Dataset(str(tmp_path), 0.1)
    rows = source.rows

    class Failing:
        load_state_dict, state_dict = rows.load_state_dict, rows.state_dict

        def __iter__(self):
            for number, row in enumerate(rows):
                if number == 5:
                    raise ConnectionError("the network is gone\nfor good")
                yield row

    source.rows = Failing()
    with pytest.raises(Interrupted, match="ConnectionError: the network is gone; the same command goes on"):
        for _ in source.read():
            cursor = source.cursor()
    source.rows = rows
    assert [text for _, text in source.read(cursor)] == TEXTS[5:]


def open_source(kind: str, folder: Path):
    """The same corpus as another object, as a second process would open it."""
    if kind == "python":
        return PythonSources(200_000, 0.2)
    if kind in ("streamed", "download"):
        return Dataset(str(folder), 0.2, download=kind == "download")
    return Files([str(folder)], 0.2)


@pytest.mark.parametrize("kind", ["files", "one file", "python", "streamed", "download"])
def test_reading_goes_on_from_any_cursor(tmp_path, kind):
    folder = tmp_path / "corpus"
    folder.mkdir()
    if kind == "one file":
        (folder / "a.txt").write_text("".join(TEXTS))
    else:
        for k in range(3):
            write_parquet(folder / f"{k}.parquet", TEXTS[200 * k : 200 * k + 200])
    if kind == "files":
        (folder / "b.txt").write_text("".join(f"line {k}\n" for k in range(30_000)))
        (folder / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[600:]))
    whole = list(open_source(kind, folder).read())
    assert len(whole) > 10
    for stop in (1, 2, len(whole) // 3, len(whole) // 2, len(whole) - 1, len(whole)):
        first, second = open_source(kind, folder), open_source(kind, folder)
        stream = first.read()
        begun = [next(stream) for _ in range(stop)]
        cursor = json.loads(json.dumps(first.cursor()))
        assert begun + list(second.read(cursor)) == whole, stop
        if kind not in ("streamed", "python"):
            assert second.fraction() == 1 and 0 < first.fraction() <= 1
