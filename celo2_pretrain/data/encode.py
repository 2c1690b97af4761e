"""Documents to token ids on many cores: chunks go out to worker processes and come back in their order, so what is
written doesn't depend on the number of workers."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from celo2_pretrain.data.sources import Document, Interrupted
from celo2_pretrain.data.tokenizer import load_tokenizer

CHUNK_CHARS = 1_000_000
CHUNK_DOCUMENTS = 512
INLINE_CHUNKS = 8  # a small corpus is done before worker processes have started


@dataclass
class Chunk:
    """Documents that follow each other in the corpus, and where it goes on after them."""

    documents: list[Document]
    cursor: dict
    fraction: float | None


@dataclass
class Encoded:
    """The ids of a chunk's documents one after the other, each with its end-of-text id; counts per document."""

    ids: np.ndarray  # the shards' dtype (tokens,)
    lengths: np.ndarray  # int64 (documents,), tokens
    sizes: np.ndarray  # int64 (documents,), bytes of UTF-8


def chunks(source, cursor: dict | None) -> Iterator[Chunk]:
    """The source's non-empty documents in chunks whose ends depend on the documents only."""
    documents, chars = [], 0
    for split, text in source.read(cursor):
        if not text:
            continue
        documents.append((split, text))
        chars += len(text)
        if chars >= CHUNK_CHARS or len(documents) == CHUNK_DOCUMENTS:
            yield Chunk(documents, source.cursor(), source.fraction())
            documents, chars = [], 0
    if documents:
        yield Chunk(documents, source.cursor(), source.fraction())


def encode(tokenizer, texts: list[str], dtype: str) -> Encoded:
    ids = tokenizer.encode(texts)
    lengths = np.array([len(document) + 1 for document in ids], np.int64)
    flat = np.full(lengths.sum(), tokenizer.eos_id, dtype)
    start = 0
    for document in ids:
        flat[start : start + len(document)] = document
        start += len(document) + 1
    return Encoded(flat, lengths, np.array([len(text.encode()) for text in texts], np.int64))


def start_worker(folder: Path) -> None:
    global worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    threading.Thread(target=die_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    worker_tokenizer = load_tokenizer(folder)


def die_with_parent() -> None:
    multiprocessing.parent_process().join()  # a killed parent leaves its workers waiting for ever
    os._exit(1)


def encode_in_worker(texts: list[str], dtype: str) -> Encoded:
    return encode(worker_tokenizer, texts, dtype)


def encode_in_order(stream: Iterator[Chunk], folder: Path, dtype: str, workers: int | None) -> Iterator[tuple[Chunk, Encoded]]:
    """Each chunk with its ids, in the order of `stream`; at most a few chunks a worker are in memory.

    Args:
        folder: where the tokenizer was saved.
        workers: processes; 1 encodes in this one, None takes all cores once the corpus turns out not to be small.

    Raises Interrupted when a worker dies, and what `stream` raises.
    """
    inline = INLINE_CHUNKS if workers is None else 0
    workers = workers or len(os.sched_getaffinity(0))
    tokenizer = load_tokenizer(folder)
    for number, chunk in enumerate(stream, 1):
        yield chunk, encode(tokenizer, [text for _, text in chunk.documents], dtype)
        if workers > 1 and number >= inline:
            break
    if workers == 1:
        return
    context = multiprocessing.get_context("forkserver")  # fork itself would copy the parent's library threads' locks
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, context, start_worker, (folder,))
    waiting = deque()
    try:
        for chunk in stream:
            waiting.append((chunk, pool.submit(encode_in_worker, [text for _, text in chunk.documents], dtype)))
            if len(waiting) > 2 * workers:
                chunk, future = waiting.popleft()
                yield chunk, future.result()
        while waiting:
            chunk, future = waiting.popleft()
            yield chunk, future.result()
    except BrokenProcessPool:
        raise Interrupted(
            "a worker process died, probably for want of memory: the same command goes on where this one "
            "stopped; give fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
