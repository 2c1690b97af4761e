"""Under which names and shapes does each implementation of Celo2 store the 347 weights of the MLP?

The canonical form is input-major: w0 (30, 8), b0 (8,), w1 (8, 8), b1 (8,), w2 (8, 3), b2 (3,). The authors'
JAX code splits w0 by feature group (`w0__0` … `w0__13`); PyLO has used three `torch.nn` forms over time.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from celo2_pretrain.weights.mlp import DIMS

_FEATURES, _FIRST, _SECOND, _OUTPUTS = DIMS
SHAPES = {
    "w0": (_FEATURES, _FIRST),
    "b0": (_FIRST,),
    "w1": (_FIRST, _SECOND),
    "b1": (_SECOND,),
    "w2": (_SECOND, _OUTPUTS),
    "b2": (_OUTPUTS,),
}
# Width of the 14 feature groups, in the order of `reference.features`; they sum to 30.
GROUPS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)


def _split(name: str) -> list[str]:
    return [name.format(i) for i in range(len(GROUPS))]


def _layout(w0: list[str], *others: str) -> dict[str, list[str]]:
    return dict(zip(SHAPES, [w0, *([name] for name in others)]))


# For each layout: the key that gives it away, whether matrices are (out, in), and where each array lies.
LAYOUTS = (
    ("the authors' flax", "w0__0", False, _layout(_split("w0__{}"), "b0", "w1", "b1", "w2", "b2")),
    (
        "PyLO's Celo2MLP",
        "first_layer.weight",
        True,
        _layout(["first_layer.weight"], "first_layer.bias", "hidden.weight", "hidden.bias", "output.weight", "output.bias"),
    ),
    (
        "PyLO's grouped Celo2MLP",
        "first_layer_weights.0",
        True,
        _layout(
            _split("first_layer_weights.{}"),
            "first_layer_bias",
            "hidden.weight",
            "hidden.bias",
            "output.weight",
            "output.bias",
        ),
    ),
    ("PyLO's CELO2MLP", "w0.0", False, _layout(_split("w0.{}"), "b0", "dense_w.0", "dense_b.0", "dense_w.1", "dense_b.1")),
    ("this package's", None, False, _layout(["w0"], "b0", "w1", "b1", "w2", "b2")),
)


def _few(names) -> str:
    names = sorted(text if text.isprintable() else repr(text) for text in (str(name)[:60] for name in names))
    return ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")


def _to_tensor(value, key: str, source: str) -> Tensor:
    """One array of any library → a float32 tensor on the CPU that shares no memory with it."""
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.array(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source}: {key} is a {type(value).__name__}, expected an array of floats") from error
    if not tensor.is_floating_point():
        raise ValueError(f"{source}: {key} has dtype {str(tensor.dtype).removeprefix('torch.')}, expected a float")
    tensor = tensor.to("cpu", torch.float32, copy=True).contiguous()
    if not tensor.isfinite().all():
        count = int((~tensor.isfinite()).sum())
        raise ValueError(f"{source}: {key} has {count} NaN or infinite values, expected finite weights")
    return tensor


def to_canonical(named: Mapping, source: str) -> dict[str, Tensor]:
    """Arrays under any known layout's names → canonical float32 CPU tensors w0, b0, w1, b1, w2, b2.

    `source` (a file name, or "weights") stands at the front of error messages.
    Raises ValueError for missing or extra keys, a wrong shape or dtype, NaN and infinity.
    """
    for label, mark, transposed, layout in LAYOUTS:
        if mark is None or mark in named:
            break
    expected = [key for keys in layout.values() for key in keys]
    missing, extra = set(expected) - set(named), set(named) - set(expected)
    if missing or extra:
        problems = [f"lacks {_few(missing)}"] * bool(missing) + [f"has unexpected {_few(extra)}"] * bool(extra)
        raise ValueError(
            f"{source}: {' and '.join(problems)}; expected {label} keys {_few(expected)} (the Celo2 MLP of 347 weights)"
        )
    canonical = {}
    for name, keys in layout.items():
        parts = []
        for key, width in zip(keys, GROUPS if len(keys) > 1 else SHAPES[name][:1]):
            shape = (width, *SHAPES[name][1:])
            if transposed:
                shape = shape[::-1]
            part = _to_tensor(named[key], key, source)
            if tuple(part.shape) != shape:
                raise ValueError(f"{source}: {key} has shape {tuple(part.shape)}, expected {shape}")
            parts.append(part.T if transposed and part.ndim == 2 else part)
        canonical[name] = torch.cat(parts).contiguous()
    return canonical
