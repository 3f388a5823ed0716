"""The column sweep against optimal brain surgeon by the book."""

import pytest
import torch
from torch import Tensor

from llmcompress.numerics.columns import (
    RoundToGrid,
    block_length,
    inverse_factor,
    invert_upper_,
    sweep_columns,
    sweep_columns_,
)
from llmcompress.numerics.grid import Grid, output_error, restore, round_to_codes, row_errors
from llmcompress.numerics.ranges import fit
from tests.reference.columns import remove_one_column_at_a_time

SHAPES = [(1, 1), (1, 7), (5, 1), (13, 31), (8, 32), (7, 43), (16, 64), (3, 97)]
GRIDS = [Grid(3, True, None), Grid(4, False, 8), Grid(2, True, 16), Grid(3, False, 5), Grid(4, True, 64)]


def problem(outputs: int, inputs: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, dtype=torch.float64, generator=generator)
    x = torch.randn(4 * inputs + 5, inputs, dtype=torch.float64, generator=generator) @ mix
    return torch.randn(outputs, inputs, dtype=torch.float64, generator=generator), x.T @ x


def damped(gram: Tensor, damping: float) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factor_is_the_upper_cholesky_factor_of_the_damped_inverse(shape: tuple[int, int]) -> None:
    _, gram = problem(*shape, seed=1)
    factor = inverse_factor(gram, 0.01)
    assert factor is not None and factor.damping == 0.01
    expected = torch.linalg.cholesky(torch.linalg.inv(damped(gram, 0.01)), upper=True)
    torch.testing.assert_close(factor.upper_II, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("inputs", [1, 128, 129, 257, 300])
def test_triangles_are_inverted_half_by_half(inputs: int) -> None:
    generator = torch.Generator().manual_seed(inputs)
    upper = torch.randn(inputs, inputs, dtype=torch.float64, generator=generator).triu(1) * inputs**-0.5
    upper += torch.eye(inputs, dtype=torch.float64) * (1 + torch.rand(inputs, dtype=torch.float64, generator=generator))
    inverse = upper.clone()
    invert_upper_(inverse)
    torch.testing.assert_close(inverse @ upper, torch.eye(inputs, dtype=torch.float64), atol=1e-10, rtol=0)
    assert torch.equal(inverse, inverse.triu())


@pytest.mark.parametrize("lazy", [1, 4, 128])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sweep_equals_the_textbook_loop(shape: tuple[int, int], grid: Grid, lazy: int) -> None:
    weight, gram = problem(*shape, seed=2)
    factor = inverse_factor(gram, 0.01)
    assert factor is not None
    rounding = RoundToGrid(weight, grid, scale_dtype=torch.float64, search="minmax", gram_II=gram)
    fast = sweep_columns(weight, factor.upper_II, rounding, block=block_length(grid.group, lazy))

    scales: dict[int, tuple[Tensor, Tensor]] = {}

    def textbook(column: int, ahead: Tensor, column_O: Tensor) -> Tensor:
        length = grid.length(shape[1])
        if column % length == 0:
            again = fit(ahead[:, :length], Grid(grid.bits, grid.symmetric, None), scale_dtype=torch.float64)
            scales[column // length] = (again.scale_OG[:, 0], again.zero_OG[:, 0])
        scale, zero = scales[column // length]
        return ((column_O / scale + zero).round().clamp(grid.low, grid.high) - zero) * scale

    slow = remove_one_column_at_a_time(weight, damped(gram, 0.01), textbook)
    torch.testing.assert_close(fast, slow, atol=1e-8, rtol=0)
    torch.testing.assert_close(restore(rounding.codes_IO.T, rounding.fitted), fast, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sum_of_column_losses_is_the_damped_output_error(shape: tuple[int, int]) -> None:
    weight, gram = problem(*shape, seed=3)
    factor = inverse_factor(gram, 0.02)
    assert factor is not None
    losses = []

    class Recording(RoundToGrid):
        def __call__(self, column: int, weight_O: Tensor) -> Tensor:
            new_O = super().__call__(column, weight_O)
            losses.append(((weight_O - new_O) / factor.upper_II[column, column]).square().sum())
            return new_O

    rounding = Recording(weight, Grid(3), scale_dtype=torch.float64, search="minmax", gram_II=gram)
    swept_IO = weight.T.clone(memory_format=torch.contiguous_format)
    loss_O = sweep_columns_(swept_IO, factor.upper_II, rounding, block=8)
    change = swept_IO.T - weight
    torch.testing.assert_close(sum(losses), output_error(change, damped(gram, 0.02)), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(loss_O, row_errors(change, gram) + factor.ridge * change.square().sum(1))


def test_sweep_beats_plain_rounding_on_correlated_inputs() -> None:
    weight, gram = problem(32, 64, seed=4)
    for grid in GRIDS:
        factor = inverse_factor(gram, 0.01)
        assert factor is not None
        rounding = RoundToGrid(weight, grid, scale_dtype=torch.float64, search="minmax", gram_II=gram)
        swept = sweep_columns(weight, factor.upper_II, rounding, block=block_length(grid.group, 32))
        plain = fit(weight, grid, scale_dtype=torch.float64)
        rounded = restore(round_to_codes(weight, plain), plain)
        assert output_error(swept - weight, gram) < output_error(rounded - weight, gram)


def test_ordered_sweep_keeps_every_code_at_its_own_column() -> None:
    weight, gram = problem(9, 24, seed=5)
    order = gram.diagonal().argsort(descending=True)
    factor = inverse_factor(gram[order][:, order], 0.01)
    assert factor is not None
    rounding = RoundToGrid(
        weight, Grid(4, False, 8), scale_dtype=torch.float64, search="minmax", gram_II=gram, order_I=order
    )
    swept = sweep_columns(weight[:, order], factor.upper_II, rounding, block=5)
    torch.testing.assert_close(restore(rounding.codes_IO.T, rounding.fitted)[:, order], swept)


def test_dead_inputs_are_rounded_to_nearest_and_repair_nothing() -> None:
    weight, gram = problem(4, 8, seed=6)
    gram[3], gram[:, 3] = 0, 0
    factor = inverse_factor(gram, 0.01)
    assert factor is not None
    rounding = RoundToGrid(weight, Grid(8), scale_dtype=torch.float64, search="minmax", gram_II=gram)
    swept = sweep_columns(weight, factor.upper_II, rounding)
    scale, _ = rounding.fitted.scale_OG[:, 0], rounding.fitted.zero_OG
    torch.testing.assert_close(swept[:, 3], (weight[:, 3] / scale).round().clamp(-128, 127) * scale)


def test_singular_matrices_raise_the_damping_and_hopeless_ones_give_up() -> None:
    ones = torch.ones(16, 16)
    factor = inverse_factor(ones, 1e-12)
    assert factor is not None and factor.damping > 1e-12
    assert inverse_factor(torch.zeros(4, 4), 0.01) is None
    assert inverse_factor(torch.full((4, 4), float("nan")), 0.01) is None
    indefinite = torch.tensor([[1.0, 1e6], [1e6, 1.0]])
    assert inverse_factor(indefinite, 0.01) is None


@pytest.mark.parametrize(
    ("group", "wanted", "expected"), [(None, 128, 128), (32, 128, 128), (48, 128, 96), (300, 128, 300)]
)
def test_lazy_blocks_never_split_a_group(group: int | None, wanted: int, expected: int) -> None:
    assert block_length(group, wanted) == expected
