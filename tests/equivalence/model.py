"""The model of the matrix: small, and awkward in every way that has broken a sharded optimizer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from celo2_pretrain.optimizer.matrices.param_groups import TAG, Tag
from celo2_pretrain.optimizer.matrices.views import MatrixView

D, VOCAB, LENGTH, MICRO_BATCH = 13, 31, 7, 2


class Awkward(nn.Module):
    """A language model of prime sizes. `scalar_shape`: () where the engine takes 0-D parameters."""

    def __init__(self, scalar_shape: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCAB, D)
        self.qkv = nn.Linear(D, 3 * D)  # fused: three matrices
        self.heads = nn.Linear(D, 10, bias=False)  # two heads of 5
        self.square = nn.Linear(D, D, bias=False)  # a tie of step 3: only the view's orientation decides
        self.fc = nn.Linear(D, 29)
        self.proj = nn.Linear(29, D, bias=False)
        self.uneven = nn.Linear(D, 11)  # parts of 7, 3 and 1
        self.conv = nn.Conv2d(2, 5, (3, 2), padding=(1, 0), bias=False)
        self.frozen = nn.Linear(D, D, bias=False).requires_grad_(False)
        self.ln = nn.LayerNorm(D)
        self.head = nn.Linear(D, VOCAB, bias=False)
        self.head.weight = self.emb.weight  # tied
        self.experts = nn.Parameter(torch.randn(3, D, 5) / D**0.5)
        self.tiny = nn.Parameter(torch.randn(1, 2))  # smaller than the world
        self.vector = nn.Parameter(torch.randn(11))
        self.gain = nn.Parameter(torch.ones(scalar_shape))
        self.sometimes = nn.Parameter(torch.randn(7, 5) / 3)
        self.interleaved = nn.Linear(D, 18, bias=False)  # 3 heads, each with its 2 rows of Q, of K and of V
        self.pairs = nn.Parameter(torch.randn(2, D, 6) / D**0.5)  # experts whose columns alternate: gate, up, gate, …
        self.flat = nn.Conv1d(2, 11, 3, padding=1, bias=False)  # one matrix (2 · 3, 11)

    def forward(self, x: Tensor, use_sometimes: bool, factor: float) -> Tensor:
        """Token numbers (batch, length) → the loss, float32, times `factor` (which makes fp16 overflow on demand)."""
        h = self.emb(x)
        q, k, v = self.qkv(h).chunk(3, -1)
        h = h + q * k.sigmoid() + v
        h = h + self.square(h).tanh() + self.frozen(h)
        h = h + F.pad(self.heads(h).tanh(), (0, D - 10))
        h = h + self.proj(self.fc(h).relu())
        uneven = self.uneven(h)
        h = h + F.pad(uneven.tanh() + self.vector * uneven.sigmoid(), (0, D - 11))
        image = h[..., :12].unflatten(-1, (2, 6)).movedim(-2, 1)  # (batch, 2, length, 6)
        h = h + F.pad(self.conv(image).movedim(1, 2).flatten(2)[..., :24].unflatten(-1, (2, 12)).sum(-2), (0, 1))
        h = h + torch.einsum("btd,edf->btef", h, self.experts).flatten(2)[..., :D].tanh()
        q, k, v = self.interleaved(h).unflatten(-1, (3, 3, 2)).unbind(-2)
        h = h + F.pad((q * k.sigmoid() + v).flatten(2), (0, D - 6))
        gate, up = torch.einsum("btd,edf->btef", h, self.pairs).unflatten(-1, (3, 2)).unbind(-1)
        h = h + F.pad((gate.sigmoid() * up).flatten(2), (0, D - 6))
        h = h + F.pad(self.flat(h[..., :2].mT).mT, (0, D - 11))
        h = h + (h * self.tiny[0, 0] + self.tiny[0, 1]).tanh()
        if use_sometimes:
            h = h + F.pad(h[..., :7] @ self.sometimes, (0, D - 5))
        logits = self.head(self.ln(h)) * self.gain
        # Pulls `tiny` one way: where gradients cancel in the momenta of two elements, nothing but round-off is left.
        pull = (self.tiny.float() - 4).square().mean()
        return (F.cross_entropy(logits.float().flatten(0, 1), x.roll(-1, 1).flatten()) + pull) * factor


VIEWS = {
    "qkv.weight": MatrixView(transpose=True, split=(D, D, D)),
    "heads.weight": MatrixView(transpose=True, head_dim=5),
    "square.weight": MatrixView(transpose=True),
    "fc.weight": MatrixView(transpose=True),
    "proj.weight": MatrixView(transpose=True),
    "uneven.weight": MatrixView(transpose=True, split=(7, 3, 1)),
    "experts": MatrixView(batch=1),
    "interleaved.weight": MatrixView(transpose=True, split=(2, 2, 2), repeats=3),
    "pairs": MatrixView(batch=1, split=(1, 1), repeats=3),
    "flat.weight": MatrixView(transpose=True, flatten=True),
}

# (rule, orthogonalize, lr, weight decay, AdamW's multiplier, parameters). Rates are large, so that a float32's rounding
# of the parameter (6e-8 of it) is small beside the update. One group holds fewer elements than there may be ranks.
GROUPS = (
    (
        "celo2",
        True,
        0.05,
        0.1,
        1.0,
        ("qkv.weight", "square.weight", "fc.weight", "heads.weight", "experts", "interleaved.weight"),
    ),
    (
        "celo2",
        False,
        0.04,
        0.0,
        1.0,
        ("proj.weight", "conv.weight", "uneven.weight", "vector", "gain", "pairs", "flat.weight"),
    ),
    ("adamw", True, 0.005, 0.3, 8.0, ("emb.weight", "qkv.bias", "fc.bias", "uneven.bias", "ln.weight")),
    ("celo2", True, 0.05, 1.0, 1.0, ("tiny",)),
    ("celo2", False, 0.03, 0.2, 1.0, ("sometimes", "ln.bias")),
)
# Under the learned rule, but no hidden matrices: another decay acts on them, in the same flat partition.
NOT_HIDDEN = {"conv.weight": "embedding", "vector": "vector", "gain": "vector", "ln.bias": "vector"}
OTHER_DECAY = 0.4


def option_groups(model: nn.Module, flipped: bool) -> tuple[list[dict], dict[str, dict]]:
    """Tags the parameters with their views; returns Celo2's param groups, and the options by parameter name."""
    params = dict(model.named_parameters())
    groups, by_name = [], {}
    for rule, orthogonalize, lr, weight_decay, multiplier, names in GROUPS:
        options = {
            "rule": rule,
            "orthogonalize": orthogonalize != flipped,
            "lr": lr,
            "weight_decay": weight_decay,
            "adamw_lr_multiplier": multiplier,
        }
        for name in names:
            kind = NOT_HIDDEN.get(name, "hidden")
            setattr(params[name], TAG, Tag(name, kind, rule, VIEWS.get(name, MatrixView())))
            by_name[name] = options | ({} if kind == "hidden" else {"weight_decay": OTHER_DECAY})
        other = {} if rule == "adamw" else {"adamw_weight_decay": OTHER_DECAY}
        groups.append({"params": [params[name] for name in names], **options, **other})
    missing = {name for name, p in params.items() if p.requires_grad} ^ set(by_name)
    assert not missing, f"parameters in no group: {missing}"
    return groups, by_name


def theta(seed: int = 3) -> dict[str, Tensor]:
    """Random weights of the learned rule, so that every feature counts (trained ones hardly use some of them)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"w0": (30, 8), "b0": (8,), "w1": (8, 8), "b1": (8,), "w2": (8, 3), "b2": (3,)}
    return {
        name: torch.randn(size, generator=generator) * (size[0] ** -0.5 if name[0] == "w" else 0.1)
        for name, size in sizes.items()
    }


def micro_batch(step: int, micro: int, rank: int) -> Tensor:
    """Token numbers (MICRO_BATCH, LENGTH), different for each step, micro-batch and rank."""
    generator = torch.Generator().manual_seed(1 + rank + 100 * micro + 10_000 * step)
    return torch.randint(0, VOCAB, (MICRO_BATCH, LENGTH), generator=generator)


def uses_sometimes(step: int) -> bool:
    """The parameter `sometimes` gets no gradient in steps 1 and 2."""
    return step not in (1, 2)
