"""Which problems does meta-training optimize? A `Task` is a family of inner problems of one shape, for `torch.vmap`.

"mlp": the paper's (arXiv 2602.19142, section 4): classify 8 × 8 images with an MLP 64-32-10. The others widen the
families for our own recipe: none of them is in the evaluation suite, nor is its data.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.errors import UserError
from . import images

Params = dict[str, Tensor]
Batch = tuple[Tensor, ...]
BATCH = 64
CAP = 1.5 * math.log(images.CLASSES)
SEQUENCES = BATCH // 4  # in a language model's batch


class Task(NamedTuple):
    """A family. Tensors are float32; matrices are (in, out)."""

    name: str
    init: Callable[[torch.Generator], Params]  # fresh parameters of one inner problem
    draw: Callable[[torch.Generator, int], Batch]  # a batch for each of n problems: tensors (n, …)
    loss: Callable[[Params, Batch], Tensor]  # of one problem and its batch: a scalar
    cap: float  # of the loss in the outer objective: 1.5 times that of knowing nothing
    adamw: tuple[str, ...] = ()  # matrices that a deployment gives to AdamW: embeddings and heads


def _weights(generator: torch.Generator, *shape: int, gain: float = 1.0) -> Tensor:
    """Normal, with a deviation of gain / sqrt(fan in)."""
    return torch.randn(shape, generator=generator) * gain / math.sqrt(shape[-2])


def mlp(images_name: str) -> Task:
    """64-32-10 with ReLU on an image set."""
    data = images.load(images_name)

    def init(generator: torch.Generator) -> Params:
        return {
            "w0": _weights(generator, 64, 32, gain=math.sqrt(2)),
            "b0": torch.zeros(32),
            "w1": _weights(generator, 32, 10),
            "b1": torch.zeros(10),
        }

    def loss(p: Params, batch: Batch) -> Tensor:
        x, y = batch
        return F.cross_entropy(torch.relu(x @ p["w0"] + p["b0"]) @ p["w1"] + p["b1"], y)

    return Task(f"mlp/{images_name}", init, _draw_images(data), loss, CAP, ("w1",))


def _draw_images(data: images.Images) -> Callable[[torch.Generator, int], Batch]:
    def draw(generator: torch.Generator, n: int) -> Batch:
        index = torch.randint(len(data.x), (n, BATCH), generator=generator)
        return data.x[index], data.y[index]

    return draw


def conv(images_name: str) -> Task:
    """Two 3 × 3 convolutions (as matrices of unfolded patches) with pooling between, and a linear head."""
    data = images.load(images_name)
    width = 12

    def init(generator: torch.Generator) -> Params:
        return {
            "c0": _weights(generator, 9, width, gain=math.sqrt(2)),
            "c1": _weights(generator, 9 * width, width * 2, gain=math.sqrt(2)),
            "head": _weights(generator, 4 * width * 2, 10),
            "b": torch.zeros(10),
        }

    def layer(x: Tensor, w: Tensor) -> Tensor:  # x (n, channels, side, side)
        patches = F.unfold(x, 3, padding=1)  # (n, channels · 9, side²)
        x = torch.relu(patches.mT @ w).mT.unflatten(-1, x.shape[-2:])
        return F.avg_pool2d(x, 2)

    def loss(p: Params, batch: Batch) -> Tensor:
        x, y = batch
        x = layer(layer(x.view(-1, 1, 8, 8), p["c0"]), p["c1"])
        return F.cross_entropy(x.flatten(1) @ p["head"] + p["b"], y)

    return Task(f"conv/{images_name}", init, _draw_images(data), loss, CAP, ("head",))


def residual(images_name: str) -> Task:
    """A residual MLP with RMS norm: two blocks of width 32, four times as wide inside."""
    data = images.load(images_name)

    def init(generator: torch.Generator) -> Params:
        p = {"in": _weights(generator, 64, 32), "head": _weights(generator, 32, 10, gain=0.1)}
        for k in range(2):
            p |= {f"up{k}": _weights(generator, 32, 128), f"down{k}": _weights(generator, 128, 32, gain=0.5)}
        return p

    def loss(p: Params, batch: Batch) -> Tensor:
        x, y = batch
        x = x @ p["in"]
        for k in range(2):
            x = x + F.gelu(_norm(x) @ p[f"up{k}"]) @ p[f"down{k}"]
        return F.cross_entropy(_norm(x) @ p["head"], y)

    return Task(f"residual/{images_name}", init, _draw_images(data), loss, CAP, ("in", "head"))


def _norm(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def transformer(vocabulary: int = 32, length: int = 24) -> Task:
    """A causal transformer on sequences of a random Markov chain (one, of order 1, with Zipf-like rows).

    The second half of every other sequence repeats its first: there are statistics and induction to be learned.
    """
    generator = torch.Generator().manual_seed(0)
    # Rows as a symmetric Dirichlet distribution of concentration 0.1 has them, nearly: a few large entries.
    table = torch.rand(vocabulary, vocabulary, generator=generator).pow(10)
    table = table / table.sum(-1, keepdim=True)

    def draw(generator: torch.Generator, n: int) -> Batch:
        token = torch.randint(vocabulary, (n, SEQUENCES), generator=generator)
        tokens = [token]
        for _ in range(length - 1):
            token = torch.multinomial(table[token.flatten()], 1, generator=generator).view(n, SEQUENCES)
            tokens.append(token)
        x = torch.stack(tokens, -1)
        half = length // 2
        x[:, ::2, half:] = x[:, ::2, : length - half]
        return (x,)

    return _language_model("transformer/markov", draw, vocabulary, length, width=24)


def text(vocabulary: int = 64, length: int = 32) -> Task:
    """The same on text: the docstrings of the installed torch, in lower case; rare characters are one."""
    data = _docstrings(vocabulary)

    def draw(generator: torch.Generator, n: int) -> Batch:
        start = torch.randint(len(data) - length, (n, SEQUENCES, 1), generator=generator)
        return (data[start + torch.arange(length)],)

    return _language_model("transformer/text", draw, vocabulary, length, width=32)


@cache
def _docstrings(vocabulary: int) -> Tensor:
    """Numbers of characters, int64: 0 is a rare one, the others go by how often they occur."""
    found = {}
    for module in (torch, torch.Tensor, torch.nn, F, torch.optim, torch.linalg, torch.distributions, torch.special, torch.fft):
        for name in sorted(dir(module)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of names that are to go
                about = getattr(module, name, None)
            if callable(about) and isinstance(about.__doc__, str):
                found[about.__doc__.lower()] = None  # each once, in a fixed order
    letters = "\n".join(found)
    common = sorted(Counter(letters).items(), key=lambda item: (-item[1], item[0]))[: vocabulary - 1]
    number = {letter: k + 1 for k, (letter, _) in enumerate(common)}
    return torch.tensor([number.get(letter, 0) for letter in letters])


def _language_model(
    name: str, draw: Callable[[torch.Generator, int], Batch], vocabulary: int, length: int, width: int, layers: int = 2
) -> Task:
    """A causal transformer with two heads on what `draw` gives: numbers (n, SEQUENCES, length)."""

    def init(generator: torch.Generator) -> Params:
        p = {
            "embed": torch.randn(vocabulary, width, generator=generator) * 0.3,
            "position": torch.randn(length - 1, width, generator=generator) * 0.1,
            "head": _weights(generator, width, vocabulary, gain=0.1),
        }
        for k in range(layers):
            for matrix in ("q", "k", "v"):
                p[f"{matrix}{k}"] = _weights(generator, width, width)
            p |= {
                f"o{k}": _weights(generator, width, width, gain=0.5),
                f"up{k}": _weights(generator, width, 4 * width),
                f"down{k}": _weights(generator, 4 * width, width, gain=0.5),
            }
        return p

    def loss(p: Params, batch: Batch) -> Tensor:
        x, y = batch[0][:, :-1], batch[0][:, 1:]
        h = p["embed"][x] + p["position"]
        mask = torch.full((length - 1, length - 1), -torch.inf, device=h.device).triu(1)
        for k in range(layers):
            z = _norm(h)
            q, key, v = ((z @ p[f"{matrix}{k}"]).unflatten(-1, (2, width // 2)).transpose(1, 2) for matrix in ("q", "k", "v"))
            attention = torch.softmax(q @ key.mT / math.sqrt(width // 2) + mask, -1)
            h = h + (attention @ v).transpose(1, 2).flatten(2) @ p[f"o{k}"]
            h = h + F.gelu(_norm(h) @ p[f"up{k}"]) @ p[f"down{k}"]
        return F.cross_entropy((_norm(h) @ p["head"]).flatten(0, 1), y.flatten())

    return Task(name, init, draw, loss, 1.5 * math.log(vocabulary), ("embed", "position", "head"))


def quadratic(size: int = 24, condition: float = 1e4) -> Task:
    """‖A (W − W*) B‖² with noise in the target: curvatures spread over `condition` on both sides of a matrix."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -0.25 * math.log10(condition), size)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator))[0] * spectrum for _ in range(2))
    on = {left.device: (left, right)}  # each device that the problems are on

    def init(generator: torch.Generator) -> Params:
        return {"w": torch.randn(size, size, generator=generator) * 0.3}

    def draw(generator: torch.Generator, n: int) -> Batch:
        return (torch.randn(n, size, size, generator=generator) * 0.3,)

    def loss(p: Params, batch: Batch) -> Tensor:
        device = p["w"].device
        if device not in on:
            on[device] = left.to(device), right.to(device)
        a, b = on[device]
        return (a.mT @ p["w"] @ b + 0.5 * batch[0]).square().mean() * 10

    return Task("quadratic", init, draw, loss, 3.0)


def make(name: str) -> Task:
    """The family of that name, "mlp/digits", "transformer", …; UserError with the list of them otherwise."""
    kind, _, of = name.partition("/")
    if kind in ("mlp", "conv", "residual"):
        return {"mlp": mlp, "conv": conv, "residual": residual}[kind](of)
    if name in ("transformer", "text", "quadratic"):
        return {"transformer": transformer, "text": text, "quadratic": quadratic}[name]()
    raise UserError(
        f"no task family {name!r}; there are mlp/SET, conv/SET, residual/SET (SET: an image set: "
        f"{', '.join((*images.LOCAL, *images.HUB))}), transformer, text and quadratic"
    )
