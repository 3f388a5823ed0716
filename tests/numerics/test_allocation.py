"""Sharing out a budget, against all combinations tried."""

import random
from itertools import product

import pytest

from llmcompress.numerics import allocation
from llmcompress.numerics.allocation import Option, allocate, lower_convex_hull, spend


def items(seed: int, *, count: int = 4, choices: int = 3) -> list[list[Option]]:
    """Four sites with three options each; larger ones lose less."""
    draw = random.Random(seed)
    return [
        [
            Option(size * weights, loss)
            for size, loss in zip(
                sorted(draw.sample(range(2, 9), choices)),
                sorted((draw.random() for _ in range(choices)), reverse=True),
                strict=True,
            )
        ]
        for weights in (draw.choice((6, 10, 15)) for _ in range(count))
    ]


def best(options: list[list[Option]], budget: int, at_least: int = 0) -> float:
    """The least loss of all combinations that fit."""
    tried = [(sum(o.size for o in each), sum(o.loss for o in each)) for each in product(*options)]
    fitting = [loss for size, loss in tried if at_least <= size <= budget]
    return min(fitting or [loss for size, loss in tried if size <= budget])


def total(options: list[list[Option]], chosen: list[int]) -> Option:
    picked = [each[index] for each, index in zip(options, chosen, strict=True)]
    return Option(sum(o.size for o in picked), sum(o.loss for o in picked))


@pytest.mark.parametrize("seed", range(30))
def test_four_sites_with_three_options_get_what_trying_all_finds(seed: int) -> None:
    options = items(seed)
    least, most = (sum(f(o.size for o in each) for each in options) for f in (min, max))
    for budget in range(least, most + 5, 7):
        found = total(options, allocate(options, budget))
        assert found.size <= budget
        assert found.loss == pytest.approx(best(options, budget))


@pytest.mark.parametrize("seed", range(10))
def test_a_floor_is_kept_where_some_combination_lies_above_it(seed: int) -> None:
    options = items(seed)
    for budget in (150, 200, 250):
        least = sum(min(o.size for o in each) for each in options)
        if budget >= least:
            found = total(options, allocate(options, budget, at_least=budget - 6))
            assert found.loss == pytest.approx(best(options, budget, budget - 6))


def test_the_order_of_options_does_not_matter() -> None:
    options = items(3)
    turned = [each[::-1] for each in options]
    assert total(options, allocate(options, 200)).loss == pytest.approx(total(turned, allocate(turned, 200)).loss)


@pytest.mark.parametrize("seed", range(10))
def test_without_a_table_hundreds_of_items_come_within_one_step_of_the_best(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = items(seed, count=200)
    budget = sum(each[1].size for each in options)
    exact = total(options, allocate(options, budget)).loss
    monkeypatch.setattr(allocation, "MOST_CELLS", 1)
    near = total(options, allocate(options, budget))
    assert near.size <= budget and near == total(options, spend(options, budget))
    assert exact - 1e-9 <= near.loss <= exact + 1.0 / 10


def test_a_budget_below_the_least_is_refused() -> None:
    for share_out in (allocate, spend):
        with pytest.raises(ValueError, match="the budget is 3"):
            share_out([[Option(4, 1.0)]], 3)


def test_corners_leave_out_what_lies_above_the_line_between_others() -> None:
    assert lower_convex_hull([(0, 4.0), (1, 3.9), (2, 1.0), (3, 0.9), (4, 0.0)]) == [0, 2, 4]
    assert lower_convex_hull([(1, 1.0)]) == [0]
