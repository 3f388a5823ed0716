"""Laws of every optimizer: legal plans within the limits, the same again with the same answers, better than random."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmcompress.errors import CompressError
from llmcompress.plan_search.optimizers.base import OPTIMIZERS, AskTell, Optimizer
from llmcompress.plan_search.optimizers.darts import min_norm
from llmcompress.plan_search.problem import Outcome, Problem, Proposal
from llmcompress.plan_search.selection import hypervolume, scalar_reward
from tests.search import toy

SMALL: dict[str, dict[str, Any]] = {
    "rco": {"steps": 20, "samples": 2},
    "darts": {"steps": 30},
    "gp": {"trials": 22},
    "nsga2": {"population": 12},
    "nsga3": {"population": 12},
    "bananas": {"predictor": "ridge"},
    "apq": {"start": 16, "population": 40, "generations": 3},
}
"""Options that make an optimizer fast."""

BEYOND = ("transformations",)
"""They begin with plans beyond the limits."""

MULTI_OBJECTIVE = ("nsga2", "nsga3")
"""They look for the whole front, not for the least loss at one limit."""

TRIALS = 48


def optimizer(name: str, **options: Any) -> Optimizer:
    return OPTIMIZERS[name].model_validate({"trials": TRIALS, **SMALL.get(name, {}), **options})


@pytest.fixture(scope="module")
def task() -> Problem:
    return toy.problem(toy.plan_space(blocks=4))


@pytest.fixture(scope="module")
def found(task: Problem) -> dict[str, list[Outcome]]:
    return {name: toy.searched(optimizer(name), task) for name in OPTIMIZERS}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_plan_is_legal_within_the_limits_and_judged_once(
    name: str, task: Problem, found: dict[str, list[Outcome]]
) -> None:
    plans = [each.plan for each in found[name]]
    assert 0 < len(plans) <= TRIALS and len(set(plans)) == len(plans)
    assert all(task.space.is_legal(plan) and task.space.canonical(plan) == plan for plan in plans)
    assert name in BEYOND or all(task.fits(plan) for plan in plans)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_same_answers_lead_to_the_same_proposals(name: str, task: Problem, found: dict[str, list[Outcome]]) -> None:
    asking, again = AskTell(optimizer(name), task), list[Proposal]()
    while asked := asking.ask():
        again += asked
        asking.tell([toy.answer(task, each) for each in asked])
    assert again == [Proposal(each.plan, each.tokens) for each in found[name]]


@pytest.mark.parametrize("name", MULTI_OBJECTIVE)
def test_fronts_dominate_more_than_those_of_random_plans(name: str) -> None:
    ours, theirs = [], []
    for seed in range(3):
        limited = toy.problem(toy.plan_space(blocks=5), seed=seed)
        task = replace(limited, limits={})
        dearest = task.cost((0,) * len(task.space.units))
        reference = {"loss": 2.0, **dearest}
        searches = (optimizer(name, trials=96), optimizer("random", trials=96))
        volumes = [hypervolume(toy.searched(each, task, seed=seed), reference) for each in searches]
        ours.append(volumes[0])
        theirs.append(volumes[1])
    assert np.mean(ours) > np.mean(theirs)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"random", "uniform", *MULTI_OBJECTIVE}))
def test_none_is_worse_than_random_where_losses_add_up(name: str) -> None:
    ours, theirs, best = [], [], []
    for seed in range(3):
        task = toy.problem(toy.plan_space(blocks=5), seed=seed)
        exact = toy.searched(optimizer("exact", trials=1), task)
        best.append(toy.least(task, exact))
        searcher = optimizer(name)
        ours.append(toy.least(task, toy.searched(searcher, task, seed=seed)))
        theirs.append(toy.least(task, toy.searched(optimizer("random", trials=searcher.trials), task, seed=seed)))
    assert all(mine >= optimum - 1e-12 for mine, optimum in zip(ours, best, strict=True))
    regret = np.mean(np.log(np.array(ours) / np.array(best)))
    assert regret <= np.mean(np.log(np.array(theirs) / np.array(best))) + 1e-12


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_later_stages_get_few_plans_and_all_of_them_were_judged_before(name: str) -> None:
    task = toy.problem(toy.plan_space(blocks=4), stages=(1, 8, 64))
    outcomes = toy.searched(optimizer(name), task)
    at = {tokens: {each.plan for each in outcomes if each.tokens == tokens} for tokens in task.stages}
    assert at[64] and len(at[64]) <= len(at[8]) <= len(at[1])
    if name != "evopress":  # its parent was judged on few tokens in another generation
        assert at[64] <= at[8] <= at[1]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_plans_that_fail_do_not_end_a_search_and_are_not_taken(name: str, task: Problem) -> None:
    asking, told = AskTell(optimizer(name, trials=30), task), list[Outcome]()
    for count in itertools.count():
        asked = asking.ask()
        if not asked:
            break
        outcomes = [
            Outcome(each.plan, each.tokens, float("nan"), problem="out of memory")
            if (count + place) % 3 == 0
            else toy.answer(task, each)
            for place, each in enumerate(asked)
        ]
        asking.tell(outcomes)
        told += outcomes
    assert any(each.is_valid for each in told)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"uniform"}))
def test_without_a_plan_that_fits_a_search_ends(name: str) -> None:
    task = toy.problem(toy.plan_space(blocks=3), share=0.1)
    outcomes = toy.searched(optimizer(name, trials=12), task)
    assert len(outcomes) <= 12 and not any(task.fits(each.plan) for each in outcomes)


@pytest.mark.parametrize("name", ["rco", "darts"])
def test_gradients_need_a_relaxation(name: str, task: Problem) -> None:
    bare = Problem(space=task.space, costs=task.costs, limits=task.limits)
    with pytest.raises(CompressError) as refused:
        AskTell(optimizer(name), bare).ask()
    assert refused.value.code == "search.no-relaxation"


@pytest.mark.parametrize(("reward", "below", "above"), [("soft", -0.07, -0.07), ("hard", 0.0, -1.0)])
def test_rewards_of_mnasnet_grow_and_let_plans_exceed_limits(
    reward: str, below: float, above: float, task: Problem
) -> None:
    outcomes = toy.searched(optimizer("policy_gradient", trials=200, reward=reward), task)
    rewards = [scalar_reward(each, task.limits, below=below, above=above) for each in outcomes]
    assert np.mean(rewards[-50:]) > np.mean(rewards[:50])
    assert any(task.excess(each.plan) > 0 for each in outcomes)


@pytest.mark.parametrize("combine", ["sum", "min_norm"])
def test_gates_come_to_cost_what_may_be_spent(combine: str, task: Problem) -> None:
    outcomes = toy.searched(optimizer("darts", combine=combine, trials=12), task)
    shares = [task.cost(each.plan)["bytes"] / task.limits["bytes"] for each in outcomes]
    assert max(shares) <= 1 + 1e-9 and np.mean(shares) > 0.9


@pytest.mark.parametrize("seed", range(5))
def test_a_step_against_the_min_norm_vector_raises_neither_loss(seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(50):
        first, second = random.standard_normal((2, 6)) * random.exponential(3.0, (2, 1))
        shortest = min_norm(first, second)
        assert shortest @ first >= -1e-9 and shortest @ second >= -1e-9
        shares = np.linspace(0.0, 1.0, 101)[:, None]
        assert np.linalg.norm(shortest) <= np.linalg.norm(shares * first + (1 - shares) * second, axis=1).min() + 1e-9
