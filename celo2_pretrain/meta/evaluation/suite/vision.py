"""Images: a vision transformer, a convolutional net and an auto-encoder on patches of photographs.

The photographs ship inside scikit-learn and scikit-image; meta-training uses others of theirs. Which photograph, and
which way up? is learned from the left three quarters of each and measured on patches of the right quarter.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .models import AutoEncoder, ConvNet, ViT
from .problem import Problem, Task

PHOTOS = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/ihc.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/retina.jpg"),
)
NEEDS = (("sklearn", "scikit-learn"), ("skimage", "scikit-image"), ("PIL", "pillow"))
SIDE, HELD_OUT = 16, 512


@cache
def photographs() -> list[Tensor]:
    """(3, height, width) float32 of mean 0 and deviation 1, about 400 pixels high."""
    from PIL import Image

    photos = []
    for module, name in PHOTOS:
        path = Path(find_spec(module).submodule_search_locations[0]) / name
        x = torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)).permute(2, 0, 1)
        while x.shape[1] > 700:
            x = F.avg_pool2d(x[None], 2)[0]
        photos.append((x - x.mean()) / x.std())
    return photos


def patches(generator: torch.Generator, count: int, held_out: bool) -> tuple[Tensor, Tensor]:
    """`count` upright patches (count, 3, SIDE, SIDE) of random places and their photographs' numbers (count,)."""
    photos = photographs()
    which = torch.randint(len(photos), (count,), generator=generator)
    places = torch.rand(count, 2, generator=generator)
    out = torch.empty(count, 3, SIDE, SIDE)
    for k, (photo, (down, right)) in enumerate(zip(which.tolist(), places.tolist())):
        height, width = photos[photo].shape[1:]
        border = width * 3 // 4  # what lies right of it is held out
        first, last = (border, width - SIDE) if held_out else (0, border - SIDE)
        top, left = int(down * (height - SIDE + 1)), first + int(right * (last - first + 1))
        out[k] = photos[photo][:, top : top + SIDE, left : left + SIDE]
    return out, which


def turned(generator: torch.Generator, count: int, held_out: bool) -> tuple[Tensor, Tensor]:
    """Patches turned by 0, 90, 180 or 270 degrees, and 4 · photograph + turn."""
    x, which = patches(generator, count, held_out)
    turn = torch.randint(4, (count,), generator=generator)
    for k in range(1, 4):
        x[turn == k] = torch.rot90(x[turn == k], k, (2, 3))
    return x, 4 * which + turn


def classify(model: torch.nn.Module, grey: bool, batch: int, seed: int) -> Problem:
    def cross_entropy(generator: torch.Generator, count: int, held_out: bool) -> Tensor:
        x, y = turned(generator, count, held_out)
        return F.cross_entropy(model(x.mean(1, keepdim=True) if grey else x), y)

    def loss(step: int) -> Tensor:
        return cross_entropy(torch.Generator().manual_seed(seed * 1_000_003 + step), batch, held_out=False)

    return Problem(model, loss, lambda: cross_entropy(torch.Generator().manual_seed(0), HELD_OUT, True).item())


def build_vit(seed: int) -> Problem:
    torch.manual_seed(seed)
    return classify(ViT(4 * len(PHOTOS), SIDE, 4, 3, 64, 2), grey=False, batch=64, seed=seed)


def build_conv(seed: int) -> Problem:
    torch.manual_seed(seed)
    return classify(ConvNet(4 * len(PHOTOS), 1, 16), grey=True, batch=64, seed=seed)


def build_autoencoder(seed: int) -> Problem:
    torch.manual_seed(seed)
    model = AutoEncoder(SIDE * SIDE, (128, 64, 16))

    def error(generator: torch.Generator, count: int, held_out: bool) -> Tensor:
        x = patches(generator, count, held_out)[0].mean(1).flatten(1)
        x = x - x.mean(1, keepdim=True)
        return F.mse_loss(model(x), x) / x.square().mean()

    def loss(step: int) -> Tensor:
        return error(torch.Generator().manual_seed(seed * 1_000_003 + step), 64, held_out=False)

    return Problem(model, loss, lambda: error(torch.Generator().manual_seed(0), HELD_OUT, True).item())


TASKS = (
    Task(
        "vit-photos",
        "ViT, 2 layers of 64: which photograph is a colour patch of, and which way up?",
        build_vit,
        400,
        "nats",
        NEEDS,
        seconds=12,
    ),
    Task("conv-photos", "convolutional net: the same of grey patches", build_conv, 600, "nats", NEEDS, seconds=9),
    Task(
        "autoencoder-photos",
        "auto-encoder 256-128-64-16 with tanh, on grey patches",
        build_autoencoder,
        1000,
        "share of the variance lost",
        NEEDS,
        seconds=10,
    ),
)
