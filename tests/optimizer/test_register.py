"""DeepSpeed accepts a Celo2 whenever either is imported, and importing celo2_pretrain stays cheap."""

import importlib
import subprocess
import sys
import threading
import time

import pytest
import torch

import celo2_pretrain
from celo2_pretrain import Celo2, register
from celo2_pretrain.optimizer.enroll import ZERO_UTILS, enroll

from support.processes import environment


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def make() -> Celo2:
    return Celo2([torch.nn.Parameter(torch.ones(2, 3))])


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package in DeepSpeed's place that is not yet imported; returns the folder of its `zero`."""
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    zero = tmp_path / "deepspeed" / "runtime" / "zero"
    zero.mkdir(parents=True)
    for folder in (zero, zero.parent):
        (folder / "__init__.py").touch()
    (tmp_path / "deepspeed" / "__init__.py").write_text(f"import {ZERO_UTILS}\n")
    (zero / "utils.py").write_text("import torch\nZERO_SUPPORTED_OPTIMIZERS = [torch.optim.Adam]\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield zero
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        del sys.modules[name]  # monkeypatch puts the real ones back


def supported() -> list[type]:
    return importlib.import_module(ZERO_UTILS).ZERO_SUPPORTED_OPTIMIZERS


def test_a_celo2_made_after_deepspeed_is_imported_is_accepted(package):
    import deepspeed  # noqa: F401

    make()
    assert Celo2 in supported()


def test_a_celo2_made_before_deepspeed_is_imported_is_accepted(package):
    make()
    assert "deepspeed" not in sys.modules
    import deepspeed  # noqa: F401

    assert Celo2 in supported()


def test_each_class_is_enrolled_once_and_a_subclass_too(package):
    class Mine(Celo2):
        pass

    import deepspeed  # noqa: F401

    for _ in range(3):
        make()
        Mine([torch.nn.Parameter(torch.ones(2, 3))])
    assert [supported().count(kind) for kind in (torch.optim.Adam, Celo2, Mine)] == [1, 1, 1]
    assert sum(type(finder).__module__ == "celo2_pretrain.optimizer.enroll" for finder in sys.meta_path) == 1


def test_the_module_keeps_its_own_loader(package):
    make()
    module = importlib.import_module(ZERO_UTILS)
    assert type(module.__loader__) is type(module.__spec__.loader) is importlib.machinery.SourceFileLoader
    assert Celo2 in importlib.reload(module).ZERO_SUPPORTED_OPTIMIZERS


def test_a_celo2_made_while_another_thread_imports_deepspeed_is_accepted(package):
    """The import has begun, but the list isn't there yet when the optimizer is made."""
    (package / "utils.py").write_text(
        "import threading, torch\nfrom test_register import began, go_on\nbegan.set()\nassert go_on.wait(30)\n"
        "ZERO_SUPPORTED_OPTIMIZERS = [torch.optim.Adam]\n"
    )
    make()
    finder = next(finder for finder in sys.meta_path if type(finder).__module__ == "celo2_pretrain.optimizer.enroll")
    sys.meta_path.remove(finder)  # as before the first Celo2 of a process
    first = threading.Thread(target=importlib.import_module, args=("deepspeed",))
    second = threading.Thread(target=make)
    first.start()
    assert began.wait(30)
    second.start()
    while finder not in sys.meta_path:
        time.sleep(0.01)
    time.sleep(0.2)  # the optimizer is being made, and waits for the import
    go_on.set()
    first.join(30)
    second.join(30)
    assert not first.is_alive() and not second.is_alive() and Celo2 in supported()


began, go_on = threading.Event(), threading.Event()


def test_without_deepspeed_nothing_happens(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # `import deepspeed` raises ImportError
    make()
    enroll(Celo2)
    register()
    assert torch.optim.Celo2 is Celo2


def test_importing_celo2_pretrain_imports_no_torch_and_using_celo2_no_deepspeed():
    assert python("import sys, celo2_pretrain; print('torch' in sys.modules)") == "False"
    assert (
        python(
            "import sys\nfrom celo2_pretrain import Celo2, param_groups, register\n"
            "print([name for name in ('deepspeed', 'transformers') if name in sys.modules])"
        )
        == "[]"
    )


def test_public_names_are_listed_and_each_can_be_imported():
    assert set(celo2_pretrain.__all__) <= set(dir(celo2_pretrain))
    assert all(callable(getattr(celo2_pretrain, name)) for name in celo2_pretrain.__all__)
    with pytest.raises(AttributeError, match="no attribute 'celo3'"):
        celo2_pretrain.celo3
