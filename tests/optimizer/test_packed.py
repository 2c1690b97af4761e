"""Packed accumulators (`state_dtype="fp8"`): four small floats in a word, right on average, alike in any sharding."""

import copy

import pytest
import torch
from test_celo2 import model, same, train, weights
from torch import nn

from celo2_pretrain import Celo2, param_groups
from celo2_pretrain.kernels.packed import (
    FIELDS,
    MOMENTA,
    NEAREST,
    RMS,
    WORD,
    decode,
    draws,
    encode,
    pack,
    powers,
    step_offset_of,
    unpack,
)
from celo2_pretrain.optimizer.backends import boxes
from celo2_pretrain.optimizer.backends.compiled import Compiled
from celo2_pretrain.optimizer.backends.passes import Scale, Tensors, scales
from celo2_pretrain.optimizer.backends.plain import TorchBackend
from celo2_pretrain.optimizer.matrices.views import MatrixView, pieces
from celo2_pretrain.optimizer.sharding.plan import Part
from celo2_pretrain.optimizer.sharding.shape import BlockShape
from celo2_pretrain.optimizer.state.save_load import load_state, save_state

NAMES = ("m0", "m1", "m2", "v")
KEYS = (11, 22, 33, 44, step_offset_of(5))


def ulp(x, form, scale):
    """The distance of neighbours at x."""
    unit = scale if form.signed else scale**2
    exponent = torch.floor(torch.log2((x / unit).abs().clamp_min(1e-30))).clamp(form.least, form.top)
    return 2.0 ** (exponent - form.mantissa_bits) * unit


def samples(form, scale, n=100_000):
    """Of either sign, uniform in the logarithm, from far below the field's range to its end."""
    generator = torch.Generator().manual_seed(0)
    low, high = form.least - 12.0, form.top + 1.0
    x = 2.0 ** (low + (high - low) * torch.rand(n, generator=generator)) * (scale if form.signed else scale**2)
    x = x.clamp_max(form.largest * (scale if form.signed else scale**2))
    return x * (torch.randint(0, 2, (n,), generator=generator) * 2 - 1) if form.signed else x


@pytest.mark.parametrize("scale", [1.0, 2.0**-40, 2.0**9])
@pytest.mark.parametrize("form", FIELDS, ids=NAMES)
def test_the_nearest_number_is_within_half_an_ulp_and_is_kept_by_every_draw(form, scale):
    x, unit = samples(form, scale), torch.tensor(scale)
    rounded = decode(encode(x, unit, form, 1 << 15), unit, form)
    most = 0.5 if form.signed else 1.0  # v > 0 never becomes 0
    assert ((rounded - x).abs() <= (most + 1e-4) * ulp(x, form, scale)).all()
    normal = x.abs() >= 2.0**form.least * (scale if form.signed else scale**2)
    assert ((rounded - x).abs() <= 2.0**-form.mantissa_bits / 2 * x.abs())[normal].all()
    for draw in (0, 1 << 15, 0xFFFF):
        assert torch.equal(decode(encode(rounded, unit, form, draw), unit, form), rounded)


@pytest.mark.parametrize("form", FIELDS, ids=NAMES)
def test_a_stored_number_is_the_same_under_another_scale(form):
    x = samples(form, 1.0)
    middle = (x.abs() > 2.0 ** (form.least + 2)) & (x.abs() < 2.0 ** (form.top - 2))
    assert middle.any()
    one, other = torch.tensor(1.0), torch.tensor(2.0)
    stored = decode(encode(x[middle], one, form, 1 << 15), one, form)
    assert torch.equal(decode(encode(stored, other, form, 12345), other, form), stored)


@pytest.mark.parametrize("form", FIELDS, ids=NAMES)
def test_zero_stays_zero_and_what_is_too_large_saturates(form):
    one = torch.tensor(1.0)
    for draw in (0, 0xFFFF):
        assert encode(torch.tensor([0.0, -0.0]), one, form, draw).tolist() == [0, 0]
        large = torch.tensor([2 * form.largest, 1e30, float("inf")])
        assert decode(encode(large, one, form, draw), one, form).tolist() == [form.largest] * 3
        if form.signed:
            assert decode(encode(-large, one, form, draw), one, form).tolist() == [-form.largest] * 3
        else:
            assert decode(encode(torch.tensor([1e-30]), one, form, draw), one, form) > 0


@pytest.mark.parametrize("form", FIELDS, ids=NAMES)
def test_rounding_is_right_on_average_over_elements_and_over_steps(form):
    one = torch.tensor(1.0)
    x = samples(form, 1.0, 64)
    x = x[x.abs() > 2.0 ** (form.least - 2)]  # v is not unbiased near 0, which it avoids
    index = torch.arange(20_000)[:, None] * len(x) + torch.arange(len(x))
    mean = decode(encode(x.expand_as(index), one, form, draws(index, 7, 0)), one, form).mean(0)
    assert ((mean - x).abs() / ulp(x, form, 1.0)).max() < 0.02  # nearest is off by up to 0.5
    steps = [decode(encode(x, one, form, draws(torch.arange(len(x)), 7, step_offset_of(k))), one, form) for k in range(200)]
    assert ((torch.stack(steps).mean(0) - x).abs() / ulp(x, form, 1.0)).max() < 0.03  # independent draws: 0.1


def test_the_fields_share_a_word():
    one, generator = torch.tensor([1.0] * 3), torch.Generator().manual_seed(0)
    values = [torch.randn(1000, generator=generator) for _ in range(3)] + [torch.rand(1000, generator=generator)]
    words = pack(values, one, NEAREST)
    assert words.dtype == WORD and sum(form.magnitude_bits + form.signed for form in FIELDS) == 32
    for x, form, stored in zip(values, FIELDS, unpack(words, one)):
        assert torch.equal(stored, decode(encode(x, one[0], form, 1 << 15), one[0], form))


def test_powers_of_two_lie_near_the_square_root():
    v = 10.0 ** torch.linspace(-33, 7, 500)
    ratio = v.sqrt() / powers(v)
    assert (ratio >= 1).all() and (ratio < 2 + 1e-6).all()
    assert powers(torch.tensor([0.0, float("inf"), float("nan"), 1e-40])).isfinite().all()


@pytest.mark.parametrize(
    "form,decay,most",
    [(MOMENTA[0], 0.9, 0.04), (MOMENTA[1], 0.99, 0.14), (MOMENTA[2], 0.999, 0.18), (RMS, 0.95, 0.19)],
    ids=NAMES,
)
def test_the_error_of_an_average_does_not_pile_up(form, decay, most):
    """Root mean square, relative, over the second half of 2000 steps of pure noise. A byte for m2: more than half."""
    generator, n = torch.Generator().manual_seed(0), 4000
    exact, stored, index, one = torch.zeros(n), torch.zeros(n, dtype=WORD), torch.arange(n), torch.tensor(1.0)
    error = size = 0.0
    for step in range(2000):
        g = torch.randn(n, generator=generator)
        g = g if form.signed else g * g
        exact = decay * exact + (1 - decay) * g
        stored = encode(decay * decode(stored, one, form) + (1 - decay) * g, one, form, draws(index, 3, step_offset_of(step)))
        if step >= 1000:
            error += (decode(stored, one, form) - exact).square().mean().item()
            size += exact.square().mean().item()
    assert (error / size) ** 0.5 < most


CASES = [
    ((1, 1), MatrixView()),
    ((1, 9), MatrixView()),
    ((7, 13), MatrixView()),
    ((16, 16), MatrixView()),
    ((37, 31), MatrixView(transpose=True)),
    ((5, 100), MatrixView()),
    ((11, 23), MatrixView(split=(16, 4, 3))),
    ((24, 10), MatrixView(transpose=True, head_dim=4)),
    ((3, 17, 19), MatrixView(batch=1)),
    ((6, 5, 3, 3), MatrixView()),
    ((18, 10), MatrixView(transpose=True, split=(3, 3, 3), repeats=2)),
    ((9, 40), MatrixView(split=(6, 2, 2), repeats=4)),
    ((2, 5, 14), MatrixView(split=(1, 1), repeats=7, batch=1)),
    ((6, 5, 3, 3), MatrixView(transpose=True, flatten=True)),
    ((6, 5, 3, 3), MatrixView(flatten=True)),
]


@pytest.mark.parametrize("shape,view", CASES)
def test_any_partition_of_a_tensor_gives_the_same_words_on_each_backend(shape, view, monkeypatch):
    monkeypatch.setattr(boxes, "JOB", 64)
    total, base = torch.Size(shape).numel(), 1 << 33  # of the slice in a huge tensor: indices are of 64 bits
    generator = torch.Generator().manual_seed(total)
    g, words = torch.randn(total, generator=generator), torch.randint(-1 << 31, 1 << 31, (total,), generator=generator)

    def repacked(backend, shape, old, new, cuts):
        made = []
        for start, stop in zip(cuts, cuts[1:]):
            t = Tensors(g[start:stop], g[start:stop], [], words[start:stop].to(WORD), [], base + start, KEYS)
            part = Part(0, shape, pieces(shape.block, start, stop, most=50), 0, 0)
            backend.repack([part], [t], *(backend.scales([part], [vectors]) for vectors in (old, new)))
            made.append(t.rms)
        return torch.cat(made)

    for block in view.blocks(shape):
        s = BlockShape(block)
        old, new = ([torch.randn(3, *size, generator=generator).exp() for size in (s.row, s.col)] for _ in range(2))
        ours, twin = (repacked(backend, s, old, new, [0, total]) for backend in (Compiled(), TorchBackend()))
        assert not torch.equal(twin, words.to(WORD)) or not torch.Size(block.shape).numel()
        # A fused multiply-add may move a value across a rounding threshold, once in ten thousand.
        assert (ours != twin).float().mean() <= 3e-3
        for backend, whole in ((Compiled(), ours), (TorchBackend(), twin)):
            cuts = [0, total // 3, total // 3, 2 * total // 3, total]
            assert torch.equal(repacked(backend, s, old, new, cuts), whole)


def test_the_passes_read_words_alike_on_each_backend():
    from celo2_pretrain.weights.mlp import DIMS, MLP

    from support.three_passes import step

    torch.manual_seed(0)
    mlp = MLP(*(torch.randn(s) / 3 for s in [DIMS[:2], DIMS[1:2], DIMS[1:3], DIMS[2:3], DIMS[2:], DIMS[3:]]))
    for shape, view in CASES:
        total = torch.Size(shape).numel()
        p, g, words = torch.randn(total), torch.randn(total), torch.randint(-1 << 31, 1 << 31, (total,)).to(WORD)
        for block in view.blocks(shape):
            s, made = BlockShape(block), []
            vectors = [torch.rand(3, *size) for size in (s.row, s.col)]
            part = Part(0, s, pieces(block, 0, total, most=50), 0, 0)
            for backend in (Compiled(), TorchBackend()):
                t = Tensors(p, g, [], words.clone(), [], 0, KEYS, backend.scales([part], [vectors])[0])
                made.append(step(backend, t, s, part.pieces, mlp))
                assert torch.equal(t.rms, words)  # only repack writes
            for ours, twin in zip(*made):
                scale = twin.abs().max().item() if twin.numel() else 0.0
                torch.testing.assert_close(ours, twin, rtol=2e-5, atol=2e-5 * scale + 1e-30)


@pytest.mark.parametrize("backend", ["reference", "compile"])
def test_tensors_rows_and_columns_without_gradient_have_states_of_zero(backend, monkeypatch):
    monkeypatch.setenv("CELO2_BACKEND", backend)
    p = nn.Parameter(torch.randn(8, 20))
    optimizer = Celo2([p], state_dtype="fp8", lr=1e-3)
    for k in range(4):
        p.grad = torch.zeros(8, 20)
        if k:
            p.grad[1:, 3:] = torch.randn(7, 17) * 10.0 ** torch.randint(-9, 6, (7, 1))
        optimizer.step()
        assert p.isfinite().all()
        words = optimizer.state[p]["packed"]
        assert (words[0] == 0).all() and (words[:, :3] == 0).all()
        assert not k or (words[1:, 3:] != 0).any()


def test_a_gpt_takes_at_most_four_and_a_half_bytes_a_parameter():
    from transformers import GPT2Config, GPT2LMHeadModel

    net = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=256, n_head=4, vocab_size=64, n_positions=32))
    optimizer = Celo2(param_groups(net), state_dtype="fp8")
    ids = torch.randint(0, 64, (2, 16))
    net(ids, labels=ids).loss.backward()
    optimizer.step()
    learned = [p for group in optimizer.param_groups if group["rule"] == "celo2" for p in group["params"]]
    size = sum(x.nbytes for p in learned for x in optimizer.state[p].values())
    assert len(learned) == 8 and size <= 4.5 * sum(p.numel() for p in learned), size


@pytest.mark.parametrize("orthogonalize", [True, False])
def test_packed_states_go_on_bit_for_bit(orthogonalize, tmp_path):
    """Through torch's state dict, and through a state for any world, which holds them as float32."""
    net = model()
    make = lambda net: Celo2(net.named_parameters(), 1e-2, orthogonalize=orthogonalize, state_dtype="fp8")
    optimizer = make(net)
    train(net, optimizer, range(3))
    assert optimizer.state[net[0].weight]["packed"].dtype == WORD
    other, third = copy.deepcopy(net), model(seed=1)
    restored, loaded = make(other), make(third)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    save_state(optimizer, tmp_path / "state")
    load_state(loaded, tmp_path / "state")
    assert torch.equal(optimizer.state[net[0].weight]["packed"], loaded.state[third[0].weight]["packed"])
    for some in ((net, optimizer), (other, restored), (third, loaded)):
        train(*some, range(3, 6))
    assert same(weights(net), weights(other)) and same(weights(net), weights(third))


@pytest.mark.parametrize("now", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("saved", ["fp32", "bf16", "fp8"])
def test_a_state_of_any_dtype_goes_on_in_any_other(saved, now, tmp_path):
    net, other, third = model(), model(seed=1), model()
    first = Celo2(net.named_parameters(), lr=1e-2, state_dtype=saved)
    train(net, first, range(20))
    save_state(first, tmp_path / "state")
    second, direct = (Celo2(x.named_parameters(), lr=1e-2, state_dtype=now) for x in (other, third))
    load_state(second, tmp_path / "state")
    third.load_state_dict(net.state_dict())
    direct.load_state_dict(copy.deepcopy(first.state_dict()))
    train(other, second, range(20, 21)), train(third, direct, range(20, 21)), train(net, first, range(20, 21))
    assert same(weights(other), weights(third))  # both ways are one
    assert ("packed" in direct.state[third[0].weight]) == (now == "fp8")
    assert ("step" in direct.state[third[0].weight]) == (now != "fp32")
    assert (weights(net)[0] - weights(other)[0]).abs().max() < 0.015  # of a step of root mean square 0.01


def test_the_scale_bounds_a_momentum():
    """|m| <= sqrt(v) element by element; where rows and columns factor, the scale is sqrt(v) within a factor of 4."""
    shape = BlockShape(MatrixView().blocks((9, 14))[0])
    a, b = torch.rand(9, 1).exp(), torch.randn(1, 14).exp()
    v = (a * b).expand(3, -1, -1)
    found = scales(v.mean(2, keepdim=True), v.mean(1, keepdim=True), shape)
    assert isinstance(found, Scale)
    ratio = v.sqrt() / (found.row * found.col)
    assert (ratio >= 1 - 1e-5).all() and (ratio < 4).all()
