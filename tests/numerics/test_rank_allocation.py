"""Ranks under a budget, against all combinations tried."""

from collections.abc import Sequence
from itertools import product

import pytest
import torch

from llmcompress.numerics.low_rank import break_even
from llmcompress.numerics.rank_allocation import Matrix, equal_shares, uniform_rank
from llmcompress.passes.decomposition.ranks import rank_row
from llmcompress.sensitivity.allocation import by_slopes
from llmcompress.sensitivity.table import LossTable


def matrices(seed: int, *, count: int = 3, step: int = 1) -> list[Matrix]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 9, (count, 2), generator=generator).tolist()
    return [
        Matrix(
            outputs, inputs, torch.rand(min(outputs, inputs), generator=generator).sort(descending=True).values, step
        )
        for outputs, inputs in sizes
    ]


def allocate_ranks(known: Sequence[Matrix], budget: int) -> list[int]:
    """By way of the table that ranks are decided from, in bfloat16."""
    table = LossTable(tuple(rank_row(str(index), each, 16) for index, each in enumerate(known)))
    chosen = by_slopes(table, 16 * budget)
    return [int(row.shape_CD[chosen[row.unit], 1]) for row in table.rows]


def parameters(matrix: Matrix, rank: int) -> int:
    return next(option.parameters for option in matrix.options() if option.rank == rank)


def loss(matrix: Matrix, rank: int) -> float:
    return next(option.loss for option in matrix.options() if option.rank == rank)


@pytest.mark.parametrize("seed", range(20))
def test_ranks_fit_the_budget_and_nothing_that_still_fits_would_lose_less(seed: int) -> None:
    known = matrices(seed)
    whole = sum(each.outputs * each.inputs for each in known)
    least = sum(each.options()[0].parameters for each in known)
    budget = int(least + 0.6 * (whole - least))
    ranks = allocate_ranks(known, budget)
    spent = sum(map(parameters, known, ranks))
    assert spent <= budget
    for each, rank in zip(known, ranks, strict=True):
        for option in each.options():
            fits = option.parameters - parameters(each, rank) <= budget - spent
            assert not (fits and option.loss < loss(each, rank)), "something that fits was left"


@pytest.mark.parametrize("price", [1e-4, 0.003, 0.01, 0.02, 0.05])
@pytest.mark.parametrize("seed", range(10))
def test_what_is_best_at_some_price_per_parameter_is_found(seed: int, price: float) -> None:
    """Then no other ranks with as many parameters lose less: all are tried."""
    known = matrices(seed)
    paid = [min(each.options(), key=lambda option: option.loss + price * option.parameters) for each in known]
    budget = sum(option.parameters for option in paid)
    fitting = [
        sum(option.loss for option in options)
        for options in product(*(each.options() for each in known))
        if sum(option.parameters for option in options) <= budget
    ]
    found = sum(map(loss, known, allocate_ranks(known, budget)))
    assert found == pytest.approx(min(fitting)) == pytest.approx(sum(option.loss for option in paid))


def test_a_budget_for_everything_leaves_everything_dense() -> None:
    known = matrices(1)
    ranks = allocate_ranks(known, sum(each.outputs * each.inputs for each in known))
    assert ranks == [min(each.outputs, each.inputs) for each in known]


def test_a_matrix_whose_directions_are_all_alike_gives_way_to_one_with_few() -> None:
    flat, steep = Matrix(16, 16, torch.ones(16)), Matrix(16, 16, 16 * 0.3 ** torch.arange(16.0))
    ranks = allocate_ranks([flat, steep], 2 * 16 * 16 * 7 // 10)
    assert ranks[1] < ranks[0]


@pytest.mark.parametrize("step", [1, 3, 8])
def test_ranks_are_whole_steps_or_the_matrix_itself(step: int) -> None:
    known = matrices(3, step=step, count=4)
    for rank, each in zip(allocate_ranks(known, 10_000), known, strict=True):
        assert rank % step == 0 or rank == min(each.outputs, each.inputs)


def test_a_budget_below_the_least_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="the least options need"):
        allocate_ranks(matrices(0), 3)


@pytest.mark.parametrize(("outputs", "inputs"), [(192, 192), (512, 192), (96, 192), (7, 43), (1, 5)])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.8, 0.99])
def test_uniform_ranks_keep_at_most_that_share(outputs: int, inputs: int, keep: float) -> None:
    rank = uniform_rank(outputs, inputs, keep, 1)
    assert rank == 1 or rank * (outputs + inputs) <= keep * outputs * inputs
    assert (rank + 1) * (outputs + inputs) > keep * outputs * inputs
    assert rank < break_even(outputs, inputs) or rank == 1
    stepped = uniform_rank(outputs, inputs, keep, 8)
    assert stepped % 8 == 0 or stepped == min(outputs, inputs)


def test_equal_shares_sum_to_one_or_are_all_zero() -> None:
    assert float(equal_shares(torch.tensor([3.0, 1.0])).sum()) == 1
    assert not equal_shares(torch.zeros(3)).any()
