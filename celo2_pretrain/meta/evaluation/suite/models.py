"""The small models of the suite, in plain torch.

Every hidden matrix is the weight of an `nn.Linear` of its own (separate Q, K, V; convolutions as matrices), so that
optimizers that orthogonalise or precondition matrices all see the same ones. Output layers are called `head`, position
and token tables are `nn.Embedding`: those and the vectors are what `param_groups` leaves to AdamW.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, width)
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block with a GELU MLP of four times the width."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Decoder-only language model with learned positions and an untied head: (batch, length) ids → logits."""

    def __init__(self, vocabulary: int, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, width // 32, causal=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:
            for last in (block.attention.out, block.down):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class GRULM(nn.Module):
    """Recurrent language model: (batch, length) ids → logits."""

    def __init__(self, vocabulary: int, width: int, hidden: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.rnn = nn.GRU(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.tokens(ids))[0])


class ViT(nn.Module):
    """Vision transformer with a mean over tokens: (batch, channels, side, side) → logits."""

    def __init__(self, classes: int, side: int, patch: int, channels: int, width: int, layers: int) -> None:
        super().__init__()
        self.patch = patch
        self.patches = nn.Linear(channels * patch * patch, width)
        self.positions = nn.Embedding((side // patch) ** 2, width)
        self.blocks = nn.Sequential(*(Block(width, width // 32, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)  # (batch, tokens, channels · patch²)
        x = self.patches(tokens) + self.positions.weight
        return self.head(self.norm(self.blocks(x)).mean(1))


class Convolution(nn.Linear):
    """A 3 × 3 convolution whose weight is kept as the matrix (out, in · 9)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(9 * inputs, outputs)
        self.inputs, self.stride = inputs, stride

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(-1, self.inputs, 3, 3)
        return F.conv2d(x, weight, self.bias, stride=self.stride, padding=1)


class ConvNet(nn.Module):
    """Four convolutions with group norm, halving the side twice: (batch, channels, side, side) → logits."""

    def __init__(self, classes: int, channels: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in (
            (channels, width, 1),
            (width, 2 * width, 2),
            (2 * width, 2 * width, 1),
            (2 * width, 4 * width, 2),
        ):
            layers += [Convolution(inputs, outputs, stride), nn.GroupNorm(4, outputs), nn.ReLU()]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images).mean((2, 3)))


class AutoEncoder(nn.Module):
    """A deep bottleneck: (batch, size) → (batch, size)."""

    def __init__(self, size: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        sizes = (size, *widths, *widths[-2::-1])
        layers: list[nn.Module] = []
        for inputs, outputs in zip(sizes, sizes[1:]):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(sizes[-1], size)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


class ActorCritic(nn.Module):
    """Two tanh layers; the head gives the actions' logits and, last, the value."""

    def __init__(self, observations: int, actions: int, width: int) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.Linear(observations, width), nn.Linear(width, width)
        self.head = nn.Linear(width, actions + 1)
        for layer in (self.layer1, self.layer2):
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.head.weight *= 0.1  # nearly uniform actions at first

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.head(torch.tanh(self.layer2(torch.tanh(self.layer1(x)))))
        return out[..., :-1], out[..., -1]
