"""Pretrain GPT-style models with Celo2, a learned optimizer, under DeepSpeed.

    from celo2_pretrain import Celo2, param_groups, register

Names are imported when they are first used, so that `import celo2_pretrain` is quick and does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .optimizer.celo2 import Celo2
    from .optimizer.matrices.param_groups import param_groups, table
    from .optimizer.register import register
    from .optimizer.state.save_load import load_state, save_state
    from .optimizer.state.takeover import from_adamw, to_adamw

__version__ = "0.1.0"  # pyproject.toml reads it here
__all__ = ["Celo2", "from_adamw", "load_state", "param_groups", "register", "save_state", "table", "to_adamw"]

_MODULES = {
    "Celo2": "celo2",
    "param_groups": "matrices.param_groups",
    "table": "matrices.param_groups",
    "register": "register",
    "save_state": "state.save_load",
    "load_state": "state.save_load",
    "from_adamw": "state.takeover",
    "to_adamw": "state.takeover",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".optimizer.{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
