"""Optima of estimated losses: the joint one first, those of every family alone among them, all within the limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from llmcompress.plan_search.optimizers.additive_optimum import least_loss
from llmcompress.plan_search.optimizers.estimated_optima import Optimum, at_rates, estimated_optima, halfway
from llmcompress.plan_search.optimizers.exact import Exact
from llmcompress.plan_search.plan_space import Plan
from llmcompress.plan_search.problem import Outcome, Problem
from llmcompress.plan_search.space import DROPPED
from tests.search import toy


@pytest.fixture
def task() -> Problem:
    return toy.problem(toy.plan_space(blocks=4), share=0.7)


def optima(task: Problem, limits: dict[str, float] | None = None) -> list[Plan]:
    assert task.losses is not None
    found = estimated_optima(task.space, task.losses, task.costs, task.limits if limits is None else limits)
    return [each.plan for each in found]


def bodies(task: Problem, plan: Plan) -> set[str]:
    return {task.space.units[body].options[plan[body]] for body in task.space.bodies}


def least(task: Problem, allowed: Callable[[set[str]], bool]) -> float:
    assert task.losses is not None
    plans = [plan for plan in toy.all_plans(task.space) if task.fits(plan) and allowed(bodies(task, plan))]
    return min(task.losses.total(task.space, plan) for plan in plans)


def test_the_first_is_the_optimum_and_each_plan_fits_and_comes_once(task: Problem) -> None:
    found = optima(task)
    assert task.losses is not None
    assert task.losses.total(task.space, found[0]) == pytest.approx(least(task, lambda _: True))
    assert all(task.fits(plan) for plan in found) and len(set(found)) == len(found) > 1


@pytest.mark.parametrize(
    "allowed",
    [lambda found: found == {"whole"}, lambda found: DROPPED not in found, lambda found: "ffn-50" not in found],
    ids=["whole blocks", "nothing dropped", "nothing narrow"],
)
def test_the_optimum_of_each_family_alone_is_among_them(task: Problem, allowed: Callable[[set[str]], bool]) -> None:
    assert task.losses is not None
    of_family = [task.losses.total(task.space, plan) for plan in optima(task) if allowed(bodies(task, plan))]
    assert min(of_family) == pytest.approx(least(task, allowed))


def asked_by(exact: Exact, task: Problem, judge: Callable[[Plan], float], count: int) -> list[Plan]:
    """So many plans, in the order in which they are proposed."""
    exploring, asked = exact.explore(task, np.random.default_rng(0)), list[Plan]()
    plans = next(exploring)
    while len(asked) < count:
        asked += plans
        plans = exploring.send([Outcome(plan, 1, judge(plan), task.cost(plan)) for plan in plans])
    return asked[:count]


@pytest.mark.parametrize("family", [{"whole"}, {"whole", "ffn-50"}])
def test_exact_goes_on_around_what_was_judged_best(task: Problem, family: set[str]) -> None:
    task = replace(task, limits={axis: 1.2 * limit for axis, limit in task.limits.items()})
    count = len(optima(task))
    asked = asked_by(Exact(spread=0.3), task, lambda plan: 1.0 if bodies(task, plan) == family else 2.0, count + 30)
    later = [bodies(task, plan) for plan in asked[count:]]
    assert any(bodies(task, plan) == family for plan in optima(task))
    assert sum(found <= family for found in later) > len(later) / 3, "half of them, and what the others have by chance"


def test_rates_beside_the_best_are_halfway_to_the_next_ones_known(task: Problem) -> None:
    known = [Optimum(optima(task)[0], *rates) for rates in ((2.0, 1.0), (1.0, 1.0), (math.inf, 1.0), (4.0, 4.0))]
    assert halfway(known) == [(math.sqrt(2.0), 1.0), (math.sqrt(8.0), 1.0), (2.0, 0.5), (2.0, 2.0)]
    assert halfway([known[2], *known[:2]]) == [(4.0, 1.0), (math.inf, 0.5), (math.inf, 2.0)]


def test_halvings_find_a_rate_that_was_not_among_the_first(task: Problem) -> None:
    """What is judged: the estimated loss with narrow bodies counted 2.8 times and dropped ones 1.4 times."""
    losses = task.losses
    assert losses is not None
    truth = at_rates(task.space, losses, 2.8, 1.4)
    reached = {}
    for halvings in (0, 3):
        exact = Exact(halvings=halvings, spread=0.0, rate_spread=0.0)
        asked = asked_by(exact, task, lambda plan: truth.total(task.space, plan), 16)
        reached[halvings] = min(truth.total(task.space, plan) for plan in asked)
    best = least_loss(task.space, truth, task.costs, task.limits)
    assert best is not None
    assert reached[3] <= reached[0] and reached[3] == pytest.approx(truth.total(task.space, best))


def test_families_that_cannot_keep_the_limits_have_none(task: Problem) -> None:
    whole = [plan for plan in toy.all_plans(task.space) if bodies(task, plan) == {"whole"}]
    smallest = min(task.cost(plan)["bytes"] for plan in whole)
    found = optima(task, {"bytes": 0.95 * smallest})
    assert found and all(bodies(task, plan) != {"whole"} for plan in found)


def test_several_limits_are_kept_together(task: Problem) -> None:
    limits = {axis: 0.9 * cost for axis, cost in task.cost(task.space.uniform("int4")).items()}
    found = optima(task, limits)
    assert found and all(replace(task, limits=limits).fits(plan) for plan in found)
