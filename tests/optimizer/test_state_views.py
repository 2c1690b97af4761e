"""A saved state says which matrices each tensor consists of; states of earlier versions, with fewer keys, still load."""

import json
from dataclasses import asdict

import pytest
import torch

from celo2_pretrain import Celo2
from celo2_pretrain.optimizer.matrices.param_groups import TAG, Tag
from celo2_pretrain.optimizer.matrices.views import MatrixView
from celo2_pretrain.optimizer.state.files import StateError, tensor_entry
from celo2_pretrain.optimizer.state.index import view_entry, view_of
from celo2_pretrain.optimizer.state.save_load import load_state, save_state

from support.view_cases import CASES

QKV = MatrixView(transpose=True, split=(2, 2, 2), repeats=2)


def optimizer(
    view: MatrixView, shape: tuple[int, ...] = (12, 5), seed: int = 0, **options
) -> tuple[torch.nn.Parameter, Celo2]:
    torch.manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(shape))
    setattr(p, TAG, Tag("w", "hidden", "celo2", view))
    return p, Celo2([p], lr=1e-2, **options)


def train(p: torch.nn.Parameter, celo2: Celo2, steps: range) -> None:
    for step in steps:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        celo2.step()


def change_view(folder, change) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index["tensors"]["w"])
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_view_comes_back_from_json(case):
    assert view_of(json.loads(json.dumps(view_entry(case.view)))) == case.view


def test_a_view_that_an_earlier_version_knew_is_written_as_it_wrote_it():
    for view in (MatrixView(), MatrixView(transpose=True, split=(3, 4), head_dim=0, batch=1)):
        entry = tensor_entry((2, 7, 5) if view.batch else (7, 5), "celo2", view)["view"]
        assert entry == {"transpose": view.transpose, "split": list(view.split), "head_dim": 0, "batch": view.batch}
    assert view_entry(QKV) == {"transpose": True, "split": [2, 2, 2], "head_dim": 0, "batch": 0, "repeats": 2}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize(
    "shape, view",
    [
        ((12, 5), QKV),
        ((2, 5, 6), MatrixView(split=(1, 1), repeats=3, batch=1)),
        ((6, 3, 2, 2), MatrixView(transpose=True, flatten=True)),
    ],
)
def test_training_goes_on_bit_for_bit_through_a_state_with_the_view(shape, view, dtype, tmp_path):
    p, first = optimizer(view, shape, state_dtype=dtype)
    train(p, first, range(3))
    save_state(first, tmp_path / "state")
    q, second = optimizer(view, shape, seed=1, state_dtype=dtype)
    load_state(second, tmp_path / "state")
    train(p, first, range(3, 5)), train(q, second, range(3, 5))
    assert torch.equal(p, q)


def test_a_state_with_all_keys_or_only_the_first_four_is_one_of_the_same_view(tmp_path):
    view = MatrixView(transpose=True, split=(4, 4, 4))
    p, first = optimizer(view)
    train(p, first, range(2))
    save_state(first, tmp_path / "state")
    for entry in (view_entry(view), json.loads(json.dumps(asdict(view)))):
        change_view(tmp_path / "state", lambda tensor: tensor.update(view=entry))
        load_state(optimizer(view, seed=1)[1], tmp_path / "state")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize(
    "theirs, ours",
    [(MatrixView(transpose=True, head_dim=2), QKV), (MatrixView(), QKV), (QKV, MatrixView(transpose=True, split=(4, 4, 4)))],
)
def test_a_run_goes_on_bit_for_bit_with_the_matrices_that_it_was_saved_with(theirs, ours, dtype, tmp_path, caplog):
    """Earlier versions read some tensors otherwise (GPT-NeoX's Q, K, V per head, convolutions as they lie)."""
    p, first = optimizer(theirs, state_dtype=dtype)
    train(p, first, range(3))
    save_state(first, tmp_path / "state")
    q, fresh = optimizer(ours, seed=1, state_dtype=dtype)
    r, stepped = optimizer(ours, seed=1, state_dtype=dtype)
    train(r, stepped, range(2))
    for other in (fresh, stepped):
        load_state(other, tmp_path / "state")
    assert "1 tensors (w) consist of other matrices" in caplog.text
    train(p, first, range(3, 5)), train(q, fresh, range(3, 5)), train(r, stepped, range(3, 5))
    assert torch.equal(p, q) and torch.equal(p, r)
    save_state(fresh, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "index.json").read_text())["tensors"]["w"]["view"] == view_entry(theirs)


@pytest.mark.parametrize(
    "view, words",
    [
        ({"transpose": "yes"}, "transpose of a view can't be 'yes'"),
        ({"transpose": 1}, "transpose of a view can't be 1"),
        ({"split": 3}, "split of a view can't be 3"),
        ({"split": [2, None]}, "split of a view can't be"),
        ({"repeats": 2.0}, "repeats of a view can't be 2.0"),
        ({"head_dim": True}, "head_dim of a view can't be True"),
        ({"stride": 2}, "a view has no 'stride'"),
        ([], "has no view that is a dict"),
    ],
)
def test_a_damaged_view_is_a_state_error_that_names_the_tensor(view, words, tmp_path):
    p, first = optimizer(QKV)
    train(p, first, range(1))
    save_state(first, tmp_path / "state")
    change_view(tmp_path / "state", lambda tensor: tensor.update(view=view))
    before = p.detach().clone()
    with pytest.raises(StateError, match="'w'") as caught:
        load_state(first, tmp_path / "state")
    assert words in str(caught.value) and "\n" not in str(caught.value) and torch.equal(p, before)
