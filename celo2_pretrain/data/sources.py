"""Where documents come from: files, the installed Python's own sources, or a `datasets` name.

A source has these four:

    identity        dict of what makes it this corpus and no other; an interrupted `prepare` compares it
    read(cursor)    streams (split, text) in an order that depends on nothing but names, from `cursor` on (None: from
                    the beginning); each document is assigned to "train" or "val" by a hash of its name, so that the
                    same corpus gives the same split on every machine
    cursor()        where read() goes on after the document that it gave last; goes through JSON
    fraction()      the part of the corpus that was read, from 0 to 1, or None where nobody knows
"""

import contextlib
import hashlib
import itertools
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from celo2_pretrain.common.errors import UserError
from celo2_pretrain.data.files import PIECE_CHARS, hash_unit, kind_of, list_files, read_file

LARGEST_SOURCE_FILE = 256 * 1024  # bytes; longer files of the standard library are tables, not text

Document = tuple[str, str]  # ("train" | "val", text)


class Interrupted(UserError):
    """What stopped the work may pass (a network, a killed process): it can go on where it was."""


def split_of(index: int, name: str, val_fraction: float) -> str:
    """ "val" for the corpus's first name (validation is never empty) and for a `val_fraction` of the others."""
    return "val" if index == 0 or hash_unit(name, "split") < val_fraction else "train"


class Files:
    """Text, JSON Lines and parquet files. Text files are split by file, JSON Lines and parquet by row; so is a lone
    text file by piece."""

    def __init__(self, paths: list[str], val_fraction: float, field: str = "text"):
        self.files, self.val_fraction, self.field = list_files(paths), val_fraction, field
        self.sizes = [path.stat().st_size for _, path in self.files]
        # Contents are too long to hash; a changed file nearly always has another size or time.
        listing = [[name, size, path.stat().st_mtime_ns] for (name, path), size in zip(self.files, self.sizes)]
        self.identity = {
            "corpus": ", ".join(paths),
            "--val-fraction": val_fraction,
            "--field": field,
            "the corpus's files": f"{len(listing)} ({hashlib.sha256(repr(listing).encode()).hexdigest()[:12]})",
        }
        self.at = {"file": 0, "item": 0, "bytes": 0}

    def read(self, cursor: dict | None = None) -> Iterator[Document]:
        self.at = dict(cursor or {"file": 0, "item": 0, "bytes": 0})
        alone, first, skip = len(self.files) == 1, self.at["file"], self.at["item"]
        for index, (name, path) in enumerate(self.files[first:], first):
            kind = kind_of(path.name) or "text"
            # A lone small file still has to give a training and a validation part.
            piece = min(PIECE_CHARS, max(512, self.sizes[index] // 20)) if alone else PIECE_CHARS
            for item, (text, done) in enumerate(read_file(path, kind, self.field, piece)):
                if index == first and item < skip:
                    continue
                self.at = {"file": index, "item": item + 1, "bytes": done}
                if kind != "text" or alone:
                    yield split_of(item if alone else index + item, f"{name}:{item}", self.val_fraction), text
                else:
                    yield split_of(index, name, self.val_fraction), text

    def cursor(self) -> dict:
        return self.at

    def fraction(self) -> float | None:
        total = sum(self.sizes)
        return (sum(self.sizes[: self.at["file"]]) + self.at["bytes"]) / total if total else None


class PythonSources:
    """About `max_bytes` of text that every machine has: sources and documents of the installed Python's standard
    library, then of the installed packages. Split by file."""

    def __init__(self, max_bytes: int, val_fraction: float):
        self.max_bytes, self.val_fraction = max_bytes, val_fraction
        self.identity = {
            "corpus": "the installed Python's sources",
            "--max-mb": max_bytes / 1e6,
            "--val-fraction": val_fraction,
        }
        self.documents = self.total = 0

    def read(self, cursor: dict | None = None) -> Iterator[Document]:
        skip = cursor["documents"] if cursor else 0  # some megabytes are soon read again
        self.documents = self.total = 0
        for name, path in self.paths():
            try:
                if not 256 <= path.stat().st_size <= LARGEST_SOURCE_FILE:
                    continue
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # a file in another encoding, or that vanished: not worth stopping for
            if self.total + len(text) > self.max_bytes:
                return
            index, self.documents, self.total = self.documents, self.documents + 1, self.total + len(text)
            if index >= skip:
                yield split_of(index, name, self.val_fraction), text

    def paths(self) -> Iterator[tuple[str, Path]]:
        for root in (Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))):
            names = []
            for folder, folders, files in os.walk(root):
                # Installed packages may lie inside the library's folder; hidden tests of broken syntax are not UTF-8.
                left_out = ("site-packages", "dist-packages", "__pycache__", "bad_data")
                folders[:] = [f for f in folders if f not in left_out]
                names += [os.path.relpath(os.path.join(folder, f), root) for f in files if f.endswith((".py", ".rst", ".txt"))]
            yield from ((n, root / n) for n in sorted(names, key=lambda name: (hash_unit(name, "order"), name)))

    def cursor(self) -> dict:
        return {"documents": self.documents}

    def fraction(self) -> float | None:
        return self.total / self.max_bytes


class Dataset:
    """Rows of a Hugging Face dataset ("name" or "name:configuration"), or of one saved with `save_to_disk`.

    From the hub (or a folder of data files) rows are streamed, or with `download` fetched whole and cached first.
    """

    def __init__(self, name: str, val_fraction: float, field: str = "text", split: str = "train", download: bool = False):
        self.name, self.val_fraction, self.field, self.split = name, val_fraction, field, split
        self.identity = {
            "corpus": f"dataset {name}",
            "--dataset-split": split,
            "--val-fraction": val_fraction,
            "--field": field,
            "--download": download,
        }
        with self.told("cannot load"):
            import datasets  # slow to import, and only this source needs it

            datasets.disable_progress_bars()
            if Path(name).is_dir() and any(Path(name).glob("**/dataset_info.json")):
                loaded = datasets.load_from_disk(name)
                self.rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
            else:
                base, _, configuration = name.partition(":")
                self.rows = datasets.load_dataset(base, configuration or None, split=split, streaming=not download)
        self.streamed = isinstance(self.rows, datasets.IterableDataset)
        known = self.rows.info.splits or {}
        self.total = (known[split].num_examples if split in known else None) if self.streamed else len(self.rows)
        self.index = 0

    @contextlib.contextmanager
    def told(self, what: str, kind: type[UserError] = UserError) -> Iterator[None]:
        """Whatever the hub, the network or the dataset's own code raises, in one line."""
        try:
            yield
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            hint = "; the same command goes on where this one stopped" if kind is Interrupted else ""
            raise kind(f"{what} dataset {self.name!r}, split {self.split!r}: {type(error).__name__}: {reason}{hint}") from None

    def read(self, cursor: dict | None = None) -> Iterator[Document]:
        self.index, rows = (cursor or {"index": 0})["index"], self.rows
        if self.streamed:
            # Without a cursor too: an earlier read() of this object may have left it in the middle.
            rows.load_state_dict(cursor["state"] if cursor else self.beginning())
        elif self.index:
            rows = rows.skip(self.index) if self.index < len(rows) else ()
        with self.told("cannot load"):
            rows = iter(rows)
            first = next(rows, None)
        if first is not None and self.field not in first:
            raise UserError(
                f"dataset {self.name!r} has no text column {self.field!r}, it has "
                f"{', '.join(sorted(first))}: name it with --field"
            )
        rows = itertools.chain([] if first is None else [first], rows)
        while True:
            with self.told("cannot read on in", Interrupted):
                row = next(rows, None)
            if row is None:
                return
            text = row[self.field]
            if text is not None and not isinstance(text, str):
                raise UserError(
                    f"dataset {self.name!r}, row {self.index}: column {self.field!r} holds "
                    f"{type(text).__name__}, not text: name another with --field"
                )
            self.index += 1
            yield split_of(self.index - 1, f"{self.name}:{self.index - 1}", self.val_fraction), text or ""

    def beginning(self) -> dict:
        if not hasattr(self, "_beginning"):
            self._beginning = self.rows.state_dict()
        return self._beginning

    def cursor(self) -> dict:
        return {"index": self.index, **({"state": self.rows.state_dict()} if self.streamed else {})}

    def fraction(self) -> float | None:
        return min(1.0, self.index / self.total) if self.total else None
