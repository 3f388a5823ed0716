"""Channel factors: what they promise on the calibration data."""

import pytest
import torch
from torch import Tensor

from llmcompress.numerics.grid import Grid, output_error, restore, round_to_codes
from llmcompress.numerics.ranges import fit
from llmcompress.numerics.scaling import reduce_max, reduce_mean, search_factors, smoothing_factors


def rounder(grid: Grid):
    def rounded(weight: Tensor) -> Tensor:
        fitted = fit(weight, grid)
        return restore(round_to_codes(weight, fitted), fitted)

    return rounded


def problem(seed: int, outliers: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 32, generator=generator)
    if outliers:
        x[:, 5] *= 40
    return torch.randn(24, 32, generator=generator), x.T @ x, x.abs().mean(0)


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_searched_factors_never_lose_to_no_scaling_and_win_with_outliers(seed: int, outliers: bool) -> None:
    weight, gram, salience = problem(seed, outliers)
    grid = Grid(3, group=16)
    found = search_factors([(weight, rounder(grid))], gram, salience, torch.arange(32), 32, points=20)
    torch.testing.assert_close(
        found.error_unscaled, float(output_error(rounder(grid)(weight) - weight, gram)), rtol=1e-5, atol=0
    )
    scaled = rounder(grid)(weight * found.factors_P) / found.factors_P
    torch.testing.assert_close(found.error, float(output_error(scaled - weight, gram)), rtol=1e-5, atol=0)
    assert found.error <= found.error_unscaled
    if outliers:
        assert found.exponent > 0 and found.error < 0.7 * found.error_unscaled


def test_the_exponent_found_is_the_best_of_all() -> None:
    """Where weights of a loud channel are small, scaling it up a lot makes no range wider."""
    weight, gram, salience = problem(2, True)
    weight[:, 5] *= 0.02
    rounded = rounder(Grid(3, group=16))
    found = search_factors([(weight, rounded)], gram, salience, torch.arange(32), 32, points=20)
    errors = {}
    for exponent in (point / 20 for point in range(20)):
        factors = salience**exponent
        factors /= (factors.max() * factors.min()).sqrt()
        errors[exponent] = float(output_error(rounded(weight * factors) / factors - weight, gram))
    assert found.exponent == min(errors, key=errors.__getitem__) > 0.5
    torch.testing.assert_close(found.error, min(errors.values()), rtol=1e-5, atol=0)


def test_one_point_is_the_identity() -> None:
    weight, gram, salience = problem(0, True)
    found = search_factors([(weight, rounder(Grid(3)))], gram, salience, torch.arange(32), 32, points=1)
    assert (found.factors_P == 1).all() and found.error == found.error_unscaled


def test_shared_key_value_heads_get_one_factor_and_unread_channels_get_one() -> None:
    weight, gram, salience = problem(1, True)
    channel_map = torch.arange(32) % 8 + 4  # 32 consumer channels read producer channels 4 … 11 of 16
    found = search_factors([(weight, rounder(Grid(3)))], gram, salience, channel_map, 16, points=10)
    assert (found.factors_P[:4] == 1).all() and (found.factors_P[12:] == 1).all()
    smooth = smoothing_factors(salience, weight.abs().amax(0), channel_map, 16, strength=0.5)
    assert (smooth[:4] == 1).all() and (smooth[12:] == 1).all()


def test_smoothing_at_half_strength_gives_inputs_and_weights_the_same_range() -> None:
    input_max, weight_max = torch.tensor([8.0, 0.5, 1e-9, 3.0]), torch.tensor([0.5, 2.0, 1.0, 0.0])
    factors = smoothing_factors(input_max, weight_max, torch.arange(4), 4, strength=0.5)
    torch.testing.assert_close(input_max[:2] / factors[:2], weight_max[:2] * factors[:2])
    assert torch.isfinite(factors).all() and (factors > 0).all()


def test_reductions_over_consumers_of_a_producer_channel() -> None:
    values, channel_map = torch.tensor([1.0, 5.0, 3.0]), torch.tensor([0, 2, 0])
    assert reduce_max(values, channel_map, 3).tolist() == [3.0, 0.0, 5.0]
    assert reduce_mean(values, channel_map, 3).tolist() == [2.0, 0.0, 5.0]
