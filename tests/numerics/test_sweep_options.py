"""What the sweep does with the Gram matrix, with dead inputs and with an order of visits, against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmcompress.numerics.columns import RoundToGrid, block_length, inverse_factor, sweep_columns
from llmcompress.numerics.grid import Grid, output_error, restore, round_to_codes
from llmcompress.numerics.ranges import fit
from llmcompress.numerics.scaling import smoothing_factors
from tests.reference.columns import remove_one_column_at_a_time


def problem(outputs: int, inputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Correlated inputs of very different energies."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, dtype=torch.float64, generator=generator)
    mix *= torch.logspace(-1, 1, inputs, dtype=torch.float64)[torch.randperm(inputs, generator=generator)]
    x = torch.randn(4 * inputs + 5, inputs, dtype=torch.float64, generator=generator) @ mix
    return torch.randn(outputs, inputs, dtype=torch.float64, generator=generator), x.T @ x


def damped(gram: Tensor, damping: float) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


@pytest.mark.parametrize("lazy", [4, 128])
@pytest.mark.parametrize("grid", [Grid(3, True, 8), Grid(3, False, 16)], ids=str)
def test_ranges_of_a_group_are_searched_with_its_own_part_of_the_gram_matrix(grid: Grid, lazy: int) -> None:
    weight, gram = problem(9, 48, seed=4)
    factor = inverse_factor(gram, 0.01)
    assert factor is not None
    rounding = RoundToGrid(weight, grid, scale_dtype=torch.float64, search="mse", gram_II=gram)
    fast = sweep_columns(weight, factor.upper_II, rounding, block=block_length(grid.group, lazy))
    length = grid.length(48)
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def textbook(column: int, ahead: Tensor, column_O: Tensor) -> Tensor:
        group, here = column // length, slice(column, column + length)
        if column % length == 0:
            row = Grid(grid.bits, grid.symmetric, None)
            again = fit(
                ahead[:, :length], row, scale_dtype=torch.float64, search="mse", gram_II=gram[here, here].contiguous()
            )
            found[group] = (again.scale_OG[:, 0], again.zero_OG[:, 0])
        scale, zero = found[group]
        return ((column_O / scale + zero).round().clamp(grid.low, grid.high) - zero) * scale

    slow = remove_one_column_at_a_time(weight, damped(gram, 0.01), textbook)
    torch.testing.assert_close(fast, slow, atol=1e-8, rtol=0)


def test_visited_by_falling_energy_the_sweep_is_that_of_a_permuted_problem() -> None:
    weight, gram = problem(7, 40, seed=5)
    order = gram.diagonal().argsort(descending=True)
    grid = Grid(3, False, 8)
    factor = inverse_factor(gram, 0.01, order)
    assert factor is not None
    rounding = RoundToGrid(weight, grid, scale_dtype=torch.float64, search="minmax", gram_II=gram, order_I=order)
    sweep_columns(weight[:, order], factor.upper_II, rounding, block=8)
    fitted = fit(weight, grid, scale_dtype=torch.float64)

    def textbook(column: int, ahead: Tensor, column_O: Tensor) -> Tensor:
        group = int(order[column]) // 8
        scale, zero = fitted.scale_OG[:, group], fitted.zero_OG[:, group]
        return ((column_O / scale + zero).round().clamp(grid.low, grid.high) - zero) * scale

    slow = remove_one_column_at_a_time(weight[:, order], damped(gram, 0.01)[order][:, order], textbook)
    torch.testing.assert_close(restore(rounding.codes_IO.T, rounding.fitted)[:, order], slow, atol=1e-8, rtol=0)


def test_inputs_that_never_were_nonzero_do_not_water_down_the_damping_of_the_others() -> None:
    _, gram = problem(1, 24, seed=6)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[::5] = True
    whole = torch.zeros(40, 40, dtype=torch.float64)
    live = (~dead).nonzero().flatten()[:24]
    whole[live[:, None], live] = gram
    factor, alone = inverse_factor(whole, 0.05), inverse_factor(gram, 0.05)
    assert factor is not None and alone is not None
    torch.testing.assert_close(factor.upper_II[live[:, None], live], alone.upper_II, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("inputs", [64, 600], ids=["in groups", "in whole rows wider than 256"])
def test_a_search_that_knows_the_inputs_loses_less_of_the_output(inputs: int) -> None:
    generator = torch.Generator().manual_seed(inputs)
    weight = torch.randn(32, inputs, generator=generator)
    energy_I = torch.logspace(-2, 2, inputs)[torch.randperm(inputs, generator=generator)]
    x = torch.randn(300, inputs, generator=generator) * energy_I.sqrt()
    gram = x.T @ x
    grid = Grid(3, True, 32 if inputs == 64 else None)

    def lost(given: Tensor | None) -> float:
        fitted = fit(weight, grid, search="mse", gram_II=given)
        return float(output_error(restore(round_to_codes(weight, fitted), fitted) - weight, torch.diag(energy_I)))

    # on a model of independent inputs even whole rows know exactly what they lose
    assert lost(gram if inputs == 64 else torch.diag(energy_I)) < 0.98 * lost(None)


def test_a_search_over_wide_rows_finds_what_a_loop_over_its_candidates_finds() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 300, generator=generator, dtype=torch.float64)
    energy_I = torch.logspace(-2, 2, 300, dtype=torch.float64)[torch.randperm(300, generator=generator)]
    grid = Grid(3, False, None)
    found = fit(weight, grid, scale_dtype=torch.float64, search="mse", gram_II=torch.diag(energy_I))
    plain = fit(weight, grid, scale_dtype=torch.float64)
    for row in range(4):

        def lost(factor: float, row: int = row) -> float:
            weight_I = weight[row]
            top, bottom = weight_I.max().clamp_min(0) * factor, weight_I.min().clamp_max(0) * factor
            scale = (top - bottom) / (grid.high - grid.low)
            zero = (grid.low - bottom / scale).round().clamp(grid.low, grid.high)
            codes = (weight_I / scale + zero).round().clamp(grid.low, grid.high)
            return float((((codes - zero) * scale - weight_I).square() * energy_I).sum())

        coarse = min((1.0, 0.85, 0.7, 0.55), key=lost)
        best = min((coarse, coarse - 0.05, coarse + 0.05), key=lost)
        assert float(found.scale_OG[row, 0]) == pytest.approx(float(plain.scale_OG[row, 0]) * best, rel=1e-9)


@pytest.mark.parametrize("strength", [0.0, 0.25, 0.8, 1.0])
def test_smoothing_factors_are_those_of_the_formula_channel_by_channel(strength: float) -> None:
    generator = torch.Generator().manual_seed(1)
    input_max, weight_max = (torch.rand(12, generator=generator) * 5 + 0.1 for _ in range(2))
    channel_map = torch.tensor([0, 0, 1, 1, 2, 2, 4, 4, 5, 5, 6, 6])
    factors = smoothing_factors(input_max, weight_max, channel_map, 7, strength=strength)
    for producer in range(7):
        consumers = [c for c in range(12) if int(channel_map[c]) == producer]
        expected = 1.0
        if consumers:
            x, w = (max(float(each[c]) for c in consumers) for each in (input_max, weight_max))
            expected = x**strength / w ** (1 - strength)
        assert float(factors[producer]) == pytest.approx(expected, rel=1e-5)
