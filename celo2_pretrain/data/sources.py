"""Where documents come from: text files, JSON Lines, the installed Python's own sources, or a `datasets` name.

Every source is streamed, in an order that depends on nothing but the names of its files, and each document is
assigned to "train" or "val" by a hash of its name: the same corpus gives the same split on every machine.
"""
import gzip
import hashlib
import io
import itertools
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from celo2_pretrain.train.errors import UserError

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".tex", ".html", ".text"}
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
PIECE_CHARS = 64 * 1024  # longer text files are cut at line ends, so that no file is ever whole in memory
LARGEST_SOURCE_FILE = 256 * 1024  # bytes; longer files of the standard library are tables, not text

Document = tuple[str, str]  # ("train" | "val", text)


def hash_unit(name: str, purpose: str) -> float:
    """A number in [0, 1) that depends on `name` and `purpose` only."""
    digest = hashlib.blake2b(f"{purpose}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def split_of(index: int, name: str, val_fraction: float) -> str:
    """"val" for the corpus's first name (validation is never empty) and for a `val_fraction` of the others."""
    return "val" if index == 0 or hash_unit(name, "split") < val_fraction else "train"


def list_files(paths: list[str]) -> list[tuple[str, Path]]:
    """Readable files below `paths` as (name relative to the given path, path), in a fixed shuffled order.

    A file that is named itself is taken whatever its suffix; in a folder only text and JSON Lines files are.
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
                    if path.suffix in TEXT_SUFFIXES or name.endswith((*JSONL_SUFFIXES, ".txt.gz")):
                        relative = str(path.relative_to(root))
                        found[relative if len(paths) == 1 else f"{root}/{relative}"] = path
        else:
            raise UserError(f"corpus path {given!r} does not exist: give a file or folder of text or JSON Lines")
    if not found:
        raise UserError(
            f"no text in {', '.join(map(str, paths))}: expected files ending in "
            f"{', '.join(sorted(TEXT_SUFFIXES))}, {', '.join(JSONL_SUFFIXES)}"
        )
    return sorted(found.items(), key=lambda item: (hash_unit(item[0], "order"), item[0]))


def open_text(path: Path) -> io.TextIOBase:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")


def read_pieces(path: Path, piece_chars: int) -> Iterator[str]:
    """The text of `path` in pieces of about `piece_chars` characters that end with a line (or at twice the length)."""
    with open_text(path) as file:
        while piece := file.read(piece_chars):
            yield piece + file.readline(piece_chars)


def read_json_lines(path: Path, field: str) -> Iterator[str]:
    with open_text(path) as file:
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
            yield record[field]


def from_files(paths: list[str], val_fraction: float, field: str = "text") -> Iterator[Document]:
    """Documents of text and JSON Lines files. Text files are split by file, JSON Lines by line; so is a lone text
    file by piece."""
    files = list_files(paths)
    alone = len(files) == 1
    for index, (name, path) in enumerate(files):
        try:
            if name.endswith(JSONL_SUFFIXES) or path.name.endswith(JSONL_SUFFIXES):
                for line, text in enumerate(read_json_lines(path, field)):
                    yield split_of(line if alone else index + line, f"{name}:{line}", val_fraction), text
            else:
                # A lone small file still has to give a training and a validation part.
                size = min(PIECE_CHARS, max(512, path.stat().st_size // 20)) if alone else PIECE_CHARS
                for piece, text in enumerate(read_pieces(path, size)):
                    if alone:
                        yield split_of(piece, f"{name}:{piece}", val_fraction), text
                    else:
                        yield split_of(index, name, val_fraction), text
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it or leave it out") from None
        except gzip.BadGzipFile:
            raise UserError(f"{path} is not a gzip file: decompress it or correct its name") from None


def from_python(max_bytes: int, val_fraction: float) -> Iterator[Document]:
    """About `max_bytes` of text that every machine has: sources and documents of the installed Python's standard
    library, then of the installed packages. Split by file."""
    library = Path(sysconfig.get_path("stdlib"))
    packages = Path(sysconfig.get_path("purelib"))
    total = index = 0
    for root in (library, packages):
        names = []
        for folder, folders, files in os.walk(root):
            # Installed packages may lie inside the library's folder; hidden tests of broken syntax are not UTF-8.
            folders[:] = [f for f in folders if f not in ("site-packages", "dist-packages", "__pycache__", "bad_data")]
            texts = [f for f in files if f.endswith((".py", ".rst", ".txt"))]
            names += [os.path.relpath(os.path.join(folder, f), root) for f in texts]
        for name in sorted(names, key=lambda name: (hash_unit(name, "order"), name)):
            path = root / name
            try:
                if not 256 <= path.stat().st_size <= LARGEST_SOURCE_FILE:
                    continue
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # a file in another encoding, or that vanished: not worth stopping for
            if total + len(text) > max_bytes:
                return
            total += len(text)
            yield split_of(index, name, val_fraction), text
            index += 1


def from_dataset(name: str, val_fraction: float, field: str = "text", split: str = "train") -> Iterator[Document]:
    """Documents of a Hugging Face dataset ("name" or "name:configuration"), or of one saved with `save_to_disk`."""
    import datasets  # slow to import, and only this source needs it

    base, _, configuration = name.partition(":")
    try:
        if Path(name).is_dir() and any(Path(name).glob("**/dataset_info.json")):
            loaded = datasets.load_from_disk(name)
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(base, configuration or None, split=split, streaming=True)
        rows = iter(rows)
        first = next(rows, None)
    except Exception as error:  # whatever the hub, the network or the dataset's own code raises
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"cannot load dataset {name!r}, split {split!r}: {type(error).__name__}: {reason}") from None
    if first is not None and not isinstance(first.get(field), str):
        columns = ", ".join(sorted(first))
        raise UserError(f"dataset {name!r} has no text column {field!r}, it has {columns}: name it with --field")
    for index, row in enumerate(itertools.chain([] if first is None else [first], rows)):
        yield split_of(index, f"{name}:{index}", val_fraction), row[field]
