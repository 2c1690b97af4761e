"""Shared by the tests: the reference trajectories of the authors' implementation (tests/data/README.md)."""
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """All arrays of `celo2_reference.npz` by their keys, e.g. golden["celo2_official/t0/p1"]."""
    with np.load(DATA / "celo2_reference.npz") as file:
        return dict(file)
