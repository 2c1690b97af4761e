"""Run a script, a module or code where only the core's distributions can be imported, as after `pip install celo2-pretrain`.

python core_only.py SCRIPT [ARGUMENT ...]
python core_only.py -c CODE
python core_only.py -m MODULE [ARGUMENT ...]
"""

import re
import runpy
import sys
from importlib.metadata import packages_distributions, requires

CORE = ("torch", "numpy", "safetensors")


def with_dependencies(names: tuple[str, ...]) -> set[str]:
    """The distributions, and what they require without extras."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name not in found:
            found.add(name)
            left += [re.match(r"[\w.-]+", line)[0] for line in requires(name) or () if "extra ==" not in line]
    return found


class Without:
    """A finder that does not find some top-level modules."""

    def __init__(self, finder, hidden: set[str]) -> None:
        self.finder, self.hidden = finder, hidden

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.hidden else self.finder.find_spec(name, path, target)


def main() -> None:
    core = with_dependencies(CORE) | {"celo2-pretrain"}
    hidden = {
        module
        for module, owners in packages_distributions().items()
        if not any(re.sub(r"[-_.]+", "-", owner).lower() in core for owner in owners)
    }
    sys.meta_path[:] = [Without(finder, hidden) if hasattr(finder, "find_spec") else finder for finder in sys.meta_path]
    sys.argv.pop(0)
    if sys.argv[0] == "-c":
        exec(compile(sys.argv[1], "<core>", "exec"), {"__name__": "__main__"})
    elif sys.argv[0] == "-m":
        sys.argv.pop(0)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
