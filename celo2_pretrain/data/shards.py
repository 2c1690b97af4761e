"""Memory-mapped token shards: `train-00000.bin`, `val-00000.bin`, … and an `index.json` that describes them.

A shard is a plain little-endian array of uint16 (uint32 for vocabularies above 65,536). Documents follow each
other, each ended by the end-of-text id: that id is the document boundary.
"""

import os
import re
from pathlib import Path

import numpy as np

from celo2_pretrain.common.errors import UserError, shown
from celo2_pretrain.common.json_file import look_up, read_json

FORMAT = "celo2-tokens-1"
DTYPES = {"uint16": 2**16, "uint32": 2**31}  # by how many ids they have room for
SPLITS = ("train", "val")


class ShardWriter:
    """Writes one split's tokens into shards of at most `shard_tokens` tokens, and counts what it wrote.

    Args:
        summary: what an earlier writer's summary() gave; the files are cut back to it, and writing goes on there.
    """

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int, summary: dict | None = None):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, np.dtype(dtype), shard_tokens
        self.shards: list[dict] = list(map(dict, summary["shards"])) if summary else []
        counts = summary or {"tokens": 0, "documents": 0, "bytes": 0}
        self.tokens, self.documents, self.bytes = counts["tokens"], counts["documents"], counts["bytes"]
        self.file = None
        names = [shard["file"] for shard in self.shards]
        for path in folder.glob(f"{split}-*.bin"):
            if path.name not in names:
                path.unlink()
        for shard in self.shards:
            if (folder / shard["file"]).is_symlink() or not (folder / shard["file"]).is_file():
                raise UserError(
                    f"{folder / shard['file']} is missing, or not the file that an interrupted call wrote: pass "
                    "--overwrite to begin anew"
                )
            os.truncate(folder / shard["file"], shard["tokens"] * self.dtype.itemsize)
        if self.shards:
            self.file = open(folder / names[-1], "ab")

    def write(self, ids: np.ndarray, documents: int, text_bytes: int) -> None:
        """Append whole documents: their ids, each document's end-of-text id included, that encode so many bytes of
        UTF-8."""
        array = np.asarray(ids, self.dtype)
        self.tokens, self.documents = self.tokens + len(array), self.documents + documents
        self.bytes += text_bytes
        while len(array):
            if self.file is None or self.shards[-1]["tokens"] == self.shard_tokens:
                self.close()
                name = f"{self.split}-{len(self.shards):05d}.bin"
                self.shards.append({"file": name, "tokens": 0})
                self.file = open(self.folder / name, "wb")
            part = array[: self.shard_tokens - self.shards[-1]["tokens"]]
            part.tofile(self.file)
            self.shards[-1]["tokens"] += len(part)
            array = array[len(part) :]

    def flush(self) -> None:
        """Have all that was written on the disk."""
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file is not None:
            self.flush()
            self.file.close()
            self.file = None

    def summary(self) -> dict:
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes, "shards": self.shards}


def read_index(folder: str | Path) -> dict:
    """The index of a folder of prepared data. Raises UserError when it is not one, or is incomplete."""
    folder = Path(folder)
    try:
        exists = folder.exists()
    except OSError as error:  # a name of 300 characters, a folder above it that may not be entered
        raise UserError(f"data folder {shown(str(folder))} can't be read: {error.strerror}") from None
    if not exists:
        make = f"celo2-pretrain prepare --out {folder} …"
        raise UserError(f"data folder {str(folder)!r} does not exist: make it with `{make}`")
    path, again = folder / "index.json", "prepare the data again"
    if not path.is_file():
        raise UserError(f"{str(folder)!r} has no index.json: it is not a folder written by `celo2-pretrain prepare`")
    index = read_json(path, again)
    if index.get("format") != FORMAT:
        raise UserError(f"{path} has format {shown(index.get('format'))}, {FORMAT!r} is expected: {again}")
    try:
        check_index(index)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {again}") from None
    size = np.dtype(index["dtype"]).itemsize
    for split in SPLITS:
        for shard in index["splits"][split]["shards"]:
            file = folder / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["tokens"] * size:
                raise UserError(f"{file} is missing or has another length than index.json says: {again}")
    return index


def check_index(index: dict) -> None:
    """Everything in it that is used. Raises ValueError that names what is wrong."""
    if look_up(index, "dtype", kind=str) not in DTYPES:
        raise ValueError(f"dtype is {shown(index['dtype'])}, not one of {', '.join(DTYPES)}")
    vocabulary = look_up(index, "vocab_size", kind=int, least=2)
    if vocabulary > DTYPES[index["dtype"]]:
        raise ValueError(f"vocab_size is {shown(vocabulary)}, more than {index['dtype']} has numbers")
    if look_up(index, "eos_id", kind=int, least=0) >= vocabulary:
        raise ValueError(f"eos_id is {shown(index['eos_id'])}, outside the vocabulary of {vocabulary}")
    for name in ("kind", "sha256"):
        look_up(index, "tokenizer", name, kind=str)
    for split in SPLITS:
        check_split(look_up(index, "splits", split), split)


def check_split(summary: dict, split: str) -> None:
    """What ShardWriter.summary() gives: names of files beside the index, and how many tokens each holds. ValueError."""
    total = 0
    for name in ("documents", "bytes", "tokens"):
        look_up(summary, name, kind=int, least=0)
    for shard in look_up(summary, "shards", kind=list):
        name = look_up(shard, "file", kind=str)
        if not re.fullmatch(rf"{split}-\d{{5,}}\.bin", name):  # also: no path leads out of the folder
            raise ValueError(f"a shard of {split} has the name {shown(name)}, not {split}-00000.bin or the like")
        total += look_up(shard, "tokens", kind=int, least=0)
    if total != summary["tokens"]:
        raise ValueError(f"the shards of {split} have {shown(total)} tokens, {shown(summary['tokens'])} are said")
    if total and not summary["bytes"]:
        raise ValueError(f"{split} has {shown(total)} tokens of no bytes")


class TokenArray:
    """All tokens of one split, read from disk as they are asked for."""

    def __init__(self, folder: str | Path, split: str):
        index = read_index(folder)
        shards = [s for s in index["splits"][split]["shards"] if s["tokens"]]
        self.files, self.vocab_size = [Path(folder, s["file"]) for s in shards], index["vocab_size"]
        self.maps = [np.memmap(Path(folder, s["file"]), index["dtype"], "r") for s in shards]
        self.starts = np.cumsum([0] + [s["tokens"] for s in shards])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as int64, across shard ends. Shape (count,). Raises UserError for an id outside the
        vocabulary."""
        out = np.empty(count, np.int64)
        done = 0
        while done < count:
            shard = int(np.searchsorted(self.starts, start + done, "right")) - 1
            offset = start + done - int(self.starts[shard])
            part = self.maps[shard][offset : offset + count - done]
            if len(part) == 0:
                raise IndexError(f"tokens [{start}, {start + count}) of {len(self)}")
            if part.max() >= self.vocab_size:
                at = offset + int(part.argmax())
                raise UserError(
                    f"{self.files[shard]}: token {part.max()} at position {at} is outside the vocabulary of "
                    f"{self.vocab_size}, so the file is damaged: prepare the data again"
                )
            out[done : done + len(part)] = part
            done += len(part)
        return out
