"""Memory-mapped token shards: `train-00000.bin`, `val-00000.bin`, … and an `index.json` that describes them.

A shard is a plain little-endian array of uint16 (uint32 for vocabularies above 65,536). Documents follow each
other, each ended by the end-of-text id: that id is the document boundary.
"""
import json
import os
from pathlib import Path

import numpy as np

from celo2_pretrain.train.errors import UserError

FORMAT = "celo2-tokens-1"
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
    if not folder.exists():
        make = f"celo2-pretrain prepare --out {folder} …"
        raise UserError(f"data folder {str(folder)!r} does not exist: make it with `{make}`")
    path = folder / "index.json"
    if not path.is_file():
        raise UserError(f"{str(folder)!r} has no index.json: it is not a folder written by `celo2-pretrain prepare`")
    try:
        index = json.loads(path.read_text())
    except json.JSONDecodeError:
        raise UserError(f"{path} is damaged: prepare the data again") from None
    if index.get("format") != FORMAT:
        raise UserError(f"{path} has format {index.get('format')!r}, {FORMAT!r} is expected: prepare the data again")
    size = np.dtype(index["dtype"]).itemsize
    for split in SPLITS:
        for shard in index["splits"][split]["shards"]:
            file = folder / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["tokens"] * size:
                raise UserError(f"{file} is missing or has another length than index.json says: prepare the data again")
    return index


class TokenArray:
    """All tokens of one split, read from disk as they are asked for."""

    def __init__(self, folder: str | Path, split: str):
        index = read_index(folder)
        shards = [s for s in index["splits"][split]["shards"] if s["tokens"]]
        self.maps = [np.memmap(Path(folder, s["file"]), index["dtype"], "r") for s in shards]
        self.starts = np.cumsum([0] + [s["tokens"] for s in shards])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as int64, across shard ends. Shape (count,)."""
        out = np.empty(count, np.int64)
        done = 0
        while done < count:
            shard = int(np.searchsorted(self.starts, start + done, "right")) - 1
            offset = start + done - int(self.starts[shard])
            part = self.maps[shard][offset : offset + count - done]
            if len(part) == 0:
                raise IndexError(f"tokens [{start}, {start + count}) of {len(self)}")
            out[done : done + len(part)] = part
            done += len(part)
        return out
