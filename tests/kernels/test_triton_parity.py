"""The Triton kernels do what their plain-torch twins do: any shape, view, slice and dtype.

Triton decides at import whether it interprets kernels, so the tests proper run in a process of their own, in which
TRITON_INTERPRET=1 is set, with those of test_triton_flat.py: outside of it, this file has a single test, which starts
that process.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from support.paths import TESTS

INTERPRETED = ["kernels/test_triton_parity.py", "kernels/test_triton_flat.py", "optimizer/test_strides.py"]
pytest.importorskip("triton", reason="Triton is not installed")

if os.environ.get("TRITON_INTERPRET") != "1":

    @pytest.mark.slow
    def test_the_interpreted_kernels_pass_their_tests():
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("PYTEST_ADDOPTS", None)
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-x",
                "-p",
                "no:cacheprovider",
                "--everything",
                *(TESTS / name for name in INTERPRETED),
            ],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert " passed" in done.stdout and "failed" not in done.stdout
else:
    from triton.runtime.interpreter import GridExecutor

    from celo2_pretrain import Celo2
    from celo2_pretrain.kernels import direction, norms
    from celo2_pretrain.kernels.tiles import Size
    from celo2_pretrain.optimizer.backends.choose import backend_for
    from celo2_pretrain.optimizer.backends.passes import Tensors
    from celo2_pretrain.optimizer.backends.plain import TorchBackend
    from celo2_pretrain.optimizer.backends.triton import Triton
    from celo2_pretrain.optimizer.matrices.views import MatrixView, pieces
    from celo2_pretrain.optimizer.sharding.plan import Part
    from celo2_pretrain.optimizer.sharding.shape import BlockShape
    from celo2_pretrain.weights.mlp import DIMS, MLP

    from support.golden import TOLERANCE, Case

    CASES = [
        ((1, 1), MatrixView()),
        ((1, 9), MatrixView()),
        ((9, 1), MatrixView()),
        ((7, 13), MatrixView()),
        ((16, 16), MatrixView()),
        ((16, 16), MatrixView(transpose=True)),
        ((23, 11), MatrixView(transpose=True)),
        ((5, 100), MatrixView()),
        ((40, 17), MatrixView(transpose=True)),
        ((12, 36), MatrixView(split=(12, 12, 12))),
        ((36, 12), MatrixView(transpose=True, split=(12, 12, 12))),
        ((11, 23), MatrixView(split=(16, 4, 3))),
        ((24, 10), MatrixView(transpose=True, head_dim=4)),
        ((3, 9, 7), MatrixView(batch=1)),
        ((13,), MatrixView()),
        ((4, 5, 3, 3), MatrixView()),
        ((2, 2, 6, 5), MatrixView()),
        ((18, 10), MatrixView(transpose=True, split=(3, 3, 3), repeats=2)),
        ((20, 9), MatrixView(transpose=True, split=(6, 2, 2), repeats=2)),
        ((9, 20), MatrixView(split=(6, 2, 2), repeats=2)),
        ((2, 5, 14), MatrixView(split=(1, 1), repeats=7, batch=1)),
        ((5, 12), MatrixView(split=(1, 2), repeats=4)),
        ((6, 5, 3, 3), MatrixView(transpose=True, flatten=True)),
        ((6, 5, 3, 3), MatrixView(flatten=True)),
    ]
    SIZE = Size(rows=16, cols=16)
    NONE, VECTOR = MatrixView(), (13,)

    @pytest.fixture(autouse=True)
    def few_instructions(monkeypatch):
        """The interpreter's time goes by instructions, not by elements."""
        monkeypatch.setattr(norms, "STEP", 8)
        monkeypatch.setattr(direction, "STEP", 8)

    def random_mlp() -> MLP:
        return MLP(*(torch.randn(s) / 3 for s in [DIMS[:2], DIMS[1:2], DIMS[1:3], DIMS[2:3], DIMS[2:], DIMS[3:]]))

    def draw(shape, start, stop, seed, dtypes, odd=0, states=torch.float32) -> Tensors:
        """A slice's tensors, with gradients over many magnitudes, each lying `odd` elements into its storage."""
        generator = torch.Generator().manual_seed(seed)
        n = stop - start

        def some(dtype=torch.float32, scale=1.0, square=False):
            x = torch.randn(n + odd, generator=generator)
            x = x.square() if square else x
            return (x * scale).to(dtype)[odd:]

        scale = 10.0 ** torch.randint(-4, 4, (n + odd,), generator=generator)
        return Tensors(
            some(dtypes[0]),
            some(dtypes[1], scale),
            [some(states) for _ in range(3)],
            some(states, square=True),
            [some(square=True) for _ in range(3)] if len(shape) == 1 else [],
            start,
            (1, 2**31, 2**32 - 1, 12345),
        )

    def passes(backend: TorchBackend, parts: list[Part], tensors: list[Tensors], mlp: MLP) -> list[torch.Tensor]:
        """All three passes over a plan's parts; returns everything that they make."""
        totals = [(torch.zeros(part.shape.row), torch.zeros(part.shape.col)) for part in parts]
        backend.accumulate(parts, tensors, totals)
        generator = torch.Generator().manual_seed(1)
        vectors = [
            tuple(torch.rand(3, *size, generator=generator) for size in (part.shape.row, part.shape.col)) for part in parts
        ]
        factors = [backend.factor(part.shape, *both) for part, both in zip(parts, vectors)]
        squares = [torch.zeros(len(part.shape.elementwise), *part.shape.lead) for part in parts]
        backend.norms(parts, tensors, factors, squares)
        layers = [backend.first_layer(x + 1e-3, *both, part.shape, mlp) for part, both, x in zip(parts, vectors, squares)]
        out = [torch.zeros(t.rms.shape) for t in tensors]
        backend.direction(parts, tensors, factors, layers, mlp, out)
        sums = [torch.full(part.shape.lead, 0.5) for part in parts]
        scaled = [x.clone() for x in out]
        backend.output_squares(parts, scaled, sums)
        backend.rescale(parts, scaled, sums)
        made = sums + scaled + [x for both in totals for x in both] + squares + out
        return made + [x for t in tensors for x in (*t.momentum, t.rms, *t.v_full)]

    def compare(cases, cuts, dtypes, odd=0, size=SIZE, states=torch.float32) -> None:
        """The kernels against plain torch, for a plan of the cases' blocks, each cut as `cuts` says."""
        torch.manual_seed(0)
        mlp, made = random_mlp(), []
        for backend in (Triton(size), TorchBackend()):
            parts, tensors = [], []
            for number, ((shape, view), (start, stop)) in enumerate(zip(cases, cuts)):
                t = draw(shape, start, stop, number, dtypes, odd, states)
                for block in view.blocks(shape):
                    parts.append(Part(number, BlockShape(block), pieces(block, start, stop, most=50), 0, 0))
                    tensors.append(t)
            made.append(passes(backend, parts, tensors, mlp))
        for ours, twin in zip(*made):
            scale = twin.abs().max().item() if twin.numel() else 0.0
            # Sums in another order: round-off relative to the largest, the MLP's amplified by cancelling terms.
            torch.testing.assert_close(ours, twin, rtol=2e-5, atol=2e-5 * scale + 1e-30)

    @pytest.mark.parametrize("shape,view", CASES)
    def test_the_kernels_are_their_twins_on_every_slice(shape, view):
        total = torch.Size(shape).numel()
        for start, stop in {(0, total), (0, total // 3), (total // 3, total), (total // 2, total // 2)}:
            compare([(shape, view)], [(start, stop)], (torch.float32, torch.float32))

    @pytest.mark.parametrize("p_dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("g_dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_parameters_and_gradients_may_have_any_dtype(p_dtype, g_dtype):
        compare([((12, 20), NONE)], [(0, 240)], (p_dtype, g_dtype))
        compare([((7, 13), NONE)], [(5, 80)], (p_dtype, g_dtype))

    def test_accumulators_in_bfloat16_are_rounded_like_their_twins():
        compare(
            [((12, 20), NONE), ((14, 9), MatrixView(transpose=True))],
            [(0, 240), (11, 120)],
            (torch.float32, torch.float32),
            states=torch.bfloat16,
        )

    def test_packed_accumulators_are_updated_and_read_like_their_twins():
        cases = [
            ((12, 20), NONE),
            ((14, 9), MatrixView(transpose=True)),
            ((11, 23), MatrixView(split=(16, 4, 3))),
            ((3, 9, 7), MatrixView(batch=1)),
            ((4, 5, 3, 3), NONE),
            ((18, 10), MatrixView(transpose=True, split=(3, 3, 3), repeats=2)),
            ((2, 5, 14), MatrixView(split=(1, 1), repeats=7, batch=1)),
            ((4, 5, 2, 3), MatrixView(flatten=True)),
        ]
        made, mlp = [], random_mlp()
        for backend in (Triton(SIZE), TorchBackend()):
            generator, parts, tensors, vectors = torch.Generator().manual_seed(0), [], [], []
            for number, (shape, view) in enumerate(cases):
                total = torch.Size(shape).numel()
                start, stop = (0, total) if number != 1 else (11, 120)
                p, g, words = (
                    torch.randn(total, generator=generator),
                    torch.randn(total, generator=generator),
                    torch.randint(-1 << 31, 1 << 31, (total,), generator=generator).to(torch.int32),
                )
                t = Tensors(
                    *(x[start:stop].clone() for x in (p, g)),
                    [],
                    words[start:stop].clone(),
                    [],
                    start,
                    (1, 2**31, 2**32 - 1, 12345, 40000),
                )
                for block in view.blocks(shape):
                    parts.append(Part(number, BlockShape(block), pieces(block, start, stop, most=50), 0, 0))
                    tensors.append(t)
                    vectors.append(
                        [
                            [
                                torch.randn(3, *size, generator=generator).exp()
                                for size in (parts[-1].shape.row, parts[-1].shape.col)
                            ]
                            for _ in range(2)
                        ]
                    )
            old, new = (backend.scales(parts, [both[k] for both in vectors]) for k in range(2))
            backend.repack(parts, tensors, old, new)
            scaled = [replace(t, scale=scale) for t, scale in zip(tensors, new)]
            words = torch.cat([t.rms for t in tensors])
            made.append([words.clone(), *passes(backend, parts, scaled, mlp)[: -len(parts)]])
            assert torch.equal(torch.cat([t.rms for t in tensors]), words)  # the passes only read them
        ours, twin = made
        assert (ours[0] != twin[0]).float().mean() <= 3e-3  # a fused multiply-add may cross a rounding threshold
        for a, b in zip(ours[1:], twin[1:]):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * b.abs().max().item() + 1e-30)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_nan_or_inf_in_an_accumulator_stays_one(value):
        shape = BlockShape(NONE.blocks((2, 4))[0])
        t = draw((2, 4), 0, 8, 0, (torch.float32, torch.float32), states=torch.bfloat16)
        t.momentum[2][5] = value
        Triton(SIZE).accumulate(
            [Part(0, shape, pieces(shape.block, 0, 8), 0, 0)], [t], [(torch.zeros(shape.row), torch.zeros(shape.col))]
        )
        assert torch.isfinite(t.momentum[2]).tolist() == [k != 5 for k in range(8)]
        torch.testing.assert_close(t.momentum[2][5].float(), torch.tensor(value), equal_nan=True)

    @pytest.mark.parametrize("odd", [0, 1, 3])
    def test_many_tensors_share_a_launch_wherever_they_lie(odd):
        cases = [
            ((7, 13), NONE),
            ((36, 12), MatrixView(transpose=True, split=(12, 12, 12))),
            (VECTOR, NONE),
            ((9, 1), NONE),
            ((8, 16), NONE),
            ((3, 9, 7), MatrixView(batch=1)),
            ((12, 8), MatrixView(transpose=True)),
            ((24, 8), MatrixView(transpose=True, split=(4, 4, 4), repeats=2)),
            ((2, 5, 14), MatrixView(split=(1, 1), repeats=7, batch=1)),
        ]
        cuts = [(0, 91), (100, 432), (0, 13), (4, 4), (16, 128), (20, 180), (0, 96), (8, 180), (3, 140)]
        compare(cases, cuts, (torch.float32, torch.float32), odd)
        compare(cases, cuts, (torch.float32, torch.float32), odd, Size(rows=4, cols=32))

    @pytest.mark.parametrize(
        "name,tensors", [("celo2_random", (0, 1, 2)), ("celo2_base_extreme", (0, 1, 2)), ("celo2_official", (3, 4, 5))]
    )
    def test_the_optimizer_on_triton_repeats_the_golden_trajectories(golden, name, tensors, monkeypatch):
        monkeypatch.setenv("CELO2_BACKEND", "triton")
        monkeypatch.setattr(backend_for(torch.device("cpu")), "size", Size(16, 32))
        case = Case(golden, name)
        params = [torch.nn.Parameter(case.tensor(f"t{i}/p0")) for i in tensors]
        optimizer = Celo2(
            [{"params": params, "rule": "celo2"}],
            lr=case.lr,
            weights=case.theta,
            weight_decay=case.weight_decay,
            adamw_weight_decay=None,
            orthogonalize=case.orthogonalize,
        )
        for k in range(1, min(case.steps, 4) + 1):
            for i, p in zip(tensors, params):
                p.grad = case.tensor(f"t{i}/g{k}")
            optimizer.step()
            for i, p in zip(tensors, params):
                error = (p.detach() - case.tensor(f"t{i}/p{k}")).abs().max().item() / case.lr
                assert error < TOLERANCE[name], f"tensor {i} of shape {tuple(p.shape)} at step {k}: {error}"

    def test_a_step_is_a_handful_of_launches_whatever_the_number_of_tensors(monkeypatch):
        monkeypatch.setenv("CELO2_BACKEND", "triton")
        launches, run = [], GridExecutor.__call__

        def count(self, *args, **options):
            launches.append(self.fn.__name__)
            return run(self, *args, **options)

        monkeypatch.setattr(GridExecutor, "__call__", count)
        counts = []
        for tensors in (1, 3):
            params = [torch.nn.Parameter(torch.randn(3, 5)) for _ in range(tensors)]
            for p in params:
                p.grad = torch.randn_like(p)
            launches.clear()
            Celo2(params).step()
            counts.append(len(launches))
        assert counts[0] == counts[1] <= 12
