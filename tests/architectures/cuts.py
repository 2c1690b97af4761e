"""How tests/optimizer/test_architectures.py states which matrices a tensor consists of, and checks it.

An architecture's expectation maps a tensor's name to "embedding", "head" or "vector" (AdamW), or to a cut: a function from
the stored tensor to the weights, (out, in), of the `nn.Linear`s that could stand in its place. A * in a name is any number,
unless the number is listed, too; "{q,k}_proj" stands for both. One-dimensional tensors are vectors and aren't listed.
"""

import re
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn

from celo2_pretrain import Celo2, param_groups
from celo2_pretrain.optimizer.matrices.param_groups import tag_of
from celo2_pretrain.optimizer.matrices.views import MatrixView

Cut = Callable[[Tensor], list[Tensor]]
Expected = dict[str, str | Cut]


def linear(w: Tensor) -> list[Tensor]:
    """As `nn.Linear`: (out, in)."""
    return [w]


def conv1d(w: Tensor) -> list[Tensor]:
    """As the `Conv1D` of GPT-2, or x @ w: (in, out)."""
    return [w.T]


def kernel(w: Tensor) -> list[Tensor]:
    """A convolution, (out, in, kernel …): one matrix with in · kernel inputs."""
    return [w.flatten(1)]


def rows(*sizes: int) -> Cut:
    """The output axis of an `nn.Linear` is parts of these sizes, one after the other."""
    return lambda w: list(w.split(sizes))


def columns(*sizes: int) -> Cut:
    """The same of a tensor that lies (in, out)."""
    return lambda w: rows(*sizes)(w.T)


def repeated(times: int, *sizes: int) -> Cut:
    """The output axis of an `nn.Linear` repeats the parts (for each head, say); a matrix is one part of all repeats."""
    return lambda w: [part.flatten(0, 1) for part in w.unflatten(0, (times, sum(sizes))).split(sizes, dim=1)]


def each(cut: Cut) -> Cut:
    """A stack of experts, each cut so."""
    return lambda w: [matrix for expert in w for matrix in cut(expert)]


def by_name(expected: Expected) -> Expected:
    """The expectation with "{q,k}_proj" written out."""
    found = {}
    for name, want in expected.items():
        choices = [part.split(",") if index % 2 else [part] for index, part in enumerate(re.split(r"[{}]", name))]
        found |= {"".join(parts): want for parts in product(*choices)}
    return found


def listed(name: str, expected: Expected) -> str:
    """Under which name a tensor is listed: its own, or with * for numbers."""
    return name if name in expected else ".".join("*" if part.isdigit() else part for part in name.split("."))


def matrices(view: MatrixView, w: Tensor) -> list[Tensor]:
    """The matrices that a view reads a tensor as, (out, in)."""
    found = []
    for block in view.blocks(tuple(w.shape)):
        x = block.select(w)
        found += [m.T for m in x.reshape(-1, *x.shape[-2:])]
    return found


def check_reading(model: nn.Module, expected: Expected) -> None:
    """Every tensor of the model has the rule that is expected, and is read as the matrices that are."""
    expected, seen, wrong = by_name(expected), set(), []
    for name, param in model.named_parameters():
        key = listed(name, expected)
        tag, want = tag_of(param), expected.get(key, "vector" if param.ndim < 2 else "(not stated)")
        seen.add(key)
        if not param.requires_grad:
            got, want = tag, None
        elif isinstance(want, str) or tag.rule == "adamw":
            got = tag.kind if tag.rule == "adamw" else "matrices"
        else:
            index = torch.arange(param.numel()).view(param.shape)
            got, want = (sorted(m.tolist() for m in found) for found in (matrices(tag.view, index), want(index)))
        if got != want:
            wrong.append(
                f"{name} {tuple(param.shape)}: {want if isinstance(want, str) else 'the cut'} is expected, "
                f"but it is {got if isinstance(got, str) else tag}"
            )
    assert not wrong, "\n".join(wrong)
    assert set(expected) <= seen, f"no such tensors: {sorted(set(expected) - seen)}"


def check_step(model: nn.Module, expected: Expected) -> None:
    """Three steps on the model's matrices are those on separate `nn.Linear`s that the cuts make of them.

    The rounding of float32 is up to 9e-7 of the step; another reading is off by 0.1 or more.
    """
    expected = by_name(expected)
    tensors = {
        listed(name, expected): param
        for name, param in model.named_parameters()
        if tag_of(param) is not None and tag_of(param).rule == "celo2"
    }  # one of each kind
    cuts = {name: expected[name] for name in tensors}
    start = {name: param.detach().clone() for name, param in tensors.items()}
    linears = {name: [nn.Linear(*reversed(m.shape), bias=False) for m in cuts[name](w)] for name, w in start.items()}
    for name, parts in linears.items():
        for part, m in zip(parts, cuts[name](start[name])):
            part.weight.data = m.clone()
    separate = nn.ModuleList(part for parts in linears.values() for part in parts)
    optimizers = Celo2(list(tensors.values()), lr=1e-2), Celo2(param_groups(separate, celo2=["*"]), lr=1e-2)
    for _ in range(3):
        for name, param in tensors.items():
            param.grad = torch.randn_like(param)
            for part, grad in zip(linears[name], cuts[name](param.grad)):
                part.weight.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for name, param in tensors.items():
        for part, fused, before in zip(linears[name], cuts[name](param.detach()), cuts[name](start[name])):
            off = (fused - part.weight.detach()).norm() / (part.weight.detach() - before).norm()
            assert off < 2e-6, f"{name}: the step is off by {off:.1e}"
