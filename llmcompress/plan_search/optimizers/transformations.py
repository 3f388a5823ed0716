"""Path transformations: from a large plan to a smaller one by moves that keep what was found so far."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from llmcompress.plan_search.optimizers.base import OPTIMIZERS
from llmcompress.plan_search.optimizers.budget import Budget
from llmcompress.plan_search.optimizers.evopress import swapped
from llmcompress.plan_search.optimizers.judging import Exploration, Explorer, badness
from llmcompress.plan_search.plan_space import Plan
from llmcompress.plan_search.problem import Outcome, Problem


@OPTIMIZERS.register("transformations")
class Transformations(Explorer):
    """The dearest plan shrinks step by step until it fits; of several shrunk plans the one that lost least for what it
    saved goes on. Then one unit grows and others shrink.

    Source: Cai et al., Path-Level Network Transformation, arXiv 1806.02639, and Net2Net, arXiv 1511.05641, whose moves
    keep a trained network's function and grow it. Here levels are given, so moves shrink, and what is kept is the plan.
    Differs: greedy choice among drawn moves instead of a controller.
    """

    width: int = Field(default=6, ge=1)
    """Moves that are judged before one is taken."""
    shrinking: float = Field(default=0.5, gt=0, le=1)
    """Share of the trials in which the plan has to fit."""

    def explore(self, problem: Problem, random: np.random.Generator) -> Exploration:
        """Shrinking, then exchanges."""
        budget = Budget(problem)
        (current,) = yield [self._dearest(budget)]
        start = excess = float(budget.excess(np.array([current.plan]))[0])
        rounds = max(1, int(self.trials * self.shrinking) // self.width)
        for round_ in range(rounds):
            if excess == 0.0:
                break
            goal = start * (1.0 - (round_ + 1) / rounds)
            told = yield [self._shrunk(current.plan, goal, budget, random) for _ in range(self.width)]
            slopes = [self._slope(each, current, budget) for each in told]
            current = told[int(np.argmin(slopes))]
            excess = float(budget.excess(np.array([current.plan]))[0])
        if excess > 0.0:
            (current,) = yield [budget.repaired(current.plan, random)]
        (current,) = yield [budget.filled(current.plan, random)]
        while True:
            plans = [swapped(current.plan, budget, random) for _ in range(self.width)]
            told = yield [plan or budget.mutated(current.plan, random) for plan in plans]
            current = min([current, *told], key=lambda each: badness(problem, each))

    def _dearest(self, budget: Budget) -> Plan:
        plan: Plan = (0,) * len(budget.space.units)
        for unit in budget.free:
            plan = (*plan[:unit], budget.ladder(plan, int(unit))[-1], *plan[unit + 1 :])
        return plan

    def _shrunk(self, plan: Plan, goal: float, budget: Budget, random: np.random.Generator) -> Plan:
        """One level down in units drawn at random, until no more than `goal` is exceeded."""
        current_U, progress = np.array(plan), True
        while progress:
            progress = False
            for unit in random.permutation(budget.free):
                excess_O = budget.excess(budget.variants(current_U, int(unit)))
                now = excess_O[current_U[unit]]
                if now <= goal:
                    return budget.space.canonical(tuple(int(option) for option in current_U))
                below = np.flatnonzero(excess_O < now)
                if below.size:
                    current_U[unit] = below[excess_O[below].argmax()]
                    progress = True
        return budget.repaired(plan, random)

    def _slope(self, child: Outcome, parent: Outcome, budget: Budget) -> float:
        """Loss added for each share of the costs that was saved."""
        before, after = budget.spent(np.array([parent.plan, child.plan]))
        return (child.loss - parent.loss) / max(before - after, 1e-12) if child.is_valid else np.inf
