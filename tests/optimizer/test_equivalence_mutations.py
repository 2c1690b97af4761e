"""Does the equivalence matrix notice a broken optimizer? Each mutation must turn the cells red that it concerns."""

import time

import pytest

from equivalence.cells import from_name
from equivalence.launch import run_cells
from equivalence.mutations import MUTATIONS

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

# Per mutation: a cell that must fail, and the kinds of error of which at least one must be too large.
EXPECTED = {
    "drop_all_reduce_a": ("zero2,bf16,acc1,rs", {"update", "state", "ranks"}),
    "drop_all_reduce_b": ("zero3,fp32,acc1,rs", {"update"}),
    "flat_slice_as_vector": ("zero2,fp32,acc1,rs", {"update"}),
    "shift_offset": ("zero2,fp32,acc1,rs", {"update", "state"}),
    "step_per_micro_batch": ("zero2,fp32,acc4,rs", {"gradient", "state"}),
    "swap_ranks": ("zero2,fp32,acc1,rs", {"update"}),
    "ignore_transpose": ("zero3,fp32,acc1,rs", {"update", "state"}),
    "ignore_repeats": ("zero2,fp32,acc1,rs", {"update", "state"}),
}


def test_every_mutation_is_tried():
    assert set(EXPECTED) == set(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_matrix_goes_red_when_broken_by(mutation):
    cell, kinds = EXPECTED[mutation]
    world = 3 if mutation == "swap_ranks" else 2  # two ranks have nobody else's piece to swap
    (result,) = run_cells(world, [from_name(cell)], mutation=mutation)
    assert not result.broke, f"the mutation should give wrong numbers, not end the run: {result.broke}"
    red = {failure.split()[0] for failure in result.failures()}
    assert red & kinds, f"{mutation} went unnoticed in {cell}: {result.errors}"


def test_a_hang_fails_instead_of_blocking():
    began = time.monotonic()
    (result,) = run_cells(1, [from_name("zero1,fp32,acc1,rs")], mutation="hang", start=30)
    assert "hangs" in result.broke and result.failures()
    assert time.monotonic() - began < 100
