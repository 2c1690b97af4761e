"""A matrix view takes a tensor apart into its matrices, and a slice of it into pieces, without losing an element."""
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from celo2_pretrain import Celo2
from celo2_pretrain.optimizer import reference
from celo2_pretrain.optimizer.rules import TAG, Tag
from celo2_pretrain.optimizer.views import MatrixView, boxes, cut_first_axis, pieces

VIEWS = [
    ((7,), MatrixView()), ((5, 3), MatrixView()), ((5, 3), MatrixView(transpose=True)), ((2, 3, 4, 5), MatrixView()),
    ((4, 12), MatrixView(split=(4, 4, 4))), ((12, 4), MatrixView(transpose=True, split=(4, 4, 4))),
    ((4, 11), MatrixView(split=(6, 3, 2))), ((11, 4), MatrixView(transpose=True, split=(6, 3, 2))),
    ((4, 12), MatrixView(head_dim=2)), ((12, 4), MatrixView(transpose=True, head_dim=3)),
    ((3, 5, 4), MatrixView(batch=1)), ((3, 6, 4), MatrixView(transpose=True, split=(2, 4), batch=1)),
    ((2, 3, 6, 4), MatrixView(transpose=True, head_dim=2, batch=2)),
]


@pytest.mark.parametrize("shape,view", VIEWS)
def test_blocks_hold_every_element_once(shape, view):
    x = torch.arange(torch.Size(shape).numel()).view(shape)
    seen = torch.cat([block.select(x).flatten() for block in view.blocks(shape)])
    assert sorted(seen.tolist()) == list(range(x.numel()))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(VIEWS), st.data())
def test_pieces_of_any_slice_are_the_block(case, data):
    """Cut a tensor at random places; the pieces of all slices must rebuild every block."""
    shape, view = case
    total = torch.Size(shape).numel()
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=4))})
    most = data.draw(st.sampled_from([1, 3, 1 << 20]))
    x = torch.arange(total, dtype=torch.float32)
    for block in view.blocks(shape):
        built = torch.full(block.shape, -1.0)
        for start, stop in itertools.pairwise(cuts):
            for piece in pieces(block, start, stop, most):
                place = piece.within(built)
                assert (place == -1).all()
                place.copy_(piece.of(x[start:stop]))
        assert torch.equal(built, block.select(x.view(shape)))


def test_boxes_are_few_and_in_order():
    found = list(boxes((4, 5, 6), 7, 113))
    assert len(found) <= 5
    flat = [((a * 5) + b) * 6 + c for box in found for a, b, c in itertools.product(*(range(*axis) for axis in box))]
    assert flat == list(range(7, 113))


def test_cutting_a_piece_along_its_first_axis_keeps_its_elements():
    block = MatrixView(batch=1).blocks((5, 2, 3))[0]
    x = torch.arange(30.0)
    piece, = [p for p in pieces(block, 6, 24) if p.shape[0] > 1]
    cut = cut_first_axis(piece, 2, 4)
    assert torch.equal(cut.of(x[6:24]), x.view(5, 2, 3)[2:4])
    assert cut_first_axis(piece, 4, 5) is None


@pytest.mark.parametrize("shape,view,word", [
    ((4, 12), MatrixView(split=(4, 4)), "add up to 8"), ((4, 12), MatrixView(head_dim=5), "does not divide"),
    ((4,), MatrixView(transpose=True), "2 dims"), ((2, 3, 4), MatrixView(transpose=True), "2 dims"),
])
def test_a_view_that_does_not_fit_is_refused_when_the_optimizer_is_made(shape, view, word):
    p = torch.nn.Parameter(torch.zeros(shape))
    setattr(p, TAG, Tag("w", "hidden", "celo2", view))
    with pytest.raises(ValueError, match=word):
        Celo2([p])


@pytest.mark.parametrize("shape,view", VIEWS)
def test_a_step_through_a_view_is_the_step_of_its_matrices(shape, view):
    """Each matrix taken out and stepped alone by the reference gives the same as the whole tensor through its view."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape))
    setattr(p, TAG, Tag("w", "hidden", "celo2", view))
    optimizer = Celo2([{"params": [p], "rule": "celo2"}], lr=1e-2)
    blocks = view.blocks(shape)
    states = {}
    for _ in range(3):
        p.grad = torch.randn(shape)
        expected = p.detach().clone()
        for number, block in enumerate(blocks):
            part = block.select(expected)
            # Batch axes are independent matrices: take them apart completely.
            for index in itertools.product(*(range(n) for n in block.shape[:block.batch])):
                matrix, key = part[index], (number, index)
                state = states.get(key) or reference.init_state(matrix)
                step, states[key] = reference.step(matrix, block.select(p.grad)[index], state, optimizer.mlp)
                matrix.sub_(1e-2 * step)
        optimizer.step()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)
