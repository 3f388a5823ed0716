"""Scores of units against loops over units."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from llmcompress.numerics.importance import (
    first_order,
    mixed_order,
    output_products,
    per_unit,
    rearranged,
    second_order,
    similarity,
    standardised,
    unique_importance,
)

SHAPES = [(1, 1, 1), (3, 7, 2), (5, 13, 4), (4, 16, 16)]


def problem(outputs: int, inputs: int, units: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, inputs (tokens × inputs) and the owners of the columns, -1 for some."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, dtype=torch.float64, generator=generator)
    x = torch.randn(50, inputs, dtype=torch.float64, generator=generator)
    owner = (
        torch.arange(inputs) % units if units == inputs else torch.randint(-1, units, (inputs,), generator=generator)
    )
    return weight, x, owner


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_per_unit_leave_out_columns_of_no_unit(shape: tuple[int, int, int]) -> None:
    _, x, owner = problem(*shape)
    expected = torch.stack([x[0][owner == unit].sum() for unit in range(shape[2])])
    torch.testing.assert_close(per_unit(x[0], owner, shape[2]), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_products_are_inner_products_of_what_units_add(shape: tuple[int, int, int]) -> None:
    weight, x, owner = problem(*shape)
    added = [x[:, owner == unit] @ weight[:, owner == unit].T for unit in range(shape[2])]
    expected = torch.tensor([[float((a * b).sum()) for a in added] for b in added], dtype=torch.float64)
    torch.testing.assert_close(output_products(weight, x.T @ x, owner, shape[2]), expected)


def test_similarity_of_single_channels_is_the_absolute_cosine() -> None:
    _, x, owner = problem(4, 6, 6)
    expected = torch.nn.functional.cosine_similarity(x[:, :, None], x[:, None, :], dim=0).abs()
    torch.testing.assert_close(similarity(x.T @ x, owner, 6), expected)
    wide = similarity(x.T @ x, torch.tensor([0, 0, 1, 1, 2, 2]), 3)
    torch.testing.assert_close(wide.diagonal(), torch.ones(3, dtype=torch.float64))
    assert (wide <= 1 + 1e-12).all() and (wide >= 0).all()


def test_dead_units_are_like_nothing() -> None:
    gram = torch.zeros(3, 3)
    gram[0, 0] = 2.0
    assert similarity(gram, torch.arange(3), 3).tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_of_two_equal_units_only_the_lesser_loses_its_importance() -> None:
    alike = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(unique_importance(torch.tensor([3.0, 2.0, 1.0]), alike), torch.tensor([3.0, 0.0, 1.0]))


def test_taylor_orders_approach_the_change_of_a_quadratic_loss() -> None:
    weight = torch.tensor([0.3, -2.0, 1.5], dtype=torch.float64)
    curvature = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)
    gradient = torch.tensor([1.0, -0.2, 0.4], dtype=torch.float64)
    change = -gradient * weight + 0.5 * curvature * weight.square()
    torch.testing.assert_close(mixed_order(weight, gradient, curvature), change.abs())
    torch.testing.assert_close(first_order(weight, gradient, curvature), (weight * gradient).abs())
    torch.testing.assert_close(second_order(weight, gradient, curvature), weight.square() * curvature)


def test_standardised_scores_have_no_unit_and_equal_ones_are_zero() -> None:
    scores = torch.tensor([1.0, 5.0, 6.0])
    torch.testing.assert_close(standardised(scores), standardised(1000 * scores + 7), atol=1e-3, rtol=0)
    assert standardised(torch.full((4,), 3.0)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_rearranging_never_removes_more_fisher_and_ends_where_no_swap_helps(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(6, 9, dtype=torch.float64, generator=generator)
    fisher = gradients.T @ gradients
    start = torch.zeros(9, dtype=torch.bool)
    start[fisher.diagonal().argsort()[:3]] = True

    def cost(removed: Tensor) -> float:
        return float(fisher[removed][:, removed].sum())

    found = rearranged(fisher, start)
    assert int(found.sum()) == 3 and cost(found) <= cost(start)
    by_hand = start.clone()
    for _ in range(3):
        swaps = []
        for out in by_hand.nonzero().flatten().tolist():
            for kept in (~by_hand).nonzero().flatten().tolist():
                trial = by_hand.clone()
                trial[out], trial[kept] = False, True
                swaps.append((cost(trial), trial))
        best = min(swaps, key=lambda each: each[0])
        if best[0] >= cost(by_hand):
            break
        by_hand = best[1]
    assert torch.equal(found, by_hand)
    lowest = min(
        cost(torch.zeros(9, dtype=torch.bool).index_fill(0, torch.tensor(c), True)) for c in combinations(range(9), 3)
    )
    assert cost(found) >= lowest


def test_rearranging_nothing_or_everything_changes_nothing() -> None:
    fisher = torch.eye(4)
    for removed in (torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)):
        assert torch.equal(rearranged(fisher, removed), removed)
