"""APQ-like search: evolution on a predictor, which is trained on plans that were judged."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from llmcompress.plan_search.optimizers.base import OPTIMIZERS
from llmcompress.plan_search.optimizers.budget import Budget
from llmcompress.plan_search.optimizers.judging import Exploration, Explorer, badness, beginning
from llmcompress.plan_search.plan_space import Plan
from llmcompress.plan_search.problem import Outcome, Problem
from llmcompress.plan_search.proxies.predictors.base import PREDICTORS, PlanForecast, fit_plans

_FEWEST = 4
"""Valid outcomes from which a predictor can learn."""


@OPTIMIZERS.register("apq")
class APQ(Explorer):
    """A predictor on the one-hot plan takes the place of judging; evolution on it proposes what is judged next.

    Each round half of the children are mutations and half crossovers of the best quarter; those beyond the limits are
    repaired. The best plans of the last generation are judged, and the predictor is trained again with them.
    Source: Wang et al., APQ, arXiv 2006.08509: population 100, 50 mutations and 50 crossovers, a quarter as parents,
    each unit mutated with probability 0.1.
    Differs: several rounds of few generations instead of one of 500, so that the predictor learns where it is asked;
    smaller networks, for hundreds of plans instead of thousands; the predictor begins from the estimate of losses that
    is a sum, where APQ's begins from plans without quantization.
    """

    start: int = Field(default=40, ge=2)
    """Plans judged before the first predictor: given ones that fit, and random ones."""
    predictor: str = "mlp"
    """What predicts the loss: `mlp`, `gp` or `ridge`."""
    transfer: bool = True
    """Whether it learns the error of the estimate that is a sum, where there is one; else the loss itself."""
    population: int = Field(default=100, ge=4)
    generations: int = Field(default=10, ge=1)
    """On the predictor, each round."""
    mutation: float = Field(default=0.1, gt=0, le=1)
    """Probability of each unit."""
    batch: int = Field(default=10, ge=1)
    """Plans judged each round."""

    def explore(self, problem: Problem, random: np.random.Generator) -> Exploration:
        """Round by round."""
        budget, seen = Budget(problem), dict[Plan, Outcome]()
        told = yield beginning(problem, budget, random, self.start)
        while told or seen:
            seen.update((each.plan, each) for each in told)
            known = sorted(seen.values(), key=lambda each: badness(problem, each))
            if sum(each.is_valid for each in known) < _FEWEST:
                told = yield [budget.random(random)]
                continue
            forecast = fit_plans(
                PREDICTORS[self.predictor](),
                problem.space,
                [each.plan for each in known],
                [each.loss for each in known],
                start=problem.losses if self.transfer else None,
                seed=int(random.integers(1 << 20)),
            )
            population = [each.plan for each in known[: self.population]]
            for _ in range(self.generations):
                population = self._next(population, forecast, budget, random)
            new = [plan for plan in population if plan not in seen]
            told = yield new[: self.batch] or [budget.random(random)]

    def _next(
        self, population: list[Plan], forecast: PlanForecast, budget: Budget, random: np.random.Generator
    ) -> list[Plan]:
        """Parents and their children, the best first."""
        parents = population[: max(2, self.population // 4)]
        children = dict.fromkeys(parents)
        for index in range(self.population):
            one, other = (parents[int(random.integers(len(parents)))] for _ in range(2))
            child = self._mutated(one, budget, random) if index % 2 else crossed(one, other, random)
            children.setdefault(budget.within(child, random))
        plans = list(children)
        return [plans[index] for index in forecast.losses(plans).argsort()[: self.population]]

    def _mutated(self, plan: Plan, budget: Budget, random: np.random.Generator) -> Plan:
        found = list(plan)
        for unit in budget.free:
            if random.random() < self.mutation:
                found[unit] = int(random.integers(len(budget.space.units[unit].options)))
        return tuple(found)


def crossed(one: Plan, other: Plan, random: np.random.Generator) -> Plan:
    """Every unit from one of two plans."""
    takes = random.random(len(one)) < 0.5
    return tuple(first if mine else second for first, second, mine in zip(one, other, takes, strict=True))
