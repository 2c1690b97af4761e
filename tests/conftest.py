"""Shared by the tests: the reference trajectories of the authors' implementation (tests/data/README.md)."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch

DATA = Path(__file__).parent / "data"
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Forget the launcher's variables of a training in this process: a test's processes would take its port."""
    for name in LAUNCHED:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """All arrays of `celo2_reference.npz` by their keys, e.g. golden["celo2_official/t0/p1"]."""
    with np.load(DATA / "celo2_reference.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    """A small corpus as tokens; tests read it only."""
    from celo2_pretrain.cli import main

    out = str(tmp_path_factory.mktemp("data") / "tokens")
    assert main(["prepare", "--stdlib", "--max-mb", "0.3", "--vocab-size", "512", "--out", out]) == 0
    return out


@pytest.fixture
def one_thread():
    """One torch thread for the test, as the processes that it compares with have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
