"""Scores at initialisation, exact masks from signed scores, schedules, one RigL move."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from llmcompress.numerics.masks import count_of_zeros
from llmcompress.numerics.rigl import drop_and_grow
from llmcompress.numerics.saliency import drop_lowest, hamming_distance
from llmcompress.numerics.schedule import exponential_shares, moved_share


def scores(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator) * scale
        for shape, scale in [((7, 11), 1.0), ((1, 5), 1e-30), ((13, 3), 1e20)]
    ]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.77, 0.99])
@pytest.mark.parametrize("seed", range(3))
def test_the_globally_lowest_signed_scores_go_exactly_as_many_as_asked(share: float, seed: int) -> None:
    parts = scores(seed)
    nothing = [torch.zeros_like(part, dtype=torch.bool) for part in parts]
    masks = drop_lowest(parts, nothing, share, "global")
    everything = torch.cat([part.flatten() for part in parts])
    expected = torch.zeros_like(everything, dtype=torch.bool)
    expected[everything.argsort(stable=True)[: count_of_zeros(share, len(everything))]] = True
    assert torch.equal(torch.cat([mask.flatten() for mask in masks]), expected)


@pytest.mark.parametrize("comparison", ["global", "layer"])
def test_ties_do_not_change_the_count_and_zeros_go_first(comparison: str) -> None:
    parts = [torch.ones(6, 6), torch.full((3, 4), 2.0)]
    zeros = [torch.zeros(6, 6, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)]
    zeros[1][2] = True
    masks = drop_lowest(parts, zeros, 0.5, comparison)  # type: ignore[arg-type]
    counts = [int(mask.sum()) for mask in masks]
    assert counts == ([20, 4] if comparison == "global" else [18, 6])
    assert masks[1][2].all()


def test_minus_infinity_and_zeros_of_both_signs_are_ordered() -> None:
    part = torch.tensor([[0.0, -torch.inf, -1.0, 1e-45, torch.finfo(torch.float32).max]])
    for count in range(6):
        mask = drop_lowest([part], [torch.zeros_like(part, dtype=torch.bool)], count / 5, "global")[0]
        assert set(mask.nonzero()[:, 1].tolist()) == set([1, 2, 0, 3, 4][:count])


def test_shares_grow_exponentially_to_the_target() -> None:
    shares = exponential_shares(0.99, 4)
    assert shares[-1] == pytest.approx(0.99)
    kept = [1.0, *(1 - share for share in shares)]
    assert all(after / before == pytest.approx(0.01**0.25) for before, after in itertools.pairwise(kept))


def test_the_moved_share_falls_from_alpha_to_nothing() -> None:
    assert moved_share(0, alpha=0.3, end=75) == pytest.approx(0.3)
    assert moved_share(25, alpha=0.3, end=75) == pytest.approx(0.15 * (1 + math.cos(math.pi / 3)))
    assert moved_share(75, alpha=0.3, end=75) == pytest.approx(0.0) == moved_share(90, alpha=0.3, end=75)


@pytest.mark.parametrize("count", [0, 1, 5, 20, 1000])
@pytest.mark.parametrize("density", [0.0, 0.3, 0.9, 1.0])
def test_as_many_grow_as_are_dropped_the_smallest_weights_for_the_greatest_gradients(
    count: int, density: float
) -> None:
    generator = torch.Generator().manual_seed(count)
    active = torch.rand(9, 7, generator=generator) < density
    weight = torch.randn(9, 7, generator=generator) * active
    gradient = torch.randn(9, 7, generator=generator)
    after, dropped, grown = drop_and_grow(weight, gradient, active, count)
    moved = min(count, int(active.sum()), int((~active).sum()))
    assert int(dropped.sum()) == int(grown.sum()) == moved
    assert int(after.sum()) == int(active.sum())
    assert not (dropped & ~active).any() and not (grown & active).any()
    if moved:
        kept = active & ~dropped
        assert not kept.any() or weight[dropped].abs().max() <= weight[kept].abs().min()
        idle = ~active & ~grown
        assert not idle.any() or gradient[grown].abs().min() >= gradient[idle].abs().max()


def test_hamming_distance_counts_all_weights() -> None:
    one = [torch.tensor([True, False, True]), torch.tensor([False])]
    other = [torch.tensor([True, True, True]), torch.tensor([True])]
    assert hamming_distance(one, other) == 0.5 and hamming_distance(one, one) == 0
