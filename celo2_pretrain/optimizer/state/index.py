"""Is the index of a saved state what `save_state` writes, and are its options such that a group can take them?

The checks raise ValueError that says what is wrong with it; numbers and names come from a file that may be damaged.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from reprlib import repr as short
from typing import Any

from ..matrices.views import MatrixView

FIRST_KEYS = ("transpose", "split", "head_dim", "batch")  # of a view, in states of every version
FILE = re.compile(r"[A-Za-z0-9_]+\.safetensors")  # no path, which would lead out of the folder


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)


def part(tree: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(tree, dict) or not isinstance(tree.get(key), kind) or (kind is int and isinstance(tree[key], bool)):
        raise ValueError(f"{where} has no {key} that is a {kind.__name__}")
    return tree[key]


def view_entry(view: MatrixView) -> dict[str, Any]:
    """A view for JSON. Keys that the first version lacks are left out where they have their defaults: it reads them so."""
    values = {**asdict(view), "split": list(view.split)}
    return {key: value for key, value in values.items() if key in FIRST_KEYS or value != getattr(MatrixView(), key)}


def view_of(entry: dict[str, Any]) -> MatrixView:
    """The view that `view_entry` gave, of this version or an earlier one. Raises ValueError for what is none."""
    defaults = asdict(MatrixView())
    for key, value in entry.items():
        if key not in defaults:
            raise ValueError(f"a view has no {short(key)}, only {', '.join(defaults)}")
        good = (
            isinstance(value, list) and all(type(size) is int for size in value)
            if key == "split"
            else type(value) is type(defaults[key])
        )
        if not good:
            raise ValueError(f"{key} of a view can't be {short(value)}")
    return MatrixView(**{**entry, "split": tuple(entry.get("split", ()))})


def check_index(index: dict) -> None:
    """Every part that is read later, by its kind and range."""
    for name, entry in part(index, "tensors", dict, "it").items():
        where = f"tensor {short(name)}"
        shape, rule = part(entry, "shape", list, where), part(entry, "rule", str, where)
        part(entry, "vector", bool, where)
        try:
            view_of(part(entry, "view", dict, where))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not all(type(size) is int and 0 <= size < 2**48 for size in shape) or rule not in ("celo2", "adamw"):
            raise ValueError(f"{where} has shape {short(shape)}, rule {short(rule)}")
    for group in part(index, "groups", list, "it"):
        part(group, "options", dict, "a param group")
        if not all(isinstance(name, str) for name in part(group, "names", list, "a param group")):
            raise ValueError("a param group has names that are no text")
    for file, entry in part(index, "files", dict, "it").items():
        if not FILE.fullmatch(file):
            raise ValueError(f"file {short(file)} leads out of the folder or has another kind of name")
        part(entry, "sha256", str, f"file {file}")
        for name, ends in part(entry, "ranges", dict, f"file {file}").items():
            if (
                name not in index["tensors"]
                or not (isinstance(ends, list) and len(ends) == 2)
                or not all(type(end) is int and 0 <= end < 2**60 for end in ends)
            ):
                raise ValueError(f"file {file} has the range {short(ends)} of {short(name)}")
    if "extra" not in index:
        raise ValueError("it has no extra")
    scale = index.get("loss_scale")
    if scale is not None and not (isinstance(scale, dict) and all(number(value) for value in scale.values())):
        raise ValueError(f"loss_scale is {short(scale)}")


OPTIONAL = {"adamw_weight_decay"}  # options that are a number or None


def fits(saved: Any, now: Any) -> bool:
    """Can a group's option be `saved` that is `now`? Numbers for numbers, as many in a list, else the same kind."""
    if isinstance(now, (list, tuple)):
        return isinstance(saved, list) and len(saved) == len(now) and all(map(fits, saved, now))
    if isinstance(now, bool) or isinstance(now, str) or now is None:
        return type(saved) is type(now)
    return number(saved)  # also for tensors


def check_options(groups: list[dict[str, Any]], now: dict[str, dict[str, Any]]) -> None:
    """Compare the saved options with those of the optimizer's groups, `now` by parameter name."""
    for group in groups:
        for name in group["names"]:
            for key, value in group["options"].items():
                if key not in now.get(name, {}) or (key in OPTIONAL and (value is None or number(value))):
                    continue
                if not fits(value, now[name][key]):
                    raise ValueError(f"option {key} of {short(name)} is {short(value)}")
