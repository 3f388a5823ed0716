"""Half-quadratic fits: never worse than the full range in their own measure, and their parts against slow versions."""

import pytest
import torch

from llmcompress.numerics.grid import Grid, restore, round_to_codes
from llmcompress.numerics.half_quadratic import half_quadratic_fit, shrink
from llmcompress.numerics.ranges import fit

SHAPES = [(1, 1), (3, 7), (5, 64), (4, 53)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_group_loses_more_than_with_its_full_range(shape: tuple[int, int], symmetric: bool, bits: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for group in (None, 16):
        grid = Grid(bits, symmetric, group)
        plain = fit(weight, grid, scale_dtype=torch.bfloat16)
        found = half_quadratic_fit(weight, grid, scale_dtype=torch.bfloat16)
        assert torch.equal(found.scale_OG, found.scale_OG.bfloat16().float())
        assert torch.equal(found.zero_OG, found.zero_OG.round().clamp(grid.low, grid.high))
        lost = [(restore(round_to_codes(weight, each), each) - weight).abs().pow(0.7) for each in (plain, found)]
        for start in range(0, shape[1], group or shape[1]):
            before, after = (each[:, start : start + (group or shape[1])].sum(1) for each in lost)
            assert (after <= before * (1 + 1e-5)).all()


def test_a_group_with_an_outlier_is_rounded_much_better_in_the_middle() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    weight[:, 0] = 12.0
    grid = Grid(3, False, 64)
    middle = [
        (restore(round_to_codes(weight, each), each) - weight)[:, 1:].square().mean()
        for each in (fit(weight, grid), half_quadratic_fit(weight, grid, steps=60))
    ]
    assert middle[1] < 0.8 * middle[0]


def test_what_may_stay_of_a_residual_is_the_lesser_of_two_costs() -> None:
    """Against trying all values: the threshold is a one-step solution, right to a few per cent where it is not zero."""
    tried = torch.linspace(0, 2, 20001, dtype=torch.float64)
    for residual in (0.05, 0.9, 1.5):
        cost = tried.pow(0.7) + 10 / 2 * (tried - residual).square()
        best = float(tried[cost.argmin()])
        found = float(shrink(torch.tensor(residual, dtype=torch.float64), power=0.7, beta=10.0))
        assert found == pytest.approx(best, abs=0.04)
    assert (
        float(shrink(torch.tensor(-0.9), power=0.7, beta=10.0))
        < 0
        == float(shrink(torch.zeros(1), power=0.7, beta=10.0))
    )
