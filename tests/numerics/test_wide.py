"""Sizes above which another path of the code is taken: lazy blocks of 128, wide groups, stripes and pieces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmcompress.numerics.columns import DropLowest, RoundToGrid, block_length, inverse_factor, sweep_columns
from llmcompress.numerics.grid import Grid, output_error, restore, round_to_codes, row_errors, row_pieces, stripes
from llmcompress.numerics.masks import Pattern, lowest
from llmcompress.numerics.ranges import fit
from tests.numerics.test_columns import damped, problem
from tests.reference.columns import remove_one_column_at_a_time
from tests.reference.masks import smallest_of, sparsegpt

INPUTS = 300
"""Two lazy blocks of 128 and a part of a third; a stripe of 256 and a part of the next."""


@pytest.mark.parametrize("grid", [Grid(3, True, None), Grid(4, False, 32), Grid(3, False, 200)], ids=str)
def test_blocks_of_the_usual_length_equal_the_textbook_loop(grid: Grid) -> None:
    weight, gram = problem(3, INPUTS, seed=2)
    factor = inverse_factor(gram, 0.01)
    assert factor is not None
    rounding = RoundToGrid(weight, grid, scale_dtype=torch.float64, search="minmax", gram_II=gram)
    fast = sweep_columns(weight, factor.upper_II, rounding, block=block_length(grid.group, 128))
    length, scales = grid.length(INPUTS), {}

    def textbook(column: int, ahead: Tensor, column_O: Tensor) -> Tensor:
        if column % length == 0:
            again = fit(ahead[:, :length], Grid(grid.bits, grid.symmetric, None), scale_dtype=torch.float64)
            scales[column // length] = (again.scale_OG[:, 0], again.zero_OG[:, 0])
        scale, zero = scales[column // length]
        return ((column_O / scale + zero).round().clamp(grid.low, grid.high) - zero) * scale

    slow = remove_one_column_at_a_time(weight, damped(gram, 0.01), textbook)
    torch.testing.assert_close(fast, slow, atol=1e-8, rtol=0)


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)], ids=str)
def test_zeros_chosen_in_blocks_of_the_usual_length_are_those_of_the_textbook(pattern: Pattern | None) -> None:
    weight, gram = problem(3, 160, seed=5)
    factor = inverse_factor(gram, 0.01)
    assert factor is not None
    drop = DropLowest(weight, factor.upper_II, share=0.5, pattern=pattern, span=128)
    fast = sweep_columns(weight, factor.upper_II, drop, block=128)
    of = None if pattern is None else (pattern.zeros, pattern.of)
    slow = sparsegpt(weight, damped(gram, 0.01), share=0.5, span=128, pattern=of)
    assert torch.equal(fast == 0, slow == 0)
    torch.testing.assert_close(fast, slow, atol=1e-8, rtol=0)


def test_errors_in_stripes_are_those_of_the_whole_matrix() -> None:
    generator = torch.Generator().manual_seed(1)
    difference, half = (torch.randn(rows, 2100, dtype=torch.float64, generator=generator) for rows in (3, 2100))
    gram = half + half.T
    assert len(stripes(2100)) == 8 and len(stripes(INPUTS)) == 2
    for inputs in (INPUTS, 2100):
        wide, seen = difference[:, :inputs], gram[:inputs, :inputs]
        torch.testing.assert_close(row_errors(wide, seen), (wide @ seen * wide).sum(1))


@pytest.mark.parametrize("group", [32, 256, None, 288])
def test_searched_ranges_err_least_of_all_that_are_tried(group: int | None) -> None:
    """Whole matrices up to groups of 256, their diagonals above: tried by hand, row by row."""
    weight, gram = (each.float() for each in problem(2, 576, seed=3))
    grid = Grid(3, True, group)
    length = grid.length(576)
    found = fit(weight, grid, search="mse", gram_II=gram)
    full = fit(weight, grid)
    for index in range(grid.groups(576)):
        here = slice(index * length, (index + 1) * length)
        block = gram[here, here]
        seen = block if length <= 256 else torch.diag(block.diagonal())
        errors = []
        for factor in (1.0, 0.85, 0.7, 0.55):
            scale = full.scale_OG[:, index : index + 1] * factor
            codes = (weight[:, here] / scale).round().clamp(grid.low, grid.high)
            lost = codes * scale - weight[:, here]
            errors.append((lost @ seen * lost).sum(1))
        ours = restore(round_to_codes(weight, found), found)[:, here] - weight[:, here]
        error = (ours @ seen * ours).sum(1)
        assert (error <= torch.stack(errors).amin(0) * (1 + 1e-4)).all()


def test_rows_in_pieces_get_the_scales_of_all_rows_at_once() -> None:
    weight = torch.randn(3, 1 << 20, generator=torch.Generator().manual_seed(0))
    assert len(row_pieces(weight)) == 2
    grid = Grid(3, False, None)
    found = fit(weight, grid, search="mse")
    for row in range(3):
        alone = fit(weight[row : row + 1], grid, search="mse")
        assert torch.equal(found.scale_OG[row : row + 1], alone.scale_OG)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_the_lowest_of_many_are_found_by_a_sample_as_by_sorting(share: float) -> None:
    score = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0)).mul(50).round()
    count = int(share * len(score))
    order = sorted(range(len(score)), key=score.tolist().__getitem__)
    expected = torch.zeros(len(score), dtype=torch.bool)
    expected[order[:count]] = True
    assert torch.equal(lowest(score, count), expected)
    assert smallest_of([2.0, 1.0, 1.0], 1) == [False, True, False]


def test_the_error_of_a_site_is_that_of_its_outputs() -> None:
    weight, _ = problem(4, INPUTS, seed=8)
    x = torch.randn(50, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(output_error(weight, x.T @ x), (x @ weight.T).square().sum())
