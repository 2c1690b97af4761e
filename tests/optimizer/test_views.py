"""A matrix view takes a tensor apart into its matrices, and a slice of it into pieces, without losing an element."""

import itertools

import pytest
import torch

from celo2_pretrain import Celo2
from celo2_pretrain.optimizer.matrices.param_groups import TAG, Tag
from celo2_pretrain.optimizer.matrices.views import Block, MatrixView, boxes, cut_first_axis, pieces

from support.view_cases import CASES, FLATTENED, INTERLEAVED

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def matrices(block: Block, x: torch.Tensor) -> list[torch.Tensor]:
    """Those that a tensor of the block's shape stacks."""
    return [x[index] for index in itertools.product(*(range(n) for n in block.shape[: block.batch]))]


@each_case
def test_blocks_are_the_matrices_that_plain_torch_cuts_out(case):
    x = torch.arange(case.numel).view(case.shape)
    found = [matrix for block in case.view.blocks(case.shape) for matrix in matrices(block, block.select(x))]
    assert len(found) == len(case.places()) and all(map(torch.equal, found, case.places()))
    assert sorted(torch.cat([matrix.flatten() for matrix in found]).tolist()) == list(range(case.numel))


@each_case
def test_what_is_assigned_to_a_block_lands_in_its_place(case):
    expected = torch.arange(case.numel).view(case.shape)
    built = torch.full(case.shape, -1)
    for block in case.view.blocks(case.shape):
        block.assign(built, block.select(expected))
    assert torch.equal(built, expected)


@each_case
def test_pieces_of_every_slice_hold_its_elements_once_and_in_their_places(case):
    """All slices, so that whatever ranks share a tensor, in any order, nothing is lost or there twice."""
    flat = torch.arange(case.numel)
    every = itertools.combinations_with_replacement(range(case.numel + 1), 2)
    few = [(0, case.numel), (1, case.numel), (0, case.numel - 2), (case.numel // 3, case.numel - 1)]
    slices = [*itertools.product(every, [1 << 20]), *itertools.product(few, (1, 2, 5, 11))]
    for block in case.view.blocks(case.shape):
        places = block.select(flat.view(case.shape))
        for (start, stop), most in slices:
            built = torch.full(block.shape, -1)
            for piece in pieces(block, start, stop, most):
                place = piece.within(built)
                assert (place == -1).all()
                place.copy_(piece.of(flat[start:stop]))
            assert torch.equal(built, torch.where((places >= start) & (places < stop), places, -1))


@each_case
def test_a_piece_for_the_kernels_has_its_elements_side_by_side(case):
    """Kernels take no stride along the inner axis: blocks without such an axis must say so."""
    for block in case.view.blocks(case.shape):
        for start, stop in itertools.combinations(range(case.numel + 1), 2):
            strides = [
                piece.stride[axis]
                for piece in pieces(block, start, stop)
                for axis in ([] if block.inner_axis is None else [block.inner_axis])
            ]
            assert set(strides) <= {1}


def test_only_columns_or_rows_that_alternate_are_left_to_plain_torch():
    left = {case.name for case in CASES for block in case.view.blocks(case.shape) if block.inner_axis is None}
    assert left == {"alternating columns", "experts, alternating columns", "one column of three"}


@pytest.mark.parametrize("most", [1, 7, 64])
@pytest.mark.parametrize(
    "shape,view",
    [((3, 9, 8), MatrixView(split=(1, 1), repeats=4, batch=1)), ((1, 40, 6), MatrixView(split=(1, 1), repeats=3, batch=1))],
)
def test_a_piece_for_plain_torch_has_at_most_as_many_elements_as_are_allowed(shape, view, most):
    (block,) = view.blocks(shape)
    assert max(piece.numel for piece in pieces(block, 0, torch.Size(shape).numel(), most)) <= most


def test_pieces_are_no_more_than_the_heads_and_what_the_ends_of_a_slice_cut():
    """64 heads, Q, K and V in one block; a block of alternating columns needs no piece for each of them."""
    (block,) = MatrixView(transpose=True, split=(8, 8, 8), repeats=64).blocks((1536, 16))
    assert [piece.shape for piece in pieces(block, 0, 1536 * 16)] == [(3, 16, 8)] * 64
    assert len(pieces(block, 1001, 1536 * 16 - 1001)) <= 64 + 2 * 6
    (block,) = MatrixView(split=(1, 1), repeats=2880).blocks((16, 5760))
    assert len(pieces(block, 0, 16 * 5760)) == 1 and len(pieces(block, 1001, 16 * 5760 - 1001)) <= 7
    (block,) = MatrixView(transpose=True, flatten=True).blocks((64, 32, 3, 3))
    assert len(pieces(block, 0, 64 * 32 * 9)) == 1


def test_boxes_are_few_and_in_order():
    found = list(boxes((4, 5, 6), 7, 113))
    assert len(found) <= 5
    flat = [((a * 5) + b) * 6 + c for box in found for a, b, c in itertools.product(*(range(*axis) for axis in box))]
    assert flat == list(range(7, 113))


def test_cutting_a_piece_along_its_first_axis_keeps_its_elements():
    block = MatrixView(batch=1).blocks((5, 2, 3))[0]
    x = torch.arange(30.0)
    (piece,) = [p for p in pieces(block, 6, 24) if p.shape[0] > 1]
    cut = cut_first_axis(piece, 2, 4)
    assert torch.equal(cut.of(x[6:24]), x.view(5, 2, 3)[2:4])
    assert cut_first_axis(piece, 4, 5) is None


@pytest.mark.parametrize(
    "case",
    [case for case in INTERLEAVED + FLATTENED if len(case.view.blocks(case.shape)[0].shape) > 2],
    ids=lambda case: case.name,
)
def test_cutting_the_pieces_of_a_stack_gives_each_of_its_tensors_once(case):
    flat = torch.arange(case.numel)
    for block in case.view.blocks(case.shape):
        built = torch.full(block.shape, -1)
        for number in range(block.shape[0]):
            cut = [part for piece in pieces(block, 1, case.numel) if (part := cut_first_axis(piece, number, number + 1))]
            for piece in cut:
                assert piece.box[0] == (number, number + 1)
                piece.within(built).copy_(piece.of(flat[1:]))
        assert torch.equal(built, block.select(torch.where(flat > 0, flat, -1).view(case.shape)))


@pytest.mark.parametrize(
    "shape,view,word",
    [
        ((4, 12), MatrixView(split=(4, 4)), "add up to 8"),
        ((4, 12), MatrixView(head_dim=5), "does not divide"),
        ((4,), MatrixView(transpose=True), "2 dims"),
        ((2, 3, 4), MatrixView(transpose=True), "2 dims"),
        ((4, 12), MatrixView(split=(2, 2), repeats=2), "add up to 4 × 2 repeats, but .* 12 elements"),
        ((4, 12), MatrixView(repeats=2), "no split"),
        ((4, 12), MatrixView(split=(16, -4)), "negative"),
        ((4, 12), MatrixView(split=(12, 0)), "0 as"),
        ((4, 12), MatrixView(split=(12,), repeats=0), "0 as repeats"),
        ((4, 12), MatrixView(head_dim=-4), "negative"),
        ((4, 12), MatrixView(split=(8, 4), head_dim=3), "one of its parts"),
        ((4,), MatrixView(transpose=True, flatten=True), "2 or more dims"),
    ],
)
def test_a_view_that_does_not_fit_is_refused_when_the_optimizer_is_made(shape, view, word):
    p = torch.nn.Parameter(torch.zeros(shape))
    setattr(p, TAG, Tag("w", "hidden", "celo2", view))
    with pytest.raises(ValueError, match=word):
        Celo2([p])
