"""Language models on text that every machine has: the sources of the installed Python's standard library."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from celo2_pretrain.data import sources
from celo2_pretrain.data.tokenizer import SentencePieceTokenizer, train_tokenizer

from .models import GPT, GRULM
from .problem import Problem, Task

MEGABYTES, VAL_FRACTION, PIECES = 3, 0.1, 1024
CONTEXT, VALIDATION = 64, 64  # tokens in a window, windows of the validation


@cache
def documents() -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {"train": [], "val": []}
    for split, text in sources.PythonSources(MEGABYTES * 1_000_000, VAL_FRACTION).read():
        texts[split].append(text)
    return texts


@cache
def tokenizer() -> SentencePieceTokenizer:
    return train_tokenizer(documents()["train"], PIECES, max_bytes=500_000)


@cache
def corpus(pieces: bool) -> tuple[Tensor, Tensor]:
    """(training, validation) ids, int64: sentencepiece's, or bytes."""

    def ids(texts: list[str]) -> Tensor:
        if pieces:
            return torch.tensor([i for text in tokenizer().encode(texts) for i in text])
        return torch.frombuffer(bytearray("".join(texts).encode()), dtype=torch.uint8).long()

    return ids(documents()["train"]), ids(documents()["val"])


def windows(data: Tensor, starts: Tensor) -> Tensor:
    """(len(starts), CONTEXT + 1) ids."""
    return data[starts[:, None] + torch.arange(CONTEXT + 1)]


def language_model(
    model: nn.Module, texts: tuple[Tensor, Tensor], batch: int, seed: int, validation: int = VALIDATION
) -> Problem:
    """Next-token prediction with `model`. `texts`: (training, validation) ids; `validation`: windows measured."""
    train, val = texts
    held_out = windows(val, torch.linspace(0, len(val) - CONTEXT - 1, validation).long())

    def cross_entropy(ids: Tensor) -> Tensor:
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return cross_entropy(windows(train, torch.randint(len(train) - CONTEXT, (batch,), generator=generator)))

    return Problem(model, loss, lambda: cross_entropy(held_out).item())


def gpt(name: str, width: int, layers: int, batch: int, steps: int, pieces: bool, seconds: float) -> Task:
    vocabulary = PIECES if pieces else 256

    def build(seed: int) -> Problem:
        torch.manual_seed(seed)
        return language_model(GPT(vocabulary, width, layers, CONTEXT), corpus(pieces), batch, seed)

    about = f"GPT, {layers} layers of {width}, on {'sentencepiece tokens' if pieces else 'bytes'} of Python's sources"
    return Task(name, about, build, steps, "nats a token" if pieces else "nats a byte", seconds=seconds)


def build_gru(seed: int) -> Problem:
    torch.manual_seed(seed)
    return language_model(GRULM(256, 64, 128), corpus(pieces=False), batch=16, seed=seed)


TASKS = (
    gpt("lm-byte-small", 64, 2, 16, 500, pieces=False, seconds=15),
    gpt("lm-byte-large", 128, 3, 8, 300, pieces=False, seconds=22),
    gpt("lm-piece-small", 64, 2, 16, 400, pieces=True, seconds=15),
    gpt("lm-piece-large", 128, 3, 8, 250, pieces=True, seconds=20),
    Task("gru-byte", "GRU of 128 on bytes of Python's sources", build_gru, 400, "nats a byte", seconds=12),
)
