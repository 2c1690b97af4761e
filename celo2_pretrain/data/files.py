"""Reading documents out of files: text, JSON Lines and parquet, plain or compressed, never a whole file at once."""

import contextlib
import gzip
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

from celo2_pretrain.common.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".tex", ".html", ".text")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIX = ".parquet"
COMPRESSED_SUFFIXES = (".gz", ".zst")
PIECE_CHARS = 64 * 1024  # longer text files are cut at line ends, so that no file is ever whole in memory
PARQUET_ROWS = 256  # rows decoded at a time

Item = tuple[str, int]  # a document's text, and how many bytes of the file (as it lies on disk) were read for it so far


def hash_unit(name: str, purpose: str) -> float:
    """A number in [0, 1) that depends on `name` and `purpose` only."""
    digest = hashlib.blake2b(f"{purpose}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def kind_of(name: str) -> str | None:
    """ "text", "jsonl" or "parquet" by the suffix, or None."""
    inner = name.removesuffix(next((s for s in COMPRESSED_SUFFIXES if name.endswith(s)), ""))
    if inner.endswith(JSONL_SUFFIXES):
        return "jsonl"
    if name.endswith(PARQUET_SUFFIX):
        return "parquet"
    if name.endswith(TEXT_SUFFIXES) or (inner != name and inner.endswith(".txt")):
        return "text"
    return None


def list_files(paths: list[str]) -> list[tuple[str, Path]]:
    """Readable files below `paths` as (name relative to the given path, path), in a fixed shuffled order.

    A file that is named itself is taken whatever its suffix; in a folder only those of a known kind are.
    """
    found = {}
    for given in paths:
        root = Path(given)
        if root.is_file():
            found[root.name if len(paths) == 1 else str(root)] = root
        elif root.is_dir():
            for folder, folders, names in os.walk(root):
                folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
                for name in names:
                    path = Path(folder, name)
                    if kind_of(name):
                        relative = str(path.relative_to(root))
                        found[relative if len(paths) == 1 else f"{root}/{relative}"] = path
        else:
            raise UserError(f"corpus path {given!r} does not exist: give a file or folder of text, JSON Lines or parquet")
    if not found:
        raise UserError(
            f"no text in {', '.join(map(str, paths))}: expected files ending in "
            f"{', '.join((*TEXT_SUFFIXES, *JSONL_SUFFIXES, PARQUET_SUFFIX))}, or .txt and JSON Lines with .gz or .zst"
        )
    return sorted(found.items(), key=lambda item: (hash_unit(item[0], "order"), item[0]))


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[tuple[io.TextIOBase, io.BufferedReader]]:
    """The decompressed text of `path`, and the file below it, whose tell() says how far it was read."""
    with open(path, "rb") as raw:
        if path.suffix == ".gz":
            binary = gzip.GzipFile(fileobj=raw)
        elif path.suffix == ".zst":
            import zstandard

            binary = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
        else:
            binary = raw
        yield io.TextIOWrapper(binary, encoding="utf-8"), raw


def read_pieces(path: Path, piece_chars: int) -> Iterator[Item]:
    """The text of `path` in pieces of about `piece_chars` characters that end with a line (or at twice the length)."""
    with open_text(path) as (file, raw):
        while piece := file.read(piece_chars):
            yield piece + file.readline(piece_chars), raw.tell()


def read_json_lines(path: Path, field: str) -> Iterator[Item]:
    with open_text(path) as (file, raw):
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error.msg}); one object a line") from None
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                keys = sorted(record)[:8] if isinstance(record, dict) else type(record).__name__
                raise UserError(f"{path}, line {number}: no text field {field!r} (found {keys}); name it with --field")
            text = record[field]
            if "\\ud" in line.lower():  # half of a surrogate pair can be written in JSON, but is no character
                text = text.encode("utf-8", "replace").decode()
            yield text, raw.tell()


def read_parquet(path: Path, field: str) -> Iterator[Item]:
    """The rows of column `field`; rows without a value are empty documents."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a parquet file ({str(error).splitlines()[0]})") from None
    with file:
        columns = {column.name: column.type for column in file.schema_arrow}
        if columns.get(field) not in (pyarrow.string(), pyarrow.large_string()):
            raise UserError(f"{path} has no text column {field!r}, it has {', '.join(columns)}: name it with --field")
        size, rows, done = path.stat().st_size, file.metadata.num_rows, 0
        for batch in file.iter_batches(PARQUET_ROWS, columns=[field]):
            for text in batch.column(0).to_pylist():
                done += 1
                yield text or "", size * done // rows


def read_file(path: Path, kind: str, field: str, piece_chars: int = PIECE_CHARS) -> Iterator[Item]:
    """The documents of one file. Raises UserError, naming the file, when it isn't what its name says."""
    try:
        if kind == "jsonl":
            yield from read_json_lines(path, field)
        elif kind == "parquet":
            yield from read_parquet(path, field)
        else:
            yield from read_pieces(path, piece_chars)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it or leave it out") from None
    except (gzip.BadGzipFile, EOFError):
        raise UserError(f"{path} is not a whole gzip file: decompress it or correct its name") from None
    except Exception as error:
        if type(error).__name__ == "ZstdError":
            raise UserError(f"{path} is not a zstandard file: decompress it or correct its name") from None
        raise
