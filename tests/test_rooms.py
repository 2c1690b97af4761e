"""The rooms of the package: who may import whom, how large a room is, and that the optimizer works alone."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.paths import ROOT

# From the ground up. A room imports itself and those before it. `celo2_pretrain/__init__.py` is the optimizer's door.
ORDER = ("kernels", "common", "weights", "optimizer", "config", "data", "model", "plan", "train", "meta", "cli")
AT_THE_TOP = {"__init__": "optimizer", "__main__": "cli", "deepspeed_config": "config"}
MOST = 12  # files of a room, but for __init__.py; kernels have one for each kernel
PRIVATE = ("_originals", "_plans")  # Celo2's

FILES = {
    "celo2_pretrain." + ".".join(path.relative_to(ROOT / "celo2_pretrain").with_suffix("").parts): path
    for path in (ROOT / "celo2_pretrain").rglob("*.py")
}
FILES |= {f"celo2_pretrain.kernels.{path.stem}": path for path in (ROOT / "kernels").glob("*.py")}
FILES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}  # a package goes by its own name


def imports(name: str) -> Iterator[str]:
    """The files that a file imports anywhere: also within functions, and for type checkers."""
    path = FILES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                found = next((x for x in (f"{module}.{alias.name}", module) if x in FILES), None)
                if found:
                    yield found


GRAPH = {name: sorted(set(imports(name)) - {name}) for name in FILES}


def circle(graph: dict[str, list[str]]) -> list[str]:
    """Files of which each imports the next one, and the last the first; empty where there is no such circle."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for other in graph[name]:
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in graph if (found := visit(name, []))), [])


def room(name: str) -> str:
    top = name.split(".")[1] if "." in name else "__init__"
    return AT_THE_TOP.get(top, top)


def upward(graph: dict[str, list[str]]) -> list[str]:
    return [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if ORDER.index(room(other)) > ORDER.index(room(name))
    ]


def test_no_files_import_each_other_in_a_circle():
    assert circle(GRAPH) == []


def test_rooms_import_downwards_only():
    assert upward(GRAPH) == []
    assert not any(room(other) == "kernels" for name in GRAPH if room(name) == "common" for other in GRAPH[name])


def test_circles_and_upward_imports_are_seen():
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c"]
    assert upward({"celo2_pretrain.model.build": ["celo2_pretrain.train.loop"]})
    assert "celo2_pretrain.plan.report" in GRAPH["celo2_pretrain.plan.command"]  # imported within a function
    assert "celo2_pretrain.optimizer.celo2" in GRAPH["celo2_pretrain"]  # for type checkers


@pytest.mark.parametrize(
    "folder",
    sorted({path.parent for path in FILES.values()} - {ROOT / "kernels"}),
    ids=lambda folder: str(folder.relative_to(ROOT)),
)
def test_a_room_is_small(folder: Path):
    files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= MOST, files


def test_private_parts_of_celo2_are_used_in_the_optimizers_room_only():
    outside = [
        path
        for folder in ("celo2_pretrain", "kernels", "benchmarks", "examples", "launch", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if not path.is_relative_to(ROOT / "celo2_pretrain/optimizer") and not path.is_relative_to(ROOT / "tests/optimizer")
    ]
    assert len(outside) > 100
    for path in outside:
        names = {
            node.attr for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)
        }
        assert not names & set(PRIVATE), path


ALONE = """
import sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        parts = name.split(".")
        if parts[0] == "celo2_pretrain" and len(parts) > 1 and parts[1] not in ("common", "weights", "optimizer", "kernels"):
            raise ImportError(f"{name} is not the optimizer's")

sys.meta_path.insert(0, Refuse())
import torch
from celo2_pretrain import Celo2, from_adamw, load_state, param_groups, register, save_state, table, to_adamw

def make():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 11), torch.nn.LayerNorm(11), torch.nn.Linear(11, 3))
    return net, Celo2(param_groups(net), lr=1e-3)

def step(net, optimizer):
    optimizer.zero_grad()
    net(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()

net, optimizer = make()
register(net)
assert "celo2" in table(net)
step(net, optimizer)
save_state(optimizer, "state")
step(net, optimizer)
other, restored = make()
load_state(restored, "state")
step(other, restored)
assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))
try:
    import celo2_pretrain.config
except ImportError as error:
    print(error)
"""


def test_the_optimizer_works_without_the_rooms_above_it(tmp_path):
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "celo2_pretrain.config is not the optimizer's" in done.stdout
