"""Which tensor gets which rule, and as which matrices: `param_groups`, and the table that shows it.

What is decided for a parameter is recorded on the parameter itself (a `Tag`), since that is all that survives
the way through a DeepSpeed config, `zero.Init` and its flat partitions to the optimizer.
"""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Iterable

from torch import Tensor, nn

from .names import canonical, canonical_names
from .views import MatrixView

TAG = "_celo2"
HEAD_NAMES = {"lm_head", "embed_out", "head", "classifier", "score", "output_layer", "unembed"}
# Fused projections whose outputs are Q, K, V one after the other; and those interleaved head by head.
FUSED_QKV = {"c_attn", "qkv_proj", "qkv", "Wqkv", "in_proj"}
INTERLEAVED_QKV = {"query_key_value"}
QKV = {"q_proj", "k_proj", "v_proj", "query", "key", "value", "to_q", "to_k", "to_v"}
FUSED_GATE = {"gate_up_proj"}


@dataclass(frozen=True)
class Tag:
    """What `param_groups` or `register` decided for a parameter."""

    name: str
    kind: str  # "hidden", "embedding", "head" or "vector": why it gets its rule
    rule: str  # "celo2" or "adamw"
    view: MatrixView


def tag_of(param: Tensor) -> Tag | None:
    """The tag that `param_groups` or `register` gave a parameter, if any."""
    return getattr(param, TAG, None)


def tag_model(model: nn.Module, *, per_head: bool = False, celo2: Iterable[str] = (), adamw: Iterable[str] = ()
              ) -> dict[str, Tensor]:
    """Decide rule and matrix view of every trainable parameter and record them on it.

    Args: as `param_groups`. Returns the parameters by name, each once (tied ones under their first name).
    Raises ValueError where a pattern matches no parameter, or a name matches patterns of both rules.
    """
    kinds = _kinds(model)
    names = canonical_names(name for name, _ in model.named_parameters())
    patterns = {"celo2": tuple(celo2), "adamw": tuple(adamw)}
    owners: dict[int, tuple[str, nn.Module]] = {}  # of each parameter: the module's own name, and the module
    for prefix, module in model.named_modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(id(param), (canonical(prefix).rsplit(".", 1)[-1], module))
    parameters, used = {}, set()
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        matched = {(rule, pattern) for rule in patterns for pattern in patterns[rule]
                   if fnmatchcase(name, pattern) or fnmatchcase(names[name], pattern)}
        used |= matched
        rules = {rule for rule, _ in matched}
        if len(rules) > 1:
            raise ValueError(f"{name!r} matches patterns of both rules: {sorted(p for _, p in matched)}")
        kind = kinds.get(id(param)) or ("hidden" if len(_shape(param)) >= 2 else "vector")
        rule = rules.pop() if rules else ("celo2" if kind == "hidden" else "adamw")
        leaf, module = owners[id(param)]
        view = _view(leaf, module, name, param, _heads(model), per_head)
        setattr(param, TAG, Tag(names[name], kind, rule, view))
        parameters[name] = param
    unused = sorted({(r, p) for r in patterns for p in patterns[r]} - used)
    if unused:
        raise ValueError(f"{unused[0][0]}={unused[0][1]!r} matches no trainable parameter; names look like "
                         f"{list(parameters)[:3]}")
    return parameters


def param_groups(model: nn.Module, *, per_head: bool = False, celo2: Iterable[str] = (), adamw: Iterable[str] = (),
                 **options: Any) -> list[dict[str, Any]]:
    """Sort a model's trainable parameters for `Celo2`: hidden matrices, embeddings and heads, 1-D tensors.

    Args:
        model: GPT-2 (`Conv1D`, fused QKV), Llama-like (`nn.Linear`) and other transformers models, or any module.
            Tied parameters are counted once, as embedding or head. Frozen ones are left out.
        per_head: every attention head's Q, K and V is a matrix of its own, instead of each of Q, K, V.
        celo2, adamw: name patterns (as `fnmatch`: "*.router.weight") for which this rule is taken in any case.
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
    return [{"params": params, "rule": rule, **(options if rule == "celo2" else others)}
            for (rule, _), params in groups.items() if params]


def table(model: nn.Module) -> str:
    """Which tensor gets which rule, as text: one line for each kind of tensor (layer numbers collapsed to *)."""
    rows: Counter = Counter()
    for _, param in model.named_parameters():
        tag = tag_of(param)
        if tag is None:
            name, kind, rule, view = "(not tagged)", "frozen" if not param.requires_grad else "?", "-", MatrixView()
        else:
            name, kind, rule, view = tag.name, tag.kind, tag.rule, tag.view
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        rows[(rule, kind, pattern, str(_shape(param)), _describe(view) if rule == "celo2" else "")] += 1
    header = ("rule", "kind", "tensor", "shape", "read as", "tensors")
    lines = [header, *((*row, str(count)) for row, count in rows.items())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    totals = Counter()
    for param in model.parameters():
        tag = tag_of(param)
        totals[tag.rule if tag else "frozen or not tagged"] += prod(_shape(param))
    text.append("parameters: " + ", ".join(f"{rule} {count:,}" for rule, count in totals.items()))
    return "\n".join(text)


def _describe(view: MatrixView) -> str:
    words = ["(out, in)" if view.transpose else "as it lies"]
    if view.head_dim:
        words.append(f"heads of {view.head_dim}")
    elif view.split:
        words.append(f"{len(view.split)} parts of {view.split[0]}" if len(set(view.split)) == 1
                     else f"parts of {', '.join(map(str, view.split))}")
    if view.batch:
        words.append(f"{view.batch} batch axes")
    return ", ".join(words)


def _shape(param: Tensor) -> tuple[int, ...]:
    return tuple(getattr(param, "ds_shape", param.shape))  # ZeRO-3 parameters are empty between uses


def _kinds(model: nn.Module) -> dict[int, str]:
    """Parameters that are embeddings or heads, by id."""
    kinds: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            kinds[id(module.weight)] = "embedding"
        elif canonical(name).rsplit(".", 1)[-1] in HEAD_NAMES and isinstance(getattr(module, "weight", None), Tensor):
            kinds.setdefault(id(module.weight), "head")
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None and isinstance(getattr(output, "weight", None), Tensor):
        kinds.setdefault(id(output.weight), "head")
    return kinds


def _heads(model: nn.Module) -> tuple[int, int, int]:
    """(query heads, key/value heads, head_dim) from a transformers config; zeros where there is none."""
    config = getattr(model, "config", None)
    get = lambda *names: next((getattr(config, n) for n in names if getattr(config, n, None)), 0)  # noqa: E731
    heads, width = get("num_attention_heads", "n_head"), get("hidden_size", "n_embd")
    if not isinstance(heads, int) or not isinstance(width, int) or not heads:
        return 0, 0, 0
    return heads, get("num_key_value_heads") or heads, get("head_dim") or width // heads


def _view(leaf: str, module: nn.Module, name: str, param: Tensor, heads: tuple[int, int, int], per_head: bool
          ) -> MatrixView:
    """How one parameter is read as matrices. `leaf` is its module's own name, `heads` as `_heads` returns."""
    shape = _shape(param)
    if len(shape) == 3 and "experts" in name.split("."):
        return MatrixView(batch=1)
    if len(shape) != 2:
        return MatrixView()
    # nn.Linear and nn.MultiheadAttention store (out, in); transformers' Conv1D stores (in, out).
    transpose = isinstance(module, (nn.Linear, nn.MultiheadAttention))
    inputs, outputs = (shape[1], shape[0]) if transpose else shape
    queries, keys, head_dim = heads
    if name.endswith("in_proj_weight"):
        leaf, queries = "in_proj", getattr(module, "num_heads", queries)
        keys, head_dim = queries, outputs // 3 // max(queries, 1)
    per_head_view = MatrixView(transpose=transpose, head_dim=head_dim)
    fits = head_dim and outputs % head_dim == 0
    if leaf in INTERLEAVED_QKV and fits:
        return per_head_view  # its Q, K, V are no contiguous matrices
    if leaf in FUSED_QKV:
        if per_head and fits:
            return per_head_view
        if head_dim and outputs == (queries + 2 * keys) * head_dim:
            return MatrixView(transpose=transpose, split=(queries * head_dim, keys * head_dim, keys * head_dim))
        if outputs == 3 * inputs:
            return MatrixView(transpose=transpose, split=(inputs,) * 3)
    if leaf in FUSED_GATE and outputs % 2 == 0:
        return MatrixView(transpose=transpose, split=(outputs // 2,) * 2)
    if leaf in QKV and per_head and fits:
        return per_head_view
    return MatrixView(transpose=transpose)
