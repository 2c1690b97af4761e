"""Turn a stream of documents into a folder of token shards, a tokenizer and an index; nothing half-written is left."""
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from celo2_pretrain.data.shards import FORMAT, SPLITS, ShardWriter
from celo2_pretrain.data.sources import Document
from celo2_pretrain.data.tokenizer import load_tokenizer, train_tokenizer
from celo2_pretrain.train.errors import UserError

BATCH_DOCUMENTS = 64
SINGLE = "the corpus is a single document: at least two are needed, for training and for validation"


def batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while batch := list(itertools.islice(documents, BATCH_DOCUMENTS)):
        yield batch


def prepare(
    open_documents: Callable[[], Iterator[Document]], out: str, *, source: str, tokenizer: str | None = None,
    vocab_size: int = 4096, tokenizer_bytes: int = 4_000_000, shard_tokens: int = 100_000_000, overwrite: bool = False,
) -> dict:
    """Write the documents' tokens into the new folder `out`.

    Args:
        open_documents: starts the stream of (split, text) from its beginning; called twice when a tokenizer is trained.
        out: the folder to make. It appears whole, by a rename, or not at all.
        source: a line on where the text is from, kept in the index.
        tokenizer: a sentencepiece `.model` file or a transformers tokenizer; None trains one of `vocab_size` pieces on
            the first `tokenizer_bytes` bytes of training text.
        shard_tokens: tokens per shard.
        overwrite: replace `out` where it exists.

    Returns: the index (see data/shards.py). Raises UserError for an empty corpus, one that cannot be split, a
    vocabulary that the text does not support, or an `out` that exists.
    """
    target = Path(out)
    if target.exists() and not overwrite:
        raise UserError(f"{out!r} exists: choose another --out, or pass --overwrite to replace it")
    if target.exists() and any(target.iterdir()) and not (target / "index.json").exists():
        raise UserError(f"{out!r} exists and is not a folder of prepared data: choose another --out")
    if next(iter(open_documents()), None) is None:
        raise UserError(f"the corpus is empty: {source} holds no text")

    if tokenizer is None:
        started = time.time()
        texts = (text for split, text in open_documents() if split == "train")
        first = next(texts, None)
        if first is None:
            raise UserError(SINGLE)
        tok = train_tokenizer(itertools.chain([first], texts), vocab_size, tokenizer_bytes)
        print(f"trained a tokenizer of {vocab_size} pieces in {time.time() - started:.0f} s", flush=True)
    else:
        tok = load_tokenizer(tokenizer)

    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
    unfinished.mkdir()
    try:
        dtype = "uint16" if tok.vocab_size <= 2**16 else "uint32"
        writers = {split: ShardWriter(unfinished, split, dtype, shard_tokens) for split in SPLITS}
        with tqdm(unit="B", unit_scale=True, desc="tokenize", disable=not sys.stderr.isatty()) as bar:
            for batch in batches(iter(open_documents())):
                for (split, text), ids in zip(batch, tok.encode([text for _, text in batch])):
                    size = len(text.encode())
                    writers[split].write([*ids, tok.eos_id], size)
                    bar.update(size)
        for writer in writers.values():
            writer.close()
        if not writers["train"].tokens or not writers["val"].tokens:
            raise UserError(SINGLE)
        tok.save(unfinished)
        index = {
            "format": FORMAT, "dtype": dtype, "vocab_size": tok.vocab_size, "eos_id": tok.eos_id, "source": source,
            "tokenizer": {"kind": tok.kind, "sha256": tok.fingerprint},
            "splits": {split: writer.summary() for split, writer in writers.items()},
        }
        (unfinished / "index.json").write_text(json.dumps(index, indent=1) + "\n")
        if target.exists():
            shutil.rmtree(target)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return index


def statistics(index: dict, out: str) -> str:
    """A few lines for people about prepared data."""
    kind = index["tokenizer"]["kind"]
    lines = [f"{out}: vocabulary {index['vocab_size']:,} ({kind}), {index['dtype']}, from {index['source']}"]
    for split, part in index["splits"].items():
        ratio = part["bytes"] / part["tokens"]
        lines.append(
            f"  {split:5}  {part['documents']:>9,} documents  {part['bytes'] / 1e6:>9,.1f} MB"
            f"  {part['tokens']:>13,} tokens  {ratio:.2f} bytes a token  {len(part['shards'])} file(s)"
        )
    return "\n".join(lines)
