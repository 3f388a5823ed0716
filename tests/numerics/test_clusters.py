"""Clusters of channels: more of them never cost more, grids cover what was seen, rounding equals the textbook."""

from __future__ import annotations

import pytest
import torch

from llmcompress.numerics.clusters import Range, cluster, grid_of, round_by_clusters


def ranges(channels: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    middle = 10 * torch.randn(channels, generator=generator)
    width = torch.rand(channels, generator=generator).pow(4) * 20
    return middle - width, middle + width


@pytest.mark.parametrize("channels", [1, 2, 7, 64, 301])
@pytest.mark.parametrize("seed", [0, 1])
def test_more_clusters_never_cost_more_and_every_cluster_covers_its_channels(channels, seed):
    low, high = ranges(channels, seed)
    costs = []
    for count in range(1, 34):
        found = cluster(low, high, count)
        assert len(found.low_K) <= min(count, channels) and sum(found.sizes) == channels and min(found.sizes) > 0
        assert (found.low_K[found.member_I] <= low).all() and (found.high_K[found.member_I] >= high).all()
        costs.append(found.cost)
    assert costs == sorted(costs, reverse=True)
    if channels > 7:
        assert costs[7] < 0.5 * costs[0]


def test_channels_that_are_alike_stay_together():
    low = torch.tensor([-1.0, -50.0, -1.1, -52.0, 0.0, 0.0])
    high = torch.tensor([1.0, 3.0, 1.1, 2.0, 90.0, 91.0])
    found = cluster(low, high, 3)
    assert found.member_I.tolist() == [1, 0, 1, 0, 2, 2]
    assert found.order_I.tolist() == [1, 3, 0, 2, 4, 5] and found.sizes == (2, 2, 2)
    assert len(cluster(torch.zeros(5), torch.ones(5), 4).sizes) == 1


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_equals_the_textbook_and_errs_by_at_most_one_step(bits):
    low, high = ranges(24)
    found = cluster(low, high, 5)
    scale_K, zero_K = grid_of(found, bits, torch.bfloat16)
    assert torch.equal(scale_K, scale_K.bfloat16().float())
    generator = torch.Generator().manual_seed(3)
    x = low + (high - low) * torch.rand(50, 24, generator=generator)
    rounded = round_by_clusters(x, scale_K[found.member_I], zero_K[found.member_I], bits)
    for token, channel in ((0, 0), (7, 3), (49, 23)):
        scale, zero = float(scale_K[found.member_I[channel]]), int(zero_K[found.member_I[channel]])
        code = min(max(round(float(x[token, channel]) / scale) + zero, 0), 2**bits - 1)
        assert float(rounded[token, channel]) == pytest.approx((code - zero) * scale, rel=1e-6)
    # half a step of rounding, half a step because zero points are whole, and what rounding the scale takes off the end
    span = scale_K[found.member_I] * (1 + 2**bits * 2.0**-8)
    assert ((rounded - x).abs() <= span).all()


def test_constant_channels_are_exact_and_unseen_ones_are_left_alone():
    low = high = torch.tensor([3.0, 0.0])
    found = cluster(low, high, 2)
    scale_K, zero_K = grid_of(found, 4, torch.float32)
    x = torch.tensor([[3.0, 0.7]])
    torch.testing.assert_close(round_by_clusters(x, scale_K[found.member_I], zero_K[found.member_I], 4), x)


def test_ranges_are_those_of_all_tokens():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    measured = Range(6, torch.device("cpu"))
    assert not measured.low_I.any() and not measured.high_I.any() and measured.is_finite()
    for part in x.split([7, 0, 33]):
        measured.add(part)
    assert torch.equal(measured.low_I, x.amin(0)) and torch.equal(measured.high_I, x.amax(0))
    measured.rescale(torch.full((6,), 2.0))
    assert torch.equal(measured.high_I, x.amax(0) / 2) and measured.tokens == 40
    measured.add(torch.full((1, 6), torch.nan))
    assert not measured.is_finite()
