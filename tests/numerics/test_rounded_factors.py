"""Factors as codes: never worse than plainly rounded ones, exact where the grid is."""

import pytest
import torch
from torch import Tensor

from llmcompress.numerics.grid import Grid, output_error
from llmcompress.numerics.low_rank import Factors, output_spectrum, truncate
from llmcompress.numerics.rounded_factors import Codes, round_factors

GRIDS = [Grid(2, True, None), Grid(3, False, 5), Grid(4, True, 8), Grid(8, True, None)]
SHAPES = [(1, 1), (13, 31), (31, 13), (7, 43)]


def problem(outputs: int, inputs: int) -> tuple[Tensor, Tensor, Factors]:
    generator = torch.Generator().manual_seed(0)
    mix_II = torch.randn(inputs, inputs, dtype=torch.float64, generator=generator)
    x_TI = torch.randn(4 * inputs + 5, inputs, dtype=torch.float64, generator=generator) @ mix_II
    weight_OI = torch.randn(outputs, inputs, dtype=torch.float64, generator=generator)
    gram_II = x_TI.T @ x_TI
    rank = max(1, min(outputs, inputs) // 2)
    return weight_OI, gram_II, truncate(weight_OI, output_spectrum(weight_OI, gram_II), rank)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_alternating_is_never_worse_than_plain_rounding(shape: tuple[int, int], grid: Grid) -> None:
    weight_OI, gram_II, factors = problem(*shape)
    errors = [
        float(
            output_error(
                round_factors(
                    factors, weight_OI, gram_II, grid, scale_dtype=torch.float64, alternations=count
                ).product()
                - weight_OI,
                gram_II,
            )
        )
        for count in range(5)
    ]
    plain = (Codes.of(each, grid, torch.float64).dense() for each in (factors.left_OR, factors.right_RI))
    left_OR, right_RI = plain
    assert errors[0] == pytest.approx(float(output_error(left_OR @ right_RI - weight_OI, gram_II)))
    assert errors == sorted(errors, reverse=True)


def test_many_bits_come_near_the_factors() -> None:
    weight_OI, gram_II, factors = problem(13, 31)
    rounded = round_factors(factors, weight_OI, gram_II, Grid(8, True, None), scale_dtype=torch.float64)
    least = float(output_error(factors.product() - weight_OI, gram_II))
    assert float(output_error(rounded.product() - weight_OI, gram_II)) < 1.02 * least
