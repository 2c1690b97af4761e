"""Is the sharded step the unsharded step? The whole matrix on 2 ranks, parts of it on 1, 3 and 4 and by each backend.

docs/equivalence.md says what is compared; `python -m tests.equivalence` runs everything and prints the table.
"""
from collections import Counter
from pathlib import Path

import pytest
from equivalence.cells import (Cell, PRECISIONS, STAGES, covering_cells, extra_cells, few_cells, from_name, matching,
                               product_cells, valid_cells)
from equivalence.launch import Result, run_cells


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("world, part", [(1, few_cells), (2, valid_cells), (3, covering_cells), (4, few_cells)])
def test_sharded_step_is_the_unsharded_step(world, part):
    all_hold(run_cells(world, part()), part(), world)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_sharded_step_is_the_unsharded_step_in_plain_torch():
    all_hold(run_cells(2, few_cells(), backend="reference"), few_cells(), 2)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_sharded_step_is_the_unsharded_step_by_the_triton_kernels():
    """In the interpreter, which needs most of a minute for a cell. In these two every param group is orthogonalised once."""
    pytest.importorskip("triton", reason="Triton is not installed")
    cells = [from_name("zero2,fp32,acc4,allreduce,offload"), from_name("zero3,bf16,acc1,rs")]
    assert {cell.flipped for cell in cells} == {False, True}
    all_hold(run_cells(2, cells, backend="triton"), cells, 2)


def all_hold(results: list[Result], cells: list[Cell], world: int) -> None:
    assert [result.cell for result in results] == cells
    failed = [f"{result.cell.name}: {'; '.join(result.failures())}" for result in results if result.failures()]
    assert not failed, f"{len(failed)} of {len(cells)} cells fail on {world} ranks:\n" + "\n".join(failed)


def test_every_invalid_cell_says_why_in_one_line():
    reasons = [cell.invalid() for cell in product_cells() + extra_cells() if cell.invalid()]
    assert reasons and all("\n" not in reason and len(reason) > 20 for reason in reasons)


def test_no_two_cells_share_a_name():
    cells = product_cells() + extra_cells()
    assert len({cell.name for cell in cells}) == len(cells)
    assert all(from_name(cell.name) == cell for cell in cells)


def test_covering_part_has_every_pair_of_settings():
    """Any two settings that occur together in a valid cell occur together in the part, too."""
    def pairs(cells):
        words = [cell.name.split(",") for cell in cells]
        return {(a, b) for names in words for a in names for b in names}

    assert pairs(covering_cells()) == pairs(valid_cells())
    assert len(covering_cells()) < 0.7 * len(valid_cells())


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
        ("zero0", "bf16+fp32acc"), ("zero0", "fp16")}


def test_a_result_without_numbers_or_with_nan_is_a_failure():
    cell = Cell("zero1", "fp32")
    assert Result(cell, broke="hangs").failures()
    assert Result(cell, {"update": (float("nan"), "w")}).failures()
    assert Result(cell, {"update": (1.1e-5, "w")}).failures()
    assert not Result(cell, {"update": (0.9e-5, "w")}).failures()


def test_the_document_lists_the_invalid_cells_as_they_are():
    text = (Path(__file__).parents[1] / "docs/equivalence.md").read_text()
    counts = Counter(reason for cell in product_cells() + extra_cells() if (reason := cell.invalid()))
    missing = [f"| {count} | {reason} |" for reason, count in counts.items() if f"| {count} | {reason} |" not in text]
    assert not missing, "\n".join(missing)
