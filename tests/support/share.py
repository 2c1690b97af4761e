"""Which share of a long list of cases the tests run by default: another one in each commit, so that in time all are run."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from typing import TypeVar

from support.paths import ROOT

T = TypeVar("T")


def share_of_this_commit(cases: Sequence[T], shares: int, number: int | None = None) -> list[T]:
    """One of so many equal shares of neighbouring cases; `number` chooses it instead of the commit."""
    if number is None:
        number = int(hashlib.sha256(commit().encode()).hexdigest(), 16) % shares
    return list(cases[len(cases) * number // shares : len(cases) * (number + 1) // shares])


def commit() -> str:
    """The commit that is checked out; "" outside of a git repository."""
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
