"""Turn a stream of documents into a folder of token shards, a tokenizer and an index.

Work happens in a hidden folder beside `out`, which becomes `out` by a rename. Every few seconds it records how far it
is (progress.json), so that the same call goes on after an interruption and ends with the same bytes. What is wrong
with the input leaves nothing behind.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from celo2_pretrain.common.durable import write_atomically
from celo2_pretrain.common.errors import UserError
from celo2_pretrain.common.json_file import read_json
from celo2_pretrain.data.encode import Chunk, Encoded, chunks, encode_in_order
from celo2_pretrain.data.progress import Progress
from celo2_pretrain.data.shards import FORMAT, SPLITS, ShardWriter, check_split
from celo2_pretrain.data.sources import Interrupted
from celo2_pretrain.data.statistics import Statistics
from celo2_pretrain.data.tokenizer import load_tokenizer, train_tokenizer

SAVE_SECONDS = 10
SINGLE = "the corpus is a single document: at least two are needed, for training and for validation"


def prepare(
    source,
    out: str,
    *,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    tokenizer_bytes: int = 4_000_000,
    shard_tokens: int = 100_000_000,
    workers: int | None = 1,
    overwrite: bool = False,
) -> dict:
    """Write the source's documents as tokens into the new folder `out`.

    Args:
        source: where the documents come from (data/sources.py); read twice when a tokenizer is trained.
        out: the folder to make. It appears whole, by a rename, or not at all.
        tokenizer: a sentencepiece `.model` file or a transformers tokenizer; None trains one of `vocab_size` pieces on
            the first `tokenizer_bytes` bytes of training text.
        shard_tokens: tokens per shard.
        workers: processes that tokenize (data/encode.py); the result is the same with any number.
        overwrite: replace `out` where it exists, and an interrupted call with other arguments.

    Returns: the index (see data/shards.py). Raises UserError for an empty corpus, one that cannot be split, a
    vocabulary that the text does not support, an `out` that exists, or an interrupted call with other arguments; and
    Interrupted when the same call can go on later.
    """
    target = Path(out)
    if target.exists() and not overwrite:
        raise UserError(f"{out!r} exists: choose another --out, or pass --overwrite to replace it")
    if target.exists() and any(target.iterdir()) and not (target / "index.json").exists():
        raise UserError(f"{out!r} exists and is not a folder of prepared data: choose another --out")
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    arguments = {**source.identity, "--shard-tokens": shard_tokens}
    if given:
        arguments["--tokenizer"] = f"{tokenizer} ({given.fingerprint[:12]})"
    else:
        arguments |= {"--tokenizer": "trained here", "--vocab-size": vocab_size, "--tokenizer-mb": tokenizer_bytes / 1e6}

    work = target.with_name(f".{target.name}.unfinished")
    state = read_progress(work, arguments, overwrite)
    tok = train(source, vocab_size, tokenizer_bytes) if state is None and given is None else given
    target.parent.mkdir(parents=True, exist_ok=True)
    with only_one(work.with_name(f"{work.name}.lock"), out):
        if state is not None and (state := read_progress(work, arguments, overwrite)) is None:
            raise UserError(f"another `prepare` has just finished {out!r}: choose another --out, or call again")
        if state is None:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            tok.save(work)
        else:
            for path in work.glob(".*"):
                path.unlink()  # half written when the earlier call was killed
            done = state["statistics"]["bytes"] / 1e6
            print(f"going on after {done:,.1f} MB that an interrupted call has done", flush=True)
        try:
            index = write(source, work, arguments, state, shard_tokens, workers)
        except KeyboardInterrupt:
            print("interrupted: the same command goes on where this one stopped", flush=True)
            raise
        except UserError as error:
            if not isinstance(error, Interrupted):
                shutil.rmtree(work, ignore_errors=True)
            raise
        if target.exists():
            shutil.rmtree(target)
        work.rename(target)
        (target / "progress.json").unlink()  # last, as a rename that didn't happen needs it
    return index


@contextlib.contextmanager
def only_one(path: Path, out: str) -> Iterator[None]:
    """Hold the lock file `path`. Raises UserError when another process does."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another `prepare` is writing {out!r}: wait for it, or choose another --out") from None
        try:
            yield
        finally:
            path.unlink()


def read_progress(work: Path, arguments: dict, overwrite: bool) -> dict | None:
    """How far an interrupted call with these arguments came; None where there is none (or a replaced one)."""
    path, again = work / "progress.json", "pass --overwrite to begin anew"
    if not path.exists():
        return None
    try:
        state = read_json(path, again)
        if state.pop("sha256", None) != fingerprint(state):
            raise UserError(f"{path} is damaged: {again}")
        for split, summary in state["splits"].items():
            check_split(summary, split)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {again}") from None
    except UserError:
        if overwrite:
            return None
        raise
    for name in sorted(arguments.keys() | state["arguments"].keys()):
        ours, theirs = arguments.get(name), state["arguments"].get(name)
        if ours != theirs and not overwrite:
            raise UserError(
                f"an interrupted call left {str(work)!r}, made with {name} = {theirs}, not {ours}: give the "
                f"same arguments to go on, or pass --overwrite to begin anew"
            )
        if ours != theirs:
            return None
    return state


def fingerprint(record: dict) -> str:
    """What tells that a record is as it was written, beyond being JSON."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def train(source, vocab_size: int, max_bytes: int):
    started = time.time()
    documents = source.read()
    if (first := next(documents, None)) is None:
        raise UserError(f"the corpus is empty: {source.identity['corpus']} holds no text")
    texts = (text for split, text in itertools.chain([first], documents) if split == "train" and text)
    if (text := next(texts, None)) is None:
        raise UserError(SINGLE)
    tokenizer = train_tokenizer(itertools.chain([text], texts), vocab_size, max_bytes)
    print(f"trained a tokenizer of {vocab_size} pieces in {time.time() - started:.0f} s", flush=True)
    return tokenizer


def write(source, work: Path, arguments: dict, state: dict | None, shard_tokens: int, workers: int | None) -> dict:
    """Tokenize the source from where `state` says into `work`, and return the index, which is written last."""
    tok = load_tokenizer(work)
    dtype = "uint16" if tok.vocab_size <= 2**16 else "uint32"
    done = state or {"cursor": None, "fraction": None, "splits": {}, "statistics": None}
    writers = {split: ShardWriter(work, split, dtype, shard_tokens, done["splits"].get(split)) for split in SPLITS}
    counts = Statistics(tok.vocab_size, done["statistics"])
    progress = Progress(done["fraction"], int(counts.lengths.sum()), int(counts.ids.sum()), counts.bytes)

    def save(cursor: dict | None, fraction: float | None) -> None:
        for writer in writers.values():
            writer.flush()
        record = {
            "arguments": arguments,
            "cursor": cursor,
            "fraction": fraction,
            "statistics": counts.state(),
            "splits": {split: writer.summary() for split, writer in writers.items()},
        }
        write_atomically(work / "progress.json", json.dumps(record | {"sha256": fingerprint(record)}))

    try:
        if state is None:
            save(None, None)
        saved = time.time()
        for chunk, encoded in encode_in_order(chunks(source, done["cursor"]), work, dtype, workers):
            add(chunk, encoded, writers, counts)
            progress.add(chunk.fraction, len(encoded.lengths), len(encoded.ids), int(encoded.sizes.sum()))
            if time.time() - saved >= SAVE_SECONDS:
                save(chunk.cursor, chunk.fraction)
                saved = time.time()
    finally:
        progress.close()
        for writer in writers.values():
            writer.close()
    if not counts.ids.sum():
        raise UserError(f"the corpus is empty: {source.identity['corpus']} holds no text")
    if not writers["train"].tokens or not writers["val"].tokens:
        raise UserError(SINGLE)
    index = {
        "format": FORMAT,
        "dtype": dtype,
        "vocab_size": tok.vocab_size,
        "eos_id": tok.eos_id,
        "source": source.identity["corpus"],
        "tokenizer": {"kind": tok.kind, "sha256": tok.fingerprint},
        "splits": {split: writer.summary() for split, writer in writers.items()},
        "statistics": counts.summary(tok.unk_id, tok.byte_ids()),
    }
    write_atomically(work / "index.json", json.dumps(index, indent=1) + "\n")
    return index


def add(chunk: Chunk, encoded: Encoded, writers: dict[str, ShardWriter], counts: Statistics) -> None:
    counts.add(encoded.ids, encoded.lengths, int(encoded.sizes.sum()))
    splits = np.array([split for split, _ in chunk.documents])
    for split, writer in writers.items():
        chosen = splits == split
        ids = encoded.ids[np.repeat(chosen, encoded.lengths)]
        writer.write(ids, int(chosen.sum()), int(encoded.sizes[chosen].sum()))
