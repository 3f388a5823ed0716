"""A table answers what was measured, and its relaxation is exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmcompress.plan_search.problem import Proposal
from llmcompress.plan_search.proxies.correlation import rank_correlation
from llmcompress.plan_search.tabular import Surrogate, Table, all_plans
from tests.search import toy


@pytest.fixture(scope="module")
def table() -> Table:
    space = toy.plan_space(blocks=3, options=2, most_dropped=0.4)
    task = toy.problem(space)
    assert task.losses is not None
    plans_PU = all_plans(space)
    losses_P = np.array([task.losses.total(space, tuple(plan)) for plan in plans_PU])
    return Table(space, (8,), plans_PU, losses_P[:, None], task.costs, task.losses, {"model": "toy"})


def test_a_table_holds_every_legal_plan_once(table: Table) -> None:
    assert {tuple(plan) for plan in table.plans_PU.tolist()} == set(toy.all_plans(table.space))


def test_a_written_table_is_read_again(table: Table, tmp_path: Path) -> None:
    table.write(tmp_path / "table.npz")
    again = Table.read(tmp_path / "table.npz")
    np.testing.assert_allclose(again.losses_PS, table.losses_PS, rtol=1e-6)
    plan = table.space.random(np.random.default_rng(0))
    assert again.judge(Proposal(plan, 8)).costs == table.judge(Proposal(plan, 8)).costs
    assert again.space.units == table.space.units and again.facts == table.facts


def test_the_relaxation_of_one_plan_is_its_loss_and_its_gradient_leads_to_others(table: Table) -> None:
    task = table.problem({})
    assert task.relaxation is not None
    random = np.random.default_rng(0)
    for _ in range(20):
        plan = table.space.random(random)
        mixture = [np.eye(len(unit.options))[choice] for unit, choice in zip(table.space.units, plan, strict=True)]
        loss, gradient = task.relaxation.loss_and_gradient(mixture, 0)
        assert loss == pytest.approx(table.loss(plan, 8))
        for other in table.space.neighbours(plan):
            (unit,) = [unit for unit, choice in enumerate(plan) if other[unit] != choice][:1]
            if sum(mine != theirs for mine, theirs in zip(plan, other, strict=True)) == 1:
                assert gradient[unit][other[unit]] == pytest.approx(table.loss(other, 8))


def test_a_gradient_is_the_slope_of_the_loss(table: Table) -> None:
    task, random = table.problem({}), np.random.default_rng(1)
    assert task.relaxation is not None
    mixture = [random.dirichlet(np.ones(len(unit.options))) for unit in table.space.units]
    _, gradient = task.relaxation.loss_and_gradient(mixture, 0)
    for unit in table.space.free:
        for option in range(len(mixture[unit])):
            ends = []
            for step in (-1e-4, 1e-4):
                moved = [each.copy() for each in mixture]
                moved[unit][option] += step
                ends.append(task.relaxation.loss_and_gradient(moved, 0)[0])
            assert (ends[1] - ends[0]) / 2e-4 == pytest.approx(gradient[unit][option], rel=1e-5)


def test_the_least_loss_is_that_of_trying_all(table: Table) -> None:
    limits = {"bytes": 0.7 * table.costs["bytes"].total(table.space, (0,) * len(table.space.units))}
    task = table.problem(limits)
    wanted = min(table.loss(plan, 8) for plan in toy.all_plans(table.space) if task.fits(plan))
    assert table.least(limits, 8).loss == wanted


def test_a_surrogate_answers_what_was_measured_and_orders_what_was_not() -> None:
    space = toy.plan_space(blocks=4, options=3, most_dropped=0.25)
    task = toy.problem(space)
    assert task.losses is not None
    plans = list(toy.all_plans(space))
    random = np.random.default_rng(0)
    drawn = [plans[index] for index in random.choice(len(plans), 100, replace=False)]
    # losses that are no sums: what is lost together is more
    losses_P = np.array([task.losses.total(space, plan) ** 1.3 for plan in drawn])
    table = Table(space, (8,), np.array(drawn), losses_P[:, None], task.costs, toy.losses(space, seed=1), {})
    surrogate = Surrogate.of(table, predictor="ridge")
    assert surrogate.judge(Proposal(drawn[0], 8)).loss == losses_P[0]
    unseen = [plan for plan in plans if not table.has(plan)][:200]
    predicted = [surrogate.judge(Proposal(plan, 8)).loss for plan in unseen]
    order = rank_correlation(predicted, [task.losses.total(space, plan) for plan in unseen])
    assert order.tau > 0.5 and surrogate.quality.tau > 0.5
