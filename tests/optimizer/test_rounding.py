"""Stochastic rounding: one of the two neighbours, right on average, and the same for the same element and key."""

import torch

from celo2_pretrain.kernels.rounding import key_of, random_bits, stochastic_round


def test_it_gives_a_neighbour_and_the_right_mean():
    x = torch.randn(64).repeat(20000, 1)
    rounded = stochastic_round(x, torch.arange(x.numel()).view(x.shape), key_of(0, "w")).float()
    ulp = 2.0 ** (torch.floor(torch.log2(x.abs())) - 7)
    assert ((rounded - x).abs() < ulp).all()
    assert (rounded.mean(0) - x[0]).abs().max() < 0.02 * ulp.max()  # nearest is off by up to 0.5
    exact = torch.tensor([0.0, 1.0, -2.5, float("inf"), float("-inf")])
    assert torch.equal(stochastic_round(exact, torch.arange(5), 7).float(), exact)
    assert stochastic_round(torch.tensor([float("nan")]), torch.arange(1), 7).isnan().all()


def test_bits_are_uniform_and_differ_by_key_and_index():
    bits = random_bits(torch.arange(1 << 16), key_of(1, 2, "w", 0))
    assert 0 <= bits.min() and bits.max() < 65536
    counts = torch.bincount(bits >> 8, minlength=256).float()
    assert ((counts - 256) ** 2 / 256).sum() < 340  # chi-square, 255 degrees of freedom
    other = random_bits(torch.arange(1 << 16), key_of(1, 3, "w", 0))
    assert abs(torch.corrcoef(torch.stack([bits.float(), other.float()]))[0, 1]) < 0.02
    assert not torch.equal(bits[:100], random_bits(torch.arange(100) + (1 << 33), key_of(1, 2, "w", 0)))


def test_a_small_change_is_not_lost():
    """An average with decay 0.999 towards 1, from 0.9: to the nearest it stands still, stochastically it moves."""
    nearest = mean = torch.full((4096,), 0.9, dtype=torch.bfloat16)
    for step in range(500):
        nearest = (nearest.float() * 0.999 + 0.001).to(torch.bfloat16)
        mean = stochastic_round(mean.float() * 0.999 + 0.001, torch.arange(4096), key_of(step))
    exact = 1 - 0.1 * 0.999**500
    assert abs(nearest.float().mean() - exact) > 0.03
    assert abs(mean.float().mean() - exact) < 0.002
