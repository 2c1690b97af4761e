"""Which tensor gets which rule, and as which matrices: `param_groups`, and the table that shows it.

What is decided for a parameter is recorded on the parameter itself (a `Tag`), since that is all that survives
the way through a DeepSpeed config, `zero.Init` and its flat partitions to the optimizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from torch import Tensor, nn

from ..names import canonical_names
from .fused import read
from .kinds import kinds
from .places import places, shape_of
from .views import MatrixView

TAG = "_celo2"


@dataclass(frozen=True)
class Tag:
    """What `param_groups` or `register` decided for a parameter."""

    name: str
    kind: str  # "hidden", "embedding", "head" or "vector": why it gets its rule
    rule: str  # "celo2" or "adamw"
    view: MatrixView
    note: str = ""  # where neither class nor sizes tell how the tensor is used: how it is read


def tag_of(param: Tensor) -> Tag | None:
    """The tag that `param_groups` or `register` gave a parameter, if any."""
    return getattr(param, TAG, None)


def tag_model(
    model: nn.Module, *, per_head: bool = False, celo2: Iterable[str] = (), adamw: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Decide rule and matrix view of every trainable parameter and record them on it.

    Args: as `param_groups`. Returns the parameters by name, each once (tied ones under their first name).
    Raises ValueError where a pattern matches no parameter, or a name matches patterns of both rules.
    """
    kind_of = kinds(model)
    names = canonical_names(name for name, _ in model.named_parameters())
    patterns = {"celo2": tuple(celo2), "adamw": tuple(adamw)}
    place_of = {id(place.param): place for place in places(model)}
    parameters, used = {}, set()
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        matched = {
            (rule, pattern)
            for rule in patterns
            for pattern in patterns[rule]
            if fnmatchcase(name, pattern) or fnmatchcase(names[name], pattern)
        }
        used |= matched
        rules = {rule for rule, _ in matched}
        if len(rules) > 1:
            raise ValueError(f"{name!r} matches patterns of both rules: {sorted(p for _, p in matched)}")
        kind = kind_of[id(param)]
        rule = rules.pop() if rules else ("celo2" if kind == "hidden" else "adamw")
        view, note = read(place_of[id(param)], per_head)
        setattr(param, TAG, Tag(names[name], kind, rule, view, note))
        parameters[name] = param
    unused = sorted({(r, p) for r in patterns for p in patterns[r]} - used)
    if unused:
        raise ValueError(
            f"{unused[0][0]}={unused[0][1]!r} matches no trainable parameter; names look like {list(parameters)[:3]}"
        )
    return parameters


def param_groups(
    model: nn.Module, *, per_head: bool = False, celo2: Iterable[str] = (), adamw: Iterable[str] = (), **options: Any
) -> list[dict[str, Any]]:
    """Sort a model's trainable parameters for `Celo2`: hidden matrices, embeddings and heads, 1-D tensors.

    Args:
        model: a transformers model or any other module. Tied parameters are counted once, as embedding or head.
            Frozen ones are left out.
        per_head: every attention head's Q, K and V is a matrix of its own, instead of each of Q, K, V.
        celo2, adamw: name patterns (as `fnmatch`: "*.value_head.weight") for which this rule is taken in any case.
        options: set in every group (lr, adamw_weight_decay, …), but `weight_decay` in those of the learned rule only.
    Returns up to three param groups with `rule` set. The matrix views are recorded on the parameters.
    Raises ValueError for a model without trainable parameters, or a pattern that matches nothing.
    """
    parameters = tag_model(model, per_head=per_head, celo2=celo2, adamw=adamw)
    if not parameters:
        raise ValueError("the model has no trainable parameters")
    groups: dict[tuple[str, bool], list[Tensor]] = {("celo2", False): [], ("adamw", False): [], ("adamw", True): []}
    for param in parameters.values():
        tag = tag_of(param)
        groups.setdefault((tag.rule, tag.kind == "vector"), []).append(param)
    others = {key: value for key, value in options.items() if key != "weight_decay"}
    return [
        {"params": params, "rule": rule, **(options if rule == "celo2" else others)}
        for (rule, _), params in groups.items()
        if params
    ]


def table(model: nn.Module) -> str:
    """Which tensor gets which rule, as text: one line for each kind of tensor (layer numbers collapsed to *)."""
    rows: Counter = Counter()
    for _, param in model.named_parameters():
        tag = tag_of(param)
        if tag is None:
            tag = Tag("(not tagged)", "?" if param.requires_grad else "frozen", "-", MatrixView())
        pattern = ".".join("*" if part.isdigit() else part for part in tag.name.split("."))
        rows[(tag.rule, tag.kind, pattern, str(shape_of(param)), _describe(tag) if tag.rule == "celo2" else "")] += 1
    header = ("rule", "kind", "tensor", "shape", "read as", "tensors")
    lines = [header, *((*row, str(count)) for row, count in rows.items())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    totals = Counter()
    for param in model.parameters():
        tag = tag_of(param)
        totals[tag.rule if tag else "frozen or not tagged"] += prod(shape_of(param))
    text.append("parameters: " + ", ".join(f"{rule} {count:,}" for rule, count in totals.items()))
    return "\n".join(text)


def _describe(tag: Tag) -> str:
    view = tag.view
    words = ["(out, in)" if view.transpose else "(in, out)" if view.flatten else "as it lies"]
    if view.flatten:
        words.append("further axes are input")
    if view.head_dim:
        words.append(f"heads of {view.head_dim}")
    elif view.split:
        words.append(
            f"{len(view.split)} parts of {view.split[0]}"
            if len(set(view.split)) == 1
            else f"parts of {', '.join(map(str, view.split))}"
        )
    if view.repeats > 1:
        words.append(f"{view.repeats} times in turn")
    if view.batch:
        words.append(f"{view.batch} batch axes")
    if tag.note:
        words.append(tag.note)
    return ", ".join(words)
