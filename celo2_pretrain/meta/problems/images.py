"""What do the inner problems learn from? Small grey-scale images: 8 × 8 pixels, mean 0 and deviation 1 over a set.

The default sets are made of real images that ship inside scikit-learn and scikit-image, so meta-training needs no
network. MNIST, Fashion-MNIST, CIFAR-10 and SVHN, the paper's four, come through `datasets` when there is one.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.errors import UserError, one_line

SIDE, CLASSES = 8, 10
COUNT = 8192  # examples drawn for a set that is made of photographs
PHOTOS = (
    "astronaut.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "moon.png",
    "rocket.jpg",
    "brick.png",
    "grass.png",
    "gravel.png",
)
# name on the hub, image column, label column
HUB = {
    "mnist": ("ylecun/mnist", "image", "label"),
    "fashion_mnist": ("zalando-datasets/fashion_mnist", "image", "label"),
    "cifar10": ("uoft-cs/cifar10", "img", "label"),
    "svhn": ("ufldl-stanford/svhn:cropped_digits", "image", "label"),
}


class Images(NamedTuple):
    """A labelled set: `x` (n, 64) float32, `y` (n,) int64 below 10."""

    x: Tensor
    y: Tensor


@cache
def load(name: str) -> Images:
    """A whole set of LOCAL or HUB, the same in every call.

    Raises UserError for another name, and where a package or the network is missing.
    """
    if name in LOCAL:
        x, y = LOCAL[name]()
    elif name in HUB:
        x, y = _hub(name)
    else:
        raise UserError(f"no image set {name!r}; there are {', '.join((*LOCAL, *HUB))}")
    x = x.float().flatten(1)
    return Images((x - x.mean()) / x.std(), y.long())


def _digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits: 1,797 images, 10 classes; values in [0, 1]."""
    _need("sklearn", "scikit-learn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images) / 16, torch.from_numpy(digits.target)


def _patches(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Squares of random place and size out of the photographs, (COUNT, 8, 8) in [0, 1], and which photograph."""
    photos = _photographs()
    which = torch.randint(len(photos), (COUNT,), generator=generator)
    out = torch.empty(COUNT, SIDE, SIDE)
    for k, photo in enumerate(which.tolist()):
        image, scale = photos[photo], 2 ** int(torch.randint(3, (), generator=generator))  # 8, 16, 32 pixels wide
        top, left = (int(torch.randint(size - SIDE * scale + 1, (), generator=generator)) for size in image.shape)
        square = image[top : top + SIDE * scale, left : left + SIDE * scale]
        out[k] = F.avg_pool2d(square[None], scale)[0] if scale > 1 else square
    return out, which


def _photos() -> tuple[Tensor, Tensor]:
    """From which of ten photographs is the patch?"""
    return _patches(torch.Generator().manual_seed(0))


def _digits_on_photos() -> tuple[Tensor, Tensor]:
    """Which digit stands before a photograph, bright or dark? (As in street-view numbers.)"""
    generator = torch.Generator().manual_seed(1)
    patches, _ = _patches(generator)
    digits, labels = _digits()
    which = torch.randint(len(digits), (COUNT,), generator=generator)
    sign = torch.randint(2, (COUNT, 1, 1), generator=generator) * 2 - 1
    return 0.5 * patches + sign * 0.5 * digits[which].float(), labels[which]


def _orientation() -> tuple[Tensor, Tensor]:
    """In which of ten sectors does the patch's mean gradient point?"""
    patches, _ = _patches(torch.Generator().manual_seed(2))
    dy = (patches[:, 1:] - patches[:, :-1]).mean((1, 2))
    dx = (patches[:, :, 1:] - patches[:, :, :-1]).mean((1, 2))
    sector = (torch.atan2(dy, dx) / (2 * torch.pi) % 1 * CLASSES).long().clamp_max(CLASSES - 1)
    contrast = (patches - patches.mean((1, 2), keepdim=True)) / (patches.std((1, 2), keepdim=True) + 0.02)
    return contrast, sector


LOCAL = {"digits": _digits, "photos": _photos, "digits_on_photos": _digits_on_photos, "orientation": _orientation}


@cache
def _photographs() -> list[Tensor]:
    """Grey, (h, w) in [0, 1], at most 400 pixels on the shorter side."""
    _need("skimage", "scikit-image")
    from PIL import Image

    folder = Path(find_spec("skimage").submodule_search_locations[0]) / "data"
    grey = []
    for name in PHOTOS:
        x = torch.from_numpy(np.asarray(Image.open(folder / name).convert("L"), dtype=np.float32)) / 255
        while min(x.shape) > 400:
            x = F.avg_pool2d(x[None], 2)[0]
        grey.append(x)
    return grey


def _hub(name: str) -> tuple[Tensor, Tensor]:
    from datasets import load_dataset

    path, image, label = HUB[name]
    path, _, config = path.partition(":")
    try:
        rows = load_dataset(path, config or None, split="train")
    except Exception as error:
        raise UserError(
            f"image set {name!r} is {path} on the Hugging Face hub, which could not be loaded "
            f"({one_line(error)}); offline, use {', '.join(LOCAL)}"
        ) from error
    x = torch.stack([torch.from_numpy(np.asarray(row.convert("L"), dtype=np.float32)) for row in rows[image]])
    return F.adaptive_avg_pool2d(x[:, None], SIDE)[:, 0] / 255, torch.tensor(rows[label])


def _need(module: str, package: str) -> None:
    if find_spec(module) is None:
        raise UserError(
            f"the bundled images are those of {package}, which isn't installed: pip install 'celo2-pretrain[meta]'"
        )
