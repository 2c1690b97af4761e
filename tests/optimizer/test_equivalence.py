"""Is the sharded step the unsharded step? The whole matrix on 2 ranks, parts of it on 1, 3 and 4 and by each backend.

By default every pair of settings on 2 ranks, and a share of the rest that the commit chooses (`support/share.py`).
docs/equivalence.md says what is compared; `python -m tests.equivalence` runs everything and prints the table.
"""

from collections import Counter

import pytest

from equivalence.cells import (
    PRECISIONS,
    STAGES,
    Cell,
    extra_cells,
    few_cells,
    from_name,
    half_of_the_cells,
    matching,
    pairs,
    pairwise_cells,
    product_cells,
    valid_cells,
)
from equivalence.launch import Result, World
from support.paths import ROOT
from support.share import share_of_this_commit

EVERYTHING = [
    (world, "", cell)
    for world, part in ((1, few_cells), (2, valid_cells), (3, half_of_the_cells), (4, few_cells))
    for cell in part()
] + [(2, "reference", cell) for cell in few_cells()]
DEFAULT = [(2, "", cell) for cell in pairwise_cells()] + share_of_this_commit(EVERYTHING, 16)


@pytest.fixture(scope="module")
def alive():
    """The one world of ranks that is running, by their number and backend."""
    worlds: dict[tuple[int, str], World] = {}
    yield worlds
    end(worlds)


def end(worlds: dict[tuple[int, str], World]) -> None:
    while worlds:
        worlds.popitem()[1].end()


@pytest.fixture
def world(alive, ranks, backend) -> World:
    """The ranks that a test asks for; they live on to the next test that asks for the same."""
    if (ranks, backend) not in alive:
        end(alive)
        alive[ranks, backend] = World(ranks, backend=backend)
    return alive[ranks, backend]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "ranks, backend, cell",
    [
        pytest.param(*case, id=f"{case[0]}-{case[1]}-{case[2].name}", marks=() if case in DEFAULT else pytest.mark.slow)
        for case in EVERYTHING
    ],
)
def test_sharded_step_is_the_unsharded_step(world, cell):
    assert world.run(cell).failures() == []


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks, backend", [(2, "triton")])
@pytest.mark.parametrize("name, flipped", [("zero2,fp32,acc4,allreduce,offload", False), ("zero3,bf16,acc1,rs", True)])
def test_sharded_step_is_the_unsharded_step_by_the_triton_kernels(world, name, flipped):
    """In the interpreter, which needs most of a minute for a cell. In these two every param group is orthogonalised once."""
    pytest.importorskip("triton", reason="Triton is not installed")
    assert from_name(name).flipped == flipped
    assert world.run(from_name(name)).failures() == []


def test_every_cell_of_the_matrix_is_run_by_some_commit():
    assert set(EVERYTHING) == {case for number in range(16) for case in share_of_this_commit(EVERYTHING, 16, number)}
    assert {cell for ranks, backend, cell in EVERYTHING if ranks == 2 and not backend} == set(valid_cells())


def test_every_invalid_cell_says_why_in_one_line():
    reasons = [cell.invalid() for cell in product_cells() + extra_cells() if cell.invalid()]
    assert reasons and all("\n" not in reason and len(reason) > 20 for reason in reasons)


def test_no_two_cells_share_a_name():
    cells = product_cells() + extra_cells()
    assert len({cell.name for cell in cells}) == len(cells)
    assert all(from_name(cell.name) == cell for cell in cells)


def test_parts_of_the_matrix_have_every_pair_of_settings():
    """Any two settings that occur together in a valid cell occur together in the part, too."""
    for part, most in ((half_of_the_cells(), 0.7), (pairwise_cells(), 0.25)):
        assert pairs(part) == pairs(valid_cells()) and len(part) < most * len(valid_cells())
    assert set(pairwise_cells()) <= {cell for ranks, _, cell in DEFAULT if ranks == 2}


def test_the_few_cells_have_every_stage_precision_and_setting_of_the_product():
    settings = {word for cell in valid_cells() if not cell.extra for word in cell.name.split(",")}
    chosen = [cell for cell in few_cells() if not cell.extra]
    assert {word for cell in chosen for word in cell.name.split(",")} == settings
    assert {(cell.stage, cell.precision) for cell in chosen} == {(cell.stage, cell.precision) for cell in valid_cells()}
    assert len(few_cells()) < 0.15 * len(valid_cells())


def test_filter_takes_words_of_the_names_and_refuses_others():
    chosen = matching(valid_cells(), "zero3,bf16")
    assert chosen and all(cell.stage == "zero3" and cell.precision == "bf16" for cell in chosen)
    with pytest.raises(ValueError, match="zero4"):
        matching(valid_cells(), "zero4")


def test_matrix_has_every_stage_and_precision():
    valid = {(cell.stage, cell.precision) for cell in valid_cells()}
    assert {(stage, precision) for stage in STAGES for precision in PRECISIONS} - valid == {
        ("zero0", "bf16+fp32acc"),
        ("zero0", "fp16"),
    }


def test_a_result_without_numbers_or_with_nan_is_a_failure():
    cell = Cell("zero1", "fp32")
    assert Result(cell, broke="hangs").failures()
    assert Result(cell, {"update": (float("nan"), "w")}).failures()
    assert Result(cell, {"update": (1.1e-5, "w")}).failures()
    assert not Result(cell, {"update": (0.9e-5, "w")}).failures()


def test_the_document_lists_the_invalid_cells_as_they_are():
    text = (ROOT / "docs/equivalence.md").read_text()
    counts = Counter(reason for cell in product_cells() + extra_cells() if (reason := cell.invalid()))
    missing = [f"| {count} | {reason} |" for reason, count in counts.items() if f"| {count} | {reason} |" not in text]
    assert not missing, "\n".join(missing)
