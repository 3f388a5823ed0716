"""The optimum of sums: both ways equal trying all plans, with bodies, dropping and several limits."""

from __future__ import annotations

import numpy as np
import pytest

from llmcompress.plan_search.optimizers.additive_optimum import by_integer_program, by_table, least_loss, nearest
from llmcompress.plan_search.optimizers.budget import Budget
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.problem import Problem
from tests.search import toy


def by_trying_all(task: Problem, limits: dict[str, float]) -> float:
    """The least loss, slowly."""
    assert task.losses is not None
    return min(
        (
            task.losses.total(task.space, plan)
            for plan in toy.all_plans(task.space)
            if all(task.costs[axis].total(task.space, plan) <= limit for axis, limit in limits.items())
        ),
        default=float("inf"),
    )


def spaces() -> list[PlanSpace]:
    return [
        toy.plan_space(blocks=3, most_dropped=0.4),
        toy.plan_space(blocks=3, options=2, most_dropped=0.7),
        toy.plan_space(blocks=1, per="group", most_dropped=0.0),
    ]


@pytest.mark.parametrize("space", spaces(), ids=["bodies", "much dropped", "groups"])
@pytest.mark.parametrize("share", [0.35, 0.5, 0.8])
def test_both_ways_find_what_trying_all_finds(space: PlanSpace, share: float) -> None:
    for seed in range(3):
        task = toy.problem(space, seed=seed, share=share)
        assert task.losses is not None
        limits = dict(task.limits)
        wanted = by_trying_all(task, limits)
        for found in (
            by_table(space, task.losses, task.costs["bytes"], limits["bytes"]),
            by_integer_program(space, task.losses, task.costs, limits),
        ):
            if found is None:
                assert wanted == float("inf")
            else:
                assert task.fits(found) and task.losses.total(space, found) == pytest.approx(wanted)


def test_two_limits_are_kept_and_cost_what_they_must() -> None:
    task = toy.problem(toy.plan_space(blocks=3))
    assert task.losses is not None
    limits = {
        "bytes": task.limits["bytes"],
        "decode": 0.5 * task.costs["decode"].total(task.space, (0,) * len(task.space.units)),
    }
    found = least_loss(task.space, task.losses, task.costs, limits)
    assert found is not None
    assert task.losses.total(task.space, found) == pytest.approx(by_trying_all(task, limits))


def test_a_limit_below_everything_has_no_optimum_but_a_nearest_plan() -> None:
    task = toy.problem(toy.plan_space(blocks=3), share=0.1)
    assert task.losses is not None
    assert least_loss(task.space, task.losses, task.costs, task.limits) is None
    closest = min(task.excess(plan) for plan in toy.all_plans(task.space))
    assert task.excess(nearest(task)) == pytest.approx(closest) and closest > 0


def test_where_the_table_grows_too_long_it_stays_within_the_limit_and_near_the_optimum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = toy.problem(toy.plan_space(blocks=4, per="group"))
    assert task.losses is not None
    exact = by_table(task.space, task.losses, task.costs["decode"], 400.0)
    monkeypatch.setattr("llmcompress.plan_search.optimizers.additive_optimum.MOST_STATES", 64)
    rough = by_table(task.space, task.losses, task.costs["decode"], 400.0)
    assert exact is not None and rough is not None
    assert task.costs["decode"].total(task.space, rough) <= 400.0
    lost = task.losses.total(task.space, rough) - task.losses.total(task.space, exact)
    assert 0.0 <= lost <= 0.05 * task.losses.total(task.space, exact)


@pytest.fixture
def plans() -> list[Plan]:
    space = toy.plan_space(per="group", options=4)
    random = np.random.default_rng(0)
    return [space.random(random) for _ in range(50)]


def test_costs_of_many_plans_at_once_are_those_of_each(plans: list[Plan]) -> None:
    task = toy.problem(toy.plan_space(per="group", options=4))
    budget = Budget(task)
    shares = budget.shares(np.array(plans))[:, 0] * task.limits["bytes"]
    np.testing.assert_allclose(shares, [task.cost(plan)["bytes"] for plan in plans])
    np.testing.assert_allclose(budget.excess(np.array(plans)), [task.excess(plan) for plan in plans])


def test_repair_and_filling_end_within_the_limits_and_use_more_of_them(plans: list[Plan]) -> None:
    task = toy.problem(toy.plan_space(per="group", options=4), share=0.45)
    budget, random = Budget(task), np.random.default_rng(1)
    for plan in plans:
        repaired = budget.repaired(plan, random)
        filled = budget.filled(repaired, random)
        assert task.fits(repaired) and task.fits(filled)
        assert task.cost(filled)["bytes"] >= task.cost(repaired)["bytes"]
