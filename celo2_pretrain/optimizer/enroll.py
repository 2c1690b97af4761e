"""Make DeepSpeed's ZeRO accept an optimizer class without a key in its config."""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ZERO_UTILS = "deepspeed.runtime.zero.utils"  # has the list of the optimizers that ZeRO accepts without a config key
_enrolled: dict[type, None] = {}  # in order; a dict is safe to add to from several threads


def enroll(optimizer_class: type) -> None:
    """Let DeepSpeed's ZeRO accept this class without `"zero_allow_untested_optimizer": true` in the config.

    Takes effect at once where DeepSpeed is loaded, else when it is imported. DeepSpeed is not imported by this.
    """
    _enrolled[optimizer_class] = None
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    if "deepspeed" in sys.modules:
        try:  # waits for another thread that is importing it
            _extend(importlib.import_module(ZERO_UTILS))
        except ImportError:  # a stand-in for DeepSpeed, or one that is switched off by None in sys.modules
            return


def _extend(module: ModuleType) -> None:
    supported = getattr(module, "ZERO_SUPPORTED_OPTIMIZERS", [])
    supported += [kind for kind in _enrolled if kind not in supported]


class _Finder(MetaPathFinder):
    """Find `ZERO_UTILS` as the other finders do, and extend its list when it is loaded."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != ZERO_UTILS:
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec") and (spec := finder.find_spec(name, path, target)):
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    """The module's own loader, followed by `_extend`."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self._loader  # what inspect and pickle see
        self._loader.exec_module(module)
        _extend(module)


_finder = _Finder()
