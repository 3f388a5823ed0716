"""Expected costs of mixtures: those of the plan where nothing is mixed, with exact gradients, kept at the limit."""

from __future__ import annotations

import numpy as np
import pytest

from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.optimizers.mixture import ExpectedCosts, Logits, expected
from llmcompress.plan_search.plan_space import PlanSpace
from llmcompress.plan_search.problem import Problem
from tests.search import toy


@pytest.fixture(scope="module")
def task() -> Problem:
    return toy.problem(toy.plan_space(blocks=3, per="group"))


@pytest.fixture(scope="module")
def logits(task: Problem) -> Logits:
    return Logits(task.space)


def test_the_expected_cost_of_one_plan_is_its_cost(task: Problem, logits: Logits) -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        plan = task.space.random(random)
        mean, _ = expected(task.space, task.costs["decode"], logits.split(logits.one_hot(plan)))
        assert mean == pytest.approx(task.costs["decode"].total(task.space, plan))


def test_it_is_the_mean_over_drawn_plans(task: Problem, logits: Logits) -> None:
    random = np.random.default_rng(1)
    shares = logits.split(logits.softmax(random.standard_normal(logits.size)))
    mean, _ = expected(task.space, task.costs["bytes"], shares)
    drawn = [tuple(int(random.choice(len(each), p=each)) for each in shares) for _ in range(4000)]
    costs = [task.costs["bytes"].total(task.space, plan) for plan in drawn]
    assert mean == pytest.approx(np.mean(costs), abs=4 * np.std(costs) / np.sqrt(len(costs)))


def test_gradients_through_the_softmax_are_slopes(task: Problem, logits: Logits) -> None:
    random, costs = np.random.default_rng(2), ExpectedCosts(task, logits)
    logits_L = random.standard_normal(logits.size)
    (normal_L,) = costs.normals(logits_L)
    for place in range(logits.size):
        step_L = np.zeros(logits.size)
        step_L[place] = 1e-5
        slope = (costs.shares(logits_L + step_L) - costs.shares(logits_L - step_L))[0] / 2e-5
        assert slope == pytest.approx(normal_L[place], abs=1e-8)


def test_logits_come_back_to_the_limit_exactly_and_steps_along_it_do_not_change_the_cost(
    task: Problem, logits: Logits
) -> None:
    random, costs = np.random.default_rng(3), ExpectedCosts(task, logits)
    for _ in range(10):
        logits_L = costs.retracted(2.0 * random.standard_normal(logits.size))
        assert costs.shares(logits_L)[0] == pytest.approx(1.0, abs=1e-9)
        along_L = costs.tangent(logits_L, random.standard_normal(logits.size))
        assert costs.normals(logits_L)[0] @ along_L == pytest.approx(0.0, abs=1e-12)


def test_of_two_limits_the_tighter_is_reached_and_the_other_kept(task: Problem, logits: Logits) -> None:
    most = task.costs["decode"].total(task.space, (0,) * len(task.space.units))
    both = Problem(space=task.space, costs=task.costs, limits={**task.limits, "decode": 0.5 * most})
    costs, random = ExpectedCosts(both, logits), np.random.default_rng(4)
    for _ in range(5):
        shares = costs.shares(costs.retracted(random.standard_normal(logits.size)))
        assert shares.max() == pytest.approx(1.0, abs=1e-6)


def test_the_likeliest_plan_is_what_trying_all_finds() -> None:
    space: PlanSpace = toy.plan_space(blocks=2, options=2, most_dropped=0.5)
    task, logits = toy.problem(space), Logits(space)
    random = np.random.default_rng(5)
    for _ in range(10):
        logits_L = random.standard_normal(logits.size)
        rows = [np.log(row) for row in logits.split(logits.softmax(logits_L))]
        found = logits.likeliest(logits_L, task)
        assert found is not None and task.fits(found)

        def likelihood(plan: tuple[int, ...], rows: list[np.ndarray] = rows) -> float:
            free = [
                space.units[index].body is not None and space.is_dropped(plan, space.units[index].body or 0)
                for index in range(len(rows))
            ]
            return sum(row.max() if any_ else row[choice] for row, choice, any_ in zip(rows, plan, free, strict=True))

        best = max(likelihood(plan) for plan in toy.all_plans(space) if task.fits(plan))
        assert likelihood(found) == pytest.approx(best)


def test_sums_without_limits_change_no_logits(task: Problem, logits: Logits) -> None:
    free = Problem(space=task.space, costs={"bytes": Additive(1.0, {}, {})}, limits={})
    costs, logits_L = ExpectedCosts(free, logits), np.ones(logits.size)
    assert np.array_equal(costs.retracted(logits_L), logits_L)
    assert np.array_equal(costs.tangent(logits_L, logits_L), logits_L)
