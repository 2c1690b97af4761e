"""A step through a matrix view is the step of its matrices taken out, however ranks share the tensor.

The ranks are threads here, each with its slice; they exchange through lists what they would exchange by collectives.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from celo2_pretrain.kernels.packed import WORD, draws, pack, step_offset_of, unpack
from celo2_pretrain.kernels.rounding import key_of, stochastic_round
from celo2_pretrain.optimizer import reference
from celo2_pretrain.optimizer.backends.passes import scales
from celo2_pretrain.optimizer.matrices.views import MatrixView
from celo2_pretrain.optimizer.reference import State
from celo2_pretrain.optimizer.sharding.layouts import Layout, Original, Slice
from celo2_pretrain.optimizer.sharding.plan import make_plan
from celo2_pretrain.optimizer.sharding.shape import BlockShape
from celo2_pretrain.optimizer.step import learned
from celo2_pretrain.optimizer.step.accumulators import ACCUMULATORS, init_state
from celo2_pretrain.optimizer.step.exchange import Exchange
from celo2_pretrain.optimizer.step.state_dtypes import pack_range, unpack_range
from celo2_pretrain.weights.mlp import DIMS, MLP

from support.view_cases import CASES, FLATTENED, INTERLEAVED, Case

STEPS, LR = 2, 0.5  # a large rate: a parameter's own rounding is small beside its update


class Ranks:
    """Threads in the place of ranks. Made into the optimizer's collectives by the fixture `ranks`."""

    def __init__(self) -> None:
        self.slots: list[Any] = []

    def run(self, world: int, work: Callable[[int], Any]) -> list[Any]:
        """`work(rank)` on each of `world` ranks at the same time; what they return."""
        self.barrier, self.slots = threading.Barrier(world), [None] * world
        found: list[Any] = [None] * world
        errors: list[BaseException] = []

        def one(rank: int) -> None:
            try:
                with torch.no_grad():
                    found[rank] = work(rank)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
        return found

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        everyone = list(self.slots)
        self.barrier.wait()
        return everyone


@pytest.fixture
def ranks(monkeypatch) -> Ranks:
    ranks = Ranks()

    def reduce(x: Tensor, layout: Layout) -> None:
        if layout.world > 1 and x.numel():
            x.copy_(torch.stack(ranks.gather(layout.rank, x.clone())).sum(0))

    def all_to_all(exchange: Exchange, sent: Tensor, to: list[int], come: list[int]) -> None:
        everyone = ranks.gather(exchange.rank, (sent, to))
        received = [sent.split(to)[exchange.rank] for sent, to in everyone]
        assert [x.numel() for x in received] == come
        exchange.pending = torch.cat(received)

    monkeypatch.setattr(learned, "reduce", reduce)
    monkeypatch.setattr(Exchange, "_all_to_all", all_to_all)
    monkeypatch.setattr(Exchange, "_wait", lambda exchange, device: exchange.pending)
    return ranks


def random_mlp() -> MLP:
    generator = torch.Generator().manual_seed(3)
    draw = lambda *size: torch.randn(size, generator=generator) / 3
    return MLP(draw(*DIMS[:2]), draw(DIMS[1]), draw(*DIMS[1:3]), draw(DIMS[2]), draw(*DIMS[2:]), draw(DIMS[3]))


def values(case: Case) -> tuple[Tensor, list[Tensor]]:
    """The parameter and the gradients of the steps, flat. Gradients differ between rows and columns, as real ones do."""
    generator = torch.Generator().manual_seed(case.numel)
    draw = lambda: torch.randn(case.numel, generator=generator)
    return draw(), [draw() * (1 + torch.arange(case.numel) % 7) for _ in range(STEPS)]


def sharded(
    ranks: Ranks, case: Case, cuts: list[int], orthogonalize: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, dict[str, Tensor]]:
    """The parameter (flat) after the steps of ranks that hold [cuts[0], cuts[1]), [cuts[1], cuts[2]), …; and the states."""
    p, gradients = values(case)
    ranges = torch.tensor(list(itertools.pairwise(cuts)))[:, None]
    mlp = random_mlp()
    group = {"lr": LR, "weight_decay": 0.1, "newton_schulz": "celo2", "newton_schulz_dtype": "fp32"}

    def work(rank: int) -> tuple[Tensor, dict[str, Tensor]]:
        start, stop = ranges[rank, 0].tolist()
        storage = torch.nn.Parameter(p[start:stop].clone())
        original = Original(torch.empty(case.shape), "w", case.view)
        layout = Layout("ranks of a test", [Slice(original, start, stop, 0, storage)], None, rank, len(ranges), ranges)
        plan = make_plan(layout, orthogonalize, 1 << 30)
        state = init_state(storage, plan.parts, lambda x, dtype: torch.zeros_like(x, dtype=dtype), dtype)
        for g in gradients:
            storage.grad = g[start:stop].clone()
            learned.LearnedStep(plan, {storage: state}, mlp, group).run()
        return storage.detach(), state

    parts, states = zip(*ranks.run(len(ranges), work))
    for key in ("v_row", "v_col"):  # replicated
        assert all(torch.equal(state[key], states[0][key]) for state in states)
    whole = {key: torch.cat([state[key] for state in states]) for key in states[0] if key not in ("v_row", "v_col", "step")}
    return torch.cat(parts), whole | {key: states[0][key] for key in ("v_row", "v_col")}


def separate(case: Case, orthogonalize: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """The parameter (flat) after the same steps of the matrices that plain torch cuts out; their v_row and v_col."""
    p, gradients = values(case)
    mlp, places = random_mlp(), case.places()
    states = [reference.init_state(p[place]) for place in places]
    for number, g in enumerate(gradients, 1):
        before = p.clone()
        for k, place in enumerate(places):
            own = before[place]
            if dtype == torch.float32:
                step, states[k] = reference.step(own, g[place], states[k], mlp, orthogonalize)
            else:
                states[k] = rounded(states[k], g[place], place, number, dtype)
                out = reference.normalize(reference.features(own, g[place], states[k]), (-2, -1))
                out = reference.direction(out, mlp)
                step = reference.normalize(reference.newton_schulz(out) if orthogonalize else out, (-2, -1))
            p[place] = own - LR * (step + 0.1 * own)
    return p, *(torch.cat([getattr(state, key) for state in states], 1) for key in ("v_row", "v_col"))


def rounded(state: State, g: Tensor, place: Tensor, step: int, dtype: torch.dtype) -> State:
    """`reference.accumulate` with accumulators in bfloat16 or packed; `place` says where elements lie in the tensor."""
    updated = reference.accumulate(g, state)
    rms = state.rms * reference.RMS_DECAY + g * g * (1 - reference.RMS_DECAY)  # in the order of the passes
    if dtype == WORD:
        d1, d0 = reference.factored_axes(g.shape)
        shape = BlockShape(MatrixView().blocks(tuple(g.shape))[0])
        scale = scales(updated.v_row.unsqueeze(d0 + 1), updated.v_col.unsqueeze(d1 + 1), shape)
        by_decay = [row * col for row, col in zip(scale.row, scale.col)]
        drawn = [draws(place, key_of("w", k), step_offset_of(step)) for k in range(4)]
        *momentum, rms = unpack(pack([*updated.momentum, rms], by_decay, drawn), by_decay)
    else:
        *momentum, rms = (
            stochastic_round(x, place, key_of("w", step, k)).float() for k, x in enumerate((*updated.momentum, rms))
        )
    return updated._replace(momentum=torch.stack(momentum), rms=rms)


def every_share(numel: int) -> list[list[int]]:
    """Where 1 to 4 ranks may cut: two ranks everywhere, three and four at odd places, some of them with nothing."""
    cuts = [[0, numel], *([0, at, numel] for at in range(numel + 1))]
    inside = [0, 1, numel // 3, numel // 2 + 1, numel - 1, numel]
    return cuts + [[0, *some, numel] for ranks in (2, 3) for some in itertools.combinations_with_replacement(inside, ranks)]


def few_shares(numel: int) -> list[list[int]]:
    return [[0, numel], [0, 1, numel // 3, numel], [0, 0, numel // 3 + 1, numel - 1, numel]]


def worst_error(
    ranks: Ranks, case: Case, shares: list[list[int]], orthogonalize: bool, dtype: torch.dtype = torch.float32
) -> float:
    """‖difference‖ / ‖update‖, the largest over the shares; v_row and v_col are compared on the way."""
    expected, v_row, v_col = separate(case, orthogonalize, dtype)
    update, worst = (expected - values(case)[0]).norm(), 0.0
    for cuts in shares:
        found, state = sharded(ranks, case, cuts, orthogonalize, dtype)
        worst = max(worst, ((found - expected).norm() / update).item())
        torch.testing.assert_close(state["v_row"], v_row, rtol=2e-6, atol=0)
        torch.testing.assert_close(state["v_col"], v_col, rtol=2e-6, atol=0)
    return worst


def allowed(orthogonalize: bool) -> float:
    """Newton–Schulz multiplies small singular values, and with them the round-off."""
    return 5e-6 if orthogonalize else 1e-6


each_rule = pytest.mark.parametrize("orthogonalize", [True, False], ids=["celo2", "celo2-base"])
each_backend = pytest.mark.parametrize("backend", ["reference", "compile"])
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@each_rule
@each_backend
@each_case
def test_a_step_through_a_view_is_the_step_of_the_separate_matrices(case, backend, orthogonalize, ranks, monkeypatch):
    monkeypatch.setenv("CELO2_BACKEND", backend)
    assert worst_error(ranks, case, few_shares(case.numel), orthogonalize) <= allowed(orthogonalize)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend,orthogonalize", [("compile", False), ("reference", True)], ids=["compile-base", "reference-celo2"]
)
@each_case
def test_a_step_is_that_of_the_separate_matrices_wherever_ranks_cut(case, backend, orthogonalize, ranks, monkeypatch):
    monkeypatch.setenv("CELO2_BACKEND", backend)
    assert worst_error(ranks, case, every_share(case.numel), orthogonalize) <= allowed(orthogonalize)


@each_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, WORD], ids=["bf16", "fp8"])
@pytest.mark.parametrize("case", INTERLEAVED + FLATTENED, ids=lambda case: case.name)
def test_rounded_states_follow_the_places_in_the_stored_tensor(case, dtype, orthogonalize, ranks, monkeypatch):
    """One element that is rounded by another's random bits would show in the update."""
    monkeypatch.setenv("CELO2_BACKEND", "reference")  # kernels fuse multiply and add, which may move a rounding
    assert worst_error(ranks, case, few_shares(case.numel), orthogonalize, dtype) <= allowed(orthogonalize)


@pytest.mark.parametrize("dtype", [torch.bfloat16, WORD], ids=["bf16", "fp8"])
@pytest.mark.parametrize("case", INTERLEAVED + FLATTENED, ids=lambda case: case.name)
def test_rounded_states_have_the_same_bits_on_any_ranks_with_kernels(case, dtype, ranks, monkeypatch):
    monkeypatch.setenv("CELO2_BACKEND", "compile")
    whole, *others = (sharded(ranks, case, cuts, False, dtype)[1] for cuts in few_shares(case.numel))
    keys = ["packed"] if dtype == WORD else ACCUMULATORS
    assert all(torch.equal(state[key], whole[key]) for state in others for key in keys)


def test_packing_a_range_of_a_view_and_unpacking_it_loses_nothing():
    """As a saved state does it, range by range, through float32."""
    for case in INTERLEAVED + FLATTENED:
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(-1 << 31, 1 << 31, (case.numel,), generator=generator).to(WORD)
        shard = Slice(Original(torch.empty(case.shape), "w", case.view), 0, case.numel, 0, words)
        shapes = [BlockShape(block) for block in case.view.blocks(case.shape)]
        vectors = [
            torch.rand(3, sum(math.prod(size) for size in sizes), generator=generator)
            for sizes in zip(*((shape.row, shape.col) for shape in shapes))
        ]
        canonical = pack_range(unpack_range(words, shard, 0, *vectors), shard, 0, *vectors)
        for cuts in few_shares(case.numel):
            made = [
                pack_range(unpack_range(canonical[a:b], shard, a, *vectors), shard, a, *vectors)
                for a, b in itertools.pairwise(cuts)
            ]
            assert torch.equal(torch.cat(made), canonical)
