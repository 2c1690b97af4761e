"""The Celo2 update: reference, sharded passes, layouts, rules."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

# Pickles of earlier versions name classes of these modules: of an optimizer, or of parameters that `param_groups` tagged.
MOVED = {"layouts": "sharding.layouts", "rules": "matrices.param_groups", "views": "matrices.views"}


class _Moved(ModuleType):
    """Stands where a module was, and gives what the module has that took its place."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system and inspect ask every module
            raise AttributeError(name)
        return getattr(import_module(f"{__name__}.{MOVED[self.__name__.rpartition('.')[2]]}"), name)


for _name in MOVED:
    sys.modules[f"{__name__}.{_name}"] = _Moved(f"{__name__}.{_name}")
