"""Which options a param group may have, and what a user is told of how groups were split by rule."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.newton_schulz import COEFFICIENTS, DTYPES

logger = logging.getLogger(__name__)

RULES = ("celo2", "adamw")
OPTIONS = (
    "lr",
    "weight_decay",
    "adamw_weight_decay",
    "orthogonalize",
    "adamw_lr_multiplier",
    "newton_schulz",
    "newton_schulz_dtype",
    "adamw_betas",
    "adamw_eps",
)  # of a group; each has a default
KEYS = frozenset((*OPTIONS, "params", "param_names", "rule", "group", "initial_lr"))
CONSTRUCTOR_ONLY = ("weights", "nonfinite", "check_replicas_every", "state_dtype", "bucket_size")
# Keys on which other optimizers act; ignoring one would train otherwise than the user asked.
OTHERS = {"betas": "adamw_betas (AdamW's tensors)", "eps": "adamw_eps (AdamW's tensors)"} | dict.fromkeys(
    (
        "momentum",
        "nesterov",
        "amsgrad",
        "maximize",
        "use_muon",
        "fused",
        "foreach",
        "capturable",
        "differentiable",
        "ns_steps",
        "beta1",
        "beta2",
        "bias_correction",
        "dampening",
        "alpha",
        "rho",
        "momentum_decay",
        "decoupled_weight_decay",
        "trust_coefficient",
    ),
    "",
)
IGNORED = (*OTHERS, *CONSTRUCTOR_ONLY)  # dropped from a saved group: earlier versions did not refuse them
OUR_PREFIXES = ("adamw_", "newton_")
ALIASES = {"learning_rate": "lr", "wd": "weight_decay"}
# Where torch and DeepSpeed compare a list with the groups, and what they call it there.
SCHEDULERS = ("torch.optim.lr_scheduler", "torch.optim.swa_utils", "deepspeed.runtime.lr_schedules")
LISTS = ("lr_lambda", "param", "min_lr", "swa_lrs", "param_value", "lr_range_test_min_lr")


def check_keys(keys: Iterable[str]) -> None:
    """Refuse keys of a group that Celo2 would ignore although they mean something. Raises ValueError.

    Keys that belong to others (DeepSpeed's `moe` and `name`, timm's `lr_scale`) pass.
    """
    for key in keys:
        if key in KEYS or not isinstance(key, str):
            continue
        if key in OTHERS:
            raise ValueError(
                f"a param group has {key!r}, an option of other optimizers on which Celo2 does not act: remove it"
                + (f", or set {OTHERS[key]}" if OTHERS[key] else "")
            )
        if key in CONSTRUCTOR_ONLY:
            raise ValueError(f"a param group has {key!r}, which holds for the whole optimizer: pass it to Celo2(…, {key}=…)")
        near = difflib.get_close_matches(
            key, (*OPTIONS, "rule", *CONSTRUCTOR_ONLY), 1, cutoff=0.5 if key.startswith(OUR_PREFIXES) else 0.87
        )
        if near or key in ALIASES:
            raise ValueError(
                f"a param group has {key!r}, which is no option of Celo2: did you mean {ALIASES.get(key) or near[0]!r}?"
            )


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option of a group that is out of range; `options` has all of OPTIONS."""
    rule = options.get("rule")
    if rule is not None and rule not in RULES:
        raise ValueError(f"a param group's rule must be one of {RULES}, got {rule!r}")
    for key in ("lr", "weight_decay", "adamw_weight_decay", "adamw_lr_multiplier", "adamw_eps"):
        value = options[key]
        if value is None and key == "adamw_weight_decay":
            continue
        if isinstance(value, Tensor):
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise ValueError(f"{key} must be a finite number of at least 0, got {options[key]!r}")
    if not isinstance(options["orthogonalize"], bool):
        raise ValueError(f"orthogonalize must be True or False, got {options['orthogonalize']!r}")
    if options["newton_schulz"] not in COEFFICIENTS:
        raise ValueError(f"newton_schulz must be one of {tuple(COEFFICIENTS)}, got {options['newton_schulz']!r}")
    if options["newton_schulz_dtype"] not in DTYPES:
        raise ValueError(f"newton_schulz_dtype must be one of {DTYPES}, got {options['newton_schulz_dtype']!r}")
    betas = options["adamw_betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adamw_betas must be two numbers in [0, 1), got {betas!r}")


def named_tensors(params: Any, offset: int) -> tuple[list[tuple[str, Tensor]], bool]:
    """(name, tensor) of whatever form `params` has, and whether the names are the user's.

    Raises TypeError, and ValueError for a dtype that isn't optimized, or names that only some have.
    """
    if isinstance(params, Tensor):
        params = [params]
    named, given = [], 0
    for number, item in enumerate(params):
        given += isinstance(item, tuple)
        name, param = item if isinstance(item, tuple) else (f"param {offset + number}", item)
        if not isinstance(param, Tensor):
            raise TypeError(f"Celo2 takes tensors, got {type(param).__name__}")
        if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} has dtype {param.dtype}; Celo2 optimizes tensors of float32, bfloat16 or float16")
        named.append((name, param))
    if given not in (0, len(named)):
        raise ValueError(f"{given} of a group's {len(named)} parameters have names: give all of them names, or none")
    return named, bool(given)


def decay_of(group: Mapping[str, Any], hidden: bool) -> float:
    """The weight decay of a tensor of this group. `hidden`: a hidden matrix under the learned rule.

    None, or no key as in groups of earlier versions: `weight_decay` acts on all tensors of the group.
    """
    other = group.get("adamw_weight_decay")
    return float(group["weight_decay"] if hidden or other is None else other)


# ---- what a user is told ------------------------------------------------------------------------------------------


@dataclass
class Assignment:
    """Which rule a tensor got, and by what."""

    name: str
    shape: tuple[int, ...]
    rule: str
    tagged: bool
    explicit: bool  # the user's group names the rule


def named_in_config() -> bool:
    """Whether DeepSpeed is making the optimizer that its configuration names: nobody sees the object or its log."""
    return sys._getframe(2).f_globals.get("__name__") == "deepspeed.runtime.engine"


def first_rank() -> bool:
    """Whether this process is the one that speaks; also before torch.distributed is set up."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def report(tensors: Sequence[Assignment], some_tagged: bool, printed: bool = False) -> bool:
    """Log on the first rank what is stepped by what; returns whether that was a warning.

    Args: some_tagged: whether any tensor of the optimizer is. printed: print it where it is no warning.

    It is a warning where matrices have neither a tag nor a group that names their rule: embeddings and heads can't be told
    from hidden matrices then. So it is where no tensor has two dims, since a wrapper may have flattened them.
    """
    if not tensors or not first_rank():
        return False
    learned = sum(x.rule == "celo2" for x in tensors)
    nouns = ("tensor", "tensors")
    vectors = any(x.rule == "celo2" and len(x.shape) < 2 for x in tensors)
    summary = (
        f"Celo2: {_count(learned, *(nouns if vectors else ('matrix', 'matrices')))}, "
        f"AdamW: {_count(len(tensors) - learned, *nouns)}"
    )
    unknown = [x for x in tensors if not x.tagged and not x.explicit]
    matrices = [x for x in unknown if len(x.shape) >= 2]
    remedy = "make the groups by param_groups(model), or call register(model) right before the optimizer is made"
    if matrices and some_tagged:
        logger.warning(
            "%s. %s not tagged, so an embedding, a head or a fused projection among them is stepped as one hidden "
            "matrix: %s; %s",
            summary,
            _count(len(matrices), "matrix is", "matrices are"),
            _names(matrices),
            remedy,
        )
        return True
    if matrices:
        logger.warning(
            "%s. No tensor is tagged, so embeddings, heads and fused projections are stepped as hidden matrices: %s",
            summary,
            remedy,
        )
        return True
    if unknown and all(len(x.shape) < 2 for x in tensors):
        largest = max(unknown, key=lambda x: prod(x.shape))
        logger.warning(
            "%s. No tensor has two dims (the largest: %s): if a wrapper flattened them, make the optimizer before "
            "it does, or use FSDP2 or ZeRO",
            summary,
            _names([largest]),
        )
        return True
    if printed:
        print(summary, flush=True)
    logger.info(summary)
    return False


def _count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def _names(tensors: Sequence[Assignment], most: int = 4) -> str:
    some = ", ".join(f"{x.name!r} {tuple(x.shape)}" for x in tensors[:most])
    return some + (f" and {len(tensors) - most} more" if len(tensors) > most else "")


def refuse_other_length(user_groups: Sequence[Sequence[int]], groups: Sequence[Mapping[str, Any]]) -> None:
    """Called where `param_groups` is read. Raises ValueError if a scheduler (or ZeroRedundancyOptimizer) does so to compare
    a list of another length with the groups, some of which Celo2 split: torch's own error can't say how.

    Args: user_groups: for each group of the user's, the numbers of the `groups` that it became.
    """
    frame = sys._getframe(2)
    reader = frame.f_globals.get("__name__")
    if reader in SCHEDULERS:
        values = next((x for name in LISTS if isinstance(x := frame.f_locals.get(name), (list, tuple))), None)
    elif reader == "torch.distributed.optim.zero_redundancy_optimizer":  # it keeps the user's groups beside ours
        values = getattr(frame.f_locals.get("self"), "param_groups", None)
    else:
        return
    if values is None or len(values) == len(groups):
        return
    split = "; ".join(
        f"group {number} into {len(parts)} ({', '.join(_describe(groups[part]) for part in parts)})"
        for number, parts in enumerate(user_groups)
        if len(parts) != 1
    )
    raise ValueError(
        f"{len(values)} entries for {len(groups)} param groups: Celo2 splits groups by rule, {split}. Give one entry "
        "for each of optimizer.param_groups (optimizer.user_groups lists them by the group they came from), or "
        "make groups of one rule: param_groups(model) does"
    )


def _describe(group: Mapping[str, Any]) -> str:
    return f"{group['rule']}: {_count(len(group['params']), 'tensor', 'tensors')}"
